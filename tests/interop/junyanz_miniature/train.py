"""Train on random pairs: as many epochs of two steps as the flags say."""

import os

import torch
import torch.distributed as dist
from models import create_model
from options import parse

if __name__ == "__main__":
    opt = parse(train=True)
    rank, ranks = 0, 1
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    os.makedirs(os.path.join(opt.checkpoints_dir, opt.name), exist_ok=True)
    torch.manual_seed(1234)
    model = create_model(opt)
    model.setup(opt)
    for _ in range(opt.epoch_count, opt.n_epochs + opt.n_epochs_decay + 1):
        model.update_learning_rate()
        for _ in range(2):
            a, b = torch.rand(ranks, 2, 1, 3, opt.crop_size, opt.crop_size)[rank] * 2 - 1
            model.set_input({"A": a, "B": b, "A_paths": ["a.jpg"], "B_paths": ["b.jpg"]})
            model.optimize_parameters()
            print("losses", *(f"{name} {value:.8f}" for name, value in model.get_current_losses().items()))
    model.save_networks("latest")
