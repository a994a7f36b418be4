"""What its models share: setting up, reading losses and images, learning rate, files."""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict

import torch
import torch.distributed as dist

from . import networks


class BaseModel(ABC):
    def __init__(self, opt):
        self.opt = opt
        self.isTrain = opt.isTrain
        self.save_dir = os.path.join(opt.checkpoints_dir, opt.name)
        if networks.FORM == "2020":
            self.gpu_ids = opt.gpu_ids
            self.device = torch.device(f"cuda:{self.gpu_ids[0]}" if self.gpu_ids else "cpu")
        else:
            self.device = opt.device
        self.loss_names, self.model_names, self.visual_names, self.optimizers = [], [], [], []

    @abstractmethod
    def forward(self): ...

    @abstractmethod
    def optimize_parameters(self): ...

    def setup(self, opt):
        if networks.FORM == "2025":
            for name in self.model_names:
                networks.init_net(getattr(self, "net" + name), opt.init_type, opt.init_gain).to(self.device)
        if self.isTrain:
            self.schedulers = [networks.get_scheduler(optimizer, opt) for optimizer in self.optimizers]
        if not self.isTrain or opt.continue_train:
            self.load_networks(opt.epoch)
        self.print_networks(opt.verbose)
        if dist.is_initialized():
            for name in self.model_names:
                network = torch.nn.parallel.DistributedDataParallel(getattr(self, "net" + name))
                setattr(self, "net" + name, network)

    def eval(self):
        for name in self.model_names:
            getattr(self, "net" + name).eval()

    def test(self):
        with torch.no_grad():
            self.forward()

    def update_learning_rate(self):
        before = self.optimizers[0].param_groups[0]["lr"]
        for scheduler in self.schedulers:
            scheduler.step()
        after = self.optimizers[0].param_groups[0]["lr"]
        print(f"learning rate {before:.7f} -> {after:.7f}")

    def get_current_visuals(self):
        return OrderedDict((name, getattr(self, name)) for name in self.visual_names)

    def get_current_losses(self):
        return OrderedDict((name, getattr(self, "loss_" + name).item()) for name in self.loss_names)

    def save_networks(self, epoch):
        if dist.is_initialized() and dist.get_rank():
            return
        for name in self.model_names:
            path = os.path.join(self.save_dir, f"{epoch}_net_{name}.pth")
            network = getattr(self, "net" + name)
            network = network.module if dist.is_initialized() else network
            torch.save(network.cpu().state_dict(), path)

    def load_networks(self, epoch):
        for name in self.model_names:
            path = os.path.join(self.save_dir, f"{epoch}_net_{name}.pth")
            print(f"loading the model from {path}")
            getattr(self, "net" + name).load_state_dict(torch.load(path, map_location=str(self.device)))

    def print_networks(self, verbose):
        for name in self.model_names:
            parameters = sum(p.numel() for p in getattr(self, "net" + name).parameters())
            print(f"[Network {name}] Total number of parameters : {parameters / 1e6:.3f} M")

    def set_requires_grad(self, net, requires_grad):
        for parameter in net.parameters():
            parameter.requires_grad = requires_grad
