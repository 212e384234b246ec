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


def pad(conversations: list[tuple[list[int], list[int]]], block_size: int) -> np.ndarray:
    """Token ids and targets of N conversations as examples of T = block_size: int64 (N, 2, T).

    conversations: token ids, and the same ids as targets (or -100). In an example, the targets are
    those of the next token, as in data.get_batch. Behind the end of a conversation, the targets are
    -100, so that nothing is learned there. Raises data.InputError if a conversation is too long.
    """
    examples = np.zeros((len(conversations), 2, block_size), dtype=np.int64)  # (N, 2, T)
    examples[:, 1] = -100
    for example, (tokens, targets) in zip(examples, conversations, strict=True):
        n = len(tokens) - 1  # predictions: of every token but the first
        if n > block_size:
            why = f"a conversation has {n + 1} tokens; give at least {n}, or shorter ones"
            raise data.InputError(f"--block_size {block_size}: {why}")
        example[0, :n] = tokens[:-1]
        example[1, :n] = targets[1:]
    return examples


def get_random_rows(examples: np.ndarray, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw B = batch_size random examples, int64 (N, 2, T): tokens and targets, int64 (B, T)."""
    rows = torch.randint(len(examples), (batch_size,)).numpy()  # (B,)
    batch = torch.from_numpy(examples[rows])  # (B, 2, T)
    return batch[:, 0], batch[:, 1]  # (B, T) and (B, T)


def get_spread_rows(
    examples: np.ndarray, i: int, n_batches: int, batch_size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return batch i of n_batches whose rows are spread evenly over examples, int64 (N, 2, T).

    They are tokens and targets, int64 (B, T) each, and the same each time. If N is
    n_batches * batch_size, each example is in one of the batches.
    """
    spread = np.linspace(0, len(examples) - 1, n_batches * batch_size).round()  # (n_batches * B,)
    rows = spread[i::n_batches].astype(np.int64)  # (B,)
    batch = torch.from_numpy(examples[rows]).to(device)  # (B, 2, T)
    return batch[:, 0], batch[:, 1]  # (B, T) and (B, T)
