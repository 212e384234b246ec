"""v8g_epochs.py: in each epoch, every window once; subsets; and runs stopped between two steps."""

import re

import numpy as np
import pytest
import torch
from conftest import TEXT, refused, tiny, tiny_flags

import data
from lab.common import train
from part4_gpt2 import v8g_epochs as v8g
from support.runs import UnsavedRun

COUNTING = np.arange(143, dtype=np.uint16)  # 28 windows of 5 and their targets; 2 tokens are left


def windows_of(tokens, monkeypatch, **changes) -> list[list[list[int]]]:
    """The windows that a run trains on: for each step, the tokens of each window of its batch."""
    seen = []
    real = data.get_windows

    def get_windows(tokens, starts, block_size, device):
        x, y = real(tokens, starts, block_size, device)
        if torch.is_grad_enabled():  # not in a loss estimate
            assert torch.equal(y, x + 1), "the targets are the tokens that come next"
            seen.append(x.tolist())
        return x, y

    monkeypatch.setattr(data, "get_windows", get_windows)
    cfg = tiny(v8g, **{"subset": 0, "warmup_iters": 1, **changes})
    model = v8g.LanguageModel(cfg, len(COUNTING))
    train(v8g, model, tokens, COUNTING, cfg)
    monkeypatch.setattr(data, "get_windows", real)
    return seen


def flat(batches):
    return [tuple(window) for batch in batches for window in batch]


ALL = [tuple(range(start, start + 5)) for start in range(0, 140, 5)]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 28, 30])
def test_every_window_comes_once_in_each_epoch(monkeypatch, batch_size):
    batches = windows_of(COUNTING, monkeypatch, epochs=3, batch_size=batch_size)
    n_batches = -(-28 // batch_size)
    assert len(batches) == 3 * n_batches
    epochs = [batches[i * n_batches : (i + 1) * n_batches] for i in range(3)]
    for epoch in epochs:
        assert sorted(flat(epoch)) == ALL
        sizes = [len(batch) for batch in epoch]
        assert sizes[:-1] == [batch_size] * (n_batches - 1), "only the last batch may be smaller"
        assert flat(epoch) != ALL, "in random order"
    assert flat(epochs[0]) != flat(epochs[1]) != flat(epochs[2])


@pytest.mark.parametrize("length", [6, 10, 11, 12, 16])
def test_the_last_whole_window_and_its_targets_are_used(length):
    starts = v8g.choose_windows(COUNTING[:length], tiny(v8g, subset=0)).tolist()
    assert starts == [start for start in range(0, 99, 5) if start + 5 + 1 <= length]


def test_a_subset_is_the_same_windows_in_each_epoch(monkeypatch):
    batches = windows_of(COUNTING, monkeypatch, epochs=3, subset=7)
    assert len(batches) == 3 * 2
    first, second, third = (flat(batches[i : i + 2]) for i in (0, 2, 4))
    assert len(set(first)) == 7
    assert set(first) <= set(ALL)
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second
    other = flat(windows_of(COUNTING, monkeypatch, epochs=1, subset=7, seed=5))
    assert sorted(other) != sorted(first)
    everything = flat(windows_of(COUNTING, monkeypatch, epochs=1, subset=28))
    assert sorted(everything) == ALL


def test_a_subset_larger_than_the_text_is_refused(corpus, capsys):
    n_windows = (len(TEXT) * 9 // 10 - 1) // 5
    flags = [*tiny_flags(v8g, subset=n_windows + 1), "--data", corpus]
    line = refused(v8g, capsys, *flags)
    why = f"the text has only {n_windows} windows; leave --subset out to train on all"
    assert line.endswith(f"--subset {n_windows + 1}: {why}")
    v8g.main([*tiny_flags(v8g, subset=n_windows, epochs=0), "--data", str(corpus)])


def test_losses_come_before_the_first_epoch_and_after_each(corpus, capsys):
    v8g.main([*tiny_flags(v8g, epochs=3), "--data", str(corpus)])
    out, err = capsys.readouterr()
    number = r"\d+\.\d{4}"
    shown = re.findall(rf"^epoch (\d): train loss {number}, val loss {number}", out, re.MULTILINE)
    assert shown == ["0", "1", "2", "3"]
    for epoch in (1, 2, 3):
        assert re.search(rf"epoch {epoch} of 3: 100%.* 3/3 ", err), "9 windows, 4 at a time"


def test_the_learning_rate_decays_over_all_epochs(monkeypatch):
    rates = []
    real = torch.optim.AdamW.step

    def step(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    windows_of(COUNTING, monkeypatch, epochs=2, subset=8, warmup_iters=0)  # 4 steps
    expected = [0.01 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_run_that_was_stopped_goes_on_to_the_bit(corpus, tmp_path, monkeypatch, stop_at):
    """In the middle of an epoch, and between two of them."""
    states = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        words = [*tiny_flags(v8g, out_dir=folder, dropout=0.3), "--data", str(corpus)]
        steps = 0

        def stop_requested(run):
            nonlocal steps
            steps += 1
            return steps == stop_at + 1

        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(v8g.runs.Run, "stop_requested", stop_requested)
                patch.setattr(v8g.runs.Run, "__exit__", lambda run, *_: run.lock.release())
                v8g.main(words)
            state = torch.load(folder / "latest.pt", weights_only=True)
            assert state["step"] == stop_at
            v8g.main(["--resume", "--out_dir", str(folder)])
        else:
            v8g.main(words)
        states.append(torch.load(folder / "latest.pt", weights_only=True))
    whole, stopped = states
    assert whole["step"] == stopped["step"] == 6
    assert whole["history"] == stopped["history"]
    for name, weight in whole["model"].items():
        assert torch.equal(stopped["model"][name], weight), name


@pytest.mark.parametrize(("name", "value"), [("batch_size", 5), ("subset", 8)])
def test_what_an_epoch_consists_of_stays_in_a_resumed_run(
    corpus, tmp_path, capsys, name, value
):
    folder = tmp_path / "run"
    v8g.main([*tiny_flags(v8g, out_dir=folder), "--data", str(corpus)])
    line = refused(v8g, capsys, "--resume", "--out_dir", folder, f"--{name}", value)
    assert line.startswith(f"error: --{name} {value}: the checkpoint has ")
    v8g.main(["--resume", "--out_dir", str(folder), "--epochs", "3"])
    assert torch.load(folder / "latest.pt", weights_only=True)["step"] == 9


def test_no_epochs_only_estimate(splits):
    cfg = tiny(v8g, epochs=0)
    model = v8g.LanguageModel(cfg, 99)
    before = [parameter.clone() for parameter in model.parameters()]
    assert list(v8g.train(model, *splits, cfg, UnsavedRun())) == [0]
    assert all(map(torch.equal, before, model.parameters()))
