"""Which folders are packages; everything else about the project is said in pyproject.toml."""

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

KERNELS = "fastpix2pix.kernels"
IN_PLACE = [
    "fastpix2pix",
    "fastpix2pix.data",
    "fastpix2pix.interop",
    "fastpix2pix.interop.junyanz",
    "fastpix2pix.models",
    "fastpix2pix.training",
]


class EditableByPath(editable_wheel):
    """``pip install -e`` by a path to the clone rather than by setuptools' import hook.

    Python asks import hooks last, so from the folder that contains the clone it would find the clone itself,
    a folder called fastpix2pix without ``__init__.py``, first. A package found on any path comes before
    such a folder. setuptools writes a path where all packages lie below one folder: ``kernels`` is left out
    here, and ``fastpix2pix/__init__.py`` finds it beside itself.
    """

    def finalize_options(self):
        self.distribution.packages = IN_PLACE
        self.distribution.package_dir = {"": "."}
        super().finalize_options()


setup(
    packages=[*IN_PLACE, KERNELS],
    package_dir={KERNELS: "kernels"},
    package_data={"fastpix2pix": ["py.typed"]},
    cmdclass={"editable_wheel": EditableByPath},
)
