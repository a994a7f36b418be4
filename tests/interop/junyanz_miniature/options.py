"""The flags of its two programs that the tests use, with its defaults for the pix2pix model."""

import argparse

import torch


def parse(train, argv=None):
    parser = argparse.ArgumentParser()
    for flag, default in {
        "dataroot": None,
        "name": "experiment_name",
        "gpu_ids": "-1",
        "checkpoints_dir": "./checkpoints",
        "model": "pix2pix",
        "input_nc": 3,
        "output_nc": 3,
        "ngf": 64,
        "ndf": 64,
        "netD": "basic",
        "netG": "unet_256",
        "n_layers_D": 3,
        "norm": "batch",
        "init_type": "normal",
        "init_gain": 0.02,
        "direction": "AtoB",
        "epoch": "latest",
        "batch_size": 1,
        "crop_size": 256,
        "n_epochs": 1,
        "n_epochs_decay": 1,
        "epoch_count": 1,
        "beta1": 0.5,
        "lr": 0.0002,
        "gan_mode": "vanilla",
        "lambda_L1": 100.0,
    }.items():
        parser.add_argument(f"--{flag}", type=str if default is None else type(default), default=default)
    for flag in ("no_dropout", "continue_train", "eval", "verbose"):
        parser.add_argument(f"--{flag}", action="store_true")
    opt = parser.parse_args(argv)
    opt.isTrain = train
    opt.gpu_ids = [int(i) for i in opt.gpu_ids.split(",") if int(i) >= 0]
    opt.device = torch.device("cpu")
    return opt
