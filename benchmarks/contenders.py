"""Who takes part: ways to run one training step, from what everybody writes to ours, on the same weights."""

from dataclasses import dataclass, replace

import torch

from benchmarks.peers import FUSED, PLAIN, PeerStep, Tuning, tuned
from fastpix2pix.config import TrainConfig
from fastpix2pix.graph import CapturedStep, set_float32_math
from fastpix2pix.host_memory import keep_freed_memory
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

    @property
    def arithmetic(self) -> str:
        """Of the convolutions, on a GPU: unless told otherwise, PyTorch has those of float32 use tf32."""
        if self.tuning is None:
            return self.precision
        return {None: "tf32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.tuning.autocast]


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
        rung = "fastpix2pix: convolutions as products of tiles, one pass of D"
        return [
            Contender(f"fastpix2pix {precision}", f"{rung}, {precision}", precision=precision)
            for precision in dict.fromkeys(("fp32", best))
        ]
    rung = "fastpix2pix: fused epilogues, one pass of D, master Adam"
    return [
        Contender(f"fastpix2pix {best}", f"{rung}, {best}", precision=best),
        *(
            Contender(
                f"fastpix2pix {precision}, captured",
                f"{rung}, captured graph, {precision}",
                precision=precision,
                captured=True,
            )
            for precision in ("fp32", "tf32", best)
        ),
    ]


class Entrant:
    """A contender at the start: ``step()`` takes one step on the next pair of a few that go round.

    Its weights are those of every other entrant of the same ``config``; images are uniform noise, in the
    memory format and type that the contender trains in.
    """

    def __init__(self, contender: Contender, config: TrainConfig, device: torch.device, pairs: int = 4):
        config = replace(config, precision=contender.precision)
        networks = build_networks(config, device)
        layout = torch.channels_last
        if contender.tuning is None:
            if device.type == "cpu":
                keep_freed_memory()  # as training does; whoever comes later in this process gains by it too
            step = TrainStep(*networks, config)
            self._step = CapturedStep(step) if contender.captured else step
        else:
            self._step = PeerStep(config, contender.tuning, device).load_ours(*networks)
            layout = torch.channels_last if contender.tuning.channels_last else torch.contiguous_format
        dtype = WORKING_TYPES[contender.precision]
        self._pairs = [
            [image.to(device, dtype, memory_format=layout) for image in pair]
            for pair in random_pairs(config, pairs)
        ]
        self._arithmetic, self._taken = contender.arithmetic, 0

    def step(self) -> object:
        set_float32_math(self._arithmetic)  # a setting of the process, which others have changed
        self._taken += 1
        return self._step(*self._pairs[self._taken % len(self._pairs)])
