# Everything that the README's first command needs, for GPUs and CPUs; docs/install.md says how to use it.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# Triton builds the launchers of its kernels with a C compiler, when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Empty: PyTorch's standard build, with CUDA. For a smaller image without CUDA, the index of its CPU builds.
ARG TORCH_INDEX=""
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch>=2.8"

COPY setup.py pyproject.toml README.md LICENSE /src/
COPY kernels /src/kernels
COPY fastpix2pix /src/fastpix2pix
RUN pip install --no-cache-dir "/src[export]" && rm -r /src

# Runs, the painted data set and compiled kernels go into the folder that is mounted here.
WORKDIR /work
ENV HOME=/work NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["python", "-m", "fastpix2pix.train", "--quick"]
