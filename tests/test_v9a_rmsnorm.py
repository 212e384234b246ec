"""v9a_rmsnorm.py: RMSNorm, and a model without biases."""

import pytest
import torch
from conftest import VOCAB_SIZE, build, random_tokens, shaken, tiny

from lab.common import generate
from part3_generation import v7b_kv_cache as v7b
from part5_modern import v9a_rmsnorm as v9a


def make_norms(size):
    """RMSNorm and PyTorch's, with the same random weights."""
    ours, theirs = v9a.RMSNorm(size), torch.nn.RMSNorm(size, eps=1e-5)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def without_biases(model):
    """A v7b as v9a should be: with PyTorch's RMSNorm, and with zeros for biases."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.LayerNorm):
                setattr(module, name, torch.nn.RMSNorm(child.normalized_shape, eps=1e-5))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


# ---- RMSNorm


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(7,), (2, 5, 18), (3, 1)])
def test_outputs_and_gradients_equal_those_of_pytorch(shape, scale):
    """With x of size 1e-3, the number added to the mean square matters."""
    ours, theirs = make_norms(shape[-1])
    x = (scale * torch.randn(shape)).requires_grad_()
    expected, actual = theirs(x), ours(x)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn(shape)
    expected = torch.autograd.grad(expected, (x, theirs.weight), gradient)
    actual = torch.autograd.grad(actual, (x, ours.weight), gradient)
    torch.testing.assert_close(actual, expected)


# ---- the model


def test_it_is_v7b_with_rmsnorm_and_no_biases():
    old, new = without_biases(build(v7b)), shaken(build(v9a))
    report = old.load_state_dict(new.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys, "the biases"
    assert all(name.endswith("bias") for name in report.missing_keys)
    idx, targets = random_tokens(3, 5), random_tokens(3, 5)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.manual_seed(5)
    expected = generate(v7b, old, idx[:, :2], 20, tiny(v7b))
    torch.manual_seed(5)
    assert torch.equal(generate(v9a, new, idx[:, :2], 20, tiny(v9a)), expected)


@pytest.mark.parametrize("length", [1, 2, 10, 23, 24])
def test_tokens_may_come_to_the_cache_one_by_one_after_a_text_of_any_length(length):
    model = shaken(build(v9a, block_size=24))
    idx = random_tokens(3, 24)
    caches = [v9a.KVCache(tiny(v9a, block_size=24), 3, idx.device) for _ in model.blocks]
    lengths = [length] + [1] * (24 - length)
    pieces = [model(piece, caches=caches)[0] for piece in idx.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx)[0])
    assert [cache.length for cache in caches] == [24, 24]


def test_there_are_no_biases_and_no_layernorm():
    old, new = build(v7b), build(v9a)
    biases = {name for name, _ in old.named_parameters() if name.endswith("bias")}
    sizes = {name: p.shape for name, p in old.named_parameters() if name not in biases}
    assert {name: p.shape for name, p in new.named_parameters()} == sizes
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in new.modules())


def test_matrices_start_small_and_norms_at_one():
    torch.manual_seed(1)
    sizes = {"n_embd": 192, "n_layer": 3, "block_size": 99}
    for name, parameter in v9a.LanguageModel(tiny(v9a, **sizes), VOCAB_SIZE).named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.001), name
        else:
            assert (parameter == 1).all(), name
