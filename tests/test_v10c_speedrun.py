"""v10c_speedrun.py: runs by the clock, which the tests set, and the settings for them."""

import dataclasses
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB_SIZE, build, random_tokens, shaken, tiny, tiny_flags

from part6_speedrun import v10b_tricks as v10b
from part6_speedrun import v10c_speedrun as v10c
from support.runs import UnsavedRun

# By the clock of the fixture, these are 10 steps after the first estimate.
HALF_A_MINUTE = {"minutes": 0.5, "max_iters": 10**6, "warmup_iters": 0, "eval_interval": 10**6}


class Clock:
    """A clock for v10c: a step takes 2.5 seconds, a pair of estimates 5, anything else no time.

    seen has the step and the progress of each training step. When step is stop_after, Ctrl-C is
    pressed.
    """

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.seen = []
        self.stop_after = None
        self.train_step, self.estimate_loss = v10c.train_step, v10c.estimate_loss
        monkeypatch.setattr(v10c, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(v10c, "train_step", self.take_step)
        monkeypatch.setattr(v10c, "estimate_loss", self.take_estimate)

    def take_step(self, model, optimizers, tokens, step, progress, cfg):
        self.train_step(model, optimizers, tokens, step, progress, cfg)
        self.now += 2.5
        self.seen.append((step, progress))
        if step == self.stop_after:
            signal.raise_signal(signal.SIGINT)

    def take_estimate(self, *args):
        self.now += 2.5
        return self.estimate_loss(*args)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def progress_after(step):
    """The progress of HALF_A_MINUTE before a step, which the first estimate also adds to."""
    return pytest.approx(0.0 if step == 0 else (5 + 2.5 * step) / 30)


def saved(folder):
    return torch.load(folder / "latest.pt", weights_only=True)


def train_a_run(corpus, folder, **changes):
    """Train in a folder; return the last checkpoint."""
    v10c.main([*tiny_flags(v10c, out_dir=folder, **changes), "--data", str(corpus)])
    return saved(folder)


def resume(folder, *flags):
    """Continue the run in a folder; return the last checkpoint."""
    v10c.main(["--resume", "--out_dir", str(folder), *flags])
    return saved(folder)


def stop_a_run(clock, step, corpus, folder, **changes):
    """Train in a folder until Ctrl-C in a step; return the last checkpoint."""
    clock.stop_after = step
    with pytest.raises(SystemExit):
        train_a_run(corpus, folder, **changes)
    clock.stop_after = None
    return saved(folder)


# ---- the model


def test_the_model_is_that_of_v10b():
    old, new = shaken(build(v10b)), build(v10c)
    new.load_state_dict(old.state_dict())
    idx, targets = random_tokens(2, 5), random_tokens(2, 5)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        assert torch.equal(actual, expected)


# ---- progress and the learning rate


@pytest.mark.parametrize(
    ("step", "seconds", "minutes", "max_iters", "progress"),
    [
        pytest.param(0, 0.0, 0.0, 20, 0.0, id="before the first step"),
        pytest.param(5, 1e9, 0.0, 20, 0.25, id="without minutes, the clock doesn't count"),
        pytest.param(20, 0.0, 0.0, 20, 1.0, id="after the last step"),
        pytest.param(21, 0.0, 0.0, 20, 1.0, id="after more steps than that"),
        pytest.param(0, 0.0, 2.0, 10**7, 0.0, id="before the first second"),
        pytest.param(7, 30.0, 2.0, 10**7, 0.25, id="by the clock"),
        pytest.param(7, 120.0, 2.0, 10**7, 1.0, id="when the time is over"),
        pytest.param(7, 130.0, 2.0, 10**7, 1.0, id="later than that"),
        pytest.param(15, 30.0, 2.0, 20, 0.75, id="steps that end first"),
        pytest.param(5, 60.0, 2.0, 20, 0.5, id="time that ends first"),
        pytest.param(20, 1.0, 2.0, 20, 1.0, id="all steps, with time left"),
        pytest.param(0, 0.0, 0.0, 0, 1.0, id="no steps"),
        pytest.param(0, 0.0, 2.0, 0, 1.0, id="no steps, but time"),
    ],
)
def test_progress_is_that_of_what_ends_first(step, seconds, minutes, max_iters, progress):
    cfg = tiny(v10c, minutes=minutes, max_iters=max_iters)
    assert v10c.progress_at(step, seconds, cfg) == progress


def test_the_learning_rate_warms_up_by_steps_and_then_falls_with_progress():
    cfg = tiny(v10c, learning_rate=0.01, warmup_iters=4, max_iters=10**7, minutes=1.0)
    for progress in (0.0, 0.9):
        rates = [v10c.learning_rate_at(step, progress, cfg) for step in range(4)]
        assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    for step in (4, 1000):
        fractions = (0.0, 1 / 3, 0.5, 2 / 3, 1.0)
        rates = [v10c.learning_rate_at(step, progress, cfg) for progress in fractions]
        assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.0])


