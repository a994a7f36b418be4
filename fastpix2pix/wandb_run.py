"""A training as a run at Weights & Biases, through its ordinary client: online or offline as that is."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fastpix2pix.errors import UserError

ID = ".wandb_id"  # of the run there, which goes on when the run here does


class WandbRun:
    """Losses, samples and the request of one training.

    run_folder: where its ``wandb/`` goes. request: what was asked for, for the table of runs. Raises
    UserError when wandb is not installed, or no run can be begun.
    """

    def __init__(self, run_folder: Path, project: str, name: str, request: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f'--use_wandb needs wandb ({error}); run pip install "fastpix2pix[wandb]"'
            ) from error
        self._wandb = wandb
        try:
            if not (run_folder / ID).is_file():
                (run_folder / ID).write_text(secrets.token_hex(4), encoding="utf-8")
            self._run = wandb.init(
                project=project,
                name=name,
                id=(run_folder / ID).read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=run_folder,
                config=dict(request),
                settings=wandb.Settings(console="off"),  # which would take the progress line apart
            )
        except Exception as error:
            raise UserError(
                f"--use_wandb: {error}; log in by wandb login, set WANDB_MODE=offline, or drop --use_wandb"
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()
