"""bigram.py: the table, and what every later script keeps: training, sampling, the command line."""

import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    TEXT,
    TINY,
    VOCAB_SIZE,
    build,
    losses_and_sample,
    random_tokens,
    refused,
    shaken,
    tiny,
    tiny_flags,
)  # fmt: skip
from torch.nn import functional as F

import bigram
import data
from lab.ladder import ROOT

LOSS = re.compile(r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})")


# ---- the model


def test_forward_gives_logits_and_a_loss():
    model = shaken(build(bigram))
    idx, targets = random_tokens(3, 5), random_tokens(3, 5)
    logits, loss = model(idx)
    assert logits.shape == (3, 5, VOCAB_SIZE)
    assert logits.dtype == torch.float32
    assert loss is None
    logits, loss = model(idx, targets)
    by_hand = -F.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss, by_hand)


def test_the_first_loss_is_that_of_a_uniform_guess():
    _, loss = build(bigram)(random_tokens(4, 5), random_tokens(4, 5))
    assert loss.item() == pytest.approx(math.log(VOCAB_SIZE), abs=1e-6)


def test_a_prediction_depends_on_the_current_token_alone():
    model = shaken(build(bigram))
    idx = random_tokens(2, 5)
    logits, _ = model(idx)
    alone, _ = model(idx[:, 3:4])
    assert torch.equal(logits[:, 3:4], alone)


def test_counting_pairs_scores_what_the_lesson_says():
    """Add-one smoothing on Shakespeare's training split; without it, a pair has probability 0."""
    if not data.corpora.SHAKESPEARE.exists():
        pytest.skip("Tiny Shakespeare is not there")
    text = data.load_text("shakespeare")
    train_data, val_data = data.split(data.CharTokenizer(text).encode(text), 64)
    counts = np.zeros((65, 65))
    np.add.at(counts, (train_data[:-1], train_data[1:]), 1)
    assert (counts[val_data[:-1], val_data[1:]] == 0).any()
    smoothed = (counts + 1) / (counts + 1).sum(axis=1, keepdims=True)
    loss = -np.log(smoothed[val_data[:-1], val_data[1:]]).mean()
    assert f"{loss:.3f}" == "2.482"
    assert "training text (plus one) scores 2.482" in " ".join(bigram.__doc__.split())


# ---- sampling


def test_generation_continues_a_prompt_of_any_length():
    model = build(bigram)
    for length in (1, TINY["block_size"], 3 * TINY["block_size"]):
        idx = random_tokens(2, length)
        out = model.generate(idx, 9)
        assert out.shape == (2, length + 9)
        assert out.dtype == torch.int64
        assert torch.equal(out[:, :length], idx)
        assert out.min() >= 0
        assert out.max() < VOCAB_SIZE
    assert torch.equal(model.generate(idx, 0), idx)


def test_generation_follows_the_probabilities():
    model = build(bigram)
    with torch.no_grad():
        model.token_embedding.weight[0, 1:3] = torch.tensor([20.0, 20.0 + math.log(3)])
    drawn = model.generate(torch.zeros(4000, 1, dtype=torch.int64), 1)[:, 1]
    assert set(drawn.tolist()) == {1, 2}
    assert (drawn == 2).float().mean().item() == pytest.approx(0.75, abs=0.03)


# ---- training


def test_training_lowers_both_losses_and_returns_its_history(splits):
    cfg = tiny(bigram, max_iters=150, eval_interval=60, eval_iters=20)
    history = bigram.train(build(bigram), *splits, cfg)
    assert list(history) == [0, 60, 120, 150]
    train_before, val_before = history[0]
    train_after, val_after = history[150]
    assert train_after < train_before - 0.3
    assert val_after < val_before - 0.3


