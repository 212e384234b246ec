"""data/prepare.py: the command that encodes texts into a file of token ids."""

import re

from data import prepare

import numpy as np
import pytest
import tiktoken
from conftest import TEXT, refused


@pytest.fixture(autouse=True)
def encoding_of_bytes(monkeypatch):
    """An encoding of single bytes in place of GPT-2's, which needs a download."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=".|\\n", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


def test_texts_become_one_file(tmp_path, corpus, capsys):
    out = tmp_path / "corpus.bin"
    prepare.main([str(corpus), str(corpus), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}: {2 * len(TEXT) + 1:,} tokens\n"
    ids = list(TEXT.encode("utf-8"))
    assert np.fromfile(out, dtype="<u2").tolist() == [*ids, 50_256, *ids]
    assert {path.name for path in tmp_path.iterdir()} == {
        "corpus.txt", "corpus.bin", "corpus.bin.json",
    }


def test_a_file_from_elsewhere_can_be_adopted(tmp_path, capsys):
    path = tmp_path / "train.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    prepare.main(["--adopt", str(path)])
    assert capsys.readouterr().out == f"{path}.json: describes 1,000 tokens\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name the texts"),
        (["{text}"], "name the texts"),
        (["--out", "a.bin"], "name the texts"),
        (["{text}", "--out", "{folder}/corpus.txt2"], "must end with .bin"),
        (["{text}", "--out", "{folder}/old.bin"], "is there already"),
        (["{text}", "--out", "{folder}/no/new.bin"], "--out {folder}/no: "),
        (["{folder}/missing.txt", "--out", "{folder}/new.bin"], "TEXT {folder}/missing.txt: no "),
        (["{folder}", "--out", "{folder}/new.bin"], "TEXT {folder}: "),
        (["{text}", "--adopt", "{text}"], "--adopt: takes no texts"),
        (["--wrong"], "--wrong"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, corpus, capsys, flags, said):
    (tmp_path / "old.bin").write_bytes(b"old")
    before = {path.name for path in tmp_path.iterdir()}
    places = {"text": corpus, "folder": tmp_path}
    line = refused(prepare, capsys, *[flag.format(**places) for flag in flags])
    assert re.escape(said.format(**places)) in re.escape(line)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "old.bin").read_bytes() == b"old"
