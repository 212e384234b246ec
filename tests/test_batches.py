"""support/batches.py: batches that are spread over the tokens, and seeds for steps."""

import math

import numpy as np
import pytest
import torch

import data
from support import batches

# ---- batches that are spread over the tokens


def spread_batches(tokens, n_batches, batch_size, block_size):
    """All batches of a loss estimate: a list of pairs (x, y)."""
    return [
        batches.get_spread_batch(tokens, i, n_batches, batch_size, block_size, "cpu")
        for i in range(n_batches)
    ]


def starts_of(batches):
    """Where the windows begin, if the tokens are their own positions."""
    return torch.cat([x[:, 0] for x, _ in batches]).tolist()


def test_spread_targets_are_inputs_shifted_by_one():
    tokens = np.arange(1000, dtype=np.uint16)
    for x, y in spread_batches(tokens, 5, 16, 8):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(8))
    x, y = batches.get_spread_batch(tokens, 0, 5, 16, 8, "meta")
    assert x.device.type == y.device.type == "meta"


@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("n_more", [0, 1, 9])
def test_windows_cover_every_token_if_there_are_enough(batch_size, n_more):
    """n_more batches more than it takes to put windows of 8 tokens side by side."""
    for n in range(9, 400):
        tokens = np.arange(n, dtype=np.uint16)
        n_windows = math.ceil((n - 1) / 8)
        n_batches = math.ceil(n_windows / batch_size) + n_more
        batches = spread_batches(tokens, n_batches, batch_size, 8)
        targets = torch.cat([y.flatten() for _, y in batches])
        assert starts_of(batches)[0] == 0
        assert targets.unique().tolist() == list(range(1, n))


@pytest.mark.parametrize("n", [90, 401, 1000, 50_000])
def test_windows_are_evenly_spread_if_there_are_too_few(n):
    starts = starts_of(spread_batches(np.arange(n, dtype=np.uint16), 3, 3, 8))
    assert starts[0] == 0
    assert starts[-1] == n - 9
    gaps = np.diff(starts)
    assert gaps.min() > 8
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("n", [9, 10, 17, 100, 5000])
def test_spread_batches_have_the_same_size(n):
    for x, y in spread_batches(np.arange(n, dtype=np.uint16), 7, 6, 8):
        assert x.shape == y.shape == (6, 8)


def test_spread_batches_are_the_same_each_time_and_draw_no_random_numbers():
    tokens = np.arange(5000, dtype=np.uint16)
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1:]
        draws.append(torch.stack([x for x, _ in spread_batches(tokens, 5, 6, 8)]))
        assert torch.equal(torch.get_rng_state(), state)
        np.testing.assert_equal(np.random.get_state()[1:], numpy_state)
    assert torch.equal(*draws)
    assert len(draws[0].unique(dim=0)) == 5


def test_a_single_window_is_the_first_one():
    for n in (9, 10, 1000):
        [(x, y)] = spread_batches(np.arange(n, dtype=np.uint16), 1, 1, 8)
        assert x.tolist() == [list(range(8))]
        assert y.tolist() == [list(range(1, 9))]


def test_tokens_for_a_single_window_give_it_again_and_again():
    for x, y in spread_batches(np.arange(9, dtype=np.uint16), 3, 4, 8):
        assert x.tolist() == [list(range(8))] * 4
        assert y.tolist() == [list(range(1, 9))] * 4


# ---- seeds


def test_the_same_numbers_give_the_same_seed():
    assert batches.mix_seed(1337, 5) == batches.mix_seed(1337, 5)
    assert batches.mix_seed(7) == batches.mix_seed(7)


def test_every_number_and_their_order_count():
    seeds = [
        batches.mix_seed(*numbers)
        for numbers in [(1,), (2,), (1, 2), (2, 1), (1, 3), (1, 2, 3), (1, 3, 2), (3, 1, 2)]
    ]
    assert len(set(seeds)) == len(seeds)


def test_any_seed_of_a_run_and_any_step_make_a_seed_for_pytorch():
    for seed in (0, 1337, 2**31 - 1):
        for step in (0, 5000, 2**31 - 1):
            mixed = batches.mix_seed(seed, step)
            assert type(mixed) is int
            assert 0 <= mixed < 2**64
            torch.manual_seed(mixed)


def test_neighbouring_seeds_and_steps_have_nothing_in_common():
    """Neither a batch nor a single random number, as seeds such as seed + step would have."""
    tokens = np.arange(50_000, dtype=np.uint16)
    drawn, numbers = set(), set()
    for seed in range(1337, 1341):
        for step in range(51):
            torch.manual_seed(batches.mix_seed(seed, step))
            numbers.update(torch.randint(2**60, (100,)).tolist())
            torch.manual_seed(batches.mix_seed(seed, step))
            x, _ = data.get_batch(tokens, 4, 8, "cpu")
            drawn.add(tuple(x[:, 0].tolist()))
    assert len(drawn) == 4 * 51
    assert len(numbers) == 4 * 51 * 100