def test_each_training_step_is_one_step_of_adamw(splits):
    cfg = tiny(bigram, max_iters=3, eval_interval=3, eval_iters=1)
    model, expected = build(bigram), build(bigram)
    torch.manual_seed(5)
    bigram.train(model, *splits, cfg)

    torch.manual_seed(5)
    for tokens in splits:  # the loss estimates of step 0 draw their batches first
        data.get_batch(tokens, cfg.batch_size, cfg.block_size, "cpu")
    optimizer = torch.optim.AdamW(expected.parameters(), lr=cfg.learning_rate)
    table = expected.token_embedding.weight
    for _ in range(3):
        x, y = data.get_batch(splits[0], cfg.batch_size, cfg.block_size, "cpu")
        _, loss = expected(x, y)
        [table.grad] = torch.autograd.grad(loss, [table])  # of this batch alone
        optimizer.step()
    assert torch.equal(model.token_embedding.weight, table)


def test_the_history_has_the_losses_that_are_printed(splits, capsys):
    history = bigram.train(build(bigram), *splits, tiny(bigram))
    lines = [LOSS.fullmatch(line).groups() for line in capsys.readouterr().out.splitlines()]
    assert lines == [(str(step), f"{a:.4f}", f"{b:.4f}") for step, (a, b) in history.items()]
    assert list(history) == [0, 2, 3]


def test_no_training_leaves_the_weights_alone(splits):
    model = shaken(build(bigram))
    before = [parameter.clone() for parameter in model.parameters()]
    history = bigram.train(model, *splits, tiny(bigram, max_iters=0))
    assert list(history) == [0]
    assert all(map(torch.equal, before, model.parameters()))


def test_the_validation_split_is_not_trained_on():
    """With two splits that share no token, training on one teaches nothing about the other."""
    cfg = tiny(bigram, max_iters=60, eval_interval=60, eval_iters=20)
    model = bigram.LanguageModel(cfg, 4)
    train_data, val_data = np.tile(np.uint16([0, 1]), 50), np.tile(np.uint16([2, 3]), 50)
    history = bigram.train(model, train_data, val_data, cfg)
    train_loss, val_loss = history[60]
    assert train_loss < history[0][0] - 0.3
    assert val_loss == pytest.approx(math.log(4))


def test_estimate_loss_is_the_mean_over_batches(splits):
    cfg = tiny(bigram, eval_iters=4)
    model = shaken(build(bigram))
    torch.manual_seed(11)
    estimate = bigram.estimate_loss(model, splits[1], cfg)
    assert model.training
    assert model.token_embedding.weight.grad is None

    torch.manual_seed(11)
    losses = []
    for _ in range(4):
        x, y = data.get_batch(splits[1], cfg.batch_size, cfg.block_size, "cpu")
        losses.append(model(x, y)[1].item())
    assert estimate == pytest.approx(np.mean(losses), rel=1e-5)


# ---- the command line


