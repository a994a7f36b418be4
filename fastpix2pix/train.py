"""``python -m fastpix2pix.train``: configuration -> data -> TrainStep -> run folder."""

import argparse
import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpix2pix import checkpoint, cli, environment, needs, run_folder
from fastpix2pix.config import QUICK, TrainConfig, check_changes, check_name
from fastpix2pix.cores import CoreShare, loader_threads, use_threads
from fastpix2pix.data import Loader, find_pairs, load_pair, open_loader
from fastpix2pix.data.check import refuse_other_layouts
from fastpix2pix.data.options import oriented
from fastpix2pix.data.synthetic import default_folder, synthetic_dataset
from fastpix2pix.device import choose_device, device_of_rank, why_no_gpu
from fastpix2pix.errors import NotFinite, UserError, out_of_memory_is_one_line
from fastpix2pix.interop.junyanz.flags import train_words
from fastpix2pix.models import build_networks
from fastpix2pix.monitor import FIRST_LOSSES, Monitor, NoMonitor
from fastpix2pix.signals import end_at_once, limited, say, stop_requests
from fastpix2pix.training.distributed import ALONE, RankGone, Ranks, joined
from fastpix2pix.training.fine_tuning import begin_with
from fastpix2pix.training.precision import WORKING_TYPES, choose_precision
from fastpix2pix.training.prepare import PreparedStep, prepare_step
from fastpix2pix.training.resume import (
    Position,
    Undo,
    check_architecture,
    check_finite,
    restore,
    training_state,
)
from fastpix2pix.wandb_run import WandbRun

SAMPLE_PAIRS = 4
FAILED = 255  # what a rank tells the others, beside the number of the signal that it was sent
NO_MEMORY = (
    "go on where there is more, close other programs, or train anew with a lower --batch_size, --crop_size, "
    "--ngf or --ndf, or with --cache 0"
)


def find_checkpoint(config: TrainConfig) -> tuple[Path, dict] | None:
    """The newest checkpoint of the run to continue and its state; None for a new run.

    Says which flags differ from the run's own. Raises UserError where there is none to continue, a flag does
    not fit it, or a new run would overwrite an old one.
    """
    folder = config.run_folder
    newest = checkpoint.latest(folder)
    if not config.continue_train:
        if newest is not None:
            raise UserError(
                f"{folder} holds a run already; add --continue_train to go on with it, or choose another "
                "--name"
            )
        return None
    for change in check_changes(run_folder.read_request(folder), config):
        print(f"changed since the run was saved: {change}")
    if newest is None:
        raise UserError(f"{folder} has no checkpoint to continue from; drop --continue_train")
    state = checkpoint.load(newest)
    check_architecture(config, state, newest)
    return newest, state


def data_folder(config: TrainConfig) -> Path:
    """Where the pairs are: --dataroot, or a data set by name."""
    if config.dataroot is not None:
        refuse_other_layouts(config.dataroot)
        return config.dataroot
    if config.dataset == "synthetic":
        return synthetic_dataset(default_folder())
    from fastpix2pix.data.download import fetch_dataset  # the download library takes a while to import

    return fetch_dataset(config.dataset)


def sized_by_data(config: TrainConfig, root: Path) -> TrainConfig:
    """``config`` in terms of --preprocess resize_and_crop: crop and none take sizes from the images, which a
    resize to that size leaves as they are.

    Raises UserError unless all images are squares of one size.
    """
    if config.preprocess == "resize_and_crop":
        return config
    pairs = find_pairs(root, "train", config.loader_options().sides)[: config.max_dataset_size]
    side = pairs[0].size[0]
    for pair in pairs:
        if pair.size != (side, side) or side < config.crop_size and config.preprocess == "crop":
            wanted = (
                "squares of one size" if pair.size != (side, side) else f"of --crop_size {config.crop_size}"
            )
            raise UserError(
                f"--preprocess {config.preprocess}: {pair.a} holds {pair.size[1]}x{pair.size[0]} pixels; "
                f"without a resize they must be {wanted}: use resize_and_crop"
            )
    crop_size = side if config.preprocess == "none" else config.crop_size
    return dataclasses.replace(config, preprocess="resize_and_crop", load_size=side, crop_size=crop_size)


