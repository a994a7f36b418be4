"""The PatchGAN loss as a module, for code that is not built around ``TrainStep``."""

from torch import Tensor, nn

from fastpix2pix.kernels.ops import apply_patchgan_loss
from fastpix2pix.kernels.reference import check_gan_mode


class PatchGANLoss(nn.Module):
    """Mean loss of a discriminator's logits against "real" or "fake" (Isola et al., 2017, section 3.1).

    gan_mode: "vanilla", cross-entropy, or "lsgan", least squares (Mao et al., 2017); ValueError for others.

    ``loss(prediction, target_is_real)``: prediction, logits of any shape and floating type, without a final
    sigmoid; target_is_real, a Python bool. Returns a scalar, float32 (float64 for float64), of which the
    gradient can be taken once. To get the losses and gradients of both players from one set of logits
    [real; fake] at once, call ``fastpix2pix.kernels.gan_loss.gan_loss``.
    """

    def __init__(self, gan_mode: str = "vanilla"):
        super().__init__()
        check_gan_mode(gan_mode)
        self.gan_mode = gan_mode

    def forward(self, prediction: Tensor, target_is_real: bool) -> Tensor:
        return apply_patchgan_loss(prediction, target_is_real, self.gan_mode)

    def extra_repr(self) -> str:
        return f"gan_mode={self.gan_mode!r}"
