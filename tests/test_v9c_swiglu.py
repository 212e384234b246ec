"""v9c_swiglu.py: the gated feed-forward network."""

import pytest
import torch
from conftest import shaken, tiny

from part5_modern import v9b_rope as v9b
from part5_modern import v9c_swiglu as v9c


def n_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_it_is_a_gate_times_an_expansion():
    layer = shaken(v9c.FeedForward(tiny(v9c)))
    x = torch.randn(2, 5, 18)
    g = x @ layer.gate.weight.T
    hidden = g / (1 + torch.exp(-g)) * (x @ layer.expansion.weight.T)
    torch.testing.assert_close(layer(x), hidden @ layer.projection.weight.T)


def test_dropout_is_applied_to_its_output_in_training_only():
    layer = shaken(v9c.FeedForward(tiny(v9c, dropout=0.5)))
    x = torch.randn(9, 5, 18)
    dropped, kept = layer.train()(x), layer.eval()(x)
    is_dropped = dropped == 0
    assert 0.4 < is_dropped.float().mean() < 0.6
    torch.testing.assert_close(dropped, (2 * kept).masked_fill(is_dropped, 0))


@pytest.mark.parametrize("n_embd", [1, 2, 3, 4, 95, 96, 97, 98, 384, 576, 768, 1000, 4096])
def test_the_hidden_layer_is_two_thirds_as_wide_rounded_up_to_a_multiple_of_8(n_embd):
    with torch.device("meta"):
        layer = v9c.FeedForward(tiny(v9c, n_embd=n_embd))
    hidden = layer.gate.out_features
    assert hidden % 8 == 0
    assert 0 <= hidden - n_embd * 8 / 3 < 8
    assert layer.gate.weight.shape == layer.expansion.weight.shape == (hidden, n_embd)
    assert layer.projection.weight.shape == (n_embd, hidden)


@pytest.mark.parametrize("n_embd", [96, 100, 250, 384, 1000, 4096])
def test_the_number_of_parameters_stays_about_the_same(n_embd):
    with torch.device("meta"):
        old, new = (script.FeedForward(tiny(script, n_embd=n_embd)) for script in (v9b, v9c))
    assert n_parameters(new) == pytest.approx(n_parameters(old), rel=0.03)
