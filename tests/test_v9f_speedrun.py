"""v9f_speedrun.py: the switches, the cache beside pairs of characters, and runs by the clock."""

import re

import data

import pytest
import torch
from conftest import VOCAB_SIZE, build, random_tokens, refused, shaken, tiny, tiny_flags

import v9e_muon as v9e
import v9f_speedrun as v9f

SWITCHES = [
    "qk_norm", "zero_init", "embedding_norm", "bigrams", "smear", "value_embeddings", "trapezoid",
]  # fmt: skip
ALL_OFF = dict.fromkeys(SWITCHES, False)


# ---- the switches


def test_without_its_switches_it_is_v9e(splits):
    ours, theirs = build(v9f, **ALL_OFF), build(v9e)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    idx, targets = random_tokens(2, 5), random_tokens(2, 5)
    for actual, expected in zip(ours(idx, targets), theirs(idx, targets), strict=True):
        assert torch.equal(actual, expected)
    histories = []
    for script, changes in ((v9f, ALL_OFF), (v9e, {})):
        torch.manual_seed(3)
        histories.append(script.train(build(script, **changes), *splits, tiny(script, **changes)))
    assert histories[0] == histories[1]


@pytest.mark.parametrize("switch", [s for s in SWITCHES if s != "trapezoid"])
def test_each_switch_changes_the_model(switch):
    torch.manual_seed(1)
    on = v9f.LanguageModel(tiny(v9f, **{**ALL_OFF, switch: True}), VOCAB_SIZE)
    off = build(v9f, **ALL_OFF)
    idx = random_tokens(2, 5)
    if switch == "zero_init":
        assert not torch.equal(on(idx)[0], off(idx)[0])
    else:
        missing = on.load_state_dict(off.state_dict(), strict=False).missing_keys
        assert missing != []
        assert not torch.equal(on(idx)[0], off(idx)[0])


def test_at_first_each_block_changes_nothing():
    model = build(v9f)
    assert (model.lm_head.weight == 0).all()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    logits, _ = model(random_tokens(2, 5))
    assert (logits == 0).all()
    assert len(seen) == 2
    for before, after in seen:
        assert torch.equal(before, after)


def test_each_pair_of_characters_has_an_embedding():
    """The first character of a text forms a pair with token 0."""
    model = shaken(build(v9f, embedding_norm=False, smear=False))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    idx = random_tokens(2, 5)
    model(idx)
    for b in range(2):
        for t in range(5):
            previous = idx[b, t - 1].item() if t > 0 else 0
            pair = model.bigram_embedding.weight[previous * VOCAB_SIZE + idx[b, t]]
            expected = model.token_embedding.weight[idx[b, t]] + pair
            torch.testing.assert_close(seen[0][b, t], expected)


def test_a_gate_adds_some_of_the_previous_embedding():
    model = shaken(build(v9f, embedding_norm=False, bigrams=False))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    idx = random_tokens(1, 5)
    model(idx)
    embeddings = model.token_embedding(idx[0])
    gates = torch.tanh(embeddings @ model.smear_gate.weight[0])
    expected = embeddings[1:] + gates[1:, None] * embeddings[:-1]
    torch.testing.assert_close(seen[0][0, 1:], expected)


def test_values_get_an_embedding_of_their_character():
    """Attention to a single position returns its value, so it shows there."""
    model = shaken(build(v9f))
    attention = model.blocks[1].attention
    x, angles = torch.randn(1, 1, 18), torch.zeros(1, 3)
    more = model.value_embeddings[1](torch.tensor([[4]]))
    difference = attention(x, angles, None, more) - attention(x, angles)
    expected = attention.projection(more.repeat(1, 1, 3))  # one key/value head for three heads
    torch.testing.assert_close(difference, expected)


