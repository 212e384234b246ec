"""common.py: what the programs of lab/ do with any script: train, generate, measure the loss."""

import math
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
from data import token_files
from support.runs import UnsavedRun


def with_dtype(script: ModuleType, cfg: Any) -> Any:
    """The settings with the dtype that main() of a script would choose for "auto"."""
    if not hasattr(script, "choose_dtype"):
        return cfg
    return replace(cfg, dtype=script.choose_dtype(cfg))


def load_corpus(script: ModuleType, cfg: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """The tokenizer of a script, and the tokens for training and for validation."""
    if hasattr(script, "BPETokenizer") and token_files.choose_tokenizer(cfg.tokenizer) == "gpt2":
        tokenizer = script.BPETokenizer()
        train_data, val_data = token_files.load_splits(cfg, tokenizer, "")
        return tokenizer, train_data, val_data
    text = data.load_text(cfg.data)
    if hasattr(script, "BytePairTokenizer"):
        n_train = len(text) * 9 // 10  # characters, as in its main()
        tokenizer = script.make_tokenizer({}, text[:n_train], cfg.vocab_size)
        splits = [tokenizer.encode(part) for part in (text[:n_train], text[n_train:])]
        return tokenizer, *(np.array(tokens, dtype=np.uint16) for tokens in splits)  # (n,) each
    tokenizer = data.CharTokenizer(text)
    train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size, cfg.data)
    return tokenizer, train_data, val_data


def bits_per_byte(loss: float, tokenizer: Any, tokens: np.ndarray) -> float:
    """A loss in nats per token as bits per byte of the text of tokens, int (n,)."""
    n_bytes = len(tokenizer.decode(tokens.tolist()).encode("utf-8"))
    return loss / math.log(2) * len(tokens) / n_bytes


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
