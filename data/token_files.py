"""Corpora as files of token ids: encode a text, keep the ids, read them where they are needed.

A file holds GPT-2's token ids as uint16, little-endian and nothing else, which is nanoGPT's layout.
The side file next to it, corpus.bin.json, says so and has the number of tokens and a checksum.
"""

import glob
import hashlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

import data
from data.corpora import check_name, load_text, reading
from data.files import replace_file
from data.flags import InputError

DTYPE = np.dtype("<u2")  # uint16, little-endian on every machine
N_VOCAB = 50_257  # tokens of GPT-2
END_OF_TEXT = 50_256
PIECE = 2**20  # characters of a text that are encoded at a time
CHUNK = 2**24  # bytes of a file that are read at a time


class TokenFile:
    """The ids from begin to end in a file, none of which is read before it is needed.

    The file is mapped into memory anew for each access: whatever a memory map has read counts as
    this program's memory until the map is closed.
    """

    def __init__(self, path: Path, begin: int, end: int, checksum: str) -> None:
        self.path = path
        self.begin = begin
        self.end = end
        self.checksum = checksum  # of the whole file

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, index: slice | np.ndarray) -> "TokenFile | np.ndarray":
        """A slice gives a TokenFile; positions, int of any shape, give their ids, uint16."""
        if isinstance(index, slice):
            begin, end, _ = index.indices(len(self))
            return TokenFile(self.path, self.begin + begin, self.begin + end, self.checksum)
        tokens = np.memmap(self.path, dtype=DTYPE, mode="r")
        return tokens[self.begin + index]


def load_tokens(name: str, flag: str = "--data") -> np.ndarray | TokenFile:
    """Return GPT-2's token ids, uint16, of a corpus that load_text knows or of a .bin file.

    A text file is encoded once; its ids are kept in a file next to it. Raises InputError, naming
    flag, for a file that can't be used.
    """
    path = Path(name)
    if path.suffix == ".bin":
        return open_token_file(path, flag)
    # A pipe can't be read twice, and there is no place for a file beside a device.
    is_file = os.path.isfile(path) and not name.startswith(("/dev/", "/proc/"))
    if name in ("shakespeare", "python") or not is_file:
        pieces = [load_text(name, flag)]
        return np.concatenate(list(encode(pieces)))
    if not os.access(path.parent, os.W_OK):
        return np.concatenate(list(encode(read_pieces(path, flag))))
    return encode_once(path, flag)


def load_characters(cfg: Any) -> str:
    """Return the corpus --data if its characters are the tokens, and if it is trained on; or "".

    Raises InputError for a corpus that can't be used.
    """
    if cfg.tokenizer == "char" and not cfg.sample_only:
        return load_text(cfg.data)
    return ""


def load_splits(
    cfg: Any, tokenizer: Any, text: str
) -> tuple[np.ndarray | TokenFile, np.ndarray | TokenFile]:
    """Return the token ids of --data and --val_data, or 90% and 10% of --data if that is empty.

    text: what load_characters returned. Raises InputError for a corpus that can't be used.
    """
    if tokenizer.name == "gpt2":
        tokens = load_tokens(cfg.data)
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


def encode_once(path: Path, flag: str) -> TokenFile:
    """Return the ids of a text file from the file next to it, which is made if it isn't there."""
    kept = path.with_name(f"{path.name}.gpt2.bin")
    text_checksum = checksum_of(path)
    try:
        described = read_side_file(kept, flag)
        if described.get("text_sha256") == text_checksum:
            return open_token_file(kept, flag)
    except InputError:
        pass  # missing or damaged, so make it
    write_token_file(kept, [path], flag, flag)
    write_side_file(kept, {**read_side_file(kept, flag), "text_sha256": text_checksum}, flag)
    return open_token_file(kept, flag)


