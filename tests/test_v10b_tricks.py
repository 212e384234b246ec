"""v10b_tricks.py: the switches, and the cache beside pairs of characters."""

import pytest
import torch
from conftest import VOCAB_SIZE, build, random_tokens, shaken, tiny

from part6_speedrun import v10a_muon as v10a
from part6_speedrun import v10b_tricks as v10b

SWITCHES = [
    "qk_norm", "zero_init", "embedding_norm", "bigrams", "smear", "value_embeddings", "slow_head",
    "relu_squared",
]  # fmt: skip
ALL_OFF = dict.fromkeys(SWITCHES, False)


def inputs_of_the_first_block(model, idx):
    """What the blocks get, float (B, T, n_embd)."""
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(idx)
    hook.remove()
    return seen[0]


# ---- the model


def test_without_its_switches_it_computes_what_v10a_computes():
    ours, theirs = build(v10b, **ALL_OFF), build(v10a)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    idx, targets = random_tokens(2, 5), random_tokens(2, 5)
    for actual, expected in zip(ours(idx, targets), theirs(idx, targets), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("switch", ["bigrams", "smear", "value_embeddings"])
def test_three_switches_add_embeddings_or_a_gate(switch):
    on = shaken(build(v10b, **{**ALL_OFF, switch: True}))
    off = build(v10b, **ALL_OFF)
    weights = on.state_dict()
    off.load_state_dict({name: weights[name] for name in off.state_dict()})
    assert len(weights) > len(off.state_dict())
    idx = random_tokens(2, 5)
    assert not torch.allclose(on(idx)[0], off(idx)[0], atol=1e-3)


def test_at_first_each_block_changes_nothing():
    model = build(v10b)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    logits, _ = model(random_tokens(2, 5))
    assert (logits == 0).all()
    assert len(seen) == 2
    for before, after in seen:
        assert torch.equal(before, after)


def test_without_zero_init_each_block_changes_something():
    model = build(v10b, zero_init=False)
    x = torch.randn(1, 3, 18)
    assert not torch.allclose(model.blocks[0](x, torch.zeros(3, 3)), x, atol=1e-3)


def test_each_pair_of_characters_has_an_embedding():
    """The first character of a text forms a pair with token 0."""
    model = shaken(build(v10b, embedding_norm=False, smear=False))
    idx = random_tokens(2, 5)
    actual = inputs_of_the_first_block(model, idx)
    for b in range(2):
        for t in range(5):
            previous = idx[b, t - 1].item() if t > 0 else 0
            pair = model.bigram_embedding.weight[previous * VOCAB_SIZE + idx[b, t]]
            expected = model.token_embedding.weight[idx[b, t]] + pair
            torch.testing.assert_close(actual[b, t], expected)


def test_the_embeddings_are_normalised():
    x = inputs_of_the_first_block(shaken(build(v10b, smear=False)), random_tokens(2, 5))
    torch.testing.assert_close(x.pow(2).mean(dim=-1), torch.ones(2, 5), atol=1e-3, rtol=0)


def test_a_gate_adds_some_of_the_previous_embedding():
    model = shaken(build(v10b, embedding_norm=False, bigrams=False))
    idx = random_tokens(1, 5)
    actual = inputs_of_the_first_block(model, idx)
    embeddings = model.token_embedding(idx[0])
    gates = torch.tanh(embeddings @ model.smear_gate.weight[0])
    before = torch.nn.functional.rms_norm(embeddings, (18,))
    expected = embeddings[1:] + gates[1:, None] * before[:-1]
    torch.testing.assert_close(actual[0, 1:], expected)


def test_values_are_mixed_with_an_embedding_of_their_character():
    """Attention to a single position returns its value, so it shows there."""
    model = shaken(build(v10b))
    attention = model.blocks[1].attention
    x, angles = torch.randn(1, 1, 18), torch.zeros(1, 3)
    embedding = model.value_embeddings[1](torch.tensor([[4]]))
    value = attention.query_key_value(x)[..., -6:]
    mixed = attention.mix[0] * value + attention.mix[1] * embedding
    expected = attention.projection(mixed.repeat(1, 1, 3))  # one key/value head for three heads
    torch.testing.assert_close(attention(x, angles, None, embedding), expected)


def test_each_block_has_value_embeddings_of_its_own():
    model = shaken(build(v10b))
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[3]))
    idx = random_tokens(2, 5)
    model(idx)
    for table, embedding in zip(model.value_embeddings, seen, strict=True):
        assert torch.equal(embedding, table(idx))


def test_the_size_of_queries_and_keys_has_no_effect():
    model = shaken(build(v10b))
    idx = random_tokens(2, 5)
    before, _ = model(idx)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query_key_value.weight[: 18 + 6] *= 10
    torch.testing.assert_close(model(idx)[0], before, atol=1e-4, rtol=1e-3)


def test_relu_squared_has_two_matrices_and_no_gate():
    model = shaken(build(v10b))
    feed_forward = model.blocks[0].feed_forward
    first, second = (parameter for parameter in feed_forward.parameters())
    assert (first.shape, second.shape) == ((72, 18), (18, 72))
    x = torch.randn(2, 18)
    expected = torch.clamp(x @ first.T, min=0) ** 2 @ second.T
    torch.testing.assert_close(feed_forward(x), expected)


@pytest.mark.parametrize("lengths", [[12], [1] * 12, [4, 1, 1, 6], [1, 11]])
def test_tokens_may_come_to_the_cache_in_pieces(lengths):
    """Although the first token of a piece forms a pair with the last one of the piece before."""
    model = shaken(build(v10b, block_size=12))
    idx = random_tokens(3, 12)
    expected, _ = model(idx)
    caches = model.make_caches(3)
    pieces = [model(piece, caches=caches)[0] for piece in idx.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


# ---- the optimizers


def test_muon_still_has_only_the_matrices_of_the_blocks():
    model = build(v10b)
    muon, adamw = v10b.make_optimizers(model, tiny(v10b))
    n_muon = sum(p.numel() for group in muon.param_groups for p in group["params"])
    n_adamw = sum(p.numel() for group in adamw.param_groups for p in group["params"])
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    assert n_muon == sum(p.numel() for p in matrices)
    assert n_muon + n_adamw == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("changes", "factor"), [({}, 0.2), ({"slow_head": False}, 1.0)])
def test_the_last_layer_learns_at_a_fifth_of_the_rate(splits, monkeypatch, changes, factor):
    model = build(v10b, **changes)
    made = []
    make_optimizers = v10b.make_optimizers

    def remember(*arguments):
        made.extend(make_optimizers(*arguments))
        return made

    monkeypatch.setattr(v10b, "make_optimizers", remember)
    cfg = tiny(v10b, **changes, max_iters=1, warmup_iters=0, learning_rate=0.25)
    v10b.train(model, *splits, cfg)
    for optimizer in made:
        for group in optimizer.param_groups:
            is_head = any(p is model.lm_head.weight for p in group["params"])
            assert group["lr"] == (0.25 * factor if is_head else 0.25)


def test_only_the_matrices_of_the_blocks_decay():
    muon, adamw = v10b.make_optimizers(build(v10b), tiny(v10b, weight_decay=0.5))
    assert [group["weight_decay"] for group in muon.param_groups] == [0.5, 0.5]
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0}
