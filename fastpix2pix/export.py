"""``python -m fastpix2pix.export``: a trained generator as an ONNX file that is checked against PyTorch.

The graph is written node by node: the network is a chain of five operators, and the norm keeps what
exporters of BatchNorm lose, the statistics of each image (junyanz issues #748, #1113).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastpix2pix import cli
from fastpix2pix.errors import UserError
from fastpix2pix.models import UNetGenerator
from fastpix2pix.models.blocks import Block, Epilogue
from fastpix2pix.translator import Translator, load

try:
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper
except ImportError:
    onnx = None  # type: ignore[assignment]

OPSET, IR_VERSION = 17, 8  # of early 2022: nothing newer is needed
TOLERANCE = 1e-3  # of an image in [-1, 1]; 8 bits are steps of 8e-3


def export_onnx(translator: Translator, path: Path) -> float:
    """Write the generator as an ONNX file and return its largest difference from PyTorch on a random image.

    Input "input" and output "generated" are float32 (n, channels, height, width) in [-1, 1], with sides that
    are multiples of 2 ** num_downs. Each image is normalised by its own statistics, or in evaluation by the
    running ones; dropout is left out, so the same image gives the same result everywhere.

    Raises UserError when onnx or onnxruntime is not installed, the difference exceeds 1e-3 (nothing is then
    written), or ``path`` cannot be written or is no plain file.
    """
    if onnx is None:
        raise UserError('export needs onnx and onnxruntime; run pip install "fastpix2pix[export]"')
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(
            f"{path}: is a link, folder or device, which is not overwritten; choose another --output"
        )
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # left by a process that was killed
        try:
            onnx.save(_Graph(translator).model(), partial)
            difference = compare(translator, partial, _random_image(translator))
            if not difference <= TOLERANCE:
                raise UserError(f"{path}: not written, for its results are {difference:.2g} off PyTorch's")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; choose another --output") from error
    return difference


def compare(translator: Translator, path: Path, images: Tensor) -> float:
    """Largest absolute difference between ONNX Runtime and PyTorch, without dropout, over ``images``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; shapes that vary make it warn
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    generator = translator.generator
    configs = [(block.epilogue, block.epilogue.config) for block in generator.ups]
    for epilogue, config in configs:
        epilogue.config = config._replace(dropout=0.0)
    try:
        largest = 0.0
        for image in images:
            (theirs,) = session.run(None, {"input": image[None].numpy()})
            ours = translator(image[None])
            # np.maximum, for max(0.0, nan) is 0.0
            largest = float(np.maximum(largest, np.abs(theirs - ours.numpy()).max()))
        return largest
    finally:
        for epilogue, config in configs:
            epilogue.config = config


