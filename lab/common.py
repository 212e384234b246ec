"""common.py: what the programs of lab/ do with any script: train, generate, measure the loss."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import numpy as np
import torch
from torch import nn

import data
from support.runs import UnsavedRun


def with_dtype(script: ModuleType, cfg: Any) -> Any:
    """The settings with the dtype that main() of a script would choose for "auto"."""
    if not hasattr(script, "choose_dtype"):
        return cfg
    return replace(cfg, dtype=script.choose_dtype(cfg))


def train(
    script: ModuleType, model: nn.Module, train_data: np.ndarray, val_data: np.ndarray, cfg: Any
) -> list[tuple[int, float, float]]:
    """Train the model of a script; return (step, train loss, validation loss), in nats."""
    run = [UnsavedRun()] if hasattr(script, "checkpoint") else []
    history = script.train(model, train_data, val_data, with_dtype(script, cfg), *run)
    return [(step, train_loss, val_loss) for step, (train_loss, val_loss) in history.items()]


def generate(
    script: ModuleType, model: nn.Module, idx: torch.Tensor, max_new_tokens: int, cfg: Any
) -> torch.Tensor:
    """Continue idx, int64 (B, T), with the model of a script: int64 (B, T + max_new_tokens)."""
    if not hasattr(script, "choose_token"):
        return model.generate(idx, max_new_tokens)
    return torch.cat([idx, *model.stream(idx, max_new_tokens, cfg)], dim=1)


@torch.no_grad()
def whole_loss(model: nn.Module, tokens: np.ndarray, cfg: Any) -> float:
    """The mean loss in nats over all whole windows of tokens, computed in float32."""
    model.eval()
    n_windows = (len(tokens) - 1) // cfg.block_size
    starts = np.arange(n_windows) * cfg.block_size  # (n_windows,)
    total = 0.0
    for i in range(0, n_windows, cfg.batch_size):
        batch = starts[i : i + cfg.batch_size]
        x, y = data.get_windows(tokens, batch, cfg.block_size, cfg.device)  # (B, T) each
        _, loss = model(x, y)  # ()
        total += loss.item() * len(batch)  # the last batch may be smaller
    model.train()
    return total / n_windows
