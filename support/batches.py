"""Batches that can be repeated: from the seed and the step, or the same for each loss estimate."""

import numpy as np
import torch

import data


def mix_seed(*numbers: int) -> int:
    """Return one seed for several numbers.

    Not their sum: then a run with seed 1338 would have the batches of one with seed 1337, each of
    them a step earlier.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def get_spread_batch(
    tokens: np.ndarray, i: int, n_batches: int, batch_size: int, block_size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return batch i of n_batches whose windows are spread evenly over tokens, int64 (B, T) each.

    They are the same each time. If there are enough of them, they cover all the tokens. Raises
    data.InputError if there are too few tokens for a window.
    """
    last = len(tokens) - block_size - 1
    if last < 0:
        why = f"a split of the text has only {len(tokens):,} tokens"
        raise data.InputError(f"--block_size {block_size}: {why}; use a longer text or less")
    starts = np.linspace(0, last, n_batches * batch_size).astype(np.int64)  # (n_batches * B,)
    batch = starts[i * batch_size : (i + 1) * batch_size]  # (B,)
    return data.get_windows(tokens, batch, block_size, device)
