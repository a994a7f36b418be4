"""A miniature of pytorch-CycleGAN-and-pix2pix, written for the tests from its published architecture.

It has what the backend meets: the networks with their keys, ``Pix2PixModel`` and its base class, ``train.py``
and ``test.py``. The environment variable MINIATURE_FORM chooses between the form of 2020 (``gpu_ids``,
networks initialised where they are defined) and that of 2025 (``opt.device``, initialised in ``setup``, and
wrapped in DistributedDataParallel in a process of torchrun's).
"""

import importlib

CLASSES = {"pix2pix": "Pix2PixModel", "own_loss": "OwnLossModel", "template": "TemplateModel"}


def create_model(opt):
    module = importlib.import_module(f"models.{opt.model}_model")
    model = getattr(module, CLASSES[opt.model])(opt)
    print(f"model [{type(model).__name__}] was created")
    return model
