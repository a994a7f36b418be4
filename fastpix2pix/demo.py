"""``python -m fastpix2pix.demo``: a page on this machine where one draws a picture and sees its translation.

One page without a framework, and Python's own http.server: nothing to install, nothing from a network, and
the pixels that one sees are those that the Python interface gives.
"""

import io
import ipaddress
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from fastpix2pix import cli
from fastpix2pix.data.painter import PALETTE, paint_pair
from fastpix2pix.data.pictures import FORMATS, UNREADABLE, read_rgb
from fastpix2pix.demo_page import render
from fastpix2pix.errors import UserError
from fastpix2pix.exported import ExportedModel
from fastpix2pix.sample_grids import find_grids, read_grid
from fastpix2pix.translator import Translator, load

Model = Translator | ExportedModel

LARGEST_BODY = 64 << 20  # bytes that a browser may send: a photo of any camera
EXAMPLES = 4  # painted ones, where a run has no samples


@dataclass
class DemoConfig:
    """Serve a page to play with: draw a label map or open a picture, and see what the network makes of it.

    Only this machine can reach the page. Stop it with Ctrl-C.
    """

    run: Path
    """Folder of a run (its newest checkpoint is used), a step_*.pt, a *_net_G.pth, an .npz of the tutorial's
    weights, or an exported .onnx."""
    port: int = 8000
    """Of the page's address; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen at. One that other machines can reach needs --allow_others."""
    allow_others: bool = False
    """Let other machines reach the page. Whoever can, can use the network; there is no password."""
    eval: bool = False
    """Normalise by the running statistics, without dropout. An exported file has its own way."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one. An exported file runs on the CPU."""


def load_model(config: DemoConfig) -> Model:
    """The network of ``config``. Raises UserError where there is none, or it makes no 8-bit pictures."""
    model: Model
    if config.run.suffix == ".onnx":
        model = ExportedModel(config.run)
    else:
        model = load(config.run, device=config.device, evaluation=config.eval)
    sides = model.input, model.output
    if any(side.channels not in (1, 3) or side.range or side.dtype != "uint8" for side in sides):
        raise UserError(
            f"{config.run}: translates {sides[0]} to {sides[1]}, and a page shows 1 or 3 channels of 8 bits; "
            "use python -m fastpix2pix.translate"
        )
    return model


def example_inputs(run: Path, model: Model) -> list[np.ndarray]:
    """Pictures to begin with, uint8 (side, side, 3): inputs of the run's samples, else painted facades.

    They are RGB for a network of one channel too, which sees them as grey.
    """
    grids = find_grids(run) if run.is_dir() else {}
    if grids:
        sources = [row.source for row in read_grid(grids[max(grids)])]
    else:
        pairs = [np.asarray(paint_pair(np.random.default_rng((0, 2, i)))) for i in range(EXAMPLES)]
        sources = [_input_half(pair, model) for pair in pairs]
    return [model.resize(np.ascontiguousarray(source)) for source in sources]


def _input_half(pair: np.ndarray, model: Model) -> np.ndarray:
    return np.ascontiguousarray(np.split(pair, 2, axis=1)[0 if model.direction == "AtoB" else 1])


# ---------------------------------------------------------------------------------------------- server


