"""v10b_tricks.py: the switches, and the cache beside pairs of characters."""

from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, build, random_tokens, refused, shaken, tiny, tiny_flags

from part6_speedrun import v10a_muon as v10a
from part6_speedrun import v10b_tricks as v10b
from support import runs

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


def test_at_first_pairs_change_nothing():
    model, without = build(v10b), build(v10b, bigrams=False)
    without.token_embedding.load_state_dict(model.token_embedding.state_dict())
    without.smear_gate.load_state_dict(model.smear_gate.state_dict())
    idx = random_tokens(2, 5)
    assert torch.equal(model.embed(idx, None), without.embed(idx, None))


def test_without_zero_init_each_block_changes_something():
    model = build(v10b, zero_init=False)
    x, (cos, sin) = torch.randn(1, 3, 18), torch.randn(2, 3, 3)
    assert not torch.allclose(model.blocks[0](x, cos, sin), x, atol=1e-3)


def test_all_other_initial_weights_are_those_of_pytorch():
    """Embeddings come from a normal distribution, matrices from a uniform one."""
    model = build(v10b, zero_init=False, n_embd=48)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    for name, weight in weights.items():
        if "embedding" in name:
            assert weight.std().item() == pytest.approx(1, rel=0.1)
            assert weight.abs().max() > 2
        else:
            bound = weight.shape[1] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound


def test_each_pair_of_characters_has_an_embedding():
    """The first character of a text forms a pair with token 0."""
    model = shaken(build(v10b, embedding_norm=False, smear=False))
    idx = random_tokens(2, 5)
    actual = inputs_of_the_first_block(model, idx)
    assert model.bigram_embedding.weight.shape == (VOCAB_SIZE**2, 18)
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
    first = torch.nn.functional.rms_norm(model.token_embedding.weight[0], (18,))
    torch.testing.assert_close(actual[0, 0], embeddings[0] + gates[0] * first)


def test_values_are_mixed_with_an_embedding_of_their_character():
    """Attention to a single position returns its value, so it shows there."""
    model = shaken(build(v10b))
    attention = model.blocks[1].attention
    x, (cos, sin) = torch.randn(1, 1, 18), torch.randn(2, 1, 3)
    embedding = model.value_embeddings[1](torch.tensor([[4]]))
    mixed = attention.mix[0] * attention.value(x) + attention.mix[1] * embedding
    expected = attention.projection(mixed.repeat(1, 1, 3))  # one key/value head for three heads
    torch.testing.assert_close(attention(x, cos, sin, None, embedding), expected)


def test_each_block_has_value_embeddings_of_its_own():
    model = shaken(build(v10b))
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[4]))
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
            block.attention.query.weight *= 10
            block.attention.key.weight *= 10
    torch.testing.assert_close(model(idx)[0], before, atol=1e-4, rtol=1e-3)


def test_relu_squared_has_two_matrices_and_no_gate():
    model = shaken(build(v10b))
    feed_forward = model.blocks[0].feed_forward
    first, second = (parameter for parameter in feed_forward.parameters())
    assert (first.shape, second.shape) == ((72, 18), (18, 72))
    x = torch.randn(2, 18)
    expected = torch.clamp(x @ first.T, min=0) ** 2 @ second.T
    torch.testing.assert_close(feed_forward(x), expected)


# ---- the cache

# Each switch on its own, each one missing, all, and none.
COMBINATIONS = [
    *(ALL_OFF | {switch: True} for switch in SWITCHES), *({switch: False} for switch in SWITCHES),
    {}, ALL_OFF,
]  # fmt: skip


def make_caches(model, n_texts):
    return [v10b.KVCache(model.cfg, n_texts, torch.device("cpu")) for _ in model.blocks]


