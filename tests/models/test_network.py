"""The torch networks and the loading of ImageNet weights, from sound and from hostile files."""

from __future__ import annotations

import itertools
import os
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from histoseg_fast.errors import HistosegError, PlanError, UsageError
from histoseg_fast.models import architectures
from histoseg_fast.models.architectures import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, PAPER_ARCHITECTURES
from histoseg_fast.models.network import UInt8Network, load_features, make_network

VGG = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)}
NORMALISED = {2: (64, 3), 5: (64, 64), 9: (128, 64), 12: (128, 128), 16: (256, 128), 19: (256, 256)}
NAMES = [f"features.conv{i}" for i in ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2")]


def weights(shapes, prefix="features."):
    """Random convolutions 3x3, named as torchvision names them."""
    torch.manual_seed(3)
    made = {}
    for number, shape in shapes.items():
        made[f"{prefix}{number}.weight"] = torch.randn(*shape, 3, 3) / 20
        made[f"{prefix}{number}.bias"] = torch.randn(shape[0])
    return made


def normalised():
    """Weights behind a 1x1 convolution, as activation-normalised VGG files have them."""
    made = weights(NORMALISED, "")
    made |= {"0.weight": torch.randn(3, 3, 1, 1) * 100, "0.bias": torch.randn(3) * 50}
    return {name: tensor.numpy() for name, tensor in made.items()}


def one_line(caught):
    """The message of an error: one line, no endless listing, no advice to run what pickles hold."""
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400 and "weights_only" not in message
    return message


# -- the networks ----------------------------------------------------------------------------------


def test_weights_of_the_final_network():
    assert sum(p.numel() for p in make_network("final").parameters()) == 2_812_291


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_output_has_the_size_of_the_input(arch):
    network = make_network(arch, 5).eval()
    side = max(4, network.stride)
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 2 * side, 3 * side)).shape == (2, 5, 2 * side, 3 * side)
        rgb = torch.zeros(1, side, 5 * side, 3, dtype=torch.uint8)
        assert UInt8Network(network)(rgb).shape == (1, 5, side, 5 * side)


def test_unknown_network():
    with pytest.raises(UsageError, match="'five'; choose one of one, two, three, final, fast"):
        make_network("five")


@pytest.mark.parametrize("arch", PAPER_ARCHITECTURES)
def test_a_relu_follows_every_layer_but_the_last(arch):
    network = make_network(arch)
    modules = [module for part in (network.features, network.head) for module in part]
    assert not isinstance(modules[-1], nn.ReLU)
    for module, following in itertools.pairwise(modules):
        assert isinstance(following, nn.ReLU) == isinstance(module, nn.Conv2d | nn.ConvTranspose2d)


def test_tensor_names_are_the_layers():
    expected = set(NAMES)
    expected |= {f"head.{layer.name}" for layer in architectures.head("final", 3)}
    assert {name.rsplit(".", 1)[0] for name in make_network("final").state_dict()} == expected


def test_normalisation_is_inside():
    wrapped = UInt8Network(nn.Identity())
    rgb = torch.randint(0, 256, (1, 4, 6, 3), dtype=torch.uint8)
    expected = (rgb.double() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(wrapped(rgb).double(), expected.permute(0, 3, 1, 2), atol=1e-5, rtol=0)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pth", "safetensors", "npz"])
@pytest.mark.parametrize("prefix", ["features.", ""])
def test_torchvision_weights(tmp_path, form, prefix):
    tensors = weights(VGG, prefix) | {"classifier.0.weight": torch.zeros(4, 4)}
    path = tmp_path / f"vgg16.{form}"
    save = {"pth": torch.save, "safetensors": save_file, "npz": lambda t, p: np.savez(p, **t)}[form]
    save(tensors, path)
    network = make_network("final")
    assert load_features(network, str(path)).layers == NAMES
    for name, number in zip(NAMES, VGG, strict=False):
        layer = network.get_submodule(name)
        assert torch.equal(layer.weight, tensors[f"{prefix}{number}.weight"])
        assert torch.equal(layer.bias, tensors[f"{prefix}{number}.bias"])


def test_a_smaller_network_takes_what_it_has(tmp_path):
    torch.save(weights(VGG), tmp_path / "vgg.pth")
    assert load_features(make_network("one"), str(tmp_path / "vgg.pth")).layers == NAMES[:4]


def test_none_leaves_the_network_alone():
    network = make_network("one")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert load_features(network, "none").layers == []
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("arch", ["one", "fast"])
def test_a_checkpoint_gives_all_its_weights(tmp_path, arch):
    torch.manual_seed(1)
    source, network = make_network(arch, 5), make_network(arch, 5)
    for name, buffer in source.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    layers = {name.rpartition(".")[0] for name in source.state_dict()}
    assert set(load_features(network, str(tmp_path / "c.safetensors")).layers) == layers
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in source.state_dict().items())
    with pytest.raises(PlanError, match="checkpoint of another architecture"):
        load_features(make_network(arch, 4), str(tmp_path / "c.safetensors"))


