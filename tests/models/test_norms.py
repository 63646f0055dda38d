"""Batch norms that come and go: folded away for inference, put behind trained layers for more training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from histoseg_fast.errors import PlanError
from histoseg_fast.models.architectures import ARCHITECTURES
from histoseg_fast.models.network import UInt8Network, load_features, make_network, rebuild
from histoseg_fast.models.norms import norm_pairs, settle_norms
from histoseg_fast.plans import open_plan


def trained(arch: str, seed: int = 0) -> torch.nn.Module:
    """A network with batch norms whose statistics are nothing like those of a fresh one."""
    torch.manual_seed(seed)
    network = make_network(arch, batch_norm=True)
    for _, _, norm in norm_pairs(network):
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.normal_()
        for tensor in (norm.running_var, norm.weight.data):
            tensor.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folding_keeps_the_function_and_leaves_the_drawn_network(arch):
    network = trained(arch).double()
    folded = network.fold()
    assert not list(norm_pairs(folded))
    assert folded.state_dict().keys() == make_network(arch).fold().state_dict().keys()
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    expected = network(x)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-9 * float(expected.detach().abs().max()))


def test_every_layer_but_the_last_of_a_paper_network_has_a_norm():
    network = make_network("final", batch_norm=True)
    names = [name for name, _, _ in norm_pairs(network)]
    assert (
        names == [name.removesuffix(".weight") for name in make_network("final").state_dict() if "weight" in name][:-1]
    )


@pytest.mark.parametrize("arch", ["final", "fast"])
def test_more_training_of_a_plan_starts_where_it_is(arch):
    """On the crops that settle the norms, the network with norms computes what the plan's does."""
    network, plan = make_network(arch, batch_norm=True), open_plan(arch)
    loaded = load_features(network, arch)
    assert loaded.unsettled
    rgb = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    model = UInt8Network(network)
    settle_norms(network, loaded.layers, loaded.biases, model.normalise(rgb))
    with torch.no_grad():
        expected, found = rebuild(plan)(rgb), model.train()(rgb)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.std())


def test_a_plan_gives_the_weights_of_a_network_without_norms():
    network = make_network("final")
    loaded = load_features(network, "final")
    state = rebuild(open_plan("final")).network.state_dict()
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())
    assert {f"{layer}.weight" for layer in loaded.layers} == {name for name in state if name.endswith("weight")}


def test_layers_that_start_random_keep_their_norms():
    network = make_network("final", batch_norm=True)
    settle_norms(network, ["features.conv1_1"], {}, torch.randn(2, 3, 32, 32))
    settled = {
        name for name, _, norm in norm_pairs(network) if not torch.equal(norm.weight, torch.ones_like(norm.weight))
    }
    assert settled == {"features.conv1_1"}


def test_a_checkpoint_with_norms_needs_a_network_with_norms(tmp_path):
    save_file(trained("one").state_dict(), tmp_path / "one.safetensors")
    assert not load_features(make_network("one", batch_norm=True), str(tmp_path / "one.safetensors")).unsettled
    with pytest.raises(PlanError, match="--batch-norm"):
        load_features(make_network("one"), str(tmp_path / "one.safetensors"))
