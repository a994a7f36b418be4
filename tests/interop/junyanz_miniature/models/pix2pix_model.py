"""The pix2pix model: conditional GAN loss and L1, the discriminator's step before the generator's."""

import torch

from . import networks
from .base_model import BaseModel


class Pix2PixModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["G_GAN", "G_L1", "D_real", "D_fake"]
        self.visual_names = ["real_A", "fake_B", "real_B"]
        self.model_names = ["G", "D"] if self.isTrain else ["G"]
        initial = (opt.init_type, opt.init_gain)
        gpus = (self.gpu_ids,) if networks.FORM == "2020" else ()
        self.netG = networks.define_G(
            opt.input_nc, opt.output_nc, opt.ngf, opt.netG, opt.norm, not opt.no_dropout, *initial, *gpus
        )
        if self.isTrain:
            self.netD = networks.define_D(
                opt.input_nc + opt.output_nc, opt.ndf, opt.netD, opt.n_layers_D, opt.norm, *initial, *gpus
            )
            self.criterionGAN = networks.GANLoss(opt.gan_mode).to(self.device)
            self.criterionL1 = torch.nn.L1Loss()
            adam = {"lr": opt.lr, "betas": (opt.beta1, 0.999)}
            self.optimizer_G = torch.optim.Adam(self.netG.parameters(), **adam)
            self.optimizer_D = torch.optim.Adam(self.netD.parameters(), **adam)
            self.optimizers = [self.optimizer_G, self.optimizer_D]

    def set_input(self, pair):
        a, b = ("A", "B") if self.opt.direction == "AtoB" else ("B", "A")
        self.real_A, self.real_B = pair[a].to(self.device), pair[b].to(self.device)
        self.image_paths = pair[a + "_paths"]

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def backward_D(self):
        pred_fake = self.netD(torch.cat((self.real_A, self.fake_B), 1).detach())
        self.loss_D_fake = self.criterionGAN(pred_fake, False)
        pred_real = self.netD(torch.cat((self.real_A, self.real_B), 1))
        self.loss_D_real = self.criterionGAN(pred_real, True)
        self.loss_D = (self.loss_D_fake + self.loss_D_real) * 0.5
        self.loss_D.backward()

    def backward_G(self):
        pred_fake = self.netD(torch.cat((self.real_A, self.fake_B), 1))
        self.loss_G_GAN = self.criterionGAN(pred_fake, True)
        self.loss_G_L1 = self.criterionL1(self.fake_B, self.real_B) * self.opt.lambda_L1
        self.loss_G = self.loss_G_GAN + self.loss_G_L1
        self.loss_G.backward()

    def optimize_parameters(self):
        self.forward()
        self.set_requires_grad(self.netD, True)
        self.optimizer_D.zero_grad()
        self.backward_D()
        self.optimizer_D.step()
        self.set_requires_grad(self.netD, False)
        self.optimizer_G.zero_grad()
        self.backward_G()
        self.optimizer_G.step()