def sample_pairs(
    root: Path, config: TrainConfig, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """The first pairs of test/, else val/, else train/, for the sample grids."""
    split = next((name for name in ("test", "val") if (root / name).is_dir()), "train")
    options = config.loader_options()
    loaded = (
        load_pair(
            pair,
            direction=options.direction,
            size=options.crop_size,
            interpolation=options.interpolation,
        )
        for pair in find_pairs(root, split, options.sides)[:SAMPLE_PAIRS]
    )
    return [(source.to(device, dtype), target.to(device, dtype)) for source, target in loaded]


def batch_shapes(loader: Loader, config: TrainConfig, position: int = 0) -> list[tuple[int, int, int]]:
    """Every (N, H, W) of images that the run will meet from sample ``position`` of an epoch on: the batch,
    and an epoch's last, smaller one."""
    sizes = {batch.share for start in (0, position) for batch in loader.rest_of_epoch(start)}
    return [(size, config.crop_size, config.crop_size) for size in sorted(sizes, reverse=True)]


def start_line(config: TrainConfig, loader: Loader, root: Path, prepared: PreparedStep, total: int) -> str:
    """What the run does, and on what: direction, precision, device, loader, threads."""
    direction = config.resolved_direction()
    half = "left" if direction == "AtoB" else "right"
    source, target = oriented(*loader.sides, direction)
    kinds = "" if source.plain and target.plain else f"; {source} to {target}"
    resolved = prepared.resolved()
    how = [resolved["precision"]]
    if prepared.device.type == "cuda":
        how.append("CUDA graph" if resolved["cuda_graph"] == "yes" else "no CUDA graph")
        how.append(f"{resolved['kernels']} kernels")
    else:
        how.append(f"{torch.get_num_threads()} threads")
    return (
        f"{len(loader)} pairs from {root} ({loader.kind} loader, {loader.options.num_threads} threads; "
        f"{direction}: the {half} half is the input{kinds}), {total} steps on {prepared.device} "
        f"({environment.device_name(prepared.device)}; {', '.join(how)}), run in {config.run_folder}"
    )


def train(config: TrainConfig, ranks: Ranks = ALONE) -> None:
    """Run training as ``config`` says, together with the other ``ranks``. Raises UserError for what the user
    can mend."""
    owned = run_folder.owned(config.run_folder) if ranks.first else nullcontext()
    with owned, out_of_memory_is_one_line(NO_MEMORY):
        _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> None:
    alone = ranks.size == 1
    found = ranks.first_decides(lambda: find_checkpoint(config))
    if alone:
        device = choose_device(config.device)
    else:
        device = device_of_rank(config.device, ranks.local_rank, ranks.local_size)
        ranks.check_same("--device", device.type)
    if config.device == "auto" and (reason := why_no_gpu()):
        print(f"training on the CPU: {reason}")
    use_threads(config.threads)
    precision = choose_precision(config.precision, device)
    ranks.check_same("--precision", precision)
    ranks.open_exchange(device)
    if config.preprocess != "none":  # whose sizes are those of the images
        needs.check_memory(config, device, precision)
    with ranks.one_by_one():
        root = data_folder(config)
    request, config = config, sized_by_data(config, root)
    if request.preprocess == "none":
        needs.check_memory(config, device, precision)
    options = config.loader_options(ranks.rank, ranks.size)
    if device.type == "cpu" and config.num_threads is None:
        threads = max(1, loader_threads(options.num_threads) // ranks.local_size)
        options = dataclasses.replace(options, num_threads=threads)
    loader = open_loader(root, options, device=device, dtype=WORKING_TYPES[precision])
    names = hashlib.sha256("\n".join(pair.name for pair in loader.pairs).encode()).hexdigest()
    ranks.check_same(f"--dataroot {root}", f"{len(loader)} pairs, whose names have the digest {names[:8]}")
    an_epoch = loader.batches_per_epoch
    needs.check_data(config, loader, precision, config.steps_left(0, 0, an_epoch, an_epoch))
    samples = sample_pairs(root, config, device, WORKING_TYPES[precision]) if ranks.first else []
    networks = build_networks(config.network_options())
    if found is None and config.init_from is not None:
        print(*begin_with(*networks, config.init_from), sep="\n")
    prepared = prepare_step(
        *networks,
        dataclasses.replace(config.step_options(), precision=precision),
        device,
        image_size=config.crop_size,
        batch_sizes=[shape[0] for shape in batch_shapes(loader, config)],
        graph=not config.no_graph,
        check=found is None
        or not environment.verified_before(
            found[1].get("environment"), device, precision, graph=not config.no_graph
        ),
        ranks=ranks,
    )
    step = prepared.step
    at = Position() if found is None else restore(step, found[1], found[0])
    if not loader.rest_of_epoch(at.sample):  # too few for so many ranks
        at = Position(at.steps, at.epoch + 1)
    prepared.capture(batch_shapes(loader, config, at.sample))
    folder = config.run_folder

    total = at.steps + config.steps_left(
        at.steps, at.epoch, len(loader.rest_of_epoch(at.sample)), loader.batches_per_epoch
    )

    def environment_block() -> dict:
        source, target = oriented(*loader.sides, loader.options.direction)
        data: dict = {
            **source.record(),
            **target.record(),
            "loader": loader.kind,
            "direction": config.resolved_direction(),
            "steps": total,
            "processes": str(ranks.size),
        }
        return environment.describe(device, prepared.resolved() | data)

    if ranks.first:
        run_folder.write_request(request)
        run_folder.write_environment(environment_block(), folder)
    print(start_line(config, loader, root, prepared, total))
    if not alone:
        print(ranks_line(config, ranks, device))

    monitor: Any = NoMonitor()
    if ranks.first:
        wandb = None
        if config.use_wandb:
            wandb = WandbRun(folder, config.wandb_project_name, config.name, request.to_dict())
        monitor = Monitor(
            folder,
            first_step=at.steps,
            total_steps=total,
            batch_size=config.batch_size * ranks.size,
            gan_mode=config.gan_mode,
            samples=samples,
            wandb=wandb,
        )
    first = tried = at.steps  # tried: the newest step that was saved, or could not be

    def save() -> None:
        nonlocal tried
        tried = at.steps
        monitor.catch_up(at.steps, lr, step)
        block = environment_block()
        state = training_state(step, config, block, at)
        check_finite(state)  # it must not displace a good one

        def write() -> None:
            checkpoint.save(folder, at.steps, state, config.keep_checkpoints)
            run_folder.write_environment(block, folder)  # the loader may have fallen back

        ranks.first_decides(write)
        monitor.report()

    stopped = f"the run goes on with --continue_train --name {config.name}"

    def stop_waiting() -> None:
        """A stop request while the loader is awaited, which may never answer."""
        try:
            if at.steps > tried:
                save()
        except Exception as error:  # which would wait for the loader on its way out
            say(f"error: {error}")
            end_at_once(2)
        say(f"stopped at step {at.steps}; {stopped}")
        end_at_once(stops.exit_code)

    stream = loader.stream(at.epoch, at.sample)
    # A graph allocates nothing when it is replayed; of several ranks none knows how far the others came.
    undo = Undo(step) if alone and prepared.run is step else None
    share = CoreShare(torch.get_num_threads())
    failure = ""
    # Of an error within a step, the state in memory is neither the old nor the new one. Of one elsewhere than
    # in the loader the other ranks do not know: they neither save with this one nor part from it.
    within_step, verdict, known_to_all = False, 0, alone
    with stop_requests(stop_waiting if alone else None, quiet=not ranks.first) as stops:
        try:
            while at.steps < total and not (alone and stops):
                began = time.perf_counter()
                try:
                    with stops.waiting():
                        batch = next(stream)
                except Exception:
                    verdict, known_to_all = ranks.agree(FAILED), True
                    raise
                monitor.waited(time.perf_counter() - began)
                if not alone and (verdict := ranks.agree(stops.received[0] if stops else 0)):
                    if verdict == FAILED:
                        failure = "error: another process of this training can't go on"
                    else:
                        stops.agree_on(verdict)
                    break
                lr = config.lr_at(at.epoch)
                step.set_lr(lr)
                within_step = True
                if undo is not None:
                    undo.mark()
                prepared.run(batch.source, batch.target)
                at = Position(at.steps + 1, batch.epoch, batch.position)
                within_step = False
                monitor.stepped()
                if monitor.losses_due(at.steps, config.print_freq):
                    monitor.read_losses(at.steps, lr, step)
                    if device.type == "cpu" and at.steps - first == FIRST_LOSSES and (line := share.advice()):
                        say(line)
                if monitor.samples_due(at.steps, config.display_freq):
                    monitor.show_samples(at.steps, lr, step)
                if at.steps % config.save_latest_freq == 0 or ends_epochs(at, config.save_epoch_freq):
                    save()
            stops.settle()
            if at.steps > first and at.steps % config.display_freq and not (stops or failure):
                monitor.show_samples(at.steps, lr, step)
            if at.steps > tried:
                save()
        except (NotFinite, RankGone) as error:
            failure = f"error: {error}"
            raise
        except Exception as error:
            failure = f"error: {error}"
            if within_step and undo is not None and undo.take_back():
                within_step = False
            if at.steps > tried and not within_step and known_to_all:
                known_to_all = save_in_spite_of(save, at.steps)
            if known_to_all:
                ranks.part()
            raise
        finally:
            monitor.close()
            line, code = f"done: {at.steps} steps; checkpoints and samples are in {folder}", 0
            if failure:
                line, code = failure, 2
            elif stops if alone else verdict:
                line, code = f"stopped at step {at.steps}; {stopped}", stops.exit_code
            with limited(line, code):  # a decoder may wait for ever
                loader.close()
            prepared.release()
        stops.finish()
        ranks.part()
    if not failure:  # else the process that met it says so
        print(line)
    if code:
        sys.exit(code)


def ranks_line(config: TrainConfig, ranks: Ranks, device: torch.device) -> str:
    """How many processes train, on what, and what a step of all of them is."""
    each, backend = ("GPU", "NCCL") if device.type == "cuda" else ("CPU process", "gloo")
    return (
        f"{ranks.size} processes, one a {each} ({backend}): --batch_size {config.batch_size} in each makes "
        f"{config.batch_size * ranks.size} pairs a step; gradients and losses are means over all"
    )


def ends_epochs(at: Position, every: int | None) -> bool:
    """Whether ``every`` epochs more are whole."""
    return every is not None and at.sample == 0 and at.epoch % every == 0


def save_in_spite_of(save: Callable[[], None], steps: int) -> bool:
    """Save what was learnt before an error ends the training, where that can be done: whether it was."""
    try:
        save()
    except Exception as error:
        say(f"step {steps} could not be saved: {error}")
        return False
    say(f"step {steps} is saved; --continue_train goes on from it")
    return True


def goes_on(folder: Path, ranks: Ranks) -> bool:
    """Whether torchrun has started the run in ``folder`` again after it saved a checkpoint, from which it
    then goes on without being told to."""
    return ranks.restarted and checkpoint.latest(folder) is not None


def defaults(ranks: Ranks, argv: Sequence[str]) -> TrainConfig | None:
    """What flags are laid over before anything is checked: what the run to continue was asked for, or what
    --quick stands for; None for neither. A flag that sets the length takes the place of theirs."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--continue_train", "--continue-train", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", default=TrainConfig.name)
    parser.add_argument(
        "--checkpoints_dir", "--checkpoints-dir", type=Path, default=TrainConfig.checkpoints_dir
    )
    try:
        flags, others = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return None  # the real parser says what is wrong
    if flags.continue_train or goes_on(flags.checkpoints_dir / flags.name, ranks):
        check_name(flags.name)
        saved = run_folder.read_request(flags.checkpoints_dir / flags.name)
    elif flags.quick:
        saved = TrainConfig(**QUICK)
    else:
        return None
    given = {word[2:].partition("=")[0].replace("-", "_") for word in others if word.startswith("--")}
    if "steps" in given:
        saved = dataclasses.replace(saved, n_epochs=None, n_epochs_decay=None)
    elif given & {"n_epochs", "n_epochs_decay"}:
        saved = dataclasses.replace(saved, steps=None)
    return saved


def main(argv: list[str] | None = None) -> None:
    """Parse and train. A continued run takes what no flag says from its own ``config.json``."""
    with joined() as ranks:

        def decided(parse: Callable[[], TrainConfig]) -> TrainConfig:
            def request() -> TrainConfig:
                config = parse()
                again = config.continue_train or goes_on(config.run_folder, ranks)
                return dataclasses.replace(config, continue_train=again)

            return ranks.first_decides(request)

        def command(config: TrainConfig) -> None:
            train(config, ranks)

        cli.run(
            TrainConfig,
            command,
            argv,
            default=partial(defaults, ranks),
            habits=train_words,
            decide=decided,
            complain=ranks.complain,
        )


if __name__ == "__main__":
    main()
