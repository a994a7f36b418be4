"""The exported ONNX file, run by ONNX Runtime, against plain forward passes of the PyTorch network."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call

from fastpix2pix import export
from fastpix2pix.errors import UserError
from fastpix2pix.models import UNetGenerator
from fastpix2pix.translator import Translator

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


def trained(preset="tutorial", *, norm="batch", num_downs=5, ngf=4, evaluation=False, seed=0, **channels):
    """A network without dropout and a translator of the same drawn weights and statistics, with dropout."""
    torch.manual_seed(seed)
    plain = UNetGenerator(preset, ngf=ngf, num_downs=num_downs, norm=norm, dropout=0.0, **channels)
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            if name.endswith("conv.weight") or name == "last.weight":
                value.mul_(3)
            elif name.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.5)
            else:
                value.add_(0.3 * torch.randn_like(value))
    network = UNetGenerator(preset, ngf=ngf, num_downs=num_downs, norm=norm, dropout=0.5, **channels)
    network.load_state_dict(plain.state_dict())
    options = {"direction": "AtoB", "size": 2**num_downs, "source": "test", "seed": 0}
    return plain.train(not evaluation), Translator(network, evaluation=evaluation, **options)


def forward(network: UNetGenerator, image: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return functional_call(network, {k: b.clone() for k, b in network.named_buffers()}, (image,)).numpy()


def run(path, images: torch.Tensor) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, {"input": images.numpy()})[0]


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_results_are_those_of_the_network(tmp_path, preset, norm, evaluation):
    plain, translator = trained(preset, norm=norm, evaluation=evaluation)
    path = tmp_path / "model.onnx"
    assert export.export_onnx(translator, path) < 1e-4
    for size in ((32, 32), (64, 96)):
        image = torch.rand(1, 3, *size) * 2 - 1
        expected = forward(plain, image)
        assert expected.std() > 0.05
        np.testing.assert_allclose(run(path, image), expected, rtol=0, atol=1e-5)


def test_batch_keeps_each_image_to_itself(tmp_path):
    plain, translator = trained()
    export.export_onnx(translator, tmp_path / "model.onnx")
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    images[1] *= 0.1
    expected = np.concatenate([forward(plain, image[None]) for image in images])
    np.testing.assert_allclose(run(tmp_path / "model.onnx", images), expected, rtol=0, atol=1e-5)


def test_other_channels(tmp_path):
    plain, translator = trained("junyanz", in_channels=1, out_channels=2)
    export.export_onnx(translator, tmp_path / "model.onnx")
    image = torch.rand(1, 1, 32, 32) * 2 - 1
    np.testing.assert_allclose(run(tmp_path / "model.onnx", image), forward(plain, image), rtol=0, atol=1e-5)


def test_translator_is_as_before(tmp_path):
    _, translator = trained()
    image = torch.rand(3, 32, 32) * 2 - 1
    before = translator(image)
    export.export_onnx(translator, tmp_path / "model.onnx")
    assert torch.equal(translator(image), before)


def test_file_that_disagrees_is_not_written(tmp_path, monkeypatch):
    _, translator = trained()
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    weight = export._Graph._weight
    monkeypatch.setattr(export._Graph, "_weight", lambda self, name, value: weight(self, name, value * 1.01))
    with pytest.raises(UserError, match="not written, for its results are .* off PyTorch's"):
        export.export_onnx(translator, path)
    assert path.read_bytes() == b"earlier" and [*tmp_path.iterdir()] == [path]


def test_command(tmp_path, capsys):
    from fastpix2pix.interop.keras import export_weights

    plain, translator = trained()
    np.savez(tmp_path / "g.npz", *export_weights(translator.generator))
    arguments = ["--run", str(tmp_path / "g.npz"), "--output", str(tmp_path / "g.onnx")]
    export.main(arguments)
    assert "off PyTorch" in capsys.readouterr().out
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    np.testing.assert_allclose(run(tmp_path / "g.onnx", image), forward(plain, image), rtol=0, atol=1e-5)
    for wrong in (["--output", str(tmp_path / "absent" / "g.onnx")], ["--run", str(tmp_path / "absent.pth")]):
        with pytest.raises(SystemExit) as stop:
            export.main([*arguments, *wrong])
        assert stop.value.code == 2 and capsys.readouterr().err.count("error: ") == 1


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "onnx", None)
    with pytest.raises(UserError, match=r'pip install "fastpix2pix\[export\]"'):
        export.export_onnx(trained()[1], tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_full_network_on_twenty_real_facades(tmp_path, facades, preset):
    plain, translator = trained(preset, num_downs=8, ngf=64)
    export.export_onnx(translator, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    largest = 0.0
    for path in sorted((facades / "test").glob("*.jpg"))[:20]:
        labels = np.asarray(Image.open(path))[:, 256:].astype(np.float32) / 127.5 - 1
        image = torch.from_numpy(labels.transpose(2, 0, 1)[None].copy())
        (generated,) = session.run(None, {"input": image.numpy()})
        expected = forward(plain, image)
        assert expected.std() > 0.05
        largest = max(largest, np.abs(generated - expected).max())
    print(f"{preset}: largest difference over 20 facades {largest:.2g}")
    assert largest < 1e-3
