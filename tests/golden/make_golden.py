"""Make the golden numbers with TensorFlow, and write them or compare them with the committed ones.

    pip install -e ".[golden]"
    python tests/golden/make_golden.py --check

Networks, losses, optimizers and preprocessing are those of the TensorFlow tutorial "pix2pix:
Image-to-image translation with a conditional GAN", with its layers' defaults, whatever they are. Weights and
inputs come from ``recipe.py``. There is no dropout: its masks would be TensorFlow's own.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import recipe
import tensorflow as tf
from keras import layers

FOLDER = Path(__file__).resolve().parent
LAMBDA = 100
CORNER = {"y": 11, "x": 17}  # of the one crop
GRADIENT_SAMPLES = [
    "G.down1.kernel",
    "G.down5.kernel",
    "G.down8.beta",
    "G.up4.kernel",
    "G.up7.gamma",
    "G.last.kernel",
    "G.last.bias",
    "D.down1.kernel",
    "D.conv4.kernel",
    "D.conv4.gamma",
    "D.last.kernel",
    "D.last.bias",
]
EXTREME_LOGITS = [-200.0, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 200.0]

# The largest relative difference that --check accepts; README.md says why. What has no limit must be equal.
LIMITS = {
    ("tutorial_float64", "step0_forward"): 1e-10,
    ("tutorial_float64", "step0_grad_l2"): 1e-10,
    ("tutorial_float64", "step0_grad_sample"): 1e-10,
    ("tutorial_float64", "trajectory"): 1e-10,
    ("tutorial_float32", "step0_forward"): 1e-4,
    ("tutorial_float32", "step0_grad_l2"): 1e-3,
    ("tutorial_float32", "step0_grad_sample"): 5e-3,
    ("tutorial_float32", "trajectory"): 3e-4,
    ("tutorial_float32", "after5_kernel_change"): 3e-2,
    ("losses", "float64"): 1e-12,
    ("losses", "float32"): 2e-6,
    ("losses", "extreme_logits"): 2e-6,
}


# ------------------------------------------------------------------------------------------ the networks


class Network(NamedTuple):
    model: keras.Model
    layers: list
    """The layers that have weights, in the order of ``recipe.weights``."""

    @property
    def weights(self) -> list:
        return [weight for layer in self.layers for weight in layer.weights]

    @property
    def trainable(self) -> list:
        return [weight for layer in self.layers for weight in layer.trainable_weights]


def _initial():
    return keras.initializers.RandomNormal(0.0, 0.02)


def generator() -> Network:
    """U-Net of eight halvings and eight doublings."""
    weighted = []

    def own(layer):
        weighted.append(layer)
        return layer

    image = x = layers.Input((256, 256, 3))
    skips = []
    for i, width in enumerate((64, 128, 256, 512, 512, 512, 512, 512)):
        conv = layers.Conv2D(width, 4, 2, "same", use_bias=False, kernel_initializer=_initial())
        x = own(conv)(x)
        if i:
            x = own(layers.BatchNormalization())(x)
        x = layers.LeakyReLU()(x)
        skips.append(x)
    for width, skip in zip((512, 512, 512, 512, 256, 128, 64), skips[-2::-1], strict=True):
        conv = layers.Conv2DTranspose(width, 4, 2, "same", use_bias=False, kernel_initializer=_initial())
        x = own(conv)(x)
        x = own(layers.BatchNormalization())(x)
        x = layers.Concatenate()([layers.ReLU()(x), skip])  # the tutorial's dropout stands before the ReLU
    last = layers.Conv2DTranspose(3, 4, 2, "same", kernel_initializer=_initial(), activation="tanh")
    return Network(keras.Model(image, own(last)(x)), weighted)


def discriminator() -> Network:
    """PatchGAN on input and output image, stacked on channels."""
    weighted = []

    def own(layer):
        weighted.append(layer)
        return layer

    source, image = layers.Input((256, 256, 3)), layers.Input((256, 256, 3))
    x = layers.Concatenate()([source, image])
    for width in (64, 128, 256):
        x = own(layers.Conv2D(width, 4, 2, "same", use_bias=False, kernel_initializer=_initial()))(x)
        if width > 64:
            x = own(layers.BatchNormalization())(x)
        x = layers.LeakyReLU()(x)
    x = layers.ZeroPadding2D()(x)
    x = own(layers.Conv2D(512, 4, 1, use_bias=False, kernel_initializer=_initial()))(x)
    x = own(layers.BatchNormalization())(x)
    x = layers.LeakyReLU()(x)
    x = layers.ZeroPadding2D()(x)
    logits = own(layers.Conv2D(1, 4, 1, kernel_initializer=_initial()))(x)
    return Network(keras.Model([source, image], logits), weighted)


# ------------------------------------------------------------------------------------- losses and update


def generator_loss(fake_logits, fake, target):
    """(total, adversarial, L1)"""
    entropy = keras.losses.BinaryCrossentropy(from_logits=True)
    gan = entropy(tf.ones_like(fake_logits), fake_logits)
    l1 = tf.reduce_mean(tf.abs(target - fake))
    return gan + LAMBDA * l1, gan, l1


def discriminator_loss(real_logits, fake_logits):
    """(total, real, generated)"""
    entropy = keras.losses.BinaryCrossentropy(from_logits=True)
    real = entropy(tf.ones_like(real_logits), real_logits)
    generated = entropy(tf.zeros_like(fake_logits), fake_logits)
    return real + generated, real, generated


def make_step(g: Network, d: Network):
    """The tutorial's update: both gradients are taken before either network changes."""
    g_adam = keras.optimizers.Adam(2e-4, beta_1=0.5)
    d_adam = keras.optimizers.Adam(2e-4, beta_1=0.5)

    @tf.function
    def step(source, target):
        with tf.GradientTape() as g_tape, tf.GradientTape() as d_tape:
            fake = g.model(source, training=True)
            real_logits = d.model([source, target], training=True)
            fake_logits = d.model([source, fake], training=True)
            total, gan, l1 = generator_loss(fake_logits, fake, target)
            disc, _, _ = discriminator_loss(real_logits, fake_logits)
        g_gradients = g_tape.gradient(total, g.trainable)
        d_gradients = d_tape.gradient(disc, d.trainable)
        g_adam.apply_gradients(zip(g_gradients, g.trainable, strict=True))
        d_adam.apply_gradients(zip(d_gradients, d.trainable, strict=True))
        losses = {"gen_total_loss": total, "gen_gan_loss": gan, "gen_l1_loss": l1, "disc_loss": disc}
        outputs = {"G(input)": fake, "D(input,target)": real_logits, "D(input,gen)": fake_logits}
        return outputs, losses, g_gradients + d_gradients

    return step


