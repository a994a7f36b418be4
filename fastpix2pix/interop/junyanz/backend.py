"""Our networks and training step behind the ``Pix2PixModel`` of pytorch-CycleGAN-and-pix2pix.

Both of its forms are served: that of 2020 (``--gpu_ids``, DataParallel) and that of 2025 (torchrun, networks
initialised in ``setup``).
"""

import copy
import importlib
import os
from collections.abc import Iterator
from types import FunctionType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastpix2pix.errors import UserError
from fastpix2pix.interop.junyanz.weights import export_weights, load_weights
from fastpix2pix.kernels.deep_conv import float32_convolutions_use_tf32
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.models.blocks import Epilogue
from fastpix2pix.models.discriminator import min_size
from fastpix2pix.models.generator import size_multiple
from fastpix2pix.models.options import GENERATOR_DEPTHS
from fastpix2pix.training.distributed import Ranks, ranks_of_group
from fastpix2pix.training.optim import MasterAdam
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.precision import WORKING_TYPES
from fastpix2pix.training.prepare import PreparedStep, prepare_step

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
    return network.module if isinstance(network, nn.DataParallel | DistributedDataParallel) else network


def _is_published_adam(optimizer: torch.optim.Optimizer, opt: Any) -> bool:
    (group,) = optimizer.param_groups
    found = (group.get("initial_lr", group["lr"]), group["betas"], group["eps"], group["weight_decay"])
    published = (opt.lr, (opt.beta1, 0.999), 1e-8, 0)
    return type(optimizer) is torch.optim.Adam and found == published and not group["amsgrad"]


def _differ(theirs: nn.Module, ours: nn.Module, size: int) -> bool:
    """Whether two networks that hold the same weights train differently: dropout, results, statistics.

    Compared on the CPU, where no tf32 blurs the difference.
    """
    theirs, ours = (copy.deepcopy(network).cpu().train() for network in (theirs, ours))
    dropouts = [layer for layer in theirs.modules() if isinstance(layer, nn.Dropout)]
    epilogues = [layer for layer in ours.modules() if isinstance(layer, Epilogue) and layer.config.dropout]
    if [layer.p for layer in dropouts] != [epilogue.config.dropout for epilogue in epilogues]:
        return True
    for layer, epilogue in zip(dropouts, epilogues, strict=True):
        layer.p, epilogue.config = 0.0, epilogue.config._replace(dropout=0.0)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, ours.in_channels, size, size, generator=random).to(next(ours.parameters()))
    with torch.no_grad():
        compared = [(theirs(x), ours(x))]
    our_state = export_weights(ours)
    for key, value in theirs.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            compared.append((value, our_state[key]))
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
        ranks = ranks_of_group(self.device)
        obstacle: str | None = self._obstacle(opt, ranks)
        ours = self._own_networks(opt) if obstacle is None else {}
        if isinstance(ours, str):
            obstacle = ours
        if ranks.agree(obstacle is not None) and obstacle is None:
            obstacle = "what another process runs"
        if obstacle is None:
            obstacle = self._take_over(opt, ours, ranks)
        if obstacle is not None:
            print(NOT_ACCELERATED.format(obstacle))

    def _obstacle(self, opt: Any, ranks: Ranks) -> str | None:
        """What our backend does not cover in this run, or None."""
        flags = ACCELERATED_IN_TRAINING if self.isTrain else ACCELERATED
        for flag, values in flags.items():
            if getattr(opt, flag) not in values:
                return f"--{flag} {getattr(opt, flag)}"
        if len(getattr(self, "gpu_ids", ())) > 1:
            return "one process on several GPUs"
        if ranks.size > 1 and self.isTrain and self.precision is not None:
            # Masters would have to be gathered by all processes, and their program saves in the first alone.
            return f"--precision {self.precision} in several processes"
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

    def _depths(self, opt: Any) -> tuple[int, int, int]:
        """Of the generator and of the discriminator, and the fewest pixels a side that both can work on."""
        depth = GENERATOR_DEPTHS[opt.netG]
        n_layers = opt.n_layers_D if self.isTrain and opt.netD == "n_layers" else 3
        return depth, n_layers, max(size_multiple(depth), min_size(n_layers))

    def _own_networks(self, opt: Any) -> dict[str, nn.Module] | str:
        """Ours with the weights of theirs, by name; or what keeps them from taking over."""
        depth, n_layers, size = self._depths(opt)
        ours: dict[str, nn.Module] = {}
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
        return ours

    def _take_over(self, opt: Any, ours: dict[str, nn.Module], ranks: Ranks) -> str | None:
        """Put our networks, step and optimizers in the place of theirs; or say what keeps them."""
        if self.isTrain:
            try:
                prepared = self._prepare(opt, ours["G"], ours["D"], ranks)
            except UserError as error:
                if ranks.size > 1:  # the others have begun
                    raise
                return f"training on this device ({error})"
        for name, network in ours.items():
            parallel = isinstance(getattr(self, f"net{name}"), nn.DataParallel)
            setattr(self, f"net{name}", nn.DataParallel(network, self.gpu_ids) if parallel else network)
        if self.isTrain:
            self._start_training(opt, prepared)
        self.taken_over = True
        print(f"fastpix2pix: net{' and net'.join(ours)} run accelerated on {self.device}")
        return None

    def _prepare(self, opt: Any, generator: Any, discriminator: Any, ranks: Ranks) -> PreparedStep:
        """Our step on their device, in fp32 unless ``precision`` says otherwise."""
        tf32 = self.device.type == "cuda" and float32_convolutions_use_tf32()
        options = StepOptions(
            preset="junyanz",
            gan_mode=opt.gan_mode,
            lambda_L1=opt.lambda_L1,
            lr=opt.lr,
            beta1=opt.beta1,
            precision=self.precision or ("tf32" if tf32 else "fp32"),
        )
        with torch.random.fork_rng():
            *_, size = self._depths(opt)
            return prepare_step(generator, discriminator, options, self.device, image_size=size, ranks=ranks)

    def _start_training(self, opt: Any, prepared: PreparedStep) -> None:
        """Put our step in the place of theirs, and its optimizers where their schedulers find them."""
        self.train_step, self.run_step = prepared.step, prepared.run
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
        if ranks_of_group(self.device).rank:
            return
        for name, network, optimizer in self._networks():
            if self.isTrain:  # in a step of theirs G sees one batch, and D three: fake, real, and fake again
                _count_batches(network, self.uncounted_steps * (1 if name == "G" else 3))
            # In float32 the weights are the masters, which several processes would have to gather together.
            state = export_weights(network, optimizer if self.working_type is not None else None)
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
    (``--netG resnet_9blocks``, ``--gan_mode wgangp``, ``--norm syncbatch``, a changed update rule, ...) runs
    as before, after one line that says so. Processes of torchrun's are accelerated together, in float32:
    gradients are means over all, as under DistributedDataParallel, and so are the losses.

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
