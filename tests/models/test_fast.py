"""The network `fast`: what folding its batch norms must not change, and its form."""

from __future__ import annotations

import copy

import pytest
import torch
from random_networks import network
from torch import nn

from histoseg_fast.models.architectures import PAPER_ARCHITECTURES
from histoseg_fast.models.fast import FastNetwork
from histoseg_fast.models.network import make_network


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_folding_changes_nothing_but_the_form(classes):
    torch.manual_seed(classes)
    trained = FastNetwork(classes).double()
    state = {n: t for n, t in network("fast").state_dict().items() if not n.startswith("logits")}
    trained.load_state_dict(state, strict=False)
    image = torch.randn(2, 3, 96, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = trained.eval()(image)
        folded = trained.fold()(image)
    assert expected.std() > 0.01 and folded.dtype == torch.float64
    torch.testing.assert_close(folded, expected, rtol=1e-10, atol=1e-10)


def test_folding_takes_the_running_statistics():
    """With those of a batch the answer differs, so the test above can fail."""
    trained = copy.deepcopy(network("fast")).double()
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        folded, batch = trained.fold()(image), trained.train()(image)
    assert (folded - batch).abs().max() > 0.1 * batch.abs().max()


def test_folding_leaves_the_network_as_it_was():
    trained = copy.deepcopy(network("fast")).train()
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    folded = trained.fold()
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert all(module.training for module in trained.modules()) and not folded.training
    assert not {id(p) for p in trained.parameters()} & {id(p) for p in folded.parameters()}


def test_the_folded_form_has_convolutions_with_biases_only():
    folded = make_network("fast").fold()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    convolutions = {name for name, module in folded.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(folded.state_dict()) == {f"{name}.{part}" for name in convolutions for part in ("weight", "bias")}
    assert {f"{name}.weight" for name in convolutions} <= set(make_network("fast").state_dict())
    assert set(FastNetwork.joined) <= convolutions


def test_a_channel_of_zeros_and_one_that_never_varied():
    """A dead channel's running variance is 0."""
    trained = copy.deepcopy(network("fast")).double()
    with torch.no_grad():
        trained.stem[0].weight[3] = 0
        trained.stem[1].running_var[3] = 0
        trained.stem[1].weight[5] = 0
        image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(trained.fold()(image), trained(image), rtol=1e-9, atol=1e-9)


def test_channels_fill_vector_registers():
    """Multiples of sixteen channels, in the layers between the first and the last."""
    first, *inner, last = (module for module in make_network("fast").modules() if isinstance(module, nn.Conv2d))
    assert all(c.in_channels % 16 == 0 for c in (*inner, last))
    assert all(c.out_channels % 16 == 0 for c in (first, *inner))


def cost(made, height, width):
    """Multiply-accumulates of one image, counted as the convolutions run."""
    counted = []

    def count(module, _, output):
        counted.append(output[0].numel() * module.weight[0].numel())

    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.inference_mode():
        made.eval()(torch.zeros(1, 3, height, width))
    return sum(counted)


def test_an_eighteenth_of_the_final_networks_cost():
    """That of a 1128x720 image is 386 GMAC (test_architectures)."""
    made = make_network("fast").fold()
    assert round(386e9 / (cost(made, 64, 64) * (720 * 1128) / 64**2)) == 18
    assert sum(p.numel() for p in made.parameters()) < 4e6  # so its plan stays under 16 MB


def test_it_is_none_of_the_papers():
    assert "fast" not in PAPER_ARCHITECTURES
    with pytest.raises(RuntimeError):
        make_network("fast").load_state_dict(make_network("final").state_dict())
