"""Encode texts of any size into one file of GPT-2's token ids, which v8b and later train on.

Run it:   python -m data.prepare novel.txt letters.txt --out corpus.bin
          python part4_gpt2/v8b_gpt2_tokens.py --data corpus.bin
"""

import argparse
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data import token_files
from data.corpora import check_name, reading
from data.files import replace_file
from data.flags import InputError, Parser, command_line

PIECE = 2**20  # characters of a text that are encoded at a time


def main(argv: list[str] | None = None) -> None:
    """Write the file that the flags ask for. argv: by default those of the command line."""
    with command_line():
        parser = Parser(
            prog="python -m data.prepare", description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument("texts", nargs="*", type=Path, metavar="TEXT", help="UTF-8 text files")
        parser.add_argument("--out", type=Path, help="the file to write; its name ends with .bin")
        args = parser.parse_args(argv)
        if not args.texts or not args.out:
            raise InputError("name the texts and the file to write: TEXT... --out corpus.bin")
        if args.out.suffix != ".bin":
            raise InputError(f"--out {args.out}: its name must end with .bin")
        if args.out.exists():
            raise InputError(f"--out {args.out}: is there already; remove it, or name another")
        for text in args.texts:
            if text.is_file() and text.stat().st_size == 0:
                raise InputError(f"TEXT {text}: the file is empty; give a text")
        n_tokens = write_token_file(args.out, args.texts)
        print(f"{args.out}: {n_tokens:,} tokens")


def write_token_file(path: Path, texts: list[Path]) -> int:
    """Encode text files into a file of token ids with its side file; return how many ids it has.

    The memory that this takes doesn't depend on the length of the texts. Raises InputError for a
    text that can't be read, and for a file that can't be written.
    """
    n_tokens = 0

    def write(file: BinaryIO) -> None:
        nonlocal n_tokens
        for ids in encode_texts(texts):
            file.write(ids)
            n_tokens += len(ids)

    replace_file(path, write, "--out")
    text = json.dumps({"tokenizer": "gpt2", "n_tokens": n_tokens}) + "\n"
    side = token_files.side_file(path)
    replace_file(side, lambda file: file.write(text.encode("utf-8")), "--out")
    return n_tokens


def encode_texts(texts: list[Path]) -> Iterator[np.ndarray]:
    """Yield the ids of text files, piece by piece, with GPT-2's end of text between two files."""
    for i, text in enumerate(texts):
        if i > 0:
            yield np.array([token_files.END_OF_TEXT], dtype=token_files.DTYPE)  # (1,)
        yield from encode_pieces(read_pieces(text))


def read_pieces(path: Path) -> Iterator[str]:
    """Yield a text file in pieces of about a million characters, with a progress bar.

    A piece ends between a word and the space or line break after it. No token of GPT-2 reaches
    across that place, so the pieces have the tokens of the whole text. (A million characters
    without such a place are cut anywhere.) Raises InputError for what isn't text.
    """
    check_name(path, "TEXT")
    with reading(path, "TEXT"), path.open(encoding="utf-8-sig") as file:
        size = os.fstat(file.fileno()).st_size  # 0 for a pipe
        bar = tqdm(total=size or None, desc=f"encoding {path.name}", unit="B", unit_scale=True)
        rest = ""
        with bar:
            while True:
                new = file.read(PIECE)
                if not new:
                    break
                bar.update(len(new.encode("utf-8")))
                if "\0" in new:
                    why = "a binary file, or text that isn't UTF-8; give UTF-8 text"
                    raise InputError(f"TEXT {path}: {why}")
                text = rest + new
                found = re.match(r".*\S(?=[ \n])", text, re.DOTALL)
                cut = found.end() if found else len(text)
                yield text[:cut]
                rest = text[cut:]
            yield rest


def encode_pieces(pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield GPT-2's token ids of each piece, uint16 (n,); all cores encode pieces at once."""
    encoding = token_files.load_encoding()
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = deque()
        for piece in pieces:
            waiting.append(pool.submit(token_files.encode, encoding, piece))
            if len(waiting) > 2 * n_threads:  # enough for all threads, and little memory
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


if __name__ == "__main__":
    main()
