"""v4_feedforward.py: the feed-forward network, and where it stands in the model."""

import torch
from conftest import build, random_tokens, shaken, tiny

import v4_feedforward as v4


def test_it_is_two_linear_layers_with_a_relu_between():
    network = shaken(v4.FeedForward(tiny(v4)))
    assert network.expansion.weight.shape == (4 * 18, 18)
    x = torch.randn(1, 5, 18)
    W1, b1 = network.expansion.weight.T, network.expansion.bias
    W2, b2 = network.projection.weight.T, network.projection.bias
    torch.testing.assert_close(network(x), (x @ W1 + b1).clamp(min=0) @ W2 + b2)


def test_each_position_is_processed_alone():
    network = shaken(v4.FeedForward(tiny(v4)))
    x = torch.randn(1, 5, 18)
    torch.testing.assert_close(network(x)[:, 2:3], network(x[:, 2:3]))


def test_it_comes_after_the_attention():
    model = shaken(build(v4))
    idx = random_tokens(2, 5)
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(5))
    expected = model.lm_head(model.feed_forward(model.attention(x)))
    torch.testing.assert_close(model(idx)[0], expected)