def _random_image(translator: Translator) -> Tensor:
    shape = (1, translator.generator.in_channels, translator.size, translator.size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


class _Graph:
    """Builds the ONNX graph of a UNetGenerator; every method takes and returns names of values."""

    def __init__(self, translator: Translator):
        self.translator, self.generator = translator, translator.generator
        self.nodes: list = []
        self.weights: list = []

    def model(self) -> "onnx.ModelProto":
        generator = self.generator
        self._op("Tanh", [self._unet(generator)], "generated")
        shapes: dict[str, list[str | int | None]] = {
            "input": ["n", generator.in_channels, "height", "width"],
            "generated": ["n", generator.out_channels, "height", "width"],
        }
        inputs, outputs = (
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)]
            for name, shape in shapes.items()
        )
        graph = helper.make_graph(self.nodes, "generator", inputs, outputs, self.weights)
        model = helper.make_model(
            graph,
            producer_name="fastpix2pix",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
            doc_string=self.translator.source,
        )
        multiple = 2**generator.num_downs
        said = {"direction": self.translator.direction, "multiple_of": str(multiple)}
        helper.set_model_props(model, said | self.translator.input.record() | self.translator.output.record())
        onnx.checker.check_model(model)
        return model

    def _unet(self, generator: UNetGenerator) -> str:
        """The generator up to its tanh: encoder, then decoder blocks joined with the mirrored encoder's."""
        x, skips = "input", []
        for i, down in enumerate(generator.downs):
            z = self._normalised(down, x, f"down{i + 1}")
            config = down.epilogue.config
            x = self._activated(z, config.slope)
            if config.skip_slope is not None:
                same = config.skip_slope == config.slope
                skips.append(x if same else self._activated(z, config.skip_slope))
        for i, (up, skip) in enumerate(zip(generator.ups, reversed(skips), strict=True)):
            y = self._activated(self._normalised(up, x, f"up{i + 1}"), up.epilogue.config.slope)
            x = self._op("Concat", [skip, y] if generator.skip_first else [y, skip], axis=1)
        return self._convolution(generator.last, x, "last", generator.last.bias)

    def _normalised(self, block: Block, x: str, name: str) -> str:
        """Convolution and norm of a block."""
        epilogue = block.epilogue
        # A convolution that no norm follows keeps its bias in the epilogue.
        bias = block.conv.bias if epilogue.norm else epilogue.bias
        x = self._convolution(block.conv, x, name, bias)
        return self._norm(epilogue, block.conv.out_channels, x, name) if epilogue.norm else x

    def _convolution(
        self, conv: nn.Conv2d | nn.ConvTranspose2d, x: str, name: str, bias: Tensor | None
    ) -> str:
        operands = [x, self._weight(f"{name}.weight", conv.weight)]
        if bias is not None:
            operands.append(self._weight(f"{name}.bias", bias))
        kind = "ConvTranspose" if isinstance(conv, nn.ConvTranspose2d) else "Conv"
        return self._op(kind, operands, strides=conv.stride, pads=2 * conv.padding)

    def _norm(self, epilogue: Epilogue, channels: int, x: str, name: str) -> str:
        affine = epilogue.norm == "batch"
        scale = epilogue.weight if affine else torch.ones(channels)
        shift = epilogue.bias if affine else torch.zeros(channels)
        operands = [x, self._weight(f"{name}.scale", scale), self._weight(f"{name}.shift", shift)]
        if affine and self.translator.evaluation:
            operands.append(self._weight(f"{name}.mean", epilogue.running_mean))
            operands.append(self._weight(f"{name}.variance", epilogue.running_var))
            return self._op("BatchNormalization", operands, epsilon=epilogue.config.eps)
        return self._op("InstanceNormalization", operands, epsilon=epilogue.config.eps)

    def _activated(self, x: str, slope: float) -> str:
        return self._op("LeakyRelu", [x], alpha=slope) if slope else self._op("Relu", [x])

    def _weight(self, name: str, value: Tensor) -> str:
        array = value.detach().cpu().float().contiguous().numpy()
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def _op(self, kind: str, operands: list[str], output: str | None = None, **attributes) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, operands, [output], **attributes))
        return output


@dataclass
class ExportConfig:
    """Export a trained generator to ONNX, and check the file against PyTorch with onnxruntime."""

    run: Path
    """Folder of a run (its newest checkpoint is used), a step_*.pt, a *_net_G.pth of
    pytorch-CycleGAN-and-pix2pix, or the tutorial's generator as np.savez(FILE, *generator.get_weights())."""
    output: Path
    """The ONNX file."""
    eval: bool = False
    """Normalise by the running statistics instead of by each image's own."""


def export(config: ExportConfig) -> None:
    """Export what ``config`` names. Raises UserError for what the user can mend."""
    translator = load(config.run, device="cpu", evaluation=config.eval)
    difference = export_onnx(translator, config.output)
    print(f"{config.output}: {translator.source}, at most {difference:.1g} off PyTorch; dropout is left out")


def main(argv: list[str] | None = None) -> None:
    cli.run(ExportConfig, export, argv)


if __name__ == "__main__":
    main()