@pytest.mark.parametrize("switches", COMBINATIONS, ids=lambda switches: str(list(switches.items())))
@pytest.mark.parametrize("length", [1, 4])
def test_the_cache_does_not_change_the_text(switches, length):
    """Although each new token needs the one before it, which the model doesn't see again."""
    model = shaken(build(v10b, block_size=12, **switches)).eval()
    cfg = tiny(v10b, block_size=12, **switches)
    idx = random_tokens(3, length)
    torch.manual_seed(5)
    actual = torch.cat([idx, *model.stream(idx, 13 - length, cfg)], dim=1)
    torch.manual_seed(5)
    for _ in range(13 - length):
        logits, _ = model(idx)
        idx = torch.cat((idx, v10b.choose_token(logits[:, -1], idx, cfg)), dim=1)
    assert torch.equal(actual, idx)
    caches = make_caches(model, 3)
    pieces = idx[:, :12].split([length] + [1] * (12 - length), dim=1)
    logits = torch.cat([model(piece, caches=caches)[0] for piece in pieces], dim=1)
    torch.testing.assert_close(logits, model(idx[:, :12])[0], rtol=1e-4, atol=1e-4)


def test_the_first_cache_keeps_the_last_token():
    model = shaken(build(v10b))
    caches = make_caches(model, 3)
    assert caches[0].last_token.tolist() == [0, 0, 0]
    idx = random_tokens(3, 5)
    for begin, end in ((0, 3), (3, 4), (4, 5)):
        model(idx[:, begin:end], caches=caches)
        assert torch.equal(caches[0].last_token, idx[:, end - 1])


def test_the_token_before_is_also_known_when_the_caches_are_full():
    model = shaken(build(v10b))
    caches = make_caches(model, 3)
    idx = random_tokens(3, 20)
    pieces = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: pieces.append(inputs[0]))
    for piece in idx.split([5] + [1] * 15, dim=1):
        model(piece, caches=caches)
    hook.remove()
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.embed(idx, None))


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
@pytest.mark.parametrize("resumed", [False, True])
def test_the_last_layer_learns_at_a_fifth_of_the_rate(splits, changes, factor, resumed):
    model = build(v10b, **changes)
    cfg = tiny(v10b, **changes, dtype="float32", warmup_iters=0, learning_rate=0.25)
    optimizers = v10b.make_optimizers(model, cfg)
    if resumed:
        run = runs.UnsavedRun()
        run.is_new = False
        run.saved = v10b.checkpoint(model, optimizers, 0)
        assert v10b.restore(model, optimizers, run) == 0
    v10b.train_step(model, optimizers, splits[0], 0, cfg)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            is_head = any(p is model.lm_head.weight for p in group["params"])
            assert group["lr"] == (0.25 * factor if is_head else 0.25)


def test_only_the_matrices_of_the_blocks_decay():
    muon, adamw = v10b.make_optimizers(build(v10b), tiny(v10b, weight_decay=0.5))
    assert [group["weight_decay"] for group in muon.param_groups] == [0.5]
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0}


# ---- runs that are resumed


def test_a_run_keeps_the_switches_that_its_weights_need(corpus, tmp_path, capsys):
    v10b.main([*tiny_flags(v10b, out_dir=tmp_path), "--data", str(corpus)])
    for switch in ("bigrams", "smear", "value_embeddings", "relu_squared"):
        for mode in ("--resume", "--sample_only"):
            line = refused(v10b, capsys, mode, "--out_dir", tmp_path, f"--no-{switch}")
            assert line.startswith(f"error: --{switch} False: the checkpoint has True, ")


def test_a_run_of_v10a_can_not_be_resumed(corpus, tmp_path, capsys):
    v10a.main([*tiny_flags(v10a, out_dir=tmp_path), "--data", str(corpus)])
    line = refused(v10b, capsys, "--resume", "--out_dir", tmp_path, "--max_iters", "5")
    writer = Path("part6_speedrun", "v10a_muon.py")
    why = f"written by {writer}, whose model has no qk_norm; use that script"
    assert line == f"error: {tmp_path / 'latest.pt'}: {why}"
