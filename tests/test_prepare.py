"""data/prepare.py: the command that makes files of token ids, and what it refuses."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import TEXT, refused

from data import prepare, token_files


@pytest.fixture(autouse=True)
def single_bytes(monkeypatch):
    """An encoding of single bytes instead of GPT-2's, which needs a download."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


def test_texts_become_one_file_with_a_description(tmp_path, corpus, capsys):
    second = tmp_path / "second.txt"
    second.write_text("fox", encoding="utf-8")
    path = tmp_path / "all.bin"
    prepare.main([str(corpus), str(second), "--out", str(path)])
    out, err = capsys.readouterr()
    assert out == f"{path}: {len(TEXT) + 1 + 3:,} tokens\n"
    assert "encoding corpus.txt: 100%" in err
    assert "encoding second.txt: 100%" in err
    assert np.fromfile(path, dtype="<u2").tolist() == [*TEXT.encode(), 50_256, *b"fox"]
    assert len(token_files.load_tokens(str(path), "--data")) == len(TEXT) + 4
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"corpus.txt", "second.txt", "all.bin", "all.bin.json"}


def test_it_runs_as_a_module(tmp_path, corpus, monkeypatch):
    path = tmp_path / "all.bin"
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(corpus), "--out", str(path)])
    monkeypatch.delitem(sys.modules, "data.prepare")
    runpy.run_module("data.prepare", run_name="__main__")
    assert len(token_files.load_tokens(str(path), "--data")) == len(TEXT)


def test_help_shows_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "python -m data.prepare novel.txt letters.txt --out corpus.bin\n" in out


HOW = "name the texts and the file to write: TEXT... --out corpus.bin"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], HOW),
        (["corpus.txt"], HOW),
        (["--out", "new.bin"], HOW),
        (["corpus.txt", "--out"], "argument --out: expected one argument; see --help"),
        (["corpus.txt", "--output", "new.bin"], "unrecognized arguments: --output"),
        (["corpus.txt", "--out", "new.txt"], "--out new.txt: its name must end with .bin"),
        (["corpus.txt", "--out", "old.bin"], "--out old.bin: is there already; remove it, or"),
        (["corpus.txt", "--out", "no/new.bin"], "--out no: can't save new.bin"),
        (["missing.txt", "--out", "new.bin"], "TEXT missing.txt: no such file or directory"),
        (["corpus.txt", "latin.txt", "--out", "new.bin"], "TEXT latin.txt: not UTF-8 text; save"),
        (["nul.txt", "corpus.txt", "--out", "new.bin"], "TEXT nul.txt: a binary file"),
        ([".", "--out", "new.bin"], "TEXT .: is a directory; give the path of a text file"),
    ],
)
def test_mistakes_are_one_line_and_change_no_file(
    tmp_path, corpus, monkeypatch, capsys, words, said
):
    monkeypatch.chdir(tmp_path)
    files = {
        "corpus.txt": corpus.read_bytes(),
        "latin.txt": b"na\xefve",
        "nul.txt": b"fox\0",
        "old.bin": b"something that is worth keeping",
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    line = refused(prepare, capsys, *words)
    assert line.startswith(f"error: {said}")
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == files


def test_without_gpt2s_files_nothing_is_written(tmp_path, corpus, monkeypatch, capsys):
    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    line = refused(prepare, capsys, corpus, "--out", tmp_path / "new.bin")
    assert line.startswith("error: can't load GPT-2's tokenizer (no network); set TIKTOKEN_CACHE_")
    assert list(tmp_path.iterdir()) == [corpus]


def test_an_empty_text_is_refused(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    line = refused(prepare, capsys, empty, "--out", tmp_path / "a.bin")
    assert line == f"error: TEXT {empty}: the file is empty; give a text"
    assert {file.name for file in tmp_path.iterdir()} == {"empty.txt"}
