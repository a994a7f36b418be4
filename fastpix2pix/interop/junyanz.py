"""pytorch-CycleGAN-and-pix2pix: its weights in and out, and its programs on our backend.

    python -m fastpix2pix.interop.junyanz train.py --dataroot ./datasets/facades --model pix2pix ...

runs that repository's unchanged ``train.py`` (or ``test.py``) with our networks and our training step behind
its ``Pix2PixModel``. ``install()`` does the same from inside a program. Both of its forms are served: that of
2020 (``--gpu_ids``, DataParallel) and that of 2025 (torchrun, networks initialised in ``setup``).
"""

import argparse
import copy
import importlib
import os
import pickle
import runpy
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastpix2pix.config import GENERATOR_DEPTHS, TrainConfig
from fastpix2pix.errors import UserError
from fastpix2pix.graph import CapturedStep
from fastpix2pix.host_memory import keep_freed_memory
from fastpix2pix.models import Block, Epilogue, PatchDiscriminator, UNetGenerator
from fastpix2pix.optim import MasterAdam
from fastpix2pix.precision import WORKING_TYPES
from fastpix2pix.selfcheck import verify_or_fall_back
from fastpix2pix.step import TrainStep

# ---------------------------------------------------------------------------------------------- weights
#
# Its checkpoints (latest_net_G.pth, latest_net_D.pth) are bare state_dicts whose keys spell out nested
# nn.Sequentials. In the U-Net each level holds the next one inside, between its convolution and its
# transposed convolution.

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
NOT_LEARNED = ("running_mean", "running_var", "num_batches_tracked")
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel, DistributedDataParallel and torch.compile put before every key."""


class _Level(NamedTuple):
    """Positions in one level's nn.Sequential; activations and dropout take positions too."""

    down: int
    down_norm: int | None
    inner: int | None
    up: int
    up_norm: int | None


OUTERMOST = _Level(down=0, down_norm=None, inner=1, up=3, up_norm=None)
BETWEEN = _Level(down=1, down_norm=2, inner=3, up=5, up_norm=6)
INNERMOST = _Level(down=1, down_norm=None, inner=None, up=3, up_norm=4)


class _Entry(NamedTuple):
    """One key of the state_dict, and the attribute of our module that holds its value."""

    key: str
    owner: nn.Module
    attribute: str

    @property
    def value(self) -> Tensor:
        """A tensor; ``num_batches_tracked``, which we keep as a number beside the norm, made into one."""
        return torch.as_tensor(getattr(self.owner, self.attribute, 0))


def _block_entries(block: Block, conv_key: str, norm_key: str | None) -> Iterator[_Entry]:
    epilogue = block.epilogue
    yield _Entry(f"{conv_key}.weight", block.conv, "weight")
    if block.conv.bias is not None:
        yield _Entry(f"{conv_key}.bias", block.conv, "bias")
    elif epilogue.norm is None and epilogue.bias is not None:
        yield _Entry(f"{conv_key}.bias", epilogue, "bias")
    if epilogue.norm == "batch":
        yield from (_Entry(f"{norm_key}.{name}", epilogue, name) for name in BATCH_NORM)


def _generator_entries(
    generator: UNetGenerator, depth: int = 0, prefix: str = "model.model"
) -> Iterator[_Entry]:
    deepest = generator.num_downs - 1
    at = OUTERMOST if depth == 0 else INNERMOST if depth == deepest else BETWEEN
    yield from _block_entries(generator.downs[depth], f"{prefix}.{at.down}", f"{prefix}.{at.down_norm}")
    if depth < deepest:
        yield from _generator_entries(generator, depth + 1, f"{prefix}.{at.inner}.model")
    if depth > 0:
        yield from _block_entries(
            generator.ups[deepest - depth], f"{prefix}.{at.up}", f"{prefix}.{at.up_norm}"
        )
    else:
        yield from (_Entry(f"{prefix}.{at.up}.{name}", generator.last, name) for name in ("weight", "bias"))


def _discriminator_entries(discriminator: PatchDiscriminator) -> Iterator[_Entry]:
    yield from _block_entries(discriminator.blocks[0], "model.0", None)
    position = 2
    for block in discriminator.blocks[1:]:
        yield from _block_entries(block, f"model.{position}", f"model.{position + 1}")
        position += 3
    yield from (_Entry(f"model.{position}.{name}", discriminator.last, name) for name in ("weight", "bias"))