class DemoServer(ThreadingHTTPServer):
    """Serves the page and translates what it sends.

    Raises UserError for an address that it may not or cannot listen at.
    """

    daemon_threads = True

    def __init__(self, model: Model, examples: list[np.ndarray], config: DemoConfig):
        self.model, self.examples = model, examples
        self.one_at_a_time = threading.Lock()  # translations, which would share the processor's cores
        self.local = check_host(config.host, config.allow_others)
        if ":" in config.host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((config.host, config.port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"--host {config.host} --port {config.port}: {reason}; choose another --port"
            ) from error
        name = f"[{config.host}]" if ":" in config.host else config.host
        self.port = self.server_address[1]
        self.url = f"http://{name}:{self.port}/"
        self.page = render(
            title=model.source,
            note=_statistics(model),
            size=model.size,
            smooth=model.interpolation != "nearest",
            palette={name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in PALETTE.items()},
            examples=len(examples),
        ).encode()

    def handle_error(self, request, client_address) -> None:
        """No traceback of a browser that has gone away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def translate(self, body: bytes) -> bytes:
        """PNG or JPEG file -> PNG file of the translated picture. Raises UserError for anything else."""
        picture = Image.fromarray(self.read(body, whole=False))
        with self.one_at_a_time:
            return png(self.model(picture))

    def fit(self, body: bytes) -> bytes:
        """A picture or side-by-side pair -> PNG file of the input, resized as the training resizes."""
        pixels = self.read(body, whole=True)
        if pixels.shape[1] == 2 * pixels.shape[0]:
            pixels = _input_half(pixels, self.model)
        return png(Image.fromarray(self.model.resize(np.ascontiguousarray(pixels))))

    def read(self, body: bytes, *, whole: bool) -> np.ndarray:
        """The 8-bit RGB pixels of a file; whole: it may be larger than what goes through the network."""
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                width, height = image.size
        except UNREADABLE as error:
            raise UserError("this is not a readable JPEG or PNG; choose another file") from error
        if not whole and max(width, height) > self.model.size:
            raise UserError(f"{width}x{height} is larger than the drawing; open it as a file")
        with tempfile.NamedTemporaryFile() as file:
            file.write(body)
            file.flush()
            try:
                return read_rgb(Path(file.name))
            except UserError as error:
                raise UserError("this file cannot be decoded; choose another one") from error


def check_host(host: str, allow_others: bool) -> bool:
    """Whether only this machine reaches ``host``. Raises UserError if others do and may not."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise UserError(f"--host {host}: is no address; give one like 127.0.0.1") from error
    if not local and not allow_others:
        raise UserError(
            f"--host {host}: other machines could reach the page, which asks for no password; add "
            "--allow_others if they may"
        )
    return local


def _statistics(model: Model) -> str:
    if isinstance(model, ExportedModel):
        return "An exported file, without dropout."
    if model.evaluation:
        return "Normalised by the running statistics of the training, without dropout."
    return "Each picture is normalised by its own statistics, with dropout, as both references test."


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """GET / and /example/N, POST /translate and /fit."""

    server: DemoServer
    server_version = "fastpix2pix"
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a browser may keep an idle connection, or a stalled upload

    def do_GET(self) -> None:
        if not self._from_the_page():
            return
        path = urlsplit(self.path).path
        number = path.removeprefix("/example/")
        if path == "/":
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif number.isdecimal() and int(number) < len(self.server.examples):
            picture = Image.fromarray(self.server.examples[int(number)])
            self._answer(HTTPStatus.OK, png(picture), "image/png")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        if not self._from_the_page():
            return
        work = {"/translate": self.server.translate, "/fit": self.server.fit}.get(self.path)
        length = self.headers.get("Content-Length", "")
        if work is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        elif not length.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the length is missing")
        elif int(length) > LARGEST_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "more than 64 MiB; choose a smaller file")
        else:
            self._work(work, self.rfile.read(int(length)))

    def _work(self, work, body: bytes) -> None:
        began = time.perf_counter()
        try:
            answer = work(body)
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:  # of the network: it is shown, and the next request may go well
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(UserError(f"{error}")))
        else:
            milliseconds = round(1000 * (time.perf_counter() - began))
            self._answer(HTTPStatus.OK, answer, "image/png", milliseconds)

    def _from_the_page(self) -> bool:
        """Whether the request is of our own page. Other web pages, under whatever name, get nothing."""
        host = self.headers.get("Host", "")
        names = {f"{name}:{self.server.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        ours = not self.server.local or host in names | {urlsplit(self.server.url).netloc}
        if not ours or self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            self._refuse(HTTPStatus.FORBIDDEN, "not from the page itself")
            return False
        return True

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # a body may still be under way
        self._answer(status, why.encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, milliseconds: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; frame-ancestors 'none'",
        )
        if milliseconds is not None:
            self.send_header("X-Milliseconds", str(milliseconds))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_values) -> None:
        """Nothing: a line for each stroke would hide the address."""


def demo(config: DemoConfig) -> None:
    """Serve until Ctrl-C. Raises UserError for what the user can mend."""
    check_host(config.host, config.allow_others)  # before the network is read, which takes longer
    model = load_model(config)
    with DemoServer(model, example_inputs(config.run, model), config) as server:
        print(f"{model.source}: open {server.url} in a browser; Ctrl-C stops it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def main(argv: list[str] | None = None) -> None:
    cli.run(DemoConfig, demo, argv)


if __name__ == "__main__":
    main()
