"""v9d_gqa.py: query heads that share keys and values, compared with v9c, where none do."""

import pytest
import torch
from conftest import VOCAB_SIZE, build, random_tokens, refused, stacked, tiny, tiny_flags

from part5_modern import v9c_swiglu as v9c
from part5_modern import v9d_gqa as v9d

SIZES = {"block_size": 8, "n_embd": 36, "n_head": 6}


def make_model(n_kv_head: int):
    """A model whose random weights make each choice uneven, and depend on the whole text."""
    model = build(v9d, n_kv_head=n_kv_head, **SIZES)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1, std=0.1)
    return model


def weights_of_v9c(weights: dict, n_kv_head: int) -> dict:
    """The weights with which v9c computes the same: each query has a key and a value of its own."""
    repeated = {}
    for name, weight in weights.items():
        repeated[name] = weight
        if name.endswith(("attention.key.weight", "attention.value.weight")):
            heads = weight.view(n_kv_head, 6, 36)  # heads, then rows of a head
            repeated[name] = heads.repeat_interleave(6 // n_kv_head, 0).flatten(0, 1)
    return stacked(repeated)


def make_pair(n_kv_head: int):
    """A v9c and a v9d that compute the same."""
    new, old = make_model(n_kv_head), build(v9c, **SIZES)
    old.load_state_dict(weights_of_v9c(new.state_dict(), n_kv_head))
    return old, new


def in_pieces(script, model, idx, lengths, **changes):
    """The logits of idx, if it comes to the caches of a model in pieces of these lengths."""
    cfg = tiny(script, **SIZES, **changes)
    caches = [script.KVCache(cfg, len(idx), idx.device) for _ in model.blocks]
    return torch.cat([model(piece, caches=caches)[0] for piece in idx.split(lengths, 1)], 1)


def test_with_as_many_heads_it_is_v9c():
    new, old = make_model(6), build(v9c, **SIZES)
    old.load_state_dict(stacked(new.state_dict()))
    idx, targets = random_tokens(3, 8), random_tokens(3, 8)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("n_kv_head", [1, 2, 3])
def test_it_is_attention_with_repeated_keys_and_values(n_kv_head):
    old, new = make_pair(n_kv_head)
    idx, targets = random_tokens(3, 8), random_tokens(3, 8)
    results = [model(idx, targets) for model in (old, new)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    for _, loss in results:
        loss.backward()
    # A shared row gets the sum of the gradients of its copies.
    shared = {name: p.detach().clone().requires_grad_() for name, p in new.named_parameters()}
    copies = weights_of_v9c(shared, n_kv_head)
    gradients = {name: parameter.grad for name, parameter in old.named_parameters()}
    torch.autograd.backward(list(copies.values()), [gradients[name] for name in copies])
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(parameter.grad, shared[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n_kv_head", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[3] + [1] * 5, [7] + [1] * 18, [8] + [1] * 17])
def test_it_is_so_through_the_cache_also_beyond_block_size(n_kv_head, lengths):
    old, new = make_pair(n_kv_head)
    idx = random_tokens(3, sum(lengths))
    expected = in_pieces(v9c, old, idx, lengths)
    actual = in_pieces(v9d, new, idx, lengths, n_kv_head=n_kv_head)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 6])
def test_the_cache_shrinks_by_the_number_of_heads_that_share(n_kv_head):
    n_bytes, seen = [], []
    for script, model in zip((v9c, v9d), make_pair(n_kv_head), strict=True):
        model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["caches"]), with_kwargs=True
        )
        next(model.stream(random_tokens(4, 1), 1, tiny(script, n_kv_head=n_kv_head, **SIZES)))
        caches = seen[-1]
        tensors = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
        n_bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert caches[0].keys.shape == caches[0].values.shape == (4, n_kv_head, 8, 6)
    assert n_bytes[0] == n_bytes[1] * (6 // n_kv_head) == 2 * 2 * 4 * 6 * 8 * 6 * 4


def test_the_matrices_for_keys_and_values_shrink_too():
    old, new = build(v9c, **SIZES), build(v9d, n_kv_head=2, **SIZES)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (old, new))
    assert before - after == 2 * 2 * 36 * (36 - 12)  # layers, keys and values, matrix


@pytest.mark.parametrize(("n_head", "n_kv_head"), [(3, 2), (3, 6), (1, 2)])
def test_heads_that_can_not_be_shared_evenly_are_refused(corpus, capsys, n_head, n_kv_head):
    flags = tiny_flags(v9d, n_head=n_head, n_kv_head=n_kv_head)
    line = refused(v9d, capsys, *flags, "--data", corpus)
    assert line == f"error: --n_head {n_head}: not a multiple of --n_kv_head {n_kv_head}"


def test_no_key_value_head_is_refused(capsys):
    line = refused(v9d, capsys, "--n_kv_head", 0)
    assert line.startswith("error: --n_kv_head 0: must be at least 1 ")


def test_a_checkpoint_keeps_its_number_of_heads(corpus, tmp_path, capsys):
    v9d.main([*tiny_flags(v9d, out_dir=tmp_path), "--data", str(corpus)])
    for mode in ("--resume", "--sample_only"):
        line = refused(v9d, capsys, mode, "--out_dir", tmp_path, "--n_kv_head", 3)
        assert line.startswith("error: --n_kv_head 3: the checkpoint has 1, ")
    v9d.main(["--sample_only", "--out_dir", str(tmp_path)])
    model = v9d.LanguageModel(tiny(v9d), VOCAB_SIZE)
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True)["model"])