def test_a_network_without_vgg_layers(tmp_path):
    """ImageNet weights leave it as it is, and nothing is downloaded; other files are refused."""
    network = make_network("fast")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert load_features(network, "imagenet").layers == []
    torch.save(weights(VGG), tmp_path / "vgg.pth")
    save_file(make_network("one").state_dict(), tmp_path / "one.safetensors")
    for name in ("vgg.pth", "one.safetensors"):
        with pytest.raises(PlanError, match="is no checkpoint of the network 'fast'") as caught:
            load_features(network, str(tmp_path / name))
        assert name in one_line(caught)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_preprocessing_is_folded_into_the_first_convolution(tmp_path):
    np.savez(tmp_path / "vgg.npz", **normalised())
    network = make_network("final")
    assert load_features(network, str(tmp_path / "vgg.npz")).layers == NAMES
    tensors = {name: torch.from_numpy(value).double() for name, value in normalised().items()}
    rgb = torch.rand(1, 3, 20, 24, dtype=torch.float64)
    prepared = nn.functional.conv2d(rgb, tensors["0.weight"], tensors["0.bias"])
    expected = nn.functional.conv2d(prepared, tensors["2.weight"], tensors["2.bias"], padding=1)
    ours = (rgb - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    found = network.features.conv1_1.double()(ours)
    inside = (..., slice(1, -1), slice(1, -1))  # at the border our zeros are the mean colour, theirs another
    scale = expected.abs().mean()
    torch.testing.assert_close(found[inside] / scale, expected[inside] / scale, atol=1e-4, rtol=0)
    assert torch.equal(network.features.conv1_2.weight.float(), tensors["5.weight"].float())


@pytest.mark.parametrize("change", [{"0.bias": None}, {"0.bias": np.zeros(4)}, {"2.weight": None, "2.bias": None}])
def test_normalised_weights_with_parts_missing(tmp_path, change):
    tensors = {name: value for name, value in (normalised() | change).items() if value is not None}
    np.savez(tmp_path / "vgg.npz", **tensors)
    with pytest.raises(PlanError) as caught:
        load_features(make_network("final"), str(tmp_path / "vgg.npz"))
    assert "vgg.npz" in one_line(caught)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (weights({0: (64, 4)}), "0.weight has not the shape"),
        (weights({0: (64, 3), 5: (128, 65)}), "5.weight has not the shape"),
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "0.bias has not the shape"),
        ({"fc.weight": torch.zeros(3)}, "no VGG convolutions"),
        ({"state_dict": {"features.0.weight": torch.zeros(64, 3, 3, 3)}}, "no VGG convolutions"),
        ({0: torch.zeros(3), "features.0.weight": "text"}, "no VGG convolutions"),
        (torch.zeros(3), "no named tensors"),
        ([1, 2], "no named tensors"),
    ],
)
def test_files_with_other_tensors(tmp_path, tensors, words):
    torch.save(tensors, tmp_path / "w.pth")
    network = make_network("final")
    before = network.features.conv1_1.weight.clone()
    with pytest.raises(PlanError) as caught:
        load_features(network, str(tmp_path / "w.pth"))
    assert words in one_line(caught) and "w.pth" in str(caught.value)
    assert torch.equal(network.features.conv1_1.weight, before)


class Payload:
    """Pickled code: it would make a folder when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.safetensors", "w.bin"])
def test_pickled_code_is_not_run(tmp_path, name):
    trap = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps({"features.0.weight": Payload(trap)}))
    torch.save({"features.0.weight": Payload(trap)}, tmp_path / "zip.pth")
    np.savez(tmp_path / "object.npz", **{"0.weight": np.array([Payload(trap)], object)}, allow_pickle=True)
    for path in (tmp_path / name, tmp_path / "zip.pth", tmp_path / "object.npz"):
        with pytest.raises(PlanError) as caught:
            load_features(make_network("one"), str(path))
        one_line(caught)
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["pth", "npz", "safetensors", "txt"])
@pytest.mark.parametrize("content", [b"", b"hello\nworld\n", bytes(range(256)) * 20, b"PK\x03\x04", b"\x80\x04K\x01."])
def test_files_that_hold_no_weights(tmp_path, suffix, content):
    (tmp_path / f"w.{suffix}").write_bytes(content)
    with pytest.raises(PlanError) as caught:
        load_features(make_network("one"), str(tmp_path / f"w.{suffix}"))
    one_line(caught)


@pytest.mark.parametrize("name", ["missing.pth", "missing.npz", "missing.safetensors", "imagnet", ".", "a/b.npz"])
def test_missing_files(tmp_path, name):
    with pytest.raises(HistosegError) as caught:
        load_features(make_network("one"), str(tmp_path / name))
    one_line(caught)
    assert isinstance(caught.value, UsageError) == (name != ".")


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route\nto host"), TimeoutError("slow"), ConnectionResetError(104, "reset"),
     urllib.error.HTTPError("http://x", 503, "busy", None, None), PermissionError(13, "Permission denied", "/cache")],
)  # fmt: skip
def test_offline(tmp_path, monkeypatch, error):
    def download(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    torch.hub.set_dir(str(tmp_path))
    try:
        with pytest.raises(UsageError, match="could not be downloaded") as caught:
            load_features(make_network("one"), "imagenet")
    finally:
        torch.hub._hub_dir = None
    assert "--weights" in one_line(caught)
