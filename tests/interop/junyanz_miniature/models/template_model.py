"""A model of its own, as ``--model template`` is: one network, trained on L1 alone."""

import torch

from . import networks
from .base_model import BaseModel
from .pix2pix_model import Pix2PixModel


class TemplateModel(BaseModel):
    set_input = Pix2PixModel.set_input

    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["G_GAN", "G_L1", "D_real", "D_fake"]
        self.loss_G_GAN = self.loss_D_real = self.loss_D_fake = torch.zeros(())
        self.model_names = ["G"]
        norm = networks.get_norm_layer("batch")
        self.netG = networks.init_net(networks.PlainGenerator(opt.input_nc, opt.output_nc, norm))
        self.optimizers = [torch.optim.Adam(self.netG.parameters(), lr=opt.lr)]

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def optimize_parameters(self):
        self.forward()
        self.loss_G_L1 = (self.fake_B - self.real_B).abs().mean()
        self.optimizers[0].zero_grad()
        self.loss_G_L1.backward()
        self.optimizers[0].step()
