"""v9b_rope.py: rotary positions, and a cache that slides."""

import math

import pytest
import torch
from conftest import TEXT, build, random_tokens, refused, tiny, tiny_flags
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import data
from lab.common import generate
from part5_modern import v9b_rope as v9b


def decisive(model):
    """The model with random weights that make each choice uneven, and depend on the whole text."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1, std=0.1)
    return model.eval()


def make_model(**changes):
    return decisive(build(v9b, **changes))


def cos_and_sin(positions, head_size):
    """The cosines and sines of the angles at positions, float (T, head_size // 2) each."""
    angles = v9b.rotation_angles(positions, head_size)
    return angles.cos(), angles.sin()


def rotated(x, positions):
    """Queries or keys, float (..., T, head_size), as they are at positions."""
    return v9b.rotate(x, *cos_and_sin(positions, x.shape[-1]))


def in_pieces(model, idx, lengths):
    """The logits of idx, if it comes to the caches in pieces of these lengths."""
    cfg = tiny(v9b, block_size=model.block_size)
    caches = [v9b.KVCache(cfg, len(idx), idx.device) for _ in model.blocks]
    return torch.cat([model(piece, caches=caches)[0] for piece in idx.split(lengths, 1)], 1)


def assert_same(logits, expected):
    """The logits, which are up to 10 or so, differ by rounding only."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def banded_logits(model, idx, width):
    """The logits of one pass over idx in which a position sees width positions, up to itself."""
    positions = torch.arange(idx.shape[1])
    distance = positions[:, None] - positions  # from a query to a key
    is_visible = (distance >= 0) & (distance < width)

    def attention(query, key, value, **_):
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        return scores.masked_fill(~is_visible, -math.inf).softmax(3) @ value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        return model(idx)[0]


# ---- rotation


@pytest.mark.parametrize("head_size", [2, 6, 64])
def test_queries_and_keys_are_those_of_transformers(head_size):
    query, key = torch.randn(2, 2, 3, 50, head_size)
    positions = torch.randint(5000, (50,))
    config = LlamaConfig(hidden_size=3 * head_size, num_attention_heads=3)
    cos, sin = LlamaRotaryEmbedding(config)(query, positions[None])
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    actual = rotated(query, positions), rotated(key, positions)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shift", [1, 7, 1000])
def test_scores_stay_the_same_if_all_positions_are_shifted(shift):
    query, key = torch.randn(2, 2, 3, 20, 6)
    positions = torch.randint(100, (20,))
    expected = rotated(query, positions) @ rotated(key, positions).mT
    actual = rotated(query, positions + shift) @ rotated(key, positions + shift).mT
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def test_scores_depend_on_the_distance():
    """Of the same query and key, at all pairs of positions."""
    query, key = torch.randn(2, 1, 8).expand(2, 20, 8)
    positions = torch.arange(20)
    scores = rotated(query, positions) @ rotated(key, positions).T
    by_distance = [scores.diagonal(distance) for distance in range(-19, 20)]
    for same in by_distance:
        torch.testing.assert_close(same, same[:1].expand(len(same)))
    assert torch.stack([same[0] for same in by_distance]).std() > 0.1


def test_position_0_is_not_rotated():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(rotated(x, torch.zeros(4).long()), x)


def test_rotation_keeps_the_length_and_the_dtype():
    x = torch.randn(2, 3, 40, 6)
    y = rotated(x, torch.arange(40))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert (y - x).norm() > 0.5 * x.norm()
    low = rotated(x.bfloat16(), torch.arange(1000, 1040))
    assert low.dtype == torch.bfloat16
    expected = rotated(x, torch.arange(1000, 1040))
    torch.testing.assert_close(low.float(), expected, rtol=0.01, atol=0.03)


def test_attention_rotates_queries_and_keys_but_not_values():
    layer = decisive(v9b.MultiHeadAttention(tiny(v9b, n_head=1)))
    x, positions = torch.randn(2, 5, 18), torch.arange(5)
    query, key, value = (x @ layer.query_key_value.weight.T).chunk(3, dim=2)
    scores = rotated(query, positions) @ rotated(key, positions).mT / math.sqrt(18)
    future = torch.ones(5, 5).triu(1).bool()
    heads = scores.masked_fill(future, -math.inf).softmax(2) @ value
    expected = heads @ layer.projection.weight.T
    assert_same(layer(x, *cos_and_sin(positions, 18)), expected)


def test_the_angles_are_computed_once_for_all_layers(monkeypatch):
    model = make_model()
    calls = []
    real = v9b.rotation_angles

    def rotation_angles(positions, head_size):
        calls.append((positions.tolist(), head_size))
        return real(positions, head_size)

    monkeypatch.setattr(v9b, "rotation_angles", rotation_angles)
    in_pieces(model, random_tokens(2, 8), [4] + [1] * 4)
    assert calls == [([0, 1, 2, 3], 6), ([4], 6), ([5], 6), ([6], 6), ([7], 6)]


def test_no_parameter_belongs_to_a_position():
    short, long = build(v9b, block_size=5), build(v9b, block_size=50)
    assert not any("position" in name for name in long.state_dict())
    long.load_state_dict(short.state_dict())


@pytest.mark.parametrize(("n_embd", "n_head"), [(15, 3), (7, 7), (9, 1)])
def test_heads_of_odd_size_are_refused(corpus, capsys, n_embd, n_head):
    flags = tiny_flags(v9b, n_embd=n_embd, n_head=n_head)
    line = refused(v9b, capsys, *flags, "--data", corpus)
    assert line.startswith(f"error: --n_embd {n_embd}: ")
    assert f"not a multiple of 2 * --n_head {n_head}, but rotation needs pairs" in line


# ---- one cache


def test_a_full_cache_replaces_the_oldest_token():
    cache = v9b.KVCache(tiny(v9b), 2, torch.device("cpu"))
    keys, values = torch.randn(2, 2, 3, 18, 6)
    slots = torch.empty(5).long()  # the number of the token in each of the 5 places
    begin = 0
    for length in [2, 1, 2] + [1] * 13:
        end = begin + length
        key, value = cache.append(keys[:, :, begin:end], values[:, :, begin:end])
        for token in range(begin, end):
            slots[token % 5] = token
        kept = slots[:end]
        assert sorted(kept.tolist()) == list(range(max(0, end - 5), end))
        assert torch.equal(key, keys[:, :, kept])
        assert torch.equal(value, values[:, :, kept])
        assert cache.length == end
        begin = end
    assert cache.keys.shape == cache.values.shape == (2, 3, 5, 6)


# ---- the same function as one pass over the whole text


@pytest.mark.parametrize("length", [1, 2, 10, 23, 24])
def test_tokens_may_come_to_the_cache_one_by_one_after_a_text_of_any_length(length):
    model = make_model(block_size=24)
    idx = random_tokens(3, 24)
    expected, _ = model(idx)
    assert_same(in_pieces(model, idx, [length] + [1] * (24 - length)), expected)


@pytest.mark.parametrize("first", [1, 3, 8])
@pytest.mark.parametrize("n_layer", [1, 3])
def test_far_beyond_block_size_logits_are_those_of_a_banded_pass(first, n_layer):
    """The first tokens may come all at once."""
    model = make_model(block_size=8, n_layer=n_layer)
    idx = random_tokens(2, 27)
    expected = banded_logits(model, idx, 8)
    actual = in_pieces(model, idx, [first] + [1] * (27 - first))
    assert_same(actual, expected)
    for width in (7, 9):
        difference = (actual - banded_logits(model, idx, width)).abs()
        assert difference.mean() > 0.1, "one token more or less makes a difference"


def test_a_pass_without_caches_sees_the_whole_text():
    model = make_model(block_size=8)
    idx = random_tokens(2, 27)
    assert_same(model(idx)[0], banded_logits(model, idx, 27))


def test_several_layers_look_back_further_than_block_size():
    model = make_model(block_size=8, n_layer=3)
    idx = random_tokens(1, 27)
    other = idx.clone()
    other[:, 0] = (idx[:, 0] + 1) % 20
    difference = in_pieces(model, idx, [1] * 27) - in_pieces(model, other, [1] * 27)
    has_changed = difference.abs().amax(dim=2)[0] > 1e-4
    last = 3 * 7  # each layer looks back at the 7 tokens before
    assert has_changed[:8].all()
    assert has_changed[8 : last + 1].any()
    assert not has_changed[last + 1 :].any()


@pytest.mark.parametrize(
    ("block_size", "length"), [(1, 1), (1, 3), (2, 3), (8, 3), (8, 8), (8, 20)]
)
def test_tokens_are_chosen_from_the_logits_of_a_banded_pass(monkeypatch, block_size, length):
    """Of a longer prompt, only the last block_size tokens count."""
    model = make_model(block_size=block_size)
    seen = []
    real = v9b.choose_token

    def choose_token(logits, idx, cfg):
        seen.append(logits)
        return real(logits, idx, cfg)

    monkeypatch.setattr(v9b, "choose_token", choose_token)
    cfg = tiny(v9b, block_size=block_size)
    idx = generate(v9b, model, random_tokens(2, length), 25, cfg)
    begin = max(0, length - block_size)
    expected = banded_logits(model, idx[:, begin:-1], block_size)
    assert_same(torch.stack(seen, dim=1), expected[:, -25:])


def test_each_step_processes_one_token(monkeypatch):
    model = make_model(block_size=24)
    lengths = []
    real = model.forward

    def forward(idx, targets=None, caches=None):
        lengths.append(idx.shape[1])
        return real(idx, targets, caches)

    monkeypatch.setattr(model, "forward", forward)
    cfg = tiny(v9b, block_size=24)
    generate(v9b, model, random_tokens(2, 4), 80, cfg)
    generate(v9b, model, random_tokens(2, 99), 5, cfg)
    assert lengths == [4] + [1] * 79 + [24] + [1] * 4


# ---- main


def test_block_size_may_change_after_training(corpus, tmp_path, capsys):
    """Even while a run goes on."""
    folder = tmp_path / "run"
    v9b.main([*tiny_flags(v9b, out_dir=folder), "--data", str(corpus)])
    state = torch.load(folder / "best.pt", weights_only=True)
    state["model"] = make_model().state_dict()
    torch.save(state, folder / "best.pt")
    tokenizer = data.CharTokenizer(TEXT)
    start = torch.tensor([tokenizer.encode("The ")])
    texts = set()
    for block_size in (5, 9, 4):
        model = make_model(block_size=block_size)
        cfg = tiny(v9b, block_size=block_size)
        torch.manual_seed(cfg.seed)
        expected = tokenizer.decode(generate(v9b, model, start, 60, cfg)[0].tolist())
        capsys.readouterr()
        typed = ["--prompt", "The ", "--max_new_tokens", "60", "--dtype", "float32"]
        typed += [] if block_size == 5 else ["--block_size", str(block_size)]
        v9b.main(["--sample_only", "--out_dir", str(folder), *typed])
        assert capsys.readouterr().out == expected + "\n"
        texts.add(expected)
    assert len(texts) == 3
    more = ["--max_iters", "4", "--block_size", "9"]
    v9b.main(["--resume", "--out_dir", str(folder), *more])
    config = torch.load(folder / "latest.pt", weights_only=True)["config"]
    assert (config["max_iters"], config["block_size"]) == (4, 9)