def test_both_optimizers_follow_progress(splits):
    cfg = tiny(v10c, dtype="float32", learning_rate=0.01, warmup_iters=0)
    model = build(v10c)
    optimizers = v10c.make_optimizers(model, cfg)
    v10c.train_step(model, optimizers, splits[0], 1, 0.5, cfg)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([0.005, 0.005, 0.001, 0.005]), "the third is the last layer's"


# ---- settings


@pytest.mark.parametrize(
    ("minutes", "least"), [(0.01, 0), (2, 0), (4.9, 0), (5, 5), (17.9, 5), (18, 18), (500, 18)]
)
def test_minutes_choose_the_settings(minutes, least):
    words = ["--minutes", str(minutes), "--device", "cpu"]
    cfg, checkpoint = v10c.read_settings(words)
    assert checkpoint == {}
    chosen = v10c.BUDGETS[least] | {"minutes": minutes, "device": "cpu"}
    others = vars(v10c.read_settings(["--device", "cpu"])[0])
    assert vars(cfg) == others | chosen, "also all their names are those of settings"
    cfg, _ = v10c.read_settings([*words, "--max_iters", "70", "--n_layer", "1"])
    assert vars(cfg) == others | chosen | {"max_iters": 70, "n_layer": 1}


@pytest.mark.parametrize("least", v10c.BUDGETS)
def test_models_of_these_sizes_can_be_built_and_no_day_has_so_many_steps(least):
    cfg, _ = v10c.read_settings(["--minutes", str(least + 0.1), "--device", "cpu"])
    with torch.device("meta"):
        model = v10c.LanguageModel(cfg, VOCAB_SIZE)
    assert model.token_embedding.weight.shape == (VOCAB_SIZE, cfg.n_embd)
    assert cfg.max_iters > 24 * 60 * 60 * 50, "what 50 steps a second are in a day"


def test_without_minutes_the_defaults_are_those_of_v10b():
    cfg, _ = v10c.read_settings(["--device", "cpu"])
    assert cfg.minutes == 0
    for field in dataclasses.fields(v10b.Config):
        assert getattr(cfg, field.name) == field.metadata["cpu"]


def test_a_run_that_is_resumed_keeps_its_sizes_whatever_the_minutes(corpus, tmp_path):
    for folder, minutes in (("steps", 0.0), ("clock", 2.0)):
        config = train_a_run(corpus, tmp_path / folder, minutes=minutes)["config"]
        for mode in ("--resume", "--sample_only"):
            words = [mode, "--out_dir", str(tmp_path / folder)]
            cfg, state = v10c.read_settings(words)
            assert (state["step"], cfg.minutes) == (3, minutes)
            cfg, _ = v10c.read_settings([*words, "--minutes", "20"])
            assert cfg.minutes == 20
            for name in ("n_embd", "n_layer", "block_size", "batch_size", "max_iters"):
                assert getattr(cfg, name) == config[name]


def test_the_help_says_that_the_clock_is_not_reproducible(capsys):
    with pytest.raises(SystemExit):
        v10c.main(["--help"])
    out = capsys.readouterr().out
    assert re.search(r"--minutes float\s+train by the clock; not reproducible", out)


# ---- runs by the clock


def test_a_run_ends_when_its_time_is_over(splits, clock):
    """The first time: 5 seconds for an estimate, and 10 steps. The second: an estimate more."""
    for eval_interval, steps in ((10**6, [0, 10]), (5, [0, 5, 8])):
        cfg = tiny(v10c, **HALF_A_MINUTE | {"dtype": "float32", "eval_interval": eval_interval})
        clock.now += 10**6  # before a run, time doesn't count
        assert list(v10c.train(build(v10c), *splits, cfg, UnsavedRun())) == steps
    assert clock.seen[:10] == [(step, progress_after(step)) for step in range(10)]
    assert clock.seen[15] == (5, progress_after(5)), "the second estimate is still to come"
    assert clock.seen[16:] == [(step, progress_after(step + 2)) for step in (6, 7)]


