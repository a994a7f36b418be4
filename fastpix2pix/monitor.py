"""What a person sees of a run: progress line, TensorBoard, sample grids, the balance of the two players."""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastpix2pix.errors import NotFinite
from fastpix2pix.history import History, read_history
from fastpix2pix.loss_table import LossTable
from fastpix2pix.models.generator import generate_without_trace
from fastpix2pix.pixels import preview
from fastpix2pix.report import write_report
from fastpix2pix.training.graph import AsyncHostCopy
from fastpix2pix.training.losses import Losses
from fastpix2pix.training.step import TrainStep
from fastpix2pix.wandb_run import WandbRun

# Everything in 80 columns, which a bar would not leave room for.
PROGRESS = "{n}/{total} {remaining} left{postfix}"
FIRST_LOSSES = 10  # steps after which the losses are read for the first time, whatever print_freq says
FIRST_SAMPLE = 60.0  # seconds after which samples are drawn for the first time, whatever display_freq says
TUTORIAL_TAGS = ("gen_total_loss", "gen_gan_loss", "gen_l1_loss", "disc_loss")
# The loss of a discriminator that answers "can't tell" (logit 0, or 1/2 for least squares) everywhere.
UNDECIDED = {"vanilla": math.log(2), "lsgan": 0.25}


def gan_health(disc_real: float, disc_fake: float, gen_gan: float, gan_mode: str) -> str:
    """One line that says whether one player is winning, from mean losses (per term, before any factor).

    Each is compared with what it is when the discriminator can't tell real from fake: log 2 = 0.69 for
    vanilla. With half of that a player is ahead; with a tenth, the other one no longer teaches it.
    """
    undecided = UNDECIDED[gan_mode]
    disc = (disc_real + disc_fake) / 2
    if disc < undecided / 10:
        verdict = "the discriminator is winning; the generator learns from L1 alone"
    elif gen_gan < undecided / 10:
        verdict = "the generator is winning; the discriminator no longer guides it"
    elif disc < undecided / 2:
        verdict = "the discriminator is ahead"
    elif gen_gan < undecided / 2:
        verdict = "the generator is ahead"
    else:
        verdict = "balanced" if disc < undecided * 1.2 else "the discriminator is worse than a guess"
    return (
        f"D real {disc_real:.2f}, D fake {disc_fake:.2f}, G {gen_gan:.2f} "
        f"(undecided: {undecided:.2f} each): {verdict}"
    )


