"""Translate one random image with the saved generator, into ``visuals.pt`` beside the weights."""

import os

import torch
from models import create_model
from options import parse

if __name__ == "__main__":
    opt = parse(train=False)
    model = create_model(opt)
    model.setup(opt)
    if opt.eval:
        model.eval()
    a, b = (
        torch.rand(2, 1, 3, opt.crop_size, opt.crop_size, generator=torch.Generator().manual_seed(7)) * 2 - 1
    )
    model.set_input({"A": a, "B": b, "A_paths": ["a.jpg"], "B_paths": ["b.jpg"]})
    model.test()
    torch.save(dict(model.get_current_visuals()), os.path.join(opt.checkpoints_dir, opt.name, "visuals.pt"))