def test_queries_and_keys_are_normalised():
    """So their size has no effect on the scores."""
    model = build(v9f, zero_init=False)
    idx = random_tokens(2, 5)
    before, _ = model(idx)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query_key_value.weight[: 18 + 6] *= 10
    torch.testing.assert_close(model(idx)[0], before, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lengths", [[12], [1] * 12, [4, 1, 1, 6], [1, 11]])
def test_tokens_may_come_to_the_cache_in_pieces(lengths):
    """Although the first token of a piece forms a pair with the last one of the piece before."""
    model = shaken(build(v9f, block_size=12))
    idx = random_tokens(3, 12)
    expected, _ = model(idx)
    caches = model.make_caches(3)
    pieces = [model(piece, caches=caches)[0] for piece in idx.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


def test_muon_still_has_only_the_matrices_of_the_blocks():
    model = build(v9f)
    muon, adamw = v9f.make_optimizers(model, tiny(v9f))
    n_muon = sum(p.numel() for group in muon.param_groups for p in group["params"])
    n_adamw = sum(p.numel() for group in adamw.param_groups for p in group["params"])
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    assert n_muon == sum(p.numel() for p in matrices)
    assert n_muon + n_adamw == sum(p.numel() for p in model.parameters())


# ---- the schedule


def test_the_trapezoid_rises_stays_and_falls():
    cfg = tiny(v9f, max_iters=110, warmup_iters=10, learning_rate=0.5)
    rates = []
    for step in range(110):
        rates.append(v9f.learning_rate_at(step, v9f.progress_at(step, 0.0, cfg), cfg))
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10:60] == [0.5] * 50
    assert rates[60:] == pytest.approx([0.5 - 0.01 * step for step in range(50)])


def test_by_the_clock_progress_is_the_time_that_has_passed():
    cfg = tiny(v9f, max_iters=v9f.BY_CLOCK, minutes=2.0)
    assert [v9f.progress_at(7, seconds, cfg) for seconds in (0.0, 30.0, 120.0, 130.0)] == [
        0.0, 0.25, 1.0, 1.0
    ]  # fmt: skip
    by_steps = tiny(v9f, max_iters=20, warmup_iters=0, minutes=2.0)
    assert v9f.progress_at(5, 1e9, by_steps) == 0.25


def test_a_run_ends_when_its_time_is_over(splits, monkeypatch):
    """On a clock that goes on by a second whenever it is read."""
    now = iter(range(10**6))
    monkeypatch.setattr(v9f.time, "perf_counter", lambda: float(next(now)))
    changes = {"minutes": 0.5, "max_iters": v9f.BY_CLOCK, "warmup_iters": 0, "eval_interval": 5}
    history = v9f.train(build(v9f), *splits, tiny(v9f, **changes))
    steps = [step for step, _, _ in history]
    assert steps[0] == 0
    assert 10 < steps[-1] < 31


@pytest.mark.parametrize(
    ("minutes", "budget"), [(0.01, 2), (2, 2), (5.9, 2), (6, 6), (19, 6), (20, 20), (500, 20)]
)
def test_minutes_choose_the_settings(monkeypatch, capsys, minutes, budget):
    seen = []

    def build(cfg, vocab_size):
        seen.append(cfg)
        raise data.InputError("seen enough")

    monkeypatch.setattr(v9f, "LanguageModel", build)
    flags = ["--minutes", minutes, "--device", "cpu", "--data", "python"]
    refused(v9f, capsys, *flags)
    assert vars(seen[0]).items() >= v9f.BUDGETS[budget].items()
    assert seen[0].max_iters == v9f.BY_CLOCK
    refused(v9f, capsys, *flags, "--max_iters", "70", "--n_layer", "1")
    assert (seen[1].max_iters, seen[1].n_layer) == (70, 1)


def test_a_run_by_steps_is_reproducible(corpus, tmp_path, capsys):
    for name in ("first", "second"):
        flags = tiny_flags(v9f, out_dir=tmp_path / name, minutes=3, warmup_iters=1)
        v9f.main([*flags, "--data", str(corpus)])
    states = [torch.load(tmp_path / name / "latest.pt") for name in ("first", "second")]
    for name, weight in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], weight)


def test_a_resumed_run_by_the_clock_has_only_the_time_that_is_left(splits, monkeypatch):
    cfg = tiny(v9f, minutes=1.0, max_iters=v9f.BY_CLOCK, warmup_iters=0, eval_interval=10**6)
    model = build(v9f)
    optimizers = v9f.make_optimizers(model, cfg)
    entry = {"step": 4, "train_loss": 1.0, "val_loss": 1.0, "seconds": 50.0}
    state = {
        "step": 4, "log": [entry], "random_state": torch.get_rng_state(), "path": "",
        "optimizer": {i: o.state_dict()["state"] for i, o in enumerate(optimizers)},
    }  # fmt: skip
    monkeypatch.setattr(data, "load_averages", lambda optimizer, state: None)
    now = iter(range(10**6))
    monkeypatch.setattr(v9f.time, "perf_counter", lambda: float(next(now)))
    history = v9f.train(model, *splits, cfg, None, state)
    assert 4 < history[-1][0] < 4 + 10


def test_the_help_says_that_the_clock_is_not_reproducible(capsys):
    with pytest.raises(SystemExit):
        v9f.main(["--help"])
    out = capsys.readouterr().out
    assert re.search(r"--minutes float\s+train by the clock; not reproducible", out)
