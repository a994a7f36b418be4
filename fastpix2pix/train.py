"""``python -m fastpix2pix.train``: configuration -> data -> TrainStep -> run folder."""

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpix2pix import checkpoint, cli
from fastpix2pix.config import TrainConfig
from fastpix2pix.data import LoaderOptions, find_pairs, load_pair, open_loader
from fastpix2pix.data.catalog import DATASETS, fetch_dataset
from fastpix2pix.data.synthetic import default_folder, synthetic_dataset
from fastpix2pix.errors import UserError
from fastpix2pix.graph import CapturedStep, set_float32_math
from fastpix2pix.host_memory import keep_freed_memory
from fastpix2pix.models import build_networks
from fastpix2pix.monitor import Monitor
from fastpix2pix.optim import MasterAdam
from fastpix2pix.precision import WORKING_TYPES, choose_precision
from fastpix2pix.report import write_report
from fastpix2pix.selfcheck import verify_or_fall_back
from fastpix2pix.step import TrainStep

SAMPLE_PAIRS = 4
# What a checkpoint's tensors depend on: none of it can change when a run continues.
ARCHITECTURE = ("preset", "netG", "ngf", "ndf", "n_layers_D", "norm")


def choose_device(name: str) -> torch.device:
    """The device called ``name``, or for "auto" a GPU where there is one. Raises UserError if absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: this machine has no such device; try cpu or auto") from error
    return device


def training_state(step: TrainStep, config: TrainConfig, steps_done: int, epoch: int, position: int) -> dict:
    """All that an exact resume needs, as plain values and tensors; weights in float32 always."""
    return {
        "config": config.to_dict(),
        "step": steps_done,
        "generator": full_precision(step.generator, step.gen_optimizer),
        "discriminator": full_precision(step.discriminator, step.disc_optimizer),
        "gen_optimizer": step.gen_optimizer.state_dict(),
        "disc_optimizer": step.disc_optimizer.state_dict(),
        "loss_scale": None if step.loss_scale is None else step.loss_scale.state_dict(),
        "dropout_rng": step.generator.rng,
        "data": {"epoch": epoch, "position": position},
    }


def full_precision(network: nn.Module, optimizer: MasterAdam) -> dict[str, Tensor]:
    """The network's ``state_dict`` with the optimizer's masters in place of 16-bit weights."""
    masters = dict(zip(dict(network.named_parameters()), optimizer.masters(), strict=True))
    return {**network.state_dict(), **masters}


def restore(step: TrainStep, config: TrainConfig, path: Path) -> tuple[int, int, int]:
    """Set ``step`` to the checkpoint at ``path``; returns (steps done, epoch, position in it).

    Raises UserError when the checkpoint is of another architecture.
    """
    state = checkpoint.load(path)
    for field in ARCHITECTURE:
        mine, theirs = getattr(config, field), state["config"][field]
        if mine != theirs:
            raise UserError(
                f"--{field} {mine}: {path} was trained with {theirs}; drop the flag, or start another run "
                "with another --name"
            )
    step.generator.load_state_dict(state["generator"])
    step.discriminator.load_state_dict(state["discriminator"])
    step.gen_optimizer.load_state_dict(state["gen_optimizer"])
    step.disc_optimizer.load_state_dict(state["disc_optimizer"])
    if step.loss_scale is not None and state["loss_scale"] is not None:
        step.loss_scale.load_state_dict(state["loss_scale"])
    step.generator.rng.copy_(state["dropout_rng"])
    return state["step"], state["data"]["epoch"], state["data"]["position"]


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the step under way is finished and saved; a second one kills."""
    received: list[int] = []

    def note(number: int, _frame) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def prepare_run_folder(config: TrainConfig) -> Path:
    """Make the run's folder and write its configuration. Raises UserError rather than overwrite a run."""
    folder = config.run_folder
    if not config.continue_train and checkpoint.latest(folder):
        raise UserError(
            f"{folder} holds a run already; add --continue_train to go on with it, or choose another --name"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config.to_json())
    except OSError as error:
        raise UserError(
            f"{folder}: can't write here ({error.strerror}); choose another --checkpoints_dir"
        ) from error
    return folder


def data_folder(config: TrainConfig) -> Path:
    """Where the pairs are: --dataroot, or a data set by name."""
    if config.dataroot is not None:
        return config.dataroot
    if config.dataset == "synthetic":
        return synthetic_dataset(default_folder())
    return fetch_dataset(config.dataset)


