"""500 steps on the facades in bf16: what a fused update's arithmetic does to the images.

On a CPU, with the twin of the kernel: gradients of deep layers enter Adam as they were summed, in float32,
and the masters of all bf16 weights are split. At a quarter of the width and of the resolution.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_steps import call_small_weights_large
from torch import Tensor

from fastpix2pix.data.pairs import find_pairs
from fastpix2pix.data.resize import resize
from fastpix2pix.kernels import deep_update
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training import optim
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.step import TrainStep

SIZE, WIDTH, STEPS = 64, 16, 500


def images(facades: Path, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(source, target), the label map and the photo, (1, 3, SIZE, SIZE) in [-1, 1], in bf16."""
    for pair in find_pairs(facades, split):
        photo, labels = (
            resize(torch.from_numpy(half.copy())[None], SIZE, "nearest").permute(0, 3, 1, 2)
            for half in pair.read()
        )
        yield tuple((half / 127.5 - 1).to(torch.bfloat16) for half in (labels, photo))


def l1_after_training(train: list, test: list) -> tuple[float, TrainStep]:
    torch.manual_seed(0)
    networks = UNetGenerator(ngf=WIDTH, num_downs=6, seed=1), PatchDiscriminator(ndf=WIDTH)
    step = TrainStep(*networks, StepOptions(precision="bf16"))
    for i in range(STEPS):
        step(*train[i % len(train)])
    with torch.no_grad():
        distances = [(networks[0](source) - target).float().abs().mean() for source, target in test]
    return torch.stack(distances).mean().item(), step


@pytest.mark.slow
def test_images_are_as_close_as_with_stored_gradients(facades, monkeypatch):
    train, test = (list(images(facades, split)) for split in ("train", "test"))
    call_small_weights_large(monkeypatch)
    monkeypatch.setattr(deep_update, "serves", lambda small, big, weight: False)
    stored, _ = l1_after_training(train, test)
    updates = []
    update = deep_update.update
    monkeypatch.setattr(deep_update, "update", lambda *args: updates.append(0) or update(*args))
    monkeypatch.setattr(deep_update, "serves", lambda small, big, weight: weight.shape[1] % 16 == 0)
    monkeypatch.setattr(optim, "use_triton", lambda tensor: True)
    fused, step = l1_after_training(train, test)
    assert len(updates) == STEPS * 9  # of every deep layer but the bottleneck, which is constant at batch 1
    assert any("remainder" in state for state in step.gen_optimizer.state.values())
    print(f"L1 of {len(test)} test pairs after {STEPS} steps: {stored:.4f} stored, {fused:.4f} fused")
    assert fused == pytest.approx(stored, rel=0.01)
