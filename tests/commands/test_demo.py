"""The demo: what its server answers and refuses, and its page in a real browser, against the interface."""

import http.client
import io
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config
from tiny_run import error_line

import fastpix2pix
from fastpix2pix import checkpoint, demo, export
from fastpix2pix.data.painter import PALETTE
from fastpix2pix.demo import DemoConfig, DemoServer
from fastpix2pix.models import build_networks

SIZE = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of an untrained tiny network, biased so that its images are not all grey."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_config(ngf=4, ndf=4, n_layers_D=1, name=folder.name, seed=3)
    generator, discriminator = build_networks(config.network_options())
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)
    networks = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
    checkpoint.save(folder, 7, {"config": config.to_dict(), "step": 7, **networks}, keep=1)
    return folder


@contextmanager
def served(path: Path, **options) -> Iterator[DemoServer]:
    """The demo of ``path`` in a thread, at a free port."""
    config = DemoConfig(run=path, port=0, device="cpu", **options)
    model = demo.load_model(config)
    with DemoServer(model, demo.example_inputs(path, model), config) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(run) -> Iterator[DemoServer]:
    with served(run) as server:
        yield server


def ask(server: DemoServer, method: str, path: str, body: bytes | None = None, **headers: str):
    """(status, body, headers) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, kind)
    return written.getvalue()


def pixels(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("evaluation", [False, True])
def test_translation_is_the_python_interfaces(run, evaluation):
    image = noise(SIZE, SIZE)
    with served(run, eval=evaluation) as server:
        status, body, headers = ask(server, "POST", "/translate", file(image))
    expected = fastpix2pix.load(run, evaluation=evaluation)(image)
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert expected.std() > 1 and np.array_equal(pixels(body), expected)


def test_translation_of_an_exported_file_is_onnx_runtimes(tmp_path, run):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    export.main(["--run", str(run), "--output", str(path)])
    image = noise(20, SIZE)
    padded = np.pad(image, ((6, 6), (0, 0), (0, 0)), mode="symmetric").astype(np.float32) / 127.5 - 1
    session = onnxruntime.InferenceSession(str(path))
    (there,) = session.run(None, {"input": padded.transpose(2, 0, 1)[None]})
    expected = np.clip(np.round((there[0].transpose(1, 2, 0)[6:26] + 1) * 127.5), 0, 255)
    with served(path) as server:
        status, body, _ = ask(server, "POST", "/translate", file(image))
        assert b"tiny, step 7, from model.onnx" in server.page
        assert pixels(ask(server, "GET", "/example/0")[1]).shape == (SIZE, SIZE, 3)
    assert status == 200 and expected.std() > 1
    assert np.abs(pixels(body).astype(int) - expected).max() <= 1


def test_opened_file_is_resized_as_the_training_resizes(server):
    image = noise(50, 70)
    _, body, _ = ask(server, "POST", "/fit", file(image))
    rows, columns = ((2 * np.arange(SIZE) + 1) * n // (2 * SIZE) for n in (50, 70))
    assert np.array_equal(pixels(body), image[rows][:, columns])


def test_of_an_opened_pair_the_input_half_is_taken(run, server):
    pair = noise(SIZE, 2 * SIZE)
    assert fastpix2pix.load(run).direction == "BtoA"
    _, body, _ = ask(server, "POST", "/fit", file(pair))
    assert np.array_equal(pixels(body), pair[:, SIZE:])


def test_examples_are_the_inputs_of_the_runs_newest_samples(tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "samples").mkdir()
    grid = noise(2 * SIZE, 3 * SIZE)
    Image.fromarray(noise(SIZE, 3 * SIZE, 1)).save(folder / "samples" / "step_00000005.png")
    Image.fromarray(grid).save(folder / "samples" / "step_00000010.png")
    (folder / "samples" / "step_00000015.png").write_bytes(b"half a picture")
    with served(folder) as server:
        found = [pixels(ask(server, "GET", f"/example/{i}")[1]) for i in range(2)]
        assert ask(server, "GET", "/example/2")[0] == 404
    assert np.array_equal(np.concatenate(found), grid[:, :SIZE])


# ------------------------------------------------------------------------------------------ refusals


def test_requests_of_other_pages_are_refused(server):
    """Another web page may not use the network, nor one whose name was made to point to this machine."""
    body, here = file(noise(SIZE, SIZE)), f"127.0.0.1:{server.port}"
    assert ask(server, "POST", "/translate", body, Origin=f"http://{here}")[0] == 200
    assert ask(server, "POST", "/translate", body, Host=f"localhost:{server.port}")[0] == 200
    assert ask(server, "POST", "/translate", body, Origin="http://elsewhere.example")[0] == 403
    assert ask(server, "POST", "/translate", body, Origin="null")[0] == 403
    assert ask(server, "POST", "/translate", body, Host=f"elsewhere.example:{server.port}")[0] == 403
    assert ask(server, "GET", "/", Host=f"elsewhere.example:{server.port}")[0] == 403


@pytest.mark.parametrize("path", ["/../config.json", "/samples", "/example/", "/example/-1", "/example/99"])
def test_there_is_nothing_else_to_get(server, path):
    status, body, _ = ask(server, "GET", path)
    assert (status, body) == (404, b"there is no such page")


def test_what_is_no_picture_is_refused_in_a_line(server):
    status, body, _ = ask(server, "POST", "/translate", b"no picture")
    assert status == 400 and body == b"this is not a readable JPEG or PNG; choose another file"
    whole = file(noise(SIZE, SIZE))
    status, body, _ = ask(server, "POST", "/fit", whole[: len(whole) // 2])
    assert status == 400 and body == b"this file cannot be decoded; choose another one"
    assert ask(server, "POST", "/translate", file(noise(SIZE, SIZE + 1)))[0] == 400
    assert ask(server, "POST", "/translate", whole)[0] == 200  # the next one goes well


def test_body_without_bounds_is_refused_unread(server):
    for length, status in (("99999999999", 413), ("-1", 411), ("all", 411)):
        assert ask(server, "POST", "/translate", b"", **{"Content-Length": length})[0] == status
    assert ask(server, "POST", "/elsewhere", b"12345")[0] == 404


def test_browser_that_goes_away_leaves_no_traceback(server, capfd, monkeypatch):
    answered = threading.Event()

    def slow(_image):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # with a reset
        return Image.new("RGB", (2000, 2000))

    monkeypatch.setattr(server, "model", slow)
    monkeypatch.setattr(slow, "size", SIZE, raising=False)
    monkeypatch.setattr(server, "shutdown_request", lambda _request: answered.set())
    client, body = socket.create_connection(("127.0.0.1", server.port)), file(noise(SIZE, SIZE))
    head = f"POST /translate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    assert answered.wait(20)
    assert capfd.readouterr().err == ""


def test_error_of_the_network_is_shown_and_not_the_end(server, monkeypatch):
    def fails(_image):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(server, "model", fails)
    monkeypatch.setattr(fails, "size", SIZE, raising=False)
    status, body, _ = ask(server, "POST", "/translate", file(noise(SIZE, SIZE)))
    assert (status, body) == (500, b"out of memory")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_machines_reach_it_only_if_a_flag_says_so(run, capsys, host):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--run", str(run), "--host", host])
    assert stop.value.code == 2 and "add --allow_others" in error_line(capsys.readouterr().err)
    assert demo.check_host(host, allow_others=True) is False


def test_address_is_loopback_by_default(run, server):
    assert server.socket.getsockname()[0] == "127.0.0.1" and server.local


def test_port_that_is_taken_is_named(run, server, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--run", str(run), "--port", str(server.port), "--device", "cpu"])
    assert stop.value.code == 2
    assert f"--port {server.port}: " in error_line(capsys.readouterr().err)


def test_wrong_files_are_refused_in_a_line(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    (tmp_path / "text.onnx").write_text("no network")
    for name, why in (("absent.onnx", "No such file"), ("text.onnx", "is no ONNX file")):
        with pytest.raises(SystemExit) as stop:
            demo.main(["--run", str(tmp_path / name)])
        assert stop.value.code == 2 and why in error_line(capsys.readouterr().err)


# ----------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium or Chrome without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if found is None:
        pytest.skip("no chromium or google-chrome on PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The demo's page with its first example translated; errors of its script fail the test."""
    page, errors = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server.url)
    settle(page)
    yield page
    assert errors == []
    page.close()


