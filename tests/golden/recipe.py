"""Weights and inputs of the golden numbers, drawn with NumPy alone, for TensorFlow and PyTorch alike.

Weights are in Keras's order and layout: the generator's arrays as ``get_weights()`` lists them, then the
discriminator's. Kernels are (height, width, in, out), those of transposed convolutions (height, width, out,
in). Images are (N, H, W, C).
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

GENERATOR_ARRAYS = 73

NORM = ("gamma", "beta", "moving_mean", "moving_variance")

_DOWN = [3, 64, 128, 256, 512, 512, 512, 512, 512]
_UP = [(512, 512), (512, 1024), (512, 1024), (512, 1024), (256, 1024), (128, 512), (64, 256)]


def _arrays() -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each array, in the order in which they are drawn."""
    for i in range(8):
        yield f"G.down{i + 1}.kernel", (4, 4, _DOWN[i], _DOWN[i + 1])
        if i:
            yield from ((f"G.down{i + 1}.{part}", (_DOWN[i + 1],)) for part in NORM)
    for i, (width, below) in enumerate(_UP):
        yield f"G.up{i + 1}.kernel", (4, 4, width, below)
        yield from ((f"G.up{i + 1}.{part}", (width,)) for part in NORM)
    yield "G.last.kernel", (4, 4, 3, 128)
    yield "G.last.bias", (3,)
    yield "D.down1.kernel", (4, 4, 6, 64)
    for name, below, width in (("down2", 64, 128), ("down3", 128, 256), ("conv4", 256, 512)):
        yield f"D.{name}.kernel", (4, 4, below, width)
        yield from ((f"D.{name}.{part}", (width,)) for part in NORM)
    yield "D.last.kernel", (4, 4, 512, 1)
    yield "D.last.bias", (1,)


def weights() -> list[tuple[str, np.ndarray]]:
    """(name, float32 array) of the 73 arrays of the generator and the 18 of the discriminator."""
    random = np.random.default_rng(1234)
    drawn = []
    for name, shape in _arrays():
        part = name.rpartition(".")[2]
        if part == "kernel":
            array = random.standard_normal(shape).astype(np.float32) * np.float32(0.02)
        elif part == "gamma":
            array = (1 + 0.1 * random.standard_normal(shape)).astype(np.float32)
        elif part in ("beta", "bias"):
            array = (0.1 * random.standard_normal(shape)).astype(np.float32)
        else:
            array = np.full(shape, part == "moving_variance", np.float32)
        drawn.append((name, array))
    return drawn


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Five pairs of input and target, (1, 256, 256, 3) float32 in [-1, 1): one for each step."""
    random = np.random.default_rng(99)
    images = [random.uniform(-1, 1, (1, 256, 256, 3)).astype(np.float32) for _ in range(10)]
    return list(zip(images[::2], images[1::2], strict=True))


def loss_inputs() -> dict[str, np.ndarray]:
    """Two batches of logits (2, 30, 30, 1) and two of images (2, 16, 16, 3), float32."""
    random = np.random.default_rng(5)
    logits = {
        name: (random.normal(size=(2, 30, 30, 1)) * 3).astype(np.float32)
        for name in ("real_logits", "fake_logits")
    }
    images = {
        name: random.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32) for name in ("gen_output", "target")
    }
    return logits | images


def picture() -> np.ndarray:
    """A side-by-side image, (256, 512, 3) uint8: the target on the left, the input on the right."""
    return np.random.default_rng(3).integers(0, 256, (256, 512, 3), dtype=np.uint8)


def sample_positions(size: int, count: int) -> np.ndarray:
    """Which of ``size`` numbers, in C order, are kept of a large array."""
    return np.random.default_rng(7).choice(size, min(count, size), replace=False)


def digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of all the bytes, which tells a NumPy that draws other numbers from the same seed."""
    sha256 = hashlib.sha256()
    for array in arrays:
        sha256.update(np.ascontiguousarray(array))
    return sha256.hexdigest()
