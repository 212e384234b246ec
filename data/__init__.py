"""What every rung needs and no lesson is about: flags, the corpus, batches of its tokens."""

import argparse
import socket
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAKESPEARE = Path(__file__).parent / "tinyshakespeare.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class InputError(ValueError):
    """What the user typed can't work; the text says why, and the way out."""


@contextmanager
def command_line() -> Iterator[None]:
    """Within it, what the user can mend ends in one line on standard error and status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # each line at once, in any encoding; not in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)  # what shells expect of a program ended by Ctrl-C
    except BrokenPipeError:  # a reader, such as head, has seen enough
        sys.exit(141)  # what shells report then
    except (InputError, MemoryError, RuntimeError) as error:
        if not isinstance(error, InputError):
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise  # a mistake in the program; what CPU, CUDA and MPS can't allocate is none
            error = "out of memory; try a smaller --batch_size, --block_size or --n_embd"
        print("error:", *str(error).split(), file=sys.stderr)  # one line, whatever was typed
        sys.exit(2)


def setting(
    full: Any, small: Any, text: str, least: float = 1, below: float = 2**31, choices: str = ""
) -> Any:
    """A field of Config: its two defaults, help, and least <= value < below, or the choices."""
    limits = dict(least=least, below=below, choices=choices.split() or None)
    return field(default=full, metadata=dict(small=small, text=text, **limits))


def read_flags(config_class: type, lesson: str, argv: list[str] | None) -> Any:
    """The config_class that flags make, the device choosing the defaults; else InputError."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,  # an error is one line then
        description=lesson, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for f in fields(config_class):
        text = f"{f.metadata['text']} (default: {f.default!r}, on the CPU {f.metadata['small']!r})"
        choices = f.metadata["choices"]
        kind = dict(type=f.type, metavar=None if choices else f.type.__name__, choices=choices)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else kind
        parser.add_argument(f"--{f.name}", help=text, **kind)
    flags = vars(parser.parse_args(argv))
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    device = flags.setdefault("device", "cuda" if torch.cuda.is_available() else best)
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(f"--device {device}: not on this machine; try --device cpu") from None
    if device.startswith("cpu"):
        flags = {f.name: f.metadata["small"] for f in fields(config_class)} | flags
    cfg = config_class(**flags)
    for f in fields(cfg):
        value, least, below = getattr(cfg, f.name), f.metadata["least"], f.metadata["below"]
        if f.type is not str and not least <= value < below:
            raise InputError(f"--{f.name} {value}: must be at least {least} and below {below}")
    return cfg


class CharTokenizer:
    """One token for each distinct character of a text; its methods are named as tiktoken's."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text) | {"\n"})  # a sample starts with a newline by default
        self.n_vocab = len(self.characters)
        if self.n_vocab > 2**16:  # token ids are uint16
            raise InputError("--data: more than 65,536 distinct characters; use another text")
        self.ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str, flag: str = "--prompt") -> list[int]:
        """Token ids of text; raises InputError, with the flag's name, for characters unknown."""
        if unknown := ", ".join(map(repr, sorted(set(text) - set(self.ids)))):
            raise InputError(f"{flag}: the corpus lacks {unknown}; use only what it contains")
        return [self.ids[character] for character in text]

    def decode(self, tokens: list[int]) -> str:
        """The text that encode turns into tokens."""
        return "".join(self.characters[token] for token in tokens)


def load_text(name: str | Path, flag: str = "--data") -> str:
    """The corpus "shakespeare" or "python", or the UTF-8 text file at a path; lines end in "\\n".

    Raises InputError, which names the flag, for a path that can't be read as text.
    """
    path = SHAKESPEARE if name == "shakespeare" else Path(name)
    if name == "shakespeare" and not path.exists():
        try:
            socket.setdefaulttimeout(10)  # seconds without an answer
            torch.hub.download_url_to_file(URL, path, SHA256)
        except Exception as error:  # whatever it was, the remedy is the same
            why = f"could not download Tiny Shakespeare ({error}); training on Python's library"
            print(f"notice: {why}. To mend it, save {URL} as {path}.", file=sys.stderr)
            name = "python"
    if name == "python":
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda m: m.name)
        return "".join(t for m in modules if (t := m.read_text("latin-1")).isascii())[:1_100_000]
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without the mark Notepad puts first
    except (OSError, ValueError) as error:  # Windows calls a folder a file without permission
        raise InputError(f"{flag} {path}: {error}; name a UTF-8 text file, no folder") from None
    if not text or "\0" in text:
        raise InputError(f"{flag} {path}: empty or binary; name a UTF-8 text file")
    return text


def split(tokens: list[int], block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first 90 % of tokens for training and the last 10 % for validation, both uint16.

    Raises InputError where one of them is shorter than a window and its last target.
    """
    n, least = len(tokens), 10 * block_size + 1
    if n < least:
        why = f"{n:,} tokens are too few for --block_size {block_size}, which needs {least:,}"
        raise InputError(f"--data: {why}; use a longer text or a smaller --block_size")
    array = np.asanyarray(tokens, dtype=np.uint16)  # (n,)
    return array[: n * 9 // 10], array[n * 9 // 10 :]


def get_batch(
    tokens: np.ndarray, batch_size: int, block_size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of tokens and, one place later, their targets: int64 (B, T) on device."""
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1)).numpy()  # (B, 1)
    windows = tokens[starts + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    windows = torch.from_numpy(windows).to(device)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]  # (B, T) and (B, T)
