"""Corpora as files of token ids, which may be larger than the memory.

A file holds GPT-2's token ids as uint16, little-endian and nothing else, which is nanoGPT's layout.
prepare.py writes it, and next to it a side file, corpus.bin.json, which says whose ids they are and
how many.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import data
from data.corpora import load_text
from data.flags import InputError

DTYPE = np.dtype("<u2")  # uint16, little-endian on every machine
N_VOCAB = 50_257  # tokens of GPT-2
END_OF_TEXT = 50_256
EXAMPLE = '{"tokenizer": "gpt2", "n_tokens": 1234}'  # of a side file


def load_encoding() -> Any:
    """GPT-2's encoding from tiktoken, which downloads its files once; InputError if it can't."""
    import tiktoken  # here, because only part 4 needs it

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, no permission, a wrong checksum, ...
        why = f"can't load GPT-2's tokenizer ({error})"
        remedy = "set TIKTOKEN_CACHE_DIR to a folder that has its files"
        raise InputError(f"{why}; {remedy}") from None


def choose_tokenizer(tokenizer: str) -> str:
    """Return the name of a tokenizer; for "auto", "gpt2" if possible, or else "char" and a notice.

    Raises InputError for "gpt2" if its files can't be had.
    """
    if tokenizer not in ("auto", "gpt2"):
        return tokenizer
    try:
        load_encoding()
    except InputError as error:
        if tokenizer == "gpt2":
            raise InputError(f"--tokenizer gpt2: {error}") from None
        print(f"notice: {error}. Continuing with characters.", file=sys.stderr)
        return "char"
    return "gpt2"


def load_characters(cfg: Any) -> str:
    """Return the corpus --data if it is trained on in other tokens than GPT-2's, or else ""."""
    if cfg.tokenizer == "gpt2" or cfg.sample_only:
        return ""
    return load_text(cfg.data)


def load_splits(cfg: Any, tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of --data and --val_data, or 90% and 10% of --data if that is empty.

    text: what load_characters returned. Raises InputError for a corpus that can't be used.
    """
    if tokenizer.name == "gpt2":
        tokens = load_tokens(cfg.data, "--data")
    else:
        tokens = np.array(tokenizer.encode(text, "--data"), dtype=np.uint16)  # (n,)
    if not cfg.val_data:
        return data.split(tokens, cfg.block_size, cfg.data)
    if tokenizer.name == "gpt2":
        val_tokens = load_tokens(cfg.val_data, "--val_data")
    else:
        val_text = load_text(cfg.val_data, "--val_data")
        val_tokens = np.array(tokenizer.encode(val_text, "--val_data"), dtype=np.uint16)  # (n,)
    for flag, part in ((f"--data {cfg.data}", tokens), (f"--val_data {cfg.val_data}", val_tokens)):
        if len(part) <= cfg.block_size:
            why = f"{len(part):,} tokens are too few for --block_size {cfg.block_size}"
            raise InputError(f"{flag}: {why}; use a longer text or a smaller --block_size")
    return tokens, val_tokens


def load_tokens(name: str, flag: str) -> np.ndarray:
    """Return GPT-2's token ids, uint16 (n,), of a .bin file or of a corpus that load_text knows.

    A text is encoded in memory, a .bin file isn't read before its ids are needed. Raises
    InputError, naming flag, if it can't be used.
    """
    if Path(name).suffix == ".bin":
        return map_token_file(Path(name), flag)
    encoding = load_encoding()
    return encode(encoding, load_text(name, flag))


def encode(encoding: Any, text: str) -> np.ndarray:
    """Text to GPT-2's token ids, uint16 (n,)."""
    # An empty disallowed_special: "<|endoftext|>" in a text is text like any other.
    return encoding.encode_to_numpy(text, disallowed_special=()).astype(DTYPE)  # (n,)


def map_token_file(path: Path, flag: str) -> np.ndarray:
    """Map a file of token ids into memory; raises InputError, naming flag, if it isn't one."""
    if not os.path.isfile(path):
        raise InputError(f"{flag} {path}: no such file; make it with python -m data.prepare")
    n_tokens = read_side_file(path, flag)["n_tokens"]
    if n_tokens < 1 or path.stat().st_size != n_tokens * DTYPE.itemsize:
        why = f"not the {n_tokens:,} ids that {side_file(path).name} describes; make it again"
        raise InputError(f"{flag} {path}: {why}")
    tokens = np.asarray(np.memmap(path, dtype=DTYPE, mode="r"))  # (n_tokens,)
    if tokens.max() >= N_VOCAB:
        raise InputError(f"{flag} {path}: {tokens.max()} isn't the id of a token of GPT-2")
    return tokens


def side_file(path: Path) -> Path:
    """Where the description of a file of token ids is."""
    return path.with_name(f"{path.name}.json")


def read_side_file(path: Path, flag: str) -> dict:
    """Return the description of a file of token ids; raises InputError, naming flag."""
    side = side_file(path)
    try:
        described = json.loads(side.read_text(encoding="utf-8"))
        tokenizer, n_tokens = described["tokenizer"], described["n_tokens"]
    except FileNotFoundError:
        why = f"not known to hold token ids, because there is no {side.name}"
        remedy = f"encode a text; or if it has GPT-2's ids, as nanoGPT writes them, say {EXAMPLE}"
        raise InputError(f"{flag} {path}: {why}; {remedy} there") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"can't use {side.name} ({error!r}); it should look like {EXAMPLE}"
        raise InputError(f"{flag} {path}: {why}") from None
    if tokenizer != "gpt2":
        why = f"its tokens are {tokenizer!r}, not 'gpt2'"
        raise InputError(f"{flag} {path}: {why}; encode the text again")
    if type(n_tokens) is not int:
        raise InputError(f"{flag} {path}: {side.name} lacks 'n_tokens'; make the file again")
    return described


def checksum(*parts: np.ndarray) -> str:
    """What tells one corpus from another: the SHA-256 of each of its parts, in hexadecimal."""
    return " ".join(hashlib.sha256(np.ascontiguousarray(part)).hexdigest() for part in parts)
