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


def with_names_of_v7b(weights):
    return {name.replace("ln_", "norm_"): weight for name, weight in weights.items()}


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


def test_the_result_in_bfloat16_is_that_in_float32_rounded():
    norm = v9a.RMSNorm(384)
    x = 30 * torch.randn(9, 384).bfloat16()
    expected = norm(x.float())
    actual = norm.bfloat16()(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected.bfloat16())


def test_weights_in_bfloat16_scale_the_result():
    norm, _ = make_norms(384)
    norm.bfloat16()
    x = torch.randn(9, 384).bfloat16()
    expected = torch.nn.functional.rms_norm(x.float(), (384,), norm.weight.float(), 1e-5)
    actual = norm(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.01, atol=0)


# ---- the model


def test_it_is_v7b_with_rmsnorm_and_no_biases():
    old, new = without_biases(build(v7b)), shaken(build(v9a))
    report = old.load_state_dict(with_names_of_v7b(new.state_dict()), strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys, "the biases"
    assert all(name.endswith("bias") for name in report.missing_keys)
    idx, targets = random_tokens(3, 5), random_tokens(3, 5)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.manual_seed(5)
    expected = generate(v7b, old, idx[:, :2], 20, tiny(v7b))
    torch.manual_seed(5)
    assert torch.equal(new.generate(idx[:, :2], 20), expected)


@pytest.mark.parametrize("lengths", [[24], [1] * 24, [10, 1, 1, 12], [3, 4, 1, 9, 7], [1, 23]])
def test_tokens_may_come_to_the_cache_in_pieces_of_any_length(lengths):
    model = shaken(build(v9a, block_size=24))
    idx = random_tokens(3, 24)
    caches = model.make_caches(3)
    pieces = [model(piece, caches=caches)[0] for piece in idx.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx)[0])
    assert [cache.length for cache in caches] == [24, 24]


def test_there_are_no_biases_and_no_layernorm():
    old, new = build(v7b), build(v9a)
    biases = {name for name, _ in old.named_parameters() if name.endswith("bias")}
    sizes = {name: p.shape for name, p in old.named_parameters() if name not in biases}
    weights = with_names_of_v7b(dict(new.named_parameters()))
    assert {name: p.shape for name, p in weights.items()} == sizes
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
