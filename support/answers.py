"""Answers to many questions at once."""

import time
from collections.abc import Iterator
from typing import Any

import torch

import data

SPENT = {"tokens": 0, "seconds": 0.0}  # by complete, since sampling_speed was last called


def complete(model: torch.nn.Module, prompts: list[list[int]], end: int, cfg: Any) -> list:
    """Continue prompts, lists of token ids; return what comes after each, as lists of token ids.

    A continuation ends with the token end, or where prompt and continuation have block_size tokens.
    Prompts of the same length are continued together, as one batch. Raises data.InputError for a
    prompt that leaves no room.
    """
    model.eval()  # switches off dropout, if the model has any
    started = time.perf_counter()
    replies = [[] for _ in prompts]
    for rows in group_by_length(prompts):
        idx = torch.tensor([prompts[row] for row in rows], device=cfg.device)  # (B, T)
        n_left = cfg.block_size - idx.shape[1]
        if n_left < 1:
            why = f"a question has {idx.shape[1]} tokens, which leaves no room for an answer"
            raise data.InputError(f"--block_size {cfg.block_size}: {why}; ask a shorter one")
        tokens = list(until_end(model.stream(idx, n_left, cfg), end))
        continued = torch.cat(tokens, dim=1)  # (B, tokens until the last one has ended)
        for row, reply in zip(rows, continued.tolist(), strict=True):
            n = reply.index(end) + 1 if end in reply else len(reply)
            replies[row] = reply[:n]
    model.train()
    SPENT["tokens"] += sum(len(reply) for reply in replies)
    SPENT["seconds"] += time.perf_counter() - started
    return replies


def sampling_speed() -> str:
    """How fast complete was since the last call, as ", sampling 12,345 tokens/s", or ""."""
    tokens, seconds = SPENT["tokens"], SPENT["seconds"]
    SPENT.update(tokens=0, seconds=0.0)
    return f", sampling {tokens / seconds:,.0f} tokens/s" if tokens else ""


def until_end(tokens: Iterator[torch.Tensor], end: int) -> Iterator[torch.Tensor]:
    """Yield tokens, int64 (B, 1) each, until each of the B texts has had the token end."""
    has_ended = False
    for token in tokens:
        yield token
        has_ended = has_ended | (token == end)  # (B, 1)
        if has_ended.all():
            return


def group_by_length(prompts: list[list[int]]) -> list[list[int]]:
    """The positions of prompts in their list, in groups of equal length, the shortest first."""
    groups = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(row)
    return [groups[length] for length in sorted(groups)]