# ----------------------------------------------------------------------------------------- the numbers


def _compute_in(dtype: str) -> None:
    keras.config.set_floatx(dtype)  # of losses
    keras.config.set_dtype_policy(dtype)  # of layers


def _sample(array: np.ndarray, count: int) -> dict:
    flat = array.reshape(-1)
    where = recipe.sample_positions(flat.size, count)
    return {"sample_idx": where.tolist(), "sample": [float(value) for value in flat[where]]}


def _l2(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array, dtype=np.float64).sum()))


def tutorial(dtype: str) -> dict:
    """Outputs and gradients of the first step, losses of five, and how far the kernels moved in them."""
    _compute_in(dtype)
    networks = generator(), discriminator()
    names, arrays = zip(*recipe.weights(), strict=True)
    data = recipe.pairs()
    variables = [weight for network in networks for weight in network.weights]
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    trainable = [name for name in names if "moving" not in name]
    step = make_step(*networks)
    trajectory = []
    for i, (source, target) in enumerate(data):
        outputs, losses, gradients = step(tf.cast(source, dtype), tf.cast(target, dtype))
        trajectory.append({name: float(loss) for name, loss in losses.items()})
        if i == 0:
            forward = {
                name: {"std": float(output.numpy().std(dtype=np.float64)), **_sample(output.numpy(), 64)}
                for name, output in outputs.items()
            }
            gradients = {
                name: value.numpy().astype(dtype) for name, value in zip(trainable, gradients, strict=True)
            }
            l2 = {name: _l2(gradient) for name, gradient in gradients.items()}
            samples = {name: _sample(gradients[name], 16) for name in GRADIENT_SAMPLES}
    numbers = {
        "inputs_sha256": recipe.digest([*arrays, *(image for pair in data for image in pair)]),
        "step0_forward": forward,
        "step0_grad_l2": l2,
        "step0_grad_sample": samples,
        "trajectory": trajectory,
    }
    if dtype == "float32":
        numbers["after5_kernel_change"] = {  # mean over the kernel
            name: float(np.abs(variable.numpy().astype(np.float64) - array).mean())
            for name, variable, array in zip(names, variables, arrays, strict=True)
            if name.endswith("kernel")
        }
    return numbers


def losses() -> dict:
    """Both losses and their gradients on fixed logits, and the cross-entropy of extreme ones."""
    inputs = recipe.loss_inputs()
    numbers = {"inputs_sha256": recipe.digest(inputs.values())}
    for dtype in ("float32", "float64"):
        _compute_in(dtype)
        real, fake, image, target = (tf.constant(array, dtype) for array in inputs.values())
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([real, fake, image])
            total, gan, l1 = generator_loss(fake, image, target)
            disc, real_loss, generated_loss = discriminator_loss(real, fake)
        values = {
            "gan": gan,
            "l1": l1,
            "disc": disc,
            "real_loss": real_loss,
            "generated_loss": generated_loss,
        }
        gradients = {
            "d gan/d fake_logits": tape.gradient(gan, fake),
            "d total/d gen_output": tape.gradient(total, image),
            "d disc/d real_logits": tape.gradient(disc, real),
            "d disc/d fake_logits": tape.gradient(disc, fake),
        }
        numbers[dtype] = {name: float(value) for name, value in values.items()} | {
            name: {"l2": _l2(value.numpy()), "min": float(value.numpy().min()), **_sample(value.numpy(), 16)}
            for name, value in gradients.items()
        }
    _compute_in("float32")
    entropy = keras.losses.BinaryCrossentropy(from_logits=True)
    numbers["extreme_logits"] = {
        str(x): {name: float(entropy([[y]], [[x]])) for name, y in (("ones", 1.0), ("zeros", 0.0))}
        for x in EXTREME_LOGITS
    }
    return numbers


