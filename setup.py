from pathlib import Path

from setuptools import setup

# DALI publishes wheels for Linux on x86-64 and Arm only; elsewhere the portable loader runs.
HAS_DALI = 'sys_platform == "linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")'

# On x86-64 Linux plain "tensorflow" is the build with CUDA; elsewhere it is the one to have.
X86_LINUX = 'sys_platform == "linux" and platform_machine == "x86_64"'
NOT_X86_LINUX = 'sys_platform != "linux" or platform_machine != "x86_64"'

setup(
    name="fastpix2pix",
    version="0.1.0",
    description="pix2pix training as fast as the hardware allows, with the TensorFlow tutorial's numbers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["fastpix2pix", "fastpix2pix.data", "fastpix2pix.interop", "fastpix2pix.kernels"],
    package_dir={"fastpix2pix.kernels": "kernels"},
    install_requires=[
        "torch>=2.8",
        'triton>=3.4; sys_platform == "linux"',
        f"nvidia-dali-cuda120>=2.2; {HAS_DALI}",
        "numpy>=1.24",
        "Pillow>=9.5",
        "tensorboard>=2.14",
        "tyro>=0.9",
        "tqdm>=4.65",
        "pooch[progress]>=1.8",
        "requests>=2.28",
        "filelock>=3.12",
    ],
    extras_require={
        "export": ["onnx>=1.15", "onnxruntime>=1.17"],
        "test": ["pytest>=8", "hypothesis>=6.100", "onnx>=1.15", "onnxruntime>=1.17"],
        "golden": [f"tensorflow-cpu>=2.16; {X86_LINUX}", f"tensorflow>=2.16; {NOT_X86_LINUX}"],
        "bench": ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.7"],
    },
)