def write_token_file(path: Path, texts: list[Path], flag: str, text_flag: str) -> int:
    """Encode text files into a file of token ids with its side file; return how many ids it has.

    Between two texts there is GPT-2's end-of-text token. The memory that this takes doesn't depend
    on the length of the texts. Raises InputError for a text that can't be read, naming text_flag,
    and for a file that can't be written, naming flag.
    """
    n_tokens = 0
    sha256 = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        nonlocal n_tokens
        for i, text in enumerate(texts):
            pieces = encode(read_pieces(text, text_flag))
            if i > 0:
                pieces = chain([np.array([END_OF_TEXT], dtype=DTYPE)], pieces)
            for ids in pieces:
                n_tokens += len(ids)
                sha256.update(ids)
                file.write(ids)

    try:
        side_file(path).unlink(missing_ok=True)  # so that it never describes another file
        remove_unfinished(path)
    except OSError as error:
        raise InputError(f"{flag} {path}: can't write there ({error.strerror})") from None
    replace_file(path, write, flag, ending=f"{os.getpid()}.unfinished")
    write_side_file(path, {"n_tokens": n_tokens, "sha256": sha256.hexdigest()}, flag)
    return n_tokens


def remove_unfinished(path: Path) -> None:
    """Remove what programs that were killed while writing path left an hour or more ago."""
    for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*.unfinished"):
        if unfinished.stat().st_mtime < time.time() - 3600:
            unfinished.unlink(missing_ok=True)


def read_pieces(path: Path, flag: str) -> Iterator[str]:
    """Yield a text file in pieces of about a million characters, with a progress bar.

    A piece ends between a word and the space or line break after it. No token of GPT-2 reaches
    across that place, so the pieces have the tokens of the whole text. (A million characters
    without such a place are cut anywhere.) Raises InputError, naming flag, like load_text.
    """
    check_name(path, flag)
    with reading(path, flag), path.open(encoding="utf-8-sig") as file:
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
                    raise InputError(f"{flag} {path}: {why}")
                text = rest + new
                found = re.match(r".*\S(?=[ \n])", text, re.DOTALL)
                cut = found.end() if found else len(text)
                yield text[:cut]
                rest = text[cut:]
            yield rest


def load_encoding() -> Any:
    """GPT-2's encoding from tiktoken, which downloads its files once; InputError if it can't."""
    import tiktoken  # here, because only v8b and later need it

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, no permission, a wrong checksum, ...
        why = f"can't load GPT-2's tokenizer ({error})"
        remedy = "set TIKTOKEN_CACHE_DIR to a folder that has its files"
        raise InputError(f"{why}; {remedy}") from None


def choose_tokenizer(tokenizer: str) -> str:
    """Return "gpt2" or "char"; for "auto", "gpt2" if possible, or else "char" and a notice.

    Raises InputError for "gpt2" if they can't.
    """
    if tokenizer == "char":
        return "char"
    try:
        load_encoding()
    except InputError as error:
        if tokenizer == "gpt2":
            raise InputError(f"--tokenizer gpt2: {error}") from None
        print(f"notice: {error}. Continuing with characters.", file=sys.stderr)
        return "char"
    return "gpt2"


