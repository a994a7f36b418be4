"""``python -m fastpix2pix.interop.junyanz``: an unchanged script of that repository on our backend."""

import argparse
import os
import runpy
import sys

from fastpix2pix.errors import UserError
from fastpix2pix.interop.junyanz.backend import install


def main(argv: list[str]) -> None:
    """``install()``, then run a script with the flags after it, as ``python`` would."""
    parser = argparse.ArgumentParser(
        prog="python -m fastpix2pix.interop.junyanz",
        description="Run train.py or test.py of pytorch-CycleGAN-and-pix2pix on fastpix2pix.",
    )
    parser.add_argument("--precision", choices=("bf16", "fp16"), help="train in 16 bits (default: float32)")
    parser.add_argument("script", help="train.py or test.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its own flags")
    arguments = parser.parse_args(argv)
    if not os.path.isfile(arguments.script):
        raise UserError(
            f"{arguments.script} is not a file; give train.py or test.py of a checkout of "
            "pytorch-CycleGAN-and-pix2pix, then its flags"
        )
    sys.argv = [arguments.script, *arguments.flags]
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments.script)))
    install(arguments.precision)
    runpy.run_path(arguments.script, run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
