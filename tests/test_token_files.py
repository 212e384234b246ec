"""data/token_files.py: texts as files of token ids, what describes them, and what is refused."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import TEXT, refused, tiny, tiny_flags
from tiktoken_ext.openai_public import r50k_pat_str

import data
from data import prepare, token_files
from lab.ladder import ROOT
from part4_gpt2 import v8b_gpt2_tokens as v8b

END_OF_TEXT = 50_256


@pytest.fixture
def bpe(monkeypatch) -> tiktoken.Encoding:
    """It cuts a text into words as GPT-2's does, but has only 256 bytes and 40 pairs of them."""
    text = TEXT + "\n\n  \t\t \n\n \r\n"
    pairs = sorted({text[i : i + 2].encode() for i in range(len(text) - 1)})[:40]
    ranks = {bytes([i]): i for i in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)}
    encoding = tiktoken.Encoding(
        "small", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 296}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@pytest.fixture
def no_encoding(monkeypatch):
    """Without a network, tiktoken can't download GPT-2's encoding."""

    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)


@pytest.fixture
def bin_file(tmp_path, corpus, bpe) -> Path:
    """The small text as a file of token ids."""
    path = tmp_path / "prepared.bin"
    prepare.write_token_file(path, [corpus])
    return path


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def ids_of(path) -> list[int]:
    return np.fromfile(path, dtype="<u2").tolist()


def as_list(tokens) -> list[int]:
    return tokens[np.arange(len(tokens))].tolist()


def description_of(path) -> dict:
    return json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))


# ---- from a text to a file


def test_a_file_has_the_ids_of_its_text_and_a_description(bin_file, bpe):
    ids = bpe.encode_ordinary(TEXT)
    assert ids_of(bin_file) == ids
    assert description_of(bin_file) == {"tokenizer": "gpt2", "n_tokens": len(ids)}
    assert as_list(token_files.load_tokens(str(bin_file), "--data")) == ids
    assert names_in(bin_file.parent) == {"corpus.txt", "prepared.bin", "prepared.bin.json"}


def test_end_of_text_separates_texts(tmp_path, bpe):
    texts = {"a.txt": "The fox ", "b.txt": "dreams", "c.txt": "of <|endoftext|>"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [tmp_path / name for name in texts]
    n_tokens = prepare.write_token_file(tmp_path / "all.bin", paths)
    a, b, c = (bpe.encode_ordinary(text) for text in texts.values())
    assert ids_of(tmp_path / "all.bin") == [*a, END_OF_TEXT, *b, END_OF_TEXT, *c]
    assert n_tokens == description_of(tmp_path / "all.bin")["n_tokens"] == len(a + b + c) + 2


SPACES = "\n\n Hens  dream.\r\n\n\n\tÜber \n  the lazy\x0b dog's\x1c 12 eggs!"
SPACES += "\u3000 \u2028\xa0 a\n\n"
TEXTS = {
    "whitespace": SPACES * 9 + "  ",
    "line ends of Windows": TEXT.replace("\n", " \r\n\r\n") + "\r\n",
    "byte order mark": "\ufeff" + SPACES * 9,
    "special token": "The <|endoftext|> of the <|endoftext|>\n\n" * 9,
    "one word": "fox",
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(
    "files",
    [
        "small",
        pytest.param(
            "gpt2",
            marks=pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="no files"),
        ),
    ],
)
def test_pieces_have_the_tokens_of_the_whole_text(tmp_path, monkeypatch, request, files, kind):
    if files == "small":
        request.getfixturevalue("bpe")
    encoding = tiktoken.get_encoding("gpt2")
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[kind], encoding="utf-8", newline="")
    expected = encoding.encode_ordinary(data.load_text(path))
    for n in range(30, 60):
        monkeypatch.setattr(prepare, "PIECE", n)
        pieces = list(prepare.read_pieces(path))
        assert "".join(pieces) == data.load_text(path)
        assert max(len(piece) for piece in pieces) < 2 * n
        ids = np.concatenate(list(prepare.encode_pieces(pieces)))
        assert ids.dtype == np.uint16
        assert ids.tolist() == expected