def test_a_run_whose_steps_end_first_does_not_wait_for_the_clock(splits, clock):
    cfg = tiny(v10c, **HALF_A_MINUTE | {"dtype": "float32", "max_iters": 3})
    history = v10c.train(build(v10c), *splits, cfg, UnsavedRun())
    assert list(history) == [0, 3]
    assert clock.seen == [(step, pytest.approx(step / 3)) for step in range(3)]


@pytest.mark.parametrize("minutes", [0.0, 0.5])
def test_a_run_of_no_steps_makes_one_estimate(splits, clock, minutes):
    cfg = tiny(v10c, dtype="float32", minutes=minutes, max_iters=0)
    assert list(v10c.train(build(v10c), *splits, cfg, UnsavedRun())) == [0]
    assert clock.seen == []


def test_the_bar_shows_how_many_steps_the_time_is_likely_to_allow(splits, clock, monkeypatch):
    seen = []

    class Bar(v10c.tqdm):
        def close(self):
            seen.append((self.n, self.total))
            super().close()

        def update(self):
            seen.append((self.n, self.total))
            super().update()

    monkeypatch.setattr(v10c, "tqdm", Bar)
    cfg = tiny(v10c, **HALF_A_MINUTE, dtype="float32")
    v10c.train(build(v10c), *splits, cfg, UnsavedRun())
    likely = [round(step * 30 / (5 + 2.5 * step)) for step in range(1, 11)]
    assert seen[1:11] == list(zip(range(1, 11), likely, strict=True))
    assert likely[-1] == 10


# ---- runs that are stopped and resumed


def test_a_resumed_run_has_the_time_that_is_left(corpus, tmp_path, clock):
    stopped = stop_a_run(clock, 5, corpus, tmp_path, **HALF_A_MINUTE)
    assert (stopped["step"], stopped["seconds"]) == (6, 20.0)
    clock.now += 10**6  # until somebody resumes it
    ended = resume(tmp_path)
    assert (ended["step"], ended["seconds"]) == (10, 30.0)
    assert clock.seen == [(step, progress_after(step)) for step in range(10)]
    assert list(ended["history"]) == [0, 10]


def test_a_finished_run_ends_at_once_and_more_minutes_continue_it(corpus, tmp_path, clock):
    train_a_run(corpus, tmp_path, **HALF_A_MINUTE)
    assert len(clock.seen) == 10
    for flags in ([], ["--minutes", "0.3"]):
        again = resume(tmp_path, *flags)
        assert (again["step"], again["seconds"], len(clock.seen)) == (10, 30.0, 10)
    ended = resume(tmp_path, "--minutes", "1")
    assert (ended["step"], ended["seconds"]) == (22, 60.0)
    assert clock.seen[10:] == [(10 + n, pytest.approx(0.5 + n / 24)) for n in range(12)]


def test_a_run_with_more_steps_than_the_default_goes_on(corpus, tmp_path, clock):
    """Its max_iters is that of BUDGETS, which no flag needs to repeat."""
    flags = tiny_flags(v10c, out_dir=tmp_path, minutes=0.5, warmup_iters=0, eval_interval=10**6)
    i = flags.index("--max_iters")
    clock.stop_after = 3
    with pytest.raises(SystemExit):
        v10c.main([*flags[:i], *flags[i + 2 :], "--data", str(corpus)])
    defaults = {field.name: field for field in dataclasses.fields(v10c.Config)}
    many = 2 * max(defaults["max_iters"].default, defaults["max_iters"].metadata["cpu"])
    torch.save(saved(tmp_path) | {"step": many}, tmp_path / "latest.pt")
    clock.stop_after = None
    ended = resume(tmp_path)
    assert (ended["step"], ended["seconds"]) == (many + 6, 30.0)


def test_by_steps_a_resumed_run_ends_with_the_same_weights_and_averages(corpus, tmp_path, clock):
    changes = {"max_iters": 5, "eval_interval": 4, "warmup_iters": 1, "dropout": 0.3}
    expected = train_a_run(corpus, tmp_path / "whole", **changes)
    assert stop_a_run(clock, 2, corpus, tmp_path / "half", **changes)["step"] == 3
    resumed = resume(tmp_path / "half")
    for part in ("model", "optimizer", "step", "history", "seconds"):
        torch.testing.assert_close(resumed[part], expected[part], rtol=0, atol=0)


def test_a_run_of_v10b_goes_on_by_steps(corpus, tmp_path, clock):
    """Its model and its optimizers are the same; only the seconds are missing."""
    v10b.main([*tiny_flags(v10b, out_dir=tmp_path), "--data", str(corpus)])
    ended = resume(tmp_path, "--max_iters", "5")
    assert (ended["step"], ended["script"]) == (5, "v10c_speedrun")