def encode(pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield GPT-2's token ids of each piece, uint16 (n,); all cores encode pieces at once."""
    encoding = load_encoding()

    def encode_piece(piece: str) -> np.ndarray:
        # An empty disallowed_special: "<|endoftext|>" in a text is text like any other.
        return encoding.encode_to_numpy(piece, disallowed_special=()).astype(DTYPE)  # (n,)

    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = deque()
        for piece in pieces:
            waiting.append(pool.submit(encode_piece, piece))
            if len(waiting) > 2 * n_threads:  # enough for all threads, and little memory
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def open_token_file(path: Path, flag: str) -> TokenFile:
    """Return a file of token ids; raises InputError, naming flag, if it isn't what it should be.

    Its checksum is compared, which takes about a second per gigabyte.
    """
    if not os.path.isfile(path):
        raise InputError(f"{flag} {path}: no such file; make it with python -m data.prepare")
    described = read_side_file(path, flag)
    n_tokens = described["n_tokens"]
    checksum, largest = checksum_and_largest(path)
    if path.stat().st_size != n_tokens * DTYPE.itemsize or checksum != described["sha256"]:
        why = f"not the file that {side_file(path).name} describes; make it again"
        raise InputError(f"{flag} {path}: {why}")
    if largest >= N_VOCAB:
        raise InputError(f"{flag} {path}: {largest} isn't the id of a token of GPT-2")
    return TokenFile(path, 0, n_tokens, checksum)


def side_file(path: Path) -> Path:
    """Where the description of a file of token ids is."""
    return path.with_name(f"{path.name}.json")


def read_side_file(path: Path, flag: str) -> dict:
    """Return the description of a file of token ids; raises InputError, naming flag."""
    side = side_file(path)
    try:
        described = json.loads(side.read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = (
            f"not known to hold token ids, because there is no {side.name}. If it has GPT-2's ids "
            f'in the layout of nanoGPT, make one: python -m data.prepare --adopt "{path}"'
        )
        raise InputError(f"{flag} {path}: {why}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{flag} {path}: can't read {side.name} ({error})") from None
    types = {"tokenizer": str, "n_tokens": int, "sha256": str}
    for name, kind in types.items():
        if not isinstance(described, dict) or type(described.get(name)) is not kind:
            raise InputError(f"{flag} {path}: {side.name} lacks {name!r}; make the file again")
    if described["tokenizer"] != "gpt2":
        why = f"its tokens are {described['tokenizer']!r}, not 'gpt2'"
        raise InputError(f"{flag} {path}: {why}; encode the text again")
    return described


def write_side_file(path: Path, described: dict, flag: str) -> None:
    """Write the description of a file of token ids; raises InputError, naming flag."""
    text = json.dumps({"tokenizer": "gpt2", **described}, indent=2) + "\n"
    ending = f"{os.getpid()}.unfinished"
    replace_file(side_file(path), lambda file: file.write(text.encode("utf-8")), flag, ending)


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file in chunks of 16 MiB, with a progress bar if it takes longer than a second."""
    size = path.stat().st_size
    bar = tqdm(total=size, desc=f"checking {path.name}", unit="B", unit_scale=True, delay=1)
    with path.open("rb") as file, bar:
        while True:
            chunk = file.read(CHUNK)
            if not chunk:
                return
            yield chunk
            bar.update(len(chunk))


def checksum_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    sha256 = hashlib.sha256()
    for chunk in read_chunks(path):
        sha256.update(chunk)
    return sha256.hexdigest()


def checksum_and_largest(path: Path) -> tuple[str, int]:
    """The SHA-256 of a file of token ids, in hexadecimal, and its largest id; 0 if it is empty."""
    sha256, largest = hashlib.sha256(), 0
    for chunk in read_chunks(path):
        sha256.update(chunk)
        ids = np.frombuffer(chunk[: len(chunk) // 2 * 2], dtype=DTYPE)  # (n,)
        largest = max(largest, int(ids.max(initial=0)))
    return sha256.hexdigest(), largest


def checksum(*parts: np.ndarray | TokenFile) -> str:
    """What tells one corpus from another: the checksums of its parts, or of their files."""
    checksums = []
    for part in parts:
        if isinstance(part, TokenFile):
            checksums.append(f"{part.checksum} {part.begin} {part.end}")
        else:
            checksums.append(hashlib.sha256(np.ascontiguousarray(part)).hexdigest())
    return " ".join(checksums)


def adopt(path: Path, flag: str) -> int:
    """Write the side file for a file of ids that has none; return how many ids there are.

    Raises InputError, naming flag, if it can't hold GPT-2's token ids.
    """
    if not os.path.isfile(path):
        raise InputError(f"{flag} {path}: no such file")
    size = path.stat().st_size
    if size == 0 or size % DTYPE.itemsize != 0:
        raise InputError(f"{flag} {path}: {size:,} bytes can't be ids of two bytes each")
    sha256 = hashlib.sha256()
    has_zero = False  # a byte that token ids have, but texts don't
    for chunk in read_chunks(path):
        sha256.update(chunk)
        has_zero = has_zero or b"\0" in chunk
        largest = np.frombuffer(chunk, dtype=DTYPE).max()
        if largest >= N_VOCAB:
            raise InputError(f"{flag} {path}: {largest} isn't the id of a token of GPT-2")
    if not has_zero:
        raise InputError(f"{flag} {path}: this is a text; leave out {flag} to encode it")
    described = {"n_tokens": size // DTYPE.itemsize, "sha256": sha256.hexdigest()}
    write_side_file(path, described, flag)
    return described["n_tokens"]
