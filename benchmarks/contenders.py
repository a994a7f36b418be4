"""Who takes part: ways to run one training step, from what everybody writes to ours, on the same weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.peers import FUSED, PLAIN, PeerStep, Tuning, tuned
from fastpix2pix.config import TrainConfig
from fastpix2pix.graph import CapturedStep, set_float32_math
from fastpix2pix.models import build_networks
from fastpix2pix.precision import WORKING_TYPES, choose_precision
from fastpix2pix.selfcheck import random_pairs
from fastpix2pix.step import TrainStep


@dataclass(frozen=True)
class Contender:
    """A way to run the step.

    rung: its place on the ladder from plain to fast, in words. tuning: of a peer, None for ours. precision,
    captured: of ours.
    """

    name: str
    rung: str
    tuning: Tuning | None = None
    precision: str = "fp32"
    captured: bool = False


def field(device: torch.device, *, compiled: bool = False) -> list[Contender]:
    """All that make sense on ``device``, slowest first as one expects it."""
    best = tuned(device)
    peers = [
        Contender("plain PyTorch", "eager", PLAIN),
        Contender("channels-last PyTorch", "+ channels_last", Tuning(channels_last=True)),
    ]
    if best.autocast is not None:
        both = Tuning(channels_last=True, adam=FUSED)
        peers.append(Contender("fused-Adam PyTorch", "+ fused Adam", both))
    peers.append(Contender("tuned PyTorch", "+ 16-bit autocast" if best.autocast else "+ fused Adam", best))
    if compiled:
        peers.append(Contender("compiled PyTorch", "+ torch.compile", replace(best, compiled=True)))
    return peers + ours(device)


def ours(device: torch.device) -> list[Contender]:
    """Our step in fp32 and, where it is another, in the precision that training would choose."""
    best = choose_precision(None, device)
    if device.type != "cuda":
        return [
            Contender(f"fastpix2pix {precision}", f"our step, {precision}", precision=precision)
            for precision in dict.fromkeys(("fp32", best))
        ]
    return [
        Contender(f"fastpix2pix {precision}{', ' * captured}{'captured' * captured}",
                  f"our step, {precision}{', captured graph' * captured}",
                  precision=precision, captured=captured)
        for precision, captured in (("fp32", True), ("tf32", True), (best, False), (best, True))
    ]  # fmt: skip


class Entrant:
    """A contender at the start: ``step()`` takes one step on the next pair of a few that go round.

    Its weights are those of every other entrant of the same ``config``; images are uniform noise, in the
    memory format and type that the contender trains in.
    """

    def __init__(self, contender: Contender, config: TrainConfig, device: torch.device, pairs: int = 4):
        config = replace(config, precision=contender.precision)
        networks = build_networks(config, device)
        dtype, layout = WORKING_TYPES[contender.precision], torch.channels_last
        self._precision = contender.precision
        set_float32_math(self._precision)
        self._step: Callable[[Tensor, Tensor], object]
        if contender.tuning is None:
            self._step = TrainStep(*networks, config)
            if contender.captured:
                self._step = CapturedStep(self._step)
        else:
            self._step = PeerStep(config, contender.tuning, device).load_ours(*networks)
            layout = torch.channels_last if contender.tuning.channels_last else torch.contiguous_format
        self._pairs = [
            [image.to(device, dtype, memory_format=layout) for image in pair]
            for pair in random_pairs(config, pairs)
        ]
        self._taken = 0

    def step(self) -> object:
        self._taken += 1
        return self._step(*self._pairs[self._taken % len(self._pairs)])