def start(script, *flags, **options):
    """Run a script as a learner does, in a process of its own."""
    command = [sys.executable, f"{script}.py", *map(str, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


def test_a_run_prints_losses_and_a_sample(corpus):
    process = start("bigram", *tiny_flags(bigram), "--data", corpus, "--prompt", "The ")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    lines = out.splitlines()
    losses = [LOSS.fullmatch(line) for line in lines[:3]]
    assert [int(match[1]) for match in losses] == [0, 2, 3]  # first, at the interval, last
    sample = out.split("\n", 3)[3]
    assert sample.startswith("The ")
    assert len(sample) == len("The ") + TINY["max_new_tokens"] + len("\n")
    assert set(sample) <= set(TEXT)
    parameters = VOCAB_SIZE**2
    n_train, n_val = len(TEXT) * 9 // 10, len(TEXT) - len(TEXT) * 9 // 10
    assert err.splitlines()[:2] == [
        f"model: {parameters:,} parameters, on cpu",
        f"tokens: {n_train:,} for training, {n_val:,} for validation",
    ]
    assert "training: 100%" in err


def output(capsys, corpus, *more, **changes):
    """What bigram.py prints, in this process."""
    flags = [*tiny_flags(bigram, max_new_tokens=60, **changes), "--data", str(corpus)]
    bigram.main([*flags, *more])
    return losses_and_sample(capsys.readouterr().out)


def test_the_same_seed_gives_the_same_output(corpus, capsys):
    first, second = output(capsys, corpus, seed=7), output(capsys, corpus, seed=7)
    assert first == second
    assert first != output(capsys, corpus, seed=8)


def test_windows_line_endings_change_nothing(corpus, capsys):
    plain = output(capsys, corpus)
    corpus.write_bytes(TEXT.replace("\n", "\r\n").encode("utf-8"))
    assert output(capsys, corpus) == plain


def test_an_empty_prompt_is_the_default_one(corpus, capsys):
    default = output(capsys, corpus)
    assert output(capsys, corpus, "--prompt", "") == default
    assert default.splitlines()[3] == ""


def test_no_training_gives_one_loss_and_a_sample(corpus, capsys):
    lines = output(capsys, corpus, max_iters=0).splitlines()
    assert LOSS.fullmatch(lines[0])[1] == "0"
    assert not LOSS.fullmatch(lines[1])


def test_a_prompt_of_unknown_characters(capsys, corpus):
    flags = [*tiny_flags(bigram), "--data", corpus]
    line = refused(bigram, capsys, *flags, "--prompt", "The é 世")
    assert "--prompt: the model's alphabet has no 'é', '世'; use characters of its text" in line


def test_a_text_that_is_too_short(capsys, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("0123456789" * 5, encoding="utf-8")
    line = refused(bigram, capsys, *tiny_flags(bigram), "--data", path)
    assert "50 tokens are too few for --block_size 5, which needs 51" in line


@pytest.mark.parametrize(
    "name", ["batch_size", "block_size", "eval_interval", "eval_iters", "learning_rate"]
)
def test_settings_that_must_be_positive(capsys, corpus, name):
    for value in ("0", "-3", "many"):
        flags = [*tiny_flags(bigram), "--data", corpus, f"--{name}", value]
        assert f"--{name}" in refused(bigram, capsys, *flags)


@pytest.mark.parametrize("name", ["max_iters", "max_new_tokens", "seed"])
def test_settings_that_must_not_be_negative(capsys, corpus, name):
    for value in ("-1", "many", 2**64):
        flags = [*tiny_flags(bigram), "--data", corpus, f"--{name}", value]
        assert f"--{name}" in refused(bigram, capsys, *flags)


def test_a_loss_that_is_not_finite(capsys, corpus, monkeypatch):
    monkeypatch.setattr(bigram, "estimate_loss", lambda *_: float("nan"))
    line = refused(bigram, capsys, *tiny_flags(bigram), "--data", corpus)
    assert "smaller --learning_rate" in line


def test_sizes_beyond_the_memory(capsys, corpus, monkeypatch):
    monkeypatch.setattr(data, "get_batch", lambda *_: torch.empty(2**50))  # 4 PiB
    assert "out of memory" in refused(bigram, capsys, *tiny_flags(bigram), "--data", corpus)


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send Ctrl-C to a single process")
def test_ctrl_c_ends_a_run_without_a_traceback(corpus):
    process = start("bigram", *tiny_flags(bigram, max_iters=10**9), "--data", corpus)
    assert LOSS.match(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes")
def test_a_reader_that_leaves_ends_a_run_without_a_traceback(corpus):
    process = start("bigram", *tiny_flags(bigram, max_iters=10**9), "--data", corpus)
    assert LOSS.match(process.stdout.readline())
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_a_terminal_without_the_characters_of_the_corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("Жили-были дед да баба.\n" * 20, encoding="utf-8")
    process = start(
        "bigram", *tiny_flags(bigram), "--data", path, "--prompt", "дед",
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "???" in out