def test_a_text_without_spaces_is_cut_anywhere(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 10)
    path = tmp_path / "text.txt"
    path.write_text("ÜberÄpfel" * 20, encoding="utf-8")
    pieces = list(prepare.read_pieces(path))
    assert max(len(piece) for piece in pieces) == 10
    ids = np.concatenate(list(prepare.encode_pieces(pieces)))
    assert bpe.decode(ids.tolist()) == "ÜberÄpfel" * 20


def test_only_a_few_pieces_are_read_ahead(bpe, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    n_read = 0

    def pieces():
        nonlocal n_read
        for i in range(50):
            n_read += 1
            yield f"{i} foxes"

    for n_encoded, ids in enumerate(prepare.encode_pieces(pieces())):
        assert bpe.decode(ids.tolist()) == f"{n_encoded} foxes"
        assert n_read - n_encoded <= 5
    assert n_read == 50


def test_several_threads_encode_at_once(monkeypatch):
    both_at_work = threading.Barrier(2, timeout=20)

    class Encoding:
        def encode_to_numpy(self, text, disallowed_special):
            both_at_work.wait()
            return np.array([len(text)])

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(token_files, "load_encoding", Encoding)
    ids = list(prepare.encode_pieces(["one", "three", "eleven", "twenty-two"]))
    assert [array.tolist() for array in ids] == [[3], [5], [6], [10]]


def test_a_bar_shows_how_fast_a_text_is_encoded(tmp_path, corpus, bpe, capsys):
    prepare.write_token_file(tmp_path / "prepared.bin", [corpus])
    err = capsys.readouterr().err
    assert "encoding corpus.txt: 100%" in err
    assert "B/s" in err


def test_a_text_is_encoded_in_memory_and_leaves_no_file(corpus, bpe):
    tokens = token_files.load_tokens(str(corpus), "--data")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == bpe.encode_ordinary(TEXT)
    assert names_in(corpus.parent) == {"corpus.txt"}


# Prints the memory of its own, in MiB, that a new process needs for batches and for a copy.
MEMORY_OF_A_FILE = """
import re
import sys
from pathlib import Path

import numpy as np

import data
from data import token_files


def own_memory():
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) / 1024


data.get_batch(np.zeros(99, dtype=np.uint16), 4, 5, "cpu")  # loads what PyTorch loads once
before = own_memory()
tokens = token_files.load_tokens(sys.argv[1], "--data")
token_files.checksum(*data.split(tokens, 5))
for _ in range(600):
    data.get_batch(tokens, 4, 5, "cpu")
print(own_memory() - before)
copied = tokens.copy()
print(own_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_ids_in_a_file_stay_there(tmp_path):
    """600 batches from a file of 64 MiB need none of this program's own memory for it."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(2**26)
    token_files.side_file(path).write_text(
        '{"tokenizer": "gpt2", "n_tokens": 33554432}', encoding="utf-8"
    )
    command = [sys.executable, "-c", MEMORY_OF_A_FILE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    for_batches, with_a_copy = map(float, done.stdout.split())
    assert for_batches < 16
    assert with_a_copy - for_batches > 60


def test_shakespeare_and_python_are_encoded_in_memory(bpe, monkeypatch):
    monkeypatch.setattr(data.corpora, "python_library", lambda: TEXT)
    tokens = token_files.load_tokens("python", "--data")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == bpe.encode_ordinary(TEXT)


BAD_TEXTS = {
    "not UTF-8": (b"na\xefve caf\xe9 " * 40, "not UTF-8 text"),
    "NUL": (b"The fox\0 dreams", "a binary file"),
    "NUL in a later piece": (b"fox " * 9 + b"\0", "a binary file"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_what_is_not_text_is_refused_and_leaves_nothing(tmp_path, bpe, monkeypatch, kind):
    content, said = BAD_TEXTS[kind]
    monkeypatch.setattr(prepare, "PIECE", 16)
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(data.InputError, match=f"^--val_data {path}: {said}"):
        token_files.load_tokens(str(path), "--val_data")
    with pytest.raises(data.InputError, match=f"^TEXT {path}: {said}"):
        prepare.write_token_file(tmp_path / "new.bin", [path])
    assert names_in(tmp_path) == {"bad.txt"}


def test_a_full_disk_leaves_nothing_behind(corpus, bpe, monkeypatch):
    def fsync(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(data.InputError, match="^--out .*No space left on device"):
        prepare.write_token_file(corpus.with_name("new.bin"), [corpus])
    assert names_in(corpus.parent) == {"corpus.txt"}


def test_a_device_is_not_encoded(bpe, tmp_path):
    with pytest.raises(data.InputError, match="^TEXT /dev/zero: a device, "):
        prepare.write_token_file(tmp_path / "a.bin", [Path("/dev/zero")])


def test_a_text_that_is_not_there_is_refused(tmp_path, bpe):
    for path in (tmp_path, tmp_path / "missing.txt", "", "x" * 3000):
        with pytest.raises(data.InputError, match="^--data.*give the path of a text file"):
            token_files.load_tokens(str(path), "--data")


# ---- files that aren't what they should be


def describe_otherwise(path, **changes):
    described = description_of(path) | changes
    Path(f"{path}.json").write_text(json.dumps(described), encoding="utf-8")


def damage(path, what):
    """Damage a file of token ids or its description; return what the message must say."""
    side, ids = Path(f"{path}.json"), path.read_bytes()
    if what == "file missing":
        path.unlink()
        return "no such file; make it with python -m data.prepare"
    if what == "no description":
        side.unlink()
        return f'there is no {side.name}; encode a text; .* {{"tokenizer": "gpt2", "n_tokens": '
    if what == "half a description":
        side.write_bytes(side.read_bytes()[:9])
        return f"can't use {side.name}"
    if what == "description of random bytes":
        side.write_bytes(b"\xff\xfe\xfd")
        return f"can't use {side.name}"
    if what == "description of another kind":
        side.write_text("[1, 2]", encoding="utf-8")
        return f"can't use {side.name}"
    if what == "nested description":
        side.write_text("[" * 100_000, encoding="utf-8")
        return f"can't use {side.name}"
    if what == "no count":
        describe_otherwise(path, n_tokens=None)
        return f"{side.name} lacks 'n_tokens'"
    if what == "other tokens":
        describe_otherwise(path, tokenizer="cl100k_base")
        return "its tokens are 'cl100k_base', not 'gpt2'"
    if what == "an id too large":
        path.write_bytes(ids[:-2] + np.array([50_257], dtype="<u2").tobytes())
        return "50257 isn't the id of a token of GPT-2"
    if what == "wrong count":
        describe_otherwise(path, n_tokens=len(ids) // 2 - 1)
    if what == "cut off":
        path.write_bytes(ids[:-2])
    if what == "half an id":
        path.write_bytes(ids[:-1])
    if what == "nothing":
        path.write_bytes(b"")
        describe_otherwise(path, n_tokens=0)
    return f"not the [0-9,]+ ids that {side.name} describes; make it again"


@pytest.mark.parametrize(
    "what",
    [
        "file missing", "no description", "half a description", "description of random bytes",
        "description of another kind", "nested description", "no count", "other tokens",
        "an id too large", "wrong count", "cut off", "half an id", "nothing",
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_is_refused(bin_file, what):
    said = damage(bin_file, what)
    with pytest.raises(data.InputError, match=f"^--val_data {bin_file}: .*{said}"):
        token_files.load_tokens(str(bin_file), "--val_data")


def test_the_message_says_how_to_describe_ids_from_elsewhere(bin_file):
    """As nanoGPT writes them, with every token of GPT-2."""
    np.arange(50_257, dtype="<u2").tofile(bin_file)
    token_files.side_file(bin_file).unlink()
    with pytest.raises(data.InputError) as error:
        token_files.load_tokens(str(bin_file), "--data")
    example = re.search(r"\{.*\}", str(error.value))[0]
    token_files.side_file(bin_file).write_text(example.replace("1234", "50257"), encoding="utf-8")
    assert token_files.load_tokens(str(bin_file), "--data").tolist() == list(range(50_257))


def test_a_text_named_bin_is_not_trained_on(tmp_path, bpe, capsys):
    path = tmp_path / "novel.bin"
    path.write_text(TEXT, encoding="utf-8")
    line = refused(v8b, capsys, *tiny_flags(v8b, tokenizer="gpt2"), "--data", path)
    assert line.startswith(f"error: --data {path}: not known to hold token ids")
    assert names_in(tmp_path) == {"novel.bin"}


# ---- which tokenizer, which corpus


def test_the_tokenizer_is_gpt2_if_it_can_be_had(bpe, capsys):
    names = [token_files.choose_tokenizer(name) for name in ("auto", "gpt2", "char")]
    assert names == ["gpt2", "gpt2", "char"]
    assert capsys.readouterr().err == ""


def test_without_its_files_the_tokenizer_is_char_or_an_error(no_encoding, capsys):
    assert token_files.choose_tokenizer("char") == "char"
    assert capsys.readouterr().err == ""
    assert token_files.choose_tokenizer("auto") == "char"
    notice = capsys.readouterr().err
    assert notice.startswith("notice: can't load GPT-2's tokenizer (no network)")
    assert notice.endswith("Continuing with characters.\n")
    with pytest.raises(data.InputError, match="^--tokenizer gpt2: .*TIKTOKEN_CACHE_DIR"):
        token_files.choose_tokenizer("gpt2")


def test_the_checksum_tells_corpora_and_splits_apart():
    parts = []
    for number in (1, 2):
        tokens = np.full(100, number, dtype=np.uint16)
        parts += [tokens, tokens[:90], tokens[90:]]
    for a, b in itertools.combinations(parts, 2):
        assert token_files.checksum(a) != token_files.checksum(b)
        assert token_files.checksum(a, b) != token_files.checksum(b, a)
    assert token_files.checksum(*parts) == token_files.checksum(*parts)


def splits_of(tokenizer, **changes):
    """What load_splits gives for these settings, as lists."""
    cfg = tiny(v8b, tokenizer=tokenizer, **changes)
    made = v8b.BPETokenizer() if tokenizer == "gpt2" else data.CharTokenizer(TEXT)
    text = token_files.load_characters(cfg)
    return [as_list(part) for part in token_files.load_splits(cfg, made, text)]


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_validation_is_a_tenth_of_data_or_all_of_val_data(tmp_path, corpus, bpe, tokenizer):
    other = tmp_path / "other.txt"
    other.write_text("dreams of hens " * 9, encoding="utf-8")
    encode = bpe.encode_ordinary if tokenizer == "gpt2" else data.CharTokenizer(TEXT).encode
    ids, other_ids = encode(TEXT), encode("dreams of hens " * 9)
    n = len(ids) * 9 // 10
    assert splits_of(tokenizer, data=str(corpus)) == [ids[:n], ids[n:]]
    assert splits_of(tokenizer, data=str(corpus), val_data=str(other)) == [ids, other_ids]


def test_files_of_token_ids_give_the_splits_of_their_texts(bin_file, corpus):
    for val_data in ("", "same"):
        of_text = splits_of("gpt2", data=str(corpus), val_data=val_data and str(corpus))
        of_file = splits_of("gpt2", data=str(bin_file), val_data=val_data and str(bin_file))
        assert of_text == of_file


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_a_text_that_is_too_short_names_its_flag(tmp_path, corpus, bpe, tokenizer):
    short = tmp_path / "short.txt"
    short.write_text("quick", encoding="utf-8")  # as many characters as block_size
    n = len(bpe.encode_ordinary("quick")) if tokenizer == "gpt2" else 5
    said = f"{short}: {n} tokens are too few for --block_size 5"
    with pytest.raises(data.InputError, match=f"^--data {said}, which needs 51"):
        splits_of(tokenizer, data=str(short))
    with pytest.raises(data.InputError, match=f"^--data {said}"):
        splits_of(tokenizer, data=str(short), val_data=str(short))
    with pytest.raises(data.InputError, match=f"^--val_data {said}"):
        splits_of(tokenizer, data=str(corpus), val_data=str(short))


def test_the_least_validation_text_is_just_enough(tmp_path, corpus):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:6], encoding="utf-8")  # a window of block_size and its targets
    cfg = tiny(v8b, data=str(corpus), val_data=str(other))
    _, val_tokens = token_files.load_splits(cfg, data.CharTokenizer(TEXT), TEXT)
    x, y = data.get_batch(val_tokens, 1, cfg.block_size, "cpu")
    assert x.shape == y.shape == (1, 5)


def test_an_unknown_character_in_val_data_names_its_flag(tmp_path, corpus):
    other = tmp_path / "other.txt"
    other.write_text("Über " * 40, encoding="utf-8")
    with pytest.raises(data.InputError, match="^--val_data: the model's alphabet has no 'Ü'"):
        splits_of("char", data=str(corpus), val_data=str(other))
