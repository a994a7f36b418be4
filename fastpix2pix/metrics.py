"""How close a generated image comes to its target: L1, PSNR and SSIM of 8-bit images."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def image_metrics(generated: Tensor, target: Tensor) -> dict[str, float]:
    """L1, PSNR and SSIM of two uint8 images (height, width, channels) of one size."""
    generated, target = generated.double(), target.double()
    return {"L1": l1(generated, target), "PSNR": psnr(generated, target), "SSIM": ssim(generated, target)}


def l1(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference on the scale of the training loss: pixels 0 to 255 become -1 to 1."""
    return (a - b).abs().mean().item() / 127.5


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared error); infinite for equal images."""
    error = (a - b).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al., "Image Quality Assessment", 2004, section III-B); equal images: 1.

    Local statistics in an 11x11 Gaussian window of standard deviation 1.5, population variances, mean over
    the window's positions inside the image and over channels: scikit-image's ``structural_similarity`` with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255``. NaN for images smaller
    than the window.
    """
    if min(a.shape[:2]) < WINDOW:
        return math.nan
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights /= weights.sum()

    def local_mean(image: Tensor) -> Tensor:
        image = image.permute(2, 0, 1)[:, None]
        return F.conv2d(F.conv2d(image, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a = local_mean(a * a) - mean_a**2
    var_b = local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    similarity = ((2 * mean_a * mean_b + C1) * (2 * covariance + C2)) / (
        (mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2)
    )
    return similarity.mean().item()