def _entries(module: nn.Module) -> list[_Entry]:
    """Everything that the checkpoint of ``module`` holds, in its order."""
    if getattr(module, "preset", None) == "junyanz":
        if isinstance(module, UNetGenerator):
            return list(_generator_entries(module))
        if isinstance(module, PatchDiscriminator):
            return list(_discriminator_entries(module))
    raise UserError(
        f"{type(module).__name__} is not one of pytorch-CycleGAN-and-pix2pix's networks; its weights fit "
        "UNetGenerator and PatchDiscriminator with preset='junyanz'"
    )


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a checkpoint such as latest_net_G.pth")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not a readable PyTorch state_dict; give a file that save_networks wrote"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a bare state_dict; give a file that save_networks wrote")
    return state


def _unwrapped(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def _described(keys: set[str]) -> str:
    """What network a state_dict belongs to, in words."""
    if any(".conv_block." in key for key in keys):
        return "a ResNet generator"
    if "net.0.weight" in keys:
        return "a pixel discriminator"
    norm = "batch" if any(key.endswith("running_mean") for key in keys) else "instance or no"
    if "model.model.0.weight" in keys:
        depth = max(key.count("model.") for key in keys) - 1
        return f"a U-Net with {depth} downsamplings and {norm} norm"
    if "model.0.weight" in keys:
        last = max(int(key.split(".")[1]) for key in keys)
        return f"a discriminator with {(last - 2) // 3} strided layers and {norm} norm"
    return "an unknown network"


def load_weights(module: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copy a checkpoint of pytorch-CycleGAN-and-pix2pix into a network of preset "junyanz".

    source: the path of ``*_net_G.pth`` or ``*_net_D.pth``, or such a state_dict, with or without the prefix
    of a parallel or compiled module. Tensors take the module's type and device. Files of PyTorch before
    0.4.1, without ``num_batches_tracked`` or with statistics of instance norms, load as they do there.

    Raises UserError when it belongs to another network; the module is then unchanged.
    """
    entries = _entries(module)
    name = "the state_dict" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else _read(Path(source))
    state = {_unwrapped(key): value for key, value in state.items()}

    expected = {entry.key for entry in entries}
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    surplus = {
        key for key in state.keys() - expected if module.norm == "batch" or not key.endswith(NOT_LEARNED)
    }
    if surplus or expected - optional - state.keys():
        raise UserError(
            f"{name} holds {_described(state.keys())}, the module is {_described(expected)}; "
            "build the module to match it"
        )
    for entry in entries:
        if entry.key in state and state[entry.key].shape != entry.value.shape:
            raise UserError(
                f"{name} has {entry.key} of shape {tuple(state[entry.key].shape)}, the module "
                f"{tuple(entry.value.shape)}; build the module with the checkpoint's widths and channels"
            )
    with torch.no_grad():
        for entry in entries:
            if entry.attribute == "num_batches_tracked":
                entry.owner.num_batches_tracked = int(state.get(entry.key, 0))
            else:
                entry.value.copy_(state[entry.key])


def read_generator(path: str | Path) -> UNetGenerator:
    """The U-Net that a ``*_net_G.pth`` belongs to, with its weights; on the CPU, their default dropout.

    Raises UserError when the file is not the checkpoint of a U-Net.
    """
    state = {_unwrapped(key): value for key, value in _read(Path(path)).items()}
    first, last = (state.get(f"model.model.{at}.weight") for at in (OUTERMOST.down, OUTERMOST.up))
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise UserError(f"{path} holds {_described(state.keys())}; give the weights of a U-Net generator")
    generator = UNetGenerator(
        "junyanz",
        in_channels=first.shape[1],
        out_channels=last.shape[1],
        ngf=first.shape[0],
        num_downs=max(key.count("model.") for key in state) - 1,
        # Files of PyTorch before 0.4.1 hold statistics of instance norms too, but only batch norm learns.
        norm="batch" if "model.model.1.model.2.weight" in state else "instance",
    )
    load_weights(generator, state)
    return generator


def export_weights(module: nn.Module, optimizer: MasterAdam | None = None) -> OrderedDict[str, Tensor]:
    """The state_dict that pytorch-CycleGAN-and-pix2pix would save: the inverse of ``load_weights``.

    A copy on the CPU, in float32 (float64 if the module is), in the order and layout of its own files; where
    the module's weights have 16 bits, those of its ``optimizer``'s masters. ``num_batches_tracked`` is what
    was loaded: no forward pass of ours counts batches, or needs to.
    """
    masters = {} if optimizer is None else dict(zip(optimizer.parameters(), optimizer.masters(), strict=True))
    state = OrderedDict()
    for entry in _entries(module):
        value = masters.get(entry.value, entry.value).detach()
        dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        state[entry.key] = value.to("cpu", dtype, copy=True).contiguous()
    return state


# ---------------------------------------------------------------------------------------------- backend

NOT_ACCELERATED = "fastpix2pix: {} is not accelerated; running this repository's own code"

ACCELERATED = {"netG": ("unet_128", "unet_256"), "norm": ("batch", "instance")}
ACCELERATED_IN_TRAINING = ACCELERATED | {"netD": ("basic", "n_layers"), "gan_mode": ("vanilla", "lsgan")}
"""Flags, and the values with which our backend takes over."""

JUDGE = {"torch", "cat", "real_A", "real_B", "fake_B", "netD", "criterionGAN", "backward"}
PUBLISHED_UPDATE = {
    "forward": {"netG", "real_A", "fake_B"},
    "backward_D": JUDGE | {"detach", "loss_D_fake", "loss_D_real", "loss_D", 0.5},
    "backward_G": JUDGE | {"criterionL1", "opt", "lambda_L1", "loss_G_GAN", "loss_G_L1", "loss_G"},
    "optimize_parameters": {"forward", "set_requires_grad", "netD", "zero_grad", "step"}
    | {"optimizer_D", "backward_D", "optimizer_G", "backward_G"},
}
"""The update rule that our step reproduces, recognised by what its methods mention: every name, and every
fractional number. A fork with a loss, a weight or a network of its own mentions something else."""


def _mentions(method: FunctionType) -> set[str | float]:
    code = method.__code__
    return {*code.co_names, *(value for value in code.co_consts if isinstance(value, float))}


def _unwrap(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, nn.DataParallel) else network


def _is_published_adam(optimizer: torch.optim.Optimizer, opt: Any) -> bool:
    (group,) = optimizer.param_groups
    found = (group.get("initial_lr", group["lr"]), group["betas"], group["eps"], group["weight_decay"])
    published = (opt.lr, (opt.beta1, 0.999), 1e-8, 0)
    return type(optimizer) is torch.optim.Adam and found == published and not group["amsgrad"]


def _differ(theirs: nn.Module, ours: nn.Module, size: int) -> bool:
    """Whether two networks that hold the same weights train differently: dropout, results, statistics."""
    theirs, ours = copy.deepcopy(theirs).train(), copy.deepcopy(ours).train()
    dropouts = [layer for layer in theirs.modules() if isinstance(layer, nn.Dropout)]
    epilogues = [layer for layer in ours.modules() if isinstance(layer, Epilogue) and layer.config.dropout]
    if [layer.p for layer in dropouts] != [epilogue.config.dropout for epilogue in epilogues]:
        return True
    for layer, epilogue in zip(dropouts, epilogues, strict=True):
        layer.p, epilogue.config = 0.0, epilogue.config._replace(dropout=0.0)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, ours.in_channels, size, size, generator=random).to(next(ours.parameters()))
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        compared = [(theirs(x), ours(x))]
    our_state = export_weights(ours)
    for key, value in theirs.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            compared.append((value.cpu(), our_state[key]))
    return any(
        not torch.allclose(result, expected, rtol=0, atol=0.01 * expected.abs().max().item())
        for expected, result in compared
    )


class AcceleratedPix2Pix:
    """Goes before their ``Pix2PixModel`` in the order of inheritance; ``setup`` is where ours takes over."""

    taken_over = False
    precision: str | None = None
    """bf16 or fp16 for training; None is float32, in whose tf32 torch's own flags have the say."""
    working_type: torch.dtype | None = None

    def setup(self, opt: Any) -> None:
        """Theirs, which initialises or loads the networks; then ours take over their weights."""
        super().setup(opt)
        obstacle = self._obstacle(opt) or self._take_over(opt)
        if obstacle is not None:
            print(NOT_ACCELERATED.format(obstacle))

    def _obstacle(self, opt: Any) -> str | None:
        """What our backend does not cover in this run, or None."""
        flags = ACCELERATED_IN_TRAINING if self.isTrain else ACCELERATED
        for flag, values in flags.items():
            if getattr(opt, flag) not in values:
                return f"--{flag} {getattr(opt, flag)}"
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed or len(getattr(self, "gpu_ids", ())) > 1:
            return "running on several GPUs"
        for name in PUBLISHED_UPDATE if self.isTrain else ("forward",):
            method = getattr(type(self), name)
            if method is getattr(AcceleratedPix2Pix, name, None):
                method = getattr(super(), name).__func__
            if _mentions(method) != PUBLISHED_UPDATE[name]:
                return f"the {name} of this {type(self).__name__}, which is not the published one,"
        if self.model_names != (["G", "D"] if self.isTrain else ["G"]):
            return f"a model of the networks {', '.join(self.model_names)}"
        if not all(_is_published_adam(optimizer, opt) for optimizer in self.optimizers):
            return "an optimizer other than the published Adam"
        return None

    def _take_over(self, opt: Any) -> str | None:
        """Put our networks, step and optimizers in the place of theirs; or say what keeps them."""
        depth = GENERATOR_DEPTHS[opt.netG]
        n_layers = opt.n_layers_D if self.isTrain and opt.netD == "n_layers" else 3
        size = max(2**depth, 2 ** (n_layers + 2))  # pixels that both networks can work on
        ours = {}
        with torch.random.fork_rng(devices=[]):  # their random numbers go on as if we had drawn none
            ours["G"] = UNetGenerator(
                "junyanz",
                opt.input_nc,
                opt.output_nc,
                opt.ngf,
                depth,
                opt.norm,
                dropout=0.0 if opt.no_dropout else 0.5,
                seed=torch.initial_seed() & (2**63 - 1),
            )
            if self.isTrain:
                channels = opt.input_nc + opt.output_nc
                ours["D"] = PatchDiscriminator("junyanz", channels, opt.ndf, n_layers, opt.norm)
        for name, network in ours.items():
            network.to(self.device)
            theirs = _unwrap(getattr(self, f"net{name}"))
            try:
                load_weights(network, theirs.state_dict())
            except UserError:
                return f"net{name}, which is not the published one,"
            if _differ(theirs, network, size):
                return f"net{name}, whose results are not those of the published one,"

        for name, network in ours.items():
            parallel = isinstance(getattr(self, f"net{name}"), nn.DataParallel)
            setattr(self, f"net{name}", nn.DataParallel(network, self.gpu_ids) if parallel else network)
        if self.isTrain:
            self._start_training(opt, n_layers, size)
        self.taken_over = True
        print(f"fastpix2pix: net{' and net'.join(ours)} run accelerated on {self.device}")
        return None

    def _start_training(self, opt: Any, n_layers: int, size: int) -> None:
        """Make our step, and put its optimizers where their schedulers find them."""
        on_gpu = self.device.type == "cuda"
        if not on_gpu:
            keep_freed_memory()
        tf32 = on_gpu and torch.backends.cudnn.allow_tf32
        config = TrainConfig(
            preset="junyanz",
            netG=opt.netG,
            ngf=opt.ngf,
            ndf=opt.ndf,
            n_layers_D=n_layers,
            norm=opt.norm,
            no_dropout=opt.no_dropout,
            batch_size=opt.batch_size,
            load_size=size,
            crop_size=size,
            gan_mode=opt.gan_mode,
            lambda_L1=opt.lambda_L1,
            lr=opt.lr,
            beta1=opt.beta1,
            precision=self.precision or ("tf32" if tf32 else "fp32"),
        )
        if on_gpu:
            with torch.random.fork_rng():
                config = verify_or_fall_back(config, self.device)
        self.train_step = TrainStep(_unwrap(self.netG), _unwrap(self.netD), config)
        captured = on_gpu and not config.no_graph
        self.run_step = CapturedStep(self.train_step) if captured else self.train_step
        self.working_type = None if self.precision is None else WORKING_TYPES[self.precision]
        self.uncounted_steps = 0
        self.optimizer_G, self.optimizer_D = self.train_step.gen_optimizer, self.train_step.disc_optimizer
        self.optimizers = [self.optimizer_G, self.optimizer_D]
        networks = importlib.import_module("models.networks")
        self.schedulers = [networks.get_scheduler(optimizer, opt) for optimizer in self.optimizers]

    def forward(self) -> None:
        if self.working_type is None:
            return super().forward()
        self.fake_B = self.netG(self.real_A.to(self.working_type)).to(self.real_A.dtype)

    def optimize_parameters(self) -> None:
        if not self.taken_over:
            return super().optimize_parameters()
        losses = self.run_step(*(x.to(self.working_type or x.dtype) for x in (self.real_A, self.real_B)))
        self.uncounted_steps += 1
        # A copy, as a captured step draws the next image in the same place.
        self.fake_B = self.train_step.fake.to(self.real_B.dtype, copy=True)
        self.loss_D_real, self.loss_D_fake = losses.disc_real_loss, losses.disc_fake_loss
        self.loss_D, self.loss_G = losses.disc_loss, losses.gen_total_loss
        self.loss_G_GAN = losses.gen_gan_loss
        self.loss_G_L1 = losses.gen_l1_loss * self.opt.lambda_L1

    def _networks(self) -> Iterator[tuple[str, nn.Module, MasterAdam | None]]:
        """(name, network, its optimizer when training)."""
        for name in self.model_names:
            network = _unwrap(getattr(self, f"net{name}"))
            yield name, network, getattr(self, f"optimizer_{name}") if self.isTrain else None

    def save_networks(self, epoch: int | str) -> None:
        """Write ``<epoch>_net_G.pth`` and ``<epoch>_net_D.pth``, in their form."""
        if not self.taken_over:
            return super().save_networks(epoch)
        for name, network, optimizer in self._networks():
            if self.isTrain:  # in a step of theirs G sees one batch, and D three: fake, real, and fake again
                _count_batches(network, self.uncounted_steps * (1 if name == "G" else 3))
            state = export_weights(network, optimizer)
            torch.save(state, os.path.join(self.save_dir, f"{epoch}_net_{name}.pth"))
        self.uncounted_steps = 0

    def load_networks(self, epoch: int | str) -> None:
        if not self.taken_over:
            return super().load_networks(epoch)
        for name, network, optimizer in self._networks():
            path = os.path.join(self.save_dir, f"{epoch}_net_{name}.pth")
            print(f"loading the model from {path}")
            load_weights(network, path)
            if optimizer is not None and self.working_type is not None:
                full = copy.deepcopy(network).float()
                load_weights(full, path)
                optimizer.set_masters(full.parameters())


def _count_batches(network: nn.Module, batches: int) -> None:
    for layer in network.modules():
        if isinstance(layer, Epilogue) and layer.norm == "batch":
            layer.num_batches_tracked = getattr(layer, "num_batches_tracked", 0) + batches


def install(precision: Literal["bf16", "fp16"] | None = None) -> None:
    """Let ``--model pix2pix`` of the pytorch-CycleGAN-and-pix2pix on ``sys.path`` run on our backend.

    Call it before that program creates its model. Flags, files, printed lines and the interface of the model
    stay as they were; dropout draws from our own stream, seeded by torch's. What our backend doesn't cover
    (``--netG resnet_9blocks``, ``--gan_mode wgangp``, several GPUs, a changed update rule, ...) runs as
    before, after one line that says so.

    precision: the type in which training computes, on float32 masters; by default float32, as there. Files
    are in float32 always. Raises UserError where no such program is found.
    """
    try:
        module = importlib.import_module("models.pix2pix_model")
    except ModuleNotFoundError as error:
        if error.name not in ("models", "models.pix2pix_model"):
            raise
        raise UserError(
            "models/pix2pix_model.py is not on sys.path; run this inside a checkout of "
            "pytorch-CycleGAN-and-pix2pix"
        ) from error
    theirs = module.Pix2PixModel
    if issubclass(theirs, AcceleratedPix2Pix):
        return
    module.Pix2PixModel = type(theirs.__name__, (AcceleratedPix2Pix, theirs), {"precision": precision})
    models = importlib.import_module("models")
    create_model_of_theirs = models.create_model

    def create_model(opt: Any) -> Any:
        model = create_model_of_theirs(opt)
        if not isinstance(model, AcceleratedPix2Pix):
            print(NOT_ACCELERATED.format(f"--model {opt.model}"))
        return model

    models.create_model = create_model


def main(argv: list[str]) -> None:
    """``install()``, then run a script with the flags after it, as ``python`` would."""
    parser = argparse.ArgumentParser(
        prog="python -m fastpix2pix.interop.junyanz",
        description="Run train.py or test.py of pytorch-CycleGAN-and-pix2pix on fastpix2pix.",
    )
    parser.add_argument("--precision", choices=("bf16", "fp16"), help="train in 16 bits (default: float32)")
    parser.add_argument("script", help="train.py or test.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its own flags")
    arguments = parser.parse_args(argv)
    if not os.path.isfile(arguments.script):
        raise UserError(
            f"{arguments.script} is not a file; give train.py or test.py of a checkout of "
            "pytorch-CycleGAN-and-pix2pix, then its flags"
        )
    sys.argv = [arguments.script, *arguments.flags]
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments.script)))
    install(arguments.precision)
    runpy.run_path(arguments.script, run_name="__main__")


if __name__ == "__main__":
    from fastpix2pix.interop import junyanz  # under its own name, by which a script may import it too

    try:
        junyanz.main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
