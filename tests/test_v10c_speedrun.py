"""v10c_speedrun.py: runs by the clock, calibration, faster attention and a faster Muon."""

import re

import pytest
import torch
from conftest import build, random_tokens, refused, shaken, tiny, tiny_flags

import data
from part6_speedrun import v10b_tricks as v10b
from part6_speedrun import v10c_speedrun as v10c
from support import hardware
from support.old import checkpoints, runs

# ---- attention without the fused kernel


def test_attention_written_out_equals_the_fused_kernel():
    """Also with three heads to one key/value head, and for the gradients."""
    plain, fused = (shaken(build(v10c, fused_attention=on)) for on in (False, True))
    fused.load_state_dict(plain.state_dict())
    idx, targets = random_tokens(2, 5), random_tokens(2, 5)
    losses = []
    for model in (plain, fused):
        _, loss = model(idx, targets)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_it_drops_attention_weights_in_training_only(monkeypatch):
    seen = []
    plain_attention = v10c.plain_attention

    def remember(query, key, value, dropout_p):
        seen.append(dropout_p)
        return plain_attention(query, key, value, dropout_p)

    monkeypatch.setattr(v10c, "plain_attention", remember)
    model = build(v10c, fused_attention=False, dropout=0.5)
    model(random_tokens(2, 5))
    model.eval()
    model(random_tokens(2, 5))
    assert seen == [0.5, 0.5, 0.0, 0.0]


def test_dropped_weights_are_zero():
    query = torch.randn(1, 1, 64, 4)
    value = torch.ones(1, 1, 64, 4)
    out = v10c.plain_attention(query, query, value, 0.5)
    assert out.std() > 0.1
    torch.testing.assert_close(v10c.plain_attention(query, query, value, 0.0), value)


# ---- the iteration of Muon


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_one_call_for_product_and_sum_gives_the_same_update(monkeypatch, shape):
    """In bfloat16, it rounds less often, and so comes closer to the result in float32."""
    torch.manual_seed(1)
    matrices = torch.randn(shape)
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: False)
    exact = v10b.orthogonalise(matrices)
    torch.testing.assert_close(v10c.orthogonalise(matrices), exact, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    old_error = (v10b.orthogonalise(matrices) - exact).norm()
    new_error = (v10c.orthogonalise(matrices) - exact).norm()
    assert 0 < new_error < old_error


# ---- calibration


def test_calibration_divides_the_logits_but_not_in_training():
    plain, calibrated = (shaken(build(v10c, calibration=number)) for number in (1.0, 1.25))
    calibrated.load_state_dict(plain.state_dict())
    idx, targets = random_tokens(2, 5), random_tokens(2, 5)
    torch.testing.assert_close(calibrated(idx, targets), plain(idx, targets))
    plain.eval()
    calibrated.eval()
    logits, loss = calibrated(idx, targets)
    torch.testing.assert_close(logits, plain(idx)[0] / 1.25)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)


# ---- the clock


def test_by_the_clock_progress_is_the_time_that_has_passed():
    cfg = tiny(v10c, max_iters=v10c.BY_CLOCK, minutes=2.0)
    assert [v10c.progress_at(7, seconds, cfg) for seconds in (0.0, 30.0, 120.0, 130.0)] == [
        0.0, 0.25, 1.0, 1.0
    ]  # fmt: skip
    by_steps = tiny(v10c, max_iters=20, warmup_iters=0, minutes=2.0)
    assert v10c.progress_at(5, 1e9, by_steps) == 0.25


def test_a_run_ends_when_its_time_is_over(splits, monkeypatch):
    """On a clock that goes on by a second whenever it is read."""
    now = iter(range(10**6))
    monkeypatch.setattr(v10c.time, "perf_counter", lambda: float(next(now)))
    changes = {"minutes": 0.5, "max_iters": v10c.BY_CLOCK, "warmup_iters": 0, "eval_interval": 5}
    history = v10c.train(build(v10c), *splits, tiny(v10c, **changes))
    steps = [step for step, _, _ in history]
    assert steps[0] == 5  # none before the first step
    assert 10 < steps[-1] < 31


@pytest.mark.parametrize(
    ("minutes", "budget"), [(0.01, 0), (2, 0), (4.9, 0), (5, 5), (17, 5), (18, 18), (500, 18)]
)
def test_minutes_choose_the_settings(monkeypatch, capsys, minutes, budget):
    seen = []

    def build(cfg, vocab_size):
        seen.append(cfg)
        raise data.InputError("seen enough")

    monkeypatch.setattr(v10c, "LanguageModel", build)
    flags = ["--minutes", minutes, "--device", "cpu", "--data", "python"]
    refused(v10c, capsys, *flags)
    assert vars(seen[0]).items() >= v10c.BUDGETS[budget].items()
    assert seen[0].max_iters == v10c.BY_CLOCK
    refused(v10c, capsys, *flags, "--max_iters", "70", "--n_layer", "1")
    assert (seen[1].max_iters, seen[1].n_layer) == (70, 1)


def test_a_run_by_steps_is_reproducible(corpus, tmp_path, capsys):
    for name in ("first", "second"):
        flags = tiny_flags(v10c, out_dir=tmp_path / name, minutes=3, warmup_iters=1)
        v10c.main([*flags, "--data", str(corpus)])
    states = [torch.load(tmp_path / name / "latest.pt") for name in ("first", "second")]
    for name, weight in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], weight)


def test_a_resumed_run_by_the_clock_has_only_the_time_that_is_left(
    splits, monkeypatch, tmp_path
):
    """On a clock that goes on by a second whenever it is read; stopped long before the end."""
    clock = {"minutes": 1.0, "max_iters": v10c.BY_CLOCK, "warmup_iters": 0, "eval_interval": 10**6}
    cfg = tiny(v10c, **clock)
    now = iter(range(10**6))
    monkeypatch.setattr(v10c.time, "perf_counter", lambda: float(next(now)))
    saved = []
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda state, path: saved.append(state))
    monkeypatch.setattr(checkpoints, "write_log", lambda log, path: None)
    answers = iter([False] * 45)
    monkeypatch.setattr(runs, "stop_requested", lambda: next(answers, True))
    model = build(v10c)
    with pytest.raises(KeyboardInterrupt):
        v10c.train(model, *splits, cfg, {"folder": str(tmp_path)})
    stopped = saved[-1]
    assert 30 < stopped["seconds"] < 60
    assert stopped["log"] == []  # no loss estimate so far
    monkeypatch.setattr(runs, "stop_requested", lambda: False)
    stopped["path"] = ""  # as read_checkpoint adds it
    history = v10c.train(model, *splits, cfg, {"folder": str(tmp_path)}, stopped)
    assert 0 < history[-1][0] - stopped["step"] <= 60 - stopped["seconds"]


def test_the_help_says_that_the_clock_is_not_reproducible(capsys):
    with pytest.raises(SystemExit):
        v10c.main(["--help"])
    out = capsys.readouterr().out
    assert re.search(r"--minutes float\s+train by the clock; not reproducible", out)