def sample_grid(generator: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> Image.Image:
    """One row for each (source, target), both (1, C, H, W): input | target | generated, as ``preview``."""
    rows = []
    for source, target in pairs:
        images = (source[0], target[0], generate_without_trace(generator, source)[0])
        rows.append(np.concatenate([*map(preview, images)], 1))
    return Image.fromarray(np.concatenate(rows, 0))


class NoMonitor:
    """In the place of a ``Monitor`` in all ranks of a training but the first, which shows the run."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        """Every method, doing nothing; nothing is ever due."""
        return lambda *args, **kwargs: False


class Monitor:
    """Shows the losses every ``print_freq`` steps and samples every ``display_freq``.

    Losses stay on the device until then and come over while training goes on: the host waits for the device
    only where it draws samples or saves. ``history`` is what has arrived, of a continued run from its start.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        first_step: int,
        total_steps: int,
        batch_size: int,
        gan_mode: str,
        samples: Sequence[tuple[Tensor, Tensor]],
        wandb: WandbRun | None = None,
    ):
        self.run_folder, self.gan_mode, self.samples = run_folder, gan_mode, samples
        self.batch_size, self.wandb = batch_size, wandb
        events = run_folder / "events"
        self.history = read_history(events) if first_step else History()
        self._unwritten: set[str] = set()
        self.writer: SummaryWriter | None = None
        self._thread_excepthook, threading.excepthook = threading.excepthook, self._quiet_writer
        with self._only_warn("events"):
            self.writer = SummaryWriter(str(events), purge_step=first_step + 1 if first_step else None)
        self.table: LossTable | None = None
        with self._only_warn("losses.csv"):
            self.table = LossTable(run_folder, first_step)
        self.bar = tqdm(total=total_steps, initial=first_step, dynamic_ncols=True, bar_format=PROGRESS)
        self._readings: deque[tuple[int, float, float, float, AsyncHostCopy]] = deque()
        self._unread = 0
        self._waited = 0.0
        self._first_step, self._sampled = first_step, False
        self._began = self._since = time.perf_counter()

    def _quiet_writer(self, args: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's writing thread: what it raised arrives at the next call as well."""
        if type(args.thread).__module__ != event_file_writer.__name__:
            self._thread_excepthook(args)

    @contextmanager
    def _only_warn(self, what: str) -> Iterator[None]:
        """Training goes on though ``what`` can't be written; said once."""
        try:
            yield
        except Exception as error:
            if what not in self._unwritten:
                self._unwritten.add(what)
                reason = getattr(error, "strerror", None) or error
                tqdm.write(f"warning: {what} can't be written ({reason}); training goes on", sys.stderr)

    def _write_event(self, write: Callable[[SummaryWriter], object]) -> None:
        """``write`` to TensorBoard's files; after an error of it nothing more goes there."""
        if self.writer is not None:
            writer, self.writer = self.writer, None
            with self._only_warn("events"):
                write(writer)
                self.writer = writer

    def waited(self, seconds: float) -> None:
        """Count time that the loop spent waiting for data."""
        self._waited += seconds

    def stepped(self) -> None:
        """Count a step of the loop, and show the losses that have arrived."""
        self._unread += 1
        self.bar.update()
        self._show_arrived()

    def losses_due(self, step: int, every: int) -> bool:
        """Whether it is time to read the losses: each ``every`` steps, the first time after few."""
        return step % every == 0 or step - self._first_step == FIRST_LOSSES

    def samples_due(self, step: int, every: int) -> bool:
        """Whether it is time to draw samples: each ``every`` steps, the first time after a minute at most."""
        late = not self._sampled and time.perf_counter() - self._began > FIRST_SAMPLE
        return step % every == 0 or late

    def read_losses(self, step: int, lr: float, train_step: TrainStep) -> None:
        """Send for the losses since the last call, and show what has arrived; waits for nothing.

        step: the number of the newest one, counted from 1. Raises NotFinite when a loss is not finite.
        """
        if self._unread:
            seconds = time.perf_counter() - self._since
            rate, wait = self._unread * self.batch_size / seconds, self._waited / seconds
            reading = AsyncHostCopy(train_step.last_losses(self._unread))
            self._readings.append((step, lr, rate, wait, reading))
            self._unread, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._show_arrived()

    def _show_arrived(self) -> None:
        while self._readings and self._readings[0][-1].ready():
            self._show_losses(*self._readings.popleft())

    def catch_up(self, step: int, lr: float, train_step: TrainStep) -> None:
        """Wait for the losses of all steps so far and show them. Raises NotFinite as ``read_losses`` does."""
        self.read_losses(step, lr, train_step)
        while self._readings:
            self._show_losses(*self._readings.popleft())

    def _show_losses(self, step: int, lr: float, rate: float, wait: float, reading: AsyncHostCopy) -> None:
        values = reading.wait()
        first = step - len(values) + 1
        finite = values.isfinite().all(1)
        if not finite.all():
            culprit = first + int((~finite).nonzero()[0])
            raise NotFinite(
                f"losses are not finite since step {culprit}; go on from the last checkpoint with "
                "--continue_train and a lower --lr"
            )
        for offset, row in enumerate(values.tolist()):
            for tag, value in zip(TUTORIAL_TAGS, row, strict=False):
                self._add(tag, value, first + offset)
        if self.table is not None:
            with self._only_warn("losses.csv"):
                self.table.add(first, values.tolist(), lr)
        self._add("train/learning_rate", lr, step)
        self._add("train/images_per_second", rate, step)
        self._add("train/data_wait_share", wait, step)
        mean = Losses(*values.mean(0).tolist())
        real, fake, gan = map(float, (mean.disc_real_loss, mean.disc_fake_loss, mean.gen_gan_loss))
        self.history.health = gan_health(real, fake, gan, self.gan_mode)
        if self.wandb is not None:
            means = dict(zip(Losses._fields, map(float, mean), strict=True))
            speed_now = {"learning_rate": lr, "images_per_second": rate, "data_wait_share": wait}
            with self._only_warn("wandb"):
                self.wandb.log(means | speed_now, step)
        speed = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
        self.bar.set_postfix_str(
            f"G {mean.gen_gan_loss:.3g} L1 {mean.gen_l1_loss:.3g} D {mean.disc_loss:.3g}, "
            f"{speed} img/s, {wait:.0%} waiting"
        )

    def _add(self, tag: str, value: float, step: int) -> None:
        self._write_event(lambda writer: writer.add_scalar(tag, value, step))
        self.history.add(tag, step, value)

    def show_samples(self, step: int, lr: float, train_step: TrainStep) -> None:
        """Write the sample grid and the GAN health reading of this moment."""
        self.catch_up(step, lr, train_step)
        self._sampled = True
        grid = sample_grid(train_step.generator, self.samples)
        folder = self.run_folder / "samples"
        with self._only_warn("samples"):
            folder.mkdir(exist_ok=True, parents=True)
            grid.save(folder / f"step_{step:08d}.png")
        pixels, health = np.asarray(grid), self.history.health
        self._write_event(lambda writer: writer.add_image("samples", pixels, step, dataformats="HWC"))
        self._write_event(lambda writer: writer.add_text("gan_health", health, step))
        if self.wandb is not None:
            with self._only_warn("wandb"):
                self.wandb.log_image("samples", grid, step)
        self.bar.write(f"step {step}: {self.history.health}")
        self._since = time.perf_counter()  # drawing is not training time

    def report(self) -> None:
        """Bring the run's event files and its ``report.html`` up to now."""
        self._write_event(lambda writer: writer.flush())
        with self._only_warn("report.html"):
            write_report(self.run_folder, self.history)

    def close(self) -> None:
        self.bar.close()
        self._write_event(lambda writer: writer.close())
        for what, log in (("losses.csv", self.table), ("wandb", self.wandb)):
            if log is not None:
                with self._only_warn(what):
                    log.close()
        threading.excepthook = self._thread_excepthook