def settle(page) -> None:
    """Wait until the image is that of the drawing."""
    page.wait_for_selector("#result[aria-busy=false]")


def canvas(page, name: str) -> np.ndarray:
    """uint8 (height, width, 3)."""
    values = page.evaluate(
        "name => { const c = document.getElementById(name);"
        "return [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]] }",
        name,
    )
    rgba = np.array(values[2], np.uint8).reshape(values[0], values[1], 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def drag(page, *points: tuple[int, int]) -> None:
    """The pointer from pixel to pixel (x, y) of the drawing, pressed."""
    box = page.locator("#drawing").bounding_box()
    places = [
        (box["x"] + (x + 0.5) * box["width"] / SIZE, box["y"] + (y + 0.5) * box["height"] / SIZE)
        for x, y in points
    ]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()
    settle(page)


def test_drawing_is_translated_as_in_python(run, server, page):
    model = fastpix2pix.load(run)
    drawn = server.examples[0].copy()
    assert np.array_equal(canvas(page, "drawing"), drawn)
    assert np.array_equal(canvas(page, "result"), model(drawn))

    page.get_by_text("shop", exact=True).click()
    drag(page, (20, 12), (9, 9), (4, 6))  # upwards, and changing one's mind
    drawn[6:13, 4:21] = PALETTE["shop"]
    assert np.array_equal(canvas(page, "drawing"), drawn)
    assert np.array_equal(canvas(page, "result"), model(drawn))

    page.get_by_text("brush", exact=True).click()
    page.get_by_text("door", exact=True).click()
    page.locator("#width").fill("3")
    drag(page, (2, 20), (28, 20))
    drawn[19:22, 1:30] = PALETTE["door"]
    assert np.array_equal(canvas(page, "drawing"), drawn)
    assert np.array_equal(canvas(page, "result"), model(drawn))
    assert page.locator("#status").inner_text().endswith(" ms")


def test_undo_and_redo_go_back_and_forth(run, page):
    model, pictures = fastpix2pix.load(run), [canvas(page, "drawing")]
    assert page.locator("#undo").is_disabled() and page.locator("#redo").is_disabled()
    for x in (3, 9):
        drag(page, (x, 3), (x + 4, 9))
        pictures.append(canvas(page, "drawing"))
    page.locator("#clear").click()
    settle(page)
    assert (canvas(page, "drawing") == PALETTE["background"]).all()
    for wanted in reversed(pictures):
        page.keyboard.press("Control+z")
        settle(page)
        assert np.array_equal(canvas(page, "drawing"), wanted)
        assert np.array_equal(canvas(page, "result"), model(wanted))
    assert page.locator("#undo").is_disabled()
    page.locator("#redo").click()
    settle(page)
    assert np.array_equal(canvas(page, "drawing"), pictures[1])


def test_file_is_opened_and_results_are_saved(run, page, tmp_path):
    pair = noise(SIZE, 2 * SIZE)
    Image.fromarray(pair).save(tmp_path / "pair.png")
    before = canvas(page, "drawing")
    page.locator("#file").set_input_files(tmp_path / "pair.png")
    page.wait_for_selector("#undo:enabled")
    settle(page)
    expected = {"save_drawing": pair[:, SIZE:], "save": fastpix2pix.load(run)(pair[:, SIZE:])}
    for button, picture in expected.items():
        with page.expect_download() as download:
            page.locator(f"#{button}").click()
        assert np.array_equal(pixels(Path(download.value.path()).read_bytes()), picture)
    page.locator("#undo").click()
    settle(page)
    assert np.array_equal(canvas(page, "drawing"), before)


def test_failure_is_said_and_the_drawing_stays(page, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    before = canvas(page, "drawing")
    page.locator("#file").set_input_files(tmp_path / "text.png")
    page.wait_for_selector("#status.failed")
    assert "not a readable JPEG or PNG" in page.locator("#status").inner_text()
    assert np.array_equal(canvas(page, "drawing"), before)


def test_page_fits_a_phone_with_both_pictures_in_view(page):
    page.set_viewport_size({"width": 390, "height": 844})
    box = page.locator("#result").bounding_box()
    assert box["y"] + box["height"] <= 844
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
