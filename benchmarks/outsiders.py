"""Training steps of other people's programs, as they are installed: the TensorFlow tutorial, junyanz's code.

Unlike the peers in ``peers.py``, which are the same mathematics in our own PyTorch lines, these run what
people have. They start from weights of their own, as they would.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.workload import Workload
from fastpix2pix.errors import UserError

Step = Callable[[], object]
"""Takes one training step."""


def has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def tensorflow_tutorial(workload: Workload) -> Step:
    """The step of the TensorFlow tutorial "pix2pix: Image-to-image translation with a conditional GAN": its
    layers with their defaults, one ``tf.function``, on as many threads as PyTorch has here."""
    import tensorflow as tf
    from keras import layers

    tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
    tf.config.threading.set_inter_op_parallelism_threads(1)
    initial = tf.random_normal_initializer(0.0, 0.02)

    def convolution(kind, filters, stride, **options):
        padding = options.pop("padding", "same")
        options = {"use_bias": False} | options
        return kind(filters, 4, strides=stride, padding=padding, kernel_initializer=initial, **options)

    def generator():
        image = x = layers.Input((workload.size, workload.size, 3))
        widths = [workload.ngf * min(2**i, 8) for i in range(workload.network_options().num_downs)]
        skips = []
        for i, width in enumerate(widths):
            x = convolution(layers.Conv2D, width, 2)(x)
            x = layers.BatchNormalization()(x) if i else x
            x = layers.LeakyReLU()(x)
            skips.append(x)
        for i, (width, skip) in enumerate(zip(widths[-2::-1], skips[-2::-1], strict=True)):
            x = layers.BatchNormalization()(convolution(layers.Conv2DTranspose, width, 2)(x))
            x = layers.Dropout(0.5)(x) if i < 3 and not workload.no_dropout else x
            x = layers.Concatenate()([layers.ReLU()(x), skip])
        last = convolution(layers.Conv2DTranspose, 3, 2, use_bias=True, activation="tanh")
        return tf.keras.Model(image, last(x))

    def discriminator():
        source, image = (layers.Input((workload.size, workload.size, 3)) for _ in range(2))
        x = layers.Concatenate()([source, image])
        for i in range(3):
            x = convolution(layers.Conv2D, workload.ndf * 2**i, 2)(x)
            x = layers.BatchNormalization()(x) if i else x
            x = layers.LeakyReLU()(x)
        x = convolution(layers.Conv2D, 8 * workload.ndf, 1, padding="valid")(layers.ZeroPadding2D()(x))
        x = layers.ZeroPadding2D()(layers.LeakyReLU()(layers.BatchNormalization()(x)))
        logits = convolution(layers.Conv2D, 1, 1, padding="valid", use_bias=True)(x)
        return tf.keras.Model([source, image], logits)

    generate, judge = generator(), discriminator()
    entropy = tf.keras.losses.BinaryCrossentropy(from_logits=True)
    adams = [tf.keras.optimizers.Adam(2e-4, beta_1=0.5) for _ in range(2)]

    @tf.function
    def train_step(source, target):
        with tf.GradientTape() as of_generator, tf.GradientTape() as of_discriminator:
            fake = generate(source, training=True)
            real_logits = judge([source, target], training=True)
            fake_logits = judge([source, fake], training=True)
            gan = entropy(tf.ones_like(fake_logits), fake_logits)
            total = gan + 100 * tf.reduce_mean(tf.abs(target - fake))
            real = entropy(tf.ones_like(real_logits), real_logits)
            disc = real + entropy(tf.zeros_like(fake_logits), fake_logits)
        for tape, loss, model, adam in zip(
            (of_generator, of_discriminator), (total, disc), (generate, judge), adams, strict=True
        ):
            gradients = tape.gradient(loss, model.trainable_variables)
            adam.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return total, disc

    pairs = _in_turn(
        [
            [tf.constant(np.ascontiguousarray(half.permute(0, 2, 3, 1))) for half in pair]
            for pair in workload.pairs(4)
        ]
    )
    return lambda: [loss.numpy() for loss in train_step(*pairs())]


def check_checkout(checkout: Path, preset: str) -> None:
    """Raise UserError for a folder that is no checkout of pytorch-CycleGAN-and-pix2pix, or another preset."""
    if preset != "junyanz":
        raise UserError(f"--junyanz {checkout}: that code computes another step; add --preset junyanz")
    if not (checkout / "models" / "pix2pix_model.py").is_file():
        raise UserError(
            f"--junyanz {checkout}: no models/pix2pix_model.py in it; give a checkout of "
            "pytorch-CycleGAN-and-pix2pix"
        )


def junyanz_program(checkout: Path, workload: Workload) -> Step:
    """The step of pytorch-CycleGAN-and-pix2pix in ``checkout``, by its own options and model classes."""
    sys.path.insert(0, str(checkout.resolve()))
    folder = tempfile.mkdtemp()
    flags = {
        "dataroot": folder,
        "checkpoints_dir": folder,
        "name": "benchmark",
        "model": "pix2pix",
        "netG": workload.netG,
        "ngf": workload.ngf,
        "ndf": workload.ndf,
        "crop_size": workload.size,
        "batch_size": workload.batch_size,
    }
    options = _junyanz_options([part for flag, value in flags.items() for part in (f"--{flag}", str(value))])
    from models import create_model  # type: ignore[import-not-found]  # of the checkout

    model = create_model(options)
    model.setup(options)
    pairs = _in_turn([dict(zip("AB", pair, strict=True)) for pair in workload.pairs(4)])
    paths = {f"{half}_paths": [""] * workload.batch_size for half in "AB"}

    def step() -> object:
        model.set_input(pairs() | paths)
        model.optimize_parameters()
        return model.get_current_losses()

    return step


def _junyanz_options(flags: list[str]):
    """That program's parsed options. The form of 2020 takes --gpu_ids, that of 2025 decides by itself."""
    from options.train_options import TrainOptions  # type: ignore[import-not-found]  # of the checkout

    if not torch.cuda.is_available() and "gpu_ids" in _source_of(TrainOptions):
        flags = [*flags, "--gpu_ids", "-1"]
    before, sys.argv = sys.argv, ["train.py", *flags]
    try:
        options = TrainOptions().parse()
    finally:
        sys.argv = before
    if not hasattr(options, "device"):
        options.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return options


def _source_of(options_class: type) -> str:
    base = sys.modules[options_class.__mro__[1].__module__].__file__
    return Path(base).read_text(encoding="utf-8") if base else ""


def _in_turn(pairs: list) -> Callable[[], object]:
    """A function that gives one of ``pairs`` after the other, round and round."""
    taken = 0

    def next_pair():
        nonlocal taken
        taken += 1
        return pairs[taken % len(pairs)]

    return next_pair
