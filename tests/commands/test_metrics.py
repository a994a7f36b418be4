"""L1, PSNR and SSIM against scikit-image: its numbers on fixed images, and itself where it is installed."""

import math

import numpy as np
import pytest
import torch

from fastpix2pix.metrics import image_metrics


def images(height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 images of smooth waves, the second one bent and darkened a little."""
    y, x, c = np.ogrid[:height, :width, :channels]
    wave = np.sin(0.31 * x + c) + np.cos(0.23 * y - 0.1 * x) + np.sin(0.07 * x * y / (1 + c))
    a = np.clip(127.5 + 42.0 * wave, 0, 255).astype(np.uint8)
    b = np.clip(115.0 + 40.0 * wave + 12.0 * np.sin(1.7 * x + 0.9 * y), 0, 255).astype(np.uint8)
    return a, b


@pytest.mark.parametrize(
    ("shape", "l1", "psnr", "ssim"),
    # scikit-image 0.26.0, structural_similarity(gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, data_range=255, channel_axis=2), and peak_signal_noise_ratio
    [
        ((16, 24, 3), 0.10841503267973855, 23.885446739583273, 0.916273278774923),
        ((40, 31, 1), 0.10526881720430108, 24.057319530440058, 0.9566098157260529),
        ((64, 64, 3), 0.10052147160947712, 24.382641676100306, 0.9570179376698533),
    ],
)
def test_scikit_image_numbers(shape, l1, psnr, ssim):
    a, b = images(*shape)
    found = image_metrics(torch.from_numpy(a), torch.from_numpy(b))
    assert found == {
        "L1": pytest.approx(l1, abs=1e-12),
        "PSNR": pytest.approx(psnr, abs=1e-10),
        "SSIM": pytest.approx(ssim, abs=1e-12),
    }
    assert image_metrics(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(found)


def test_scikit_image_itself():
    metrics = pytest.importorskip("skimage.metrics")
    random = np.random.default_rng(0)
    for shape in ((11, 11, 3), (12, 40, 1), (64, 48, 3)):
        a = random.integers(0, 256, shape, np.uint8)
        b = np.clip(a + random.integers(-60, 61, shape), 0, 255).astype(np.uint8)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        found = image_metrics(torch.from_numpy(a), torch.from_numpy(b))
        expected = metrics.structural_similarity(a, b, data_range=255, channel_axis=2, **options)
        assert found["SSIM"] == pytest.approx(expected, abs=1e-12)
        assert found["PSNR"] == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=255))


def test_equal_opposite_and_small_images():
    a = torch.from_numpy(images(20, 20, 3)[0])
    assert image_metrics(a, a) == {"L1": 0.0, "PSNR": math.inf, "SSIM": pytest.approx(1.0)}
    black, white = torch.zeros(20, 20, 3, dtype=torch.uint8), torch.full((20, 20, 3), 255, dtype=torch.uint8)
    worst = image_metrics(black, white)
    assert (worst["L1"], worst["PSNR"]) == (2.0, 0.0) and worst["SSIM"] < 1e-3
    assert math.isnan(image_metrics(a[:10], a[:10])["SSIM"])
