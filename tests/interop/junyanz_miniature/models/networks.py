"""U-Net generator and PatchGAN discriminator as nested nn.Sequentials, initialised by class name."""

import functools
import os

import torch
from torch import nn

FORM = os.environ.get("MINIATURE_FORM", "2020")


def get_norm_layer(kind):
    if kind == "batch":
        return functools.partial(nn.BatchNorm2d, affine=True, track_running_stats=True)
    return functools.partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)


class UnetLevel(nn.Module):
    """Down, the next level, up; all but the outermost level put their input beside their output.

    The first activation works in place, so what is put beside is the activated input.
    """

    def __init__(self, outer, inner, norm, inside=None, inputs=None, dropout=False):
        super().__init__()
        bias = norm.func is nn.InstanceNorm2d
        self.outermost = inputs is not None
        down = nn.Conv2d(inputs or outer, inner, 4, 2, 1, bias=bias)
        if self.outermost:
            layers = [down, inside, nn.ReLU(True), nn.ConvTranspose2d(2 * inner, outer, 4, 2, 1), nn.Tanh()]
        else:
            up = nn.ConvTranspose2d(2 * inner if inside else inner, outer, 4, 2, 1, bias=bias)
            middle = [norm(inner), inside] if inside else []
            layers = [nn.LeakyReLU(0.2, True), down, *middle, nn.ReLU(True), up, norm(outer)]
        self.model = nn.Sequential(*layers, *([nn.Dropout(0.5)] if dropout else []))

    def forward(self, x):
        y = self.model(x)
        return y if self.outermost else torch.cat([x, y], 1)


class Unet(nn.Module):
    def __init__(self, input_nc, output_nc, num_downs, ngf, norm, dropout):
        super().__init__()
        level = UnetLevel(8 * ngf, 8 * ngf, norm)
        for _ in range(num_downs - 5):
            level = UnetLevel(8 * ngf, 8 * ngf, norm, level, dropout=dropout)
        for width in (4, 2, 1):
            level = UnetLevel(width * ngf, 2 * width * ngf, norm, level)
        self.model = UnetLevel(output_nc, ngf, norm, level, inputs=input_nc)

    def forward(self, x):
        return self.model(x)


class PatchGAN(nn.Module):
    def __init__(self, input_nc, ndf, n_layers, norm):
        super().__init__()
        layers = [nn.Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        width = ndf
        for n in range(1, n_layers + 1):
            before, width = width, ndf * min(2**n, 8)
            conv = nn.Conv2d(
                before, width, 4, 2 if n < n_layers else 1, 1, bias=norm.func is nn.InstanceNorm2d
            )
            layers += [conv, norm(width), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, x):
        return self.model(x)


class PlainGenerator(nn.Module):
    """Stands for any generator that is not a U-Net."""

    def __init__(self, input_nc, output_nc, norm):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(input_nc, output_nc, 3, 1, 1), norm(output_nc), nn.Tanh())

    def forward(self, x):
        return self.model(x)


def init_net(net, init_type="normal", init_gain=0.02):
    def initialise(layer):
        name = type(layer).__name__
        if "Conv" in name:
            getattr(nn.init, {"normal": "normal_", "xavier": "xavier_normal_"}[init_type])(
                layer.weight, **({"std": init_gain} if init_type == "normal" else {"gain": init_gain})
            )
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif "BatchNorm2d" in name:
            nn.init.normal_(layer.weight, 1.0, init_gain)
            nn.init.zeros_(layer.bias)

    return net.apply(initialise)


def define_G(input_nc, output_nc, ngf, kind, norm, dropout, init_type, init_gain, gpu_ids=()):
    norm = get_norm_layer(norm)
    if kind == "resnet_9blocks":
        net = PlainGenerator(input_nc, output_nc, norm)
    else:
        net = Unet(input_nc, output_nc, {"unet_128": 7, "unet_256": 8}[kind], ngf, norm, dropout)
    return init_net(net, init_type, init_gain) if FORM == "2020" else net


def define_D(input_nc, ndf, kind, n_layers, norm, init_type, init_gain, gpu_ids=()):
    net = PatchGAN(input_nc, ndf, 3 if kind == "basic" else n_layers, get_norm_layer(norm))
    return init_net(net, init_type, init_gain) if FORM == "2020" else net


class GANLoss(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.loss = {"lsgan": nn.MSELoss(), "vanilla": nn.BCEWithLogitsLoss(), "wgangp": None}[mode]

    def forward(self, prediction, real):
        if self.mode == "wgangp":
            return -prediction.mean() if real else prediction.mean()
        return self.loss(prediction, torch.full_like(prediction, float(real)))


def get_scheduler(optimizer, opt):
    def factor(epoch):
        return 1.0 - max(0, epoch + opt.epoch_count - opt.n_epochs) / (opt.n_epochs_decay + 1)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
