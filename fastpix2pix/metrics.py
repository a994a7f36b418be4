"""How close a generated image comes to its target: L1, PSNR and SSIM."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window


def image_metrics(generated: Tensor, target: Tensor, span: float = 255.0) -> dict[str, float]:
    """L1, PSNR and SSIM of two images (height, width, channels) of one size, whose values span so much."""
    a, b = generated.double(), target.double()
    return {"L1": l1(a, b, span), "PSNR": psnr(a, b, span), "SSIM": ssim(a, b, span)}


def l1(a: Tensor, b: Tensor, span: float) -> float:
    """Mean absolute difference on the scale of the training loss, where values go from -1 to 1."""
    return (a - b).abs().mean().item() / (span / 2)


def psnr(a: Tensor, b: Tensor, span: float) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(span^2 / mean squared error); infinite for equal images."""
    error = (a - b).square().mean().item()
    return 10 * math.log10(span**2 / error) if error else math.inf


def ssim(a: Tensor, b: Tensor, span: float) -> float:
    """Structural similarity (Wang et al., "Image Quality Assessment", 2004, section III-B); equal images: 1.

    Local statistics in an 11x11 Gaussian window of standard deviation 1.5, population variances, mean over
    the window's positions inside the image and over channels: scikit-image's ``structural_similarity`` with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=span``. NaN for images smaller
    than the window.
    """
    if min(a.shape[:2]) < WINDOW:
        return math.nan
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
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
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return similarity.mean().item()