def preprocessing() -> dict:
    """Resize to 286, one crop of 256, flip and normalisation of one picture: digests of the pixels."""
    picture = recipe.picture()
    halves = {"real": picture[:, :256], "input": picture[:, 256:]}

    def resize(image, size: int):
        nearest = tf.image.ResizeMethod.NEAREST_NEIGHBOR
        return tf.image.resize(tf.cast(image, tf.float32), (size, size), method=nearest)

    def crop(image):
        return resize(image, 286)[CORNER["y"] : CORNER["y"] + 256, CORNER["x"] : CORNER["x"] + 256]

    def normalised(image) -> str:
        return recipe.digest([(image / 127.5 - 1).numpy()])

    ramp = np.broadcast_to(np.arange(256)[:, None, None], (256, 256, 1))
    grey_levels = tf.range(256, dtype=tf.float32)
    return {
        "inputs_sha256": recipe.digest([picture]),
        "index_table_286_from_256": resize(ramp, 286).numpy()[:, 0, 0].astype(int).tolist(),
        "corner": CORNER,
        "sha256_of_resized_uint8": {
            name: recipe.digest([resize(half, 286).numpy().astype(np.uint8)]) for name, half in halves.items()
        },
        "sha256_of_float32": {
            "not_flipped": {name: normalised(crop(half)) for name, half in halves.items()},
            "flipped": {
                name: normalised(tf.image.flip_left_right(crop(half))) for name, half in halves.items()
            },
            "test_image": {name: normalised(resize(half, 256)) for name, half in halves.items()},
            "grey_levels": normalised(grey_levels),
        },
    }


FILES = {
    "preprocessing": preprocessing,
    "losses": losses,
    "tutorial_float32": lambda: tutorial("float32"),
    "tutorial_float64": lambda: tutorial("float64"),
}


# ----------------------------------------------------------------------------------- writing and checking


def to_json(numbers: dict) -> str:
    """JSON with a line for each entry of each section."""
    sections = []
    for name, section in numbers.items():
        if isinstance(section, dict):
            rows = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items())
            sections.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
        else:
            sections.append(f" {json.dumps(name)}: {json.dumps(section)}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def differences(fresh, committed) -> Iterator[float]:
    """Relative ones; those in a list of floats relative to its largest. What is no float must be equal."""
    if isinstance(committed, dict):
        if fresh.keys() != committed.keys():
            yield math.inf
        for key in fresh.keys() & committed.keys():
            yield from differences(fresh[key], committed[key])
    elif isinstance(committed, list) and isinstance(committed[0], dict):
        for one, other in zip(fresh, committed, strict=True):
            yield from differences(one, other)
    elif isinstance(committed, list) and isinstance(committed[0], float):
        difference = np.abs(np.subtract(fresh, committed)).max()
        yield difference / np.abs(committed).max()
    elif isinstance(committed, float) and fresh != committed:
        yield abs(fresh - committed) / abs(committed) if committed else math.inf
    else:
        yield 0.0 if fresh == committed else math.inf


def check(name: str, fresh: dict) -> bool:
    """Print a line for each section of a file, and return whether all are within their limits."""
    committed = json.loads((FOLDER / f"{name}.json").read_text())
    agrees = fresh.keys() == committed.keys()
    for section in [key for key in fresh if key in committed and key != "made_with"]:
        largest = max(differences(fresh[section], committed[section]))
        limit = LIMITS.get((name, section), 0.0)
        agrees &= largest <= limit
        result = "equal" if largest == 0 else f"largest difference {largest:.1e}, limit {limit:.0e}"
        print(f"{name:17} {section:25} {result}{'' if largest <= limit else '  <-- TOO LARGE'}")
    return agrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the committed numbers")
    action.add_argument("--write", action="store_true", help="replace the committed numbers")
    parser.add_argument("--only", choices=FILES, help="this file alone")
    options = parser.parse_args()
    made_with = {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__}
    print(", ".join(f"{package} {version}" for package, version in made_with.items()))
    agrees = True
    for name in [options.only] if options.only else FILES:
        numbers = {"made_with": made_with, **FILES[name]()}
        if options.write:
            (FOLDER / f"{name}.json").write_text(to_json(numbers))
        else:
            agrees &= check(name, numbers)
    sys.exit(not agrees)


if __name__ == "__main__":
    main()
