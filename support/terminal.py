"""What goes in and out of the terminal around generation: the prompt, and text piece by piece."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.corpora import load_text


def read_prompt_file(cfg: Any, tokenizer: Any) -> Any:
    """Return the settings with the text of --prompt_file, if there is one, as the prompt.

    Raises InputError if the file can't be read, or if tokenizer can't encode its text or --stop.
    """
    tokenizer.encode(cfg.stop, "--stop")
    if not cfg.prompt_file:
        return cfg
    prompt = load_text(Path(cfg.prompt_file), "--prompt_file")
    tokenizer.encode(prompt, "--prompt_file")
    return replace(cfg, prompt=prompt, prompt_file="")  # so that a checkpoint has the text itself


def print_text(start: str, tokens: Iterator[torch.Tensor], tokenizer: Any, stop: str) -> None:
    """Print start and then the text of tokens, int64 (1, 1) each, as they come; end before stop."""
    print(start, end="", flush=True)
    for piece in stream_text(tokens, tokenizer, stop):
        print(piece, end="", flush=True)
    print()


def stream_text(tokens: Iterator[torch.Tensor], tokenizer: Any, stop: str) -> Iterator[str]:
    """Yield the text of tokens, int64 (1, 1) each, piece by piece; it ends before stop, if any.

    Hold back the last len(stop) - 1 characters: they may be the start of it.
    """
    n_held_back = max(0, len(stop) - 1)
    text = ""  # what hasn't been yielded yet
    for token in tokens:
        text += tokenizer.decode([token.item()])
        if stop and stop in text:
            yield text[: text.index(stop)]
            return
        n_ready = max(0, len(text) - n_held_back)
        yield text[:n_ready]
        text = text[n_ready:]
    yield text