def choose_direction(config: TrainConfig) -> str:
    """The direction asked for, else the customary one of a data set by name, else the preset's."""
    if config.direction is not None:
        return config.direction
    if config.dataroot is None and config.dataset in DATASETS:
        return DATASETS[config.dataset].direction
    return "BtoA" if config.dataroot is None else config.recipe.direction


def sample_pairs(root: Path, config: TrainConfig, device: torch.device) -> list:
    """The first pairs of test/, else val/, else train/, for the sample grids."""
    split = next((name for name in ("test", "val") if (root / name).is_dir()), "train")
    pairs = find_pairs(root, split)[:SAMPLE_PAIRS]
    recipe = config.recipe
    loaded = (
        load_pair(
            pair,
            direction=config.direction,
            size=config.crop_size,
            interpolation=recipe.interpolation,
        )
        for pair in pairs
    )
    dtype = WORKING_TYPES[config.precision]
    return [(source.to(device, dtype), target.to(device, dtype)) for source, target in loaded]


def train(config: TrainConfig) -> None:
    """Run training as ``config`` says. Raises UserError for what the user can mend."""
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    config = dataclasses.replace(
        config, precision=choose_precision(config.precision, device), direction=choose_direction(config)
    )
    root = data_folder(config)
    recipe = config.recipe
    options = LoaderOptions(
        direction=config.direction,
        load_size=config.load_size,
        crop_size=config.crop_size,
        interpolation=recipe.interpolation,
        flip=not config.no_flip,
        batch_size=config.batch_size,
        seed=config.seed,
        loader=config.loader,
        num_threads=config.num_threads,
        cache_bytes=int(config.cache * 2**30),
    )
    loader = open_loader(root, options, split="train", device=device, dtype=WORKING_TYPES[config.precision])
    samples = sample_pairs(root, config, device)
    set_float32_math(config.precision)
    if device.type == "cuda":
        config = verify_or_fall_back(config, device)
    step = TrainStep(*build_networks(config, device), config)
    done, epoch, position = 0, 0, 0
    if config.continue_train:
        newest = checkpoint.latest(config.run_folder)
        if newest is None:
            raise UserError(f"{config.run_folder} has no checkpoint to continue from; drop --continue_train")
        done, epoch, position = restore(step, config, newest)
    folder = prepare_run_folder(config)
    total = config.total_steps(loader.batches_per_epoch)
    print(
        f"{len(loader)} pairs from {root} ({loader.kind} loader), {total} steps on {device}, run in {folder}"
    )

    monitor = Monitor(
        folder,
        first_step=done,
        total_steps=total,
        batch_size=config.batch_size,
        gan_mode=config.gan_mode,
        samples=samples,
    )

    def save() -> None:
        monitor.catch_up(done, lr, step)  # a state that is not finite must not displace a good one
        state = training_state(step, config, done, epoch, position)
        checkpoint.save(folder, done, state, config.keep_checkpoints)
        monitor.writer.flush()
        write_report(folder, monitor.history)

    update = CapturedStep(step) if device.type == "cuda" and not config.no_graph else step
    stream = loader.stream(epoch, position)
    first = done
    with stop_requests() as stops:
        try:
            while done < total and not stops:
                began = time.perf_counter()
                batch = next(stream)
                monitor.waited(time.perf_counter() - began)
                lr = config.lr_at(done, loader.batches_per_epoch)
                step.set_lr(lr)
                update(batch.source, batch.target)
                monitor.stepped()
                done, epoch, position = done + 1, batch.epoch, batch.position
                if done % config.print_freq == 0:
                    monitor.read_losses(done, lr, step)
                if done % config.display_freq == 0:
                    monitor.show_samples(done, lr, step)
                if done % config.save_latest_freq == 0:
                    save()
            if done > first:
                if done % config.display_freq:
                    monitor.show_samples(done, lr, step)
                if done % config.save_latest_freq:
                    save()
        finally:
            monitor.close()
            loader.close()
    if stops:
        print(f"stopped at step {done}; the run goes on with --continue_train --name {config.name}")
        sys.exit(128 + stops[0])
    print(f"done: {done} steps; checkpoints and samples are in {folder}")


def main(argv: list[str] | None = None) -> None:
    """Parse and train. A continued run takes what no flag says from its own ``config.json``."""

    def saved(config: TrainConfig) -> TrainConfig | None:
        if not config.continue_train:
            return None
        path = config.run_folder / "config.json"
        try:
            return TrainConfig.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: not readable, so there is no run to continue; drop --continue_train, or give the "
                "--name and --checkpoints_dir of a run"
            ) from error

    cli.run(TrainConfig, train, argv, defaults_for=saved)


if __name__ == "__main__":
    main()
