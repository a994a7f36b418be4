"""FID, KID and LPIPS by torchmetrics, with the networks that they look through given as files.

Nothing is downloaded. The files are plain state_dicts, read without executing anything in them.
"""

import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpix2pix.device import choose_device
from fastpix2pix.errors import UserError

INSTALL = 'run pip install "fastpix2pix[metrics]"'
KID_SUBSET, KID_SUBSETS = 1000, 100  # of the paper's implementation, for sets that are large enough


class FeatureDistances:
    """Frechet and kernel Inception distance (Heusel et al., 2017; Binkowski et al., 2018) of two sets.

    weights: the state_dict of torch-fidelity's InceptionV3, which both papers' numbers rest on. Raises
    UserError when it is not that, or a library is missing.
    """

    def __init__(self, weights: Path, device: str = "auto"):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
            from torchmetrics.image.kid import KernelInceptionDistance
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--inception needs torchmetrics ({error}); {INSTALL}") from error
        _check_state_dict("--inception", weights)
        try:
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
        except ImportError as error:
            raise UserError(f"--inception needs torch-fidelity ({error}); {INSTALL}") from error
        except RuntimeError as error:
            raise UserError(
                f"--inception {weights}: not the weights of torch-fidelity's InceptionV3; give its "
                "weights-inception-2015-12-05-6726825d.pth"
            ) from error
        self.device = choose_device(device)
        self._fid = FrechetInceptionDistance(network).to(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it keeps features, 8 KiB an image
            self._kid = KernelInceptionDistance(network, KID_SUBSETS, KID_SUBSET).to(self.device)
        self._count = 0

    def add(self, generated: Tensor, target: Tensor) -> None:
        """Count two uint8 images (height, width, 3)."""
        for image, real in ((generated, False), (target, True)):
            batch = _batch(image, self.device)
            self._fid.update(batch, real=real)
            self._kid.update(batch, real=real)
        self._count += 1

    def take(self) -> dict[str, float]:
        """FID and KID of the images since the last call; NaN for fewer than two."""
        if self._count < 2:
            values = {"FID": float("nan"), "KID": float("nan")}
        else:
            # One subset of them all where there are too few to draw from.
            few = self._count <= KID_SUBSET
            self._kid.subset_size, self._kid.subsets = (self._count, 1) if few else (KID_SUBSET, KID_SUBSETS)
            values = {"FID": self._fid.compute().item(), "KID": self._kid.compute()[0].item()}
        self._fid.reset(), self._kid.reset()
        self._count = 0
        return values


class PerceptualDistance:
    """LPIPS (Zhang et al., 2018), version 0.1 on AlexNet, of two images.

    weights: the state_dict of torchvision's AlexNet. Raises UserError as ``FeatureDistances`` does.
    """

    def __init__(self, weights: Path, device: str = "auto"):
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
            from torchvision.models import AlexNet_Weights
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--lpips needs torchmetrics and torchvision ({error}); {INSTALL}") from error
        _check_state_dict("--lpips", weights)
        name = AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
        hub = torch.hub.get_dir()
        with tempfile.TemporaryDirectory() as folder:  # where torchvision looks before it downloads
            (Path(folder) / "checkpoints").mkdir()
            os.symlink(weights.resolve(), Path(folder) / "checkpoints" / name)
            torch.hub.set_dir(folder)
            try:
                self._metric = LearnedPerceptualImagePatchSimilarity("alex")
            except RuntimeError as error:
                raise UserError(
                    f"--lpips {weights}: not the weights of torchvision's AlexNet; give its {name}"
                ) from error
            finally:
                torch.hub.set_dir(hub)
        self.device = choose_device(device)
        self._metric.to(self.device)

    @torch.no_grad()
    def __call__(self, generated: Tensor, target: Tensor) -> float:
        """Of two uint8 images (height, width, 3)."""
        images = (_batch(image, self.device).float() / 127.5 - 1 for image in (generated, target))
        return float(self._metric(*images))


def _batch(image: Tensor, device: torch.device) -> Tensor:
    """(1, 3, height, width) uint8; grey repeated."""
    if image.shape[-1] not in (1, 3) or image.dtype != torch.uint8:
        raise UserError(
            f"FID, KID and LPIPS look at 8-bit RGB, and these images have {image.shape[-1]} channels of "
            f"{str(image.dtype).removeprefix('torch.')}; leave out --inception and --lpips"
        )
    return image.permute(2, 0, 1)[None].expand(1, 3, -1, -1).to(device)


def _check_state_dict(flag: str, path: Path) -> None:
    """Raise UserError unless ``path`` is a state_dict that can be read without executing what is in it."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}; give the file of its weights") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{flag} {path}: is no file of weights that can be read safely") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{flag} {path}: holds more than weights; give a plain state_dict")
