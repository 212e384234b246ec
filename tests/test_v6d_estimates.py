"""v6d_checkpoints.py estimates losses from the same windows each time, spread over a split."""

import numpy as np
import pytest
import torch
from conftest import TEXT, build, shaken, tiny

import data
from part2_training import v6d_checkpoints as v6d

TOKENS = np.array(data.CharTokenizer(TEXT).encode(TEXT), dtype=np.uint16)


def naive_loss(model, tokens, starts):
    """The mean loss of the windows that begin at starts, one at a time, without dropout."""
    model.eval()
    losses = []
    for start in starts:
        window = torch.from_numpy(tokens[start : start + 6].astype(np.int64))[None]
        with torch.no_grad():
            _, loss = model(window[:, :-1], window[:, 1:])
        losses.append(loss.item())
    model.train()
    return np.mean(losses)


# Batches of 4 windows of 5 tokens, from the first window to the last: 12 windows fit 61 tokens.
@pytest.mark.parametrize(
    ("n_tokens", "eval_iters", "starts"),
    [
        (61, 3, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55]),
        (61, 2, [0, 7, 15, 23, 31, 39, 47, 55]),
        (61, 1, [0, 18, 36, 55]),
        (46, 1, [0, 13, 26, 40]),
        (46, 2, [0, 5, 11, 17, 22, 28, 34, 40]),
        (11, 2, [0, 0, 1, 2, 2, 3, 4, 5]),
        (7, 1, [0, 0, 0, 1]),
        (6, 1, [0]),
        (6, 3, [0]),
    ],
)
def test_a_loss_estimate_is_the_mean_over_windows_that_are_evenly_spread(
    n_tokens, eval_iters, starts
):
    tokens = TOKENS[:n_tokens]
    cfg = tiny(v6d, eval_iters=eval_iters, dropout=0.5)
    model = shaken(build(v6d, dropout=0.5))
    expected = naive_loss(model, tokens, starts)
    assert v6d.estimate_loss(model, tokens, cfg) == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("n_tokens", [6, 7, 20, 21, 100, len(TOKENS)])
@pytest.mark.parametrize("batch_size", [1, 6, 40])
def test_all_batches_of_a_loss_estimate_have_the_same_size(n_tokens, batch_size):
    """So the mean over batches is the mean over windows."""
    model = build(v6d)
    shapes = []
    model.register_forward_hook(lambda _, args, __: shapes.extend(x.shape for x in args))
    v6d.estimate_loss(model, TOKENS[:n_tokens], tiny(v6d, batch_size=batch_size, eval_iters=7))
    assert shapes == [(batch_size, 5)] * 14


def test_a_loss_estimate_leaves_the_random_numbers_alone():
    model = shaken(build(v6d, dropout=0.5))
    estimates = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        estimates.append(v6d.estimate_loss(model, TOKENS, tiny(v6d, dropout=0.5, seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
    assert estimates[0] == estimates[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_estimates_run_in_the_chosen_dtype(dtype):
    model = build(v6d)
    used = set()
    model.lm_head.register_forward_hook(lambda *args: used.add(args[-1].dtype))
    v6d.estimate_loss(model, TOKENS, tiny(v6d, dtype=dtype))
    assert used == {getattr(torch, dtype)}


def test_the_cpu_defaults_cover_the_whole_validation_split_of_shakespeare():
    """Tiny Shakespeare has 1,115,394 characters."""
    cfg = data.read_flags(v6d.Config, "", ["--device", "cpu"])
    _, val_data = data.split(np.arange(1_115_394), cfg.block_size)
    targets = set()

    def model(x, y):
        targets.update(y.flatten().tolist())
        return None, torch.zeros(())

    model.eval = model.train = lambda: None
    v6d.estimate_loss(model, val_data, cfg)
    assert targets == set(val_data[1:].tolist())  # nothing predicts the first
