"""support/checkpoints.py: what is wrong with a file that isn't a good checkpoint."""

import io
import math
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import data
from lab.ladder import ROOT
from support import checkpoints

STATE = {
    "script": "v6d_checkpoints",
    "config": {"n_embd": 18},
    "tokenizer": "char",
    "characters": "\nab",
    "corpus": "0" * 64,
    "model": {"weight": torch.arange(300.0)},
    "optimizer": {0: {"exp_avg": torch.ones(300)}},
    "step": 3,
    "history": {0: (4.0, 4.0), 3: (3.0, 3.5)},
}

TOKENIZER = {"json": Tokenizer(WordLevel({"a": 0})).to_str(), "n_vocab": 1, "end_of_text": [0]}
FILE = {"tokenizer": "file", "tokenizer_content": TOKENIZER}


class Trap:
    """Hostile contents of a file: a reader that isn't careful makes a folder at path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def path(tmp_path):
    """A good checkpoint."""
    with (tmp_path / "latest.pt").open("wb") as file:  # as runs.py does
        torch.save(STATE, file)
    return tmp_path / "latest.pt"


def refused(path) -> str:
    """Let read_checkpoint refuse a file, which stays as it was; return the message."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(data.InputError) as error:
        checkpoints.read_checkpoint(path)
    assert (path.read_bytes() if path.is_file() else None) == before
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_a_checkpoint_comes_back_as_it_was_written(path):
    state = checkpoints.read_checkpoint(path)
    assert state.pop("path") == str(path), "where it was found"
    assert state.pop("modified") == path.stat().st_mtime_ns
    assert str(state) == str(STATE)


def flip(content, part):
    """Change one bit in the middle of a part of the content."""
    i = content.index(part) + len(part) // 2
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


def other_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<document/>")
    return file.getvalue()


def as_folder(content):
    """Mark the last file in the archive as a folder, which changes no checksum."""
    i = content.rindex(b"PK\x01\x02") + 38
    return content[:i] + bytes([content[i] | 0x10]) + content[i + 1 :]


WEIGHT = STATE["model"]["weight"].numpy().tobytes()
DAMAGES = {
    "empty": lambda content: b"",
    "text": lambda content: b"Once upon a time",
    "first half": lambda content: content[: len(content) // 2],
    "last byte cut": lambda content: content[:-1],
    "flipped weight": lambda content: flip(content, WEIGHT),
    "flipped settings": lambda content: flip(content, b"n_embd"),
    "zeros": lambda content: bytes(len(content)),
    "file marked as a folder": as_folder,
    "another program's zip": lambda content: other_zip(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(path, damage):
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert refused(path).startswith("damaged")


def test_a_file_with_a_damaged_name_in_its_directory_is_refused(path):
    content = path.read_bytes()
    i = content.rindex(b"archive/version")
    path.write_bytes(content[:i] + b"\xff" + content[i + 1 :])
    assert refused(path).startswith("damaged")


@pytest.mark.parametrize("content", [[1, 2], {}, {"weight": torch.ones(3)}, torch.ones(3)], ids=str)
def test_a_file_of_another_program_is_refused(path, content):
    torch.save(content, path)
    assert refused(path) == "not a checkpoint of this course (it lacks 'script')"


@pytest.mark.parametrize("name", STATE)
def test_a_checkpoint_must_be_complete(path, name):
    incomplete = {other: value for other, value in STATE.items() if other != name}
    for state in (incomplete, STATE | {name: None}, STATE | {name: 2.5}):
        torch.save(state, path)
        assert refused(path) == f"not a checkpoint of this course (it lacks {name!r})"


def test_a_hostile_file_is_refused_and_does_nothing(path, tmp_path):
    torch.save(STATE | {"history": {0: Trap(tmp_path / "trap")}}, path)
    assert refused(path).startswith("holds more than weights and settings; not loaded")
    assert not (tmp_path / "trap").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "trap").exists(), "the trap works on a careless reader"


def test_a_checkpoint_of_an_older_version_is_refused_with_the_commit_that_reads_it(path):
    old = {"random_state": torch.get_rng_state(), "log": [{"step": 0}]}
    torch.save(STATE | old, path)
    script = Path("part2_training", "v6d_checkpoints.py")
    why = f"written by {script} in another format, which commit 3b6abd2 of it can read"
    assert refused(path) == why
    git = ["git", "-C", str(ROOT)]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True)
    if shallow.stdout.strip() == b"false":
        reader = "3b6abd2:part2_training/v6d_checkpoints.py"
        assert b'"random_state"' in subprocess.check_output([*git, "show", reader])


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1}, {"history": {}}, {"history": {"0": (1.0, 1.0)}}, {"history": {0: 1.0}},
        {"history": {0: (1.0,)}}, {"history": {0: (1, 2)}}, {"history": {0: (1.0, math.inf)}},
        {"seconds": -1.0}, {"seconds": math.nan}, {"seconds": None}, {"seconds": "1"},
        {"tokenizer": "file"}, {"tokenizer": "file", "tokenizer_content": None},
        FILE | {"tokenizer_content": TOKENIZER | {"json": "x"}},
        FILE | {"tokenizer_content": TOKENIZER | {"n_vocab": -1}},
        FILE | {"tokenizer_content": TOKENIZER | {"n_vocab": "9"}},
        FILE | {"tokenizer_content": TOKENIZER | {"end_of_text": 3}},
        FILE | {"tokenizer_content": TOKENIZER | {"end_of_text": ["3"]}},
        {"tokenizer": "bpe"}, {"tokenizer": "bpe", "tokenizer_content": {"merges": 3}},
        {"tokenizer": "bpe", "tokenizer_content": {"merges": [(1, 256)]}},
        {"tokenizer": "bpe", "tokenizer_content": {"merges": [(1, -2)]}},
        {"tokenizer": "bpe", "tokenizer_content": {"merges": [(1, 2, 3)]}},
        {"tokenizer": "bpe", "tokenizer_content": {"merges": [(1, "2")]}},
    ],
    ids=str,
)
def test_an_impossible_checkpoint_is_refused(path, changes):
    torch.save(STATE | changes, path)
    assert refused(path).startswith("damaged (its ")


BYTE_PAIRS = {"tokenizer": "bpe", "tokenizer_content": {"merges": [(1, 2), (256, 3)]}}


@pytest.mark.parametrize("more", [{"seconds": 1.5}, FILE, BYTE_PAIRS], ids=str)
def test_a_clock_and_a_tokenizer_may_be_in_a_checkpoint(path, more):
    torch.save(STATE | more, path)
    state = checkpoints.read_checkpoint(path)
    assert {name: state[name] for name in more} == more


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(dtype):
    model = torch.nn.Linear(2, 3, bias=False)
    state = {"path": "latest.pt", "script": "linear", "model": {"weight": torch.ones(3, 2)}}
    checkpoints.load_weights(model, state)
    state["model"] = {"weight": torch.ones(3, 2, dtype=dtype)}
    with pytest.raises(data.InputError, match="damaged: its weights don't fit its settings"):
        checkpoints.load_weights(model, state)


def test_a_missing_file_is_refused(tmp_path):
    assert refused(tmp_path / "latest.pt").startswith("no such file; ")


def test_a_file_that_can_not_be_read_is_refused(tmp_path):
    (tmp_path / "latest.pt").mkdir()
    assert refused(tmp_path / "latest.pt").startswith("can't read it (")


@pytest.mark.parametrize("damage", ["missing", "unreadable", "damaged", "foreign", "hostile"])
def test_best_pt_is_offered_if_it_is_intact(path, tmp_path, damage):
    best = path.rename(tmp_path / "best.pt")
    if damage == "unreadable":
        path.mkdir()
    elif damage == "damaged":
        path.write_bytes(best.read_bytes()[:-1])
    elif damage == "foreign":
        torch.save({}, path)
    elif damage == "hostile":
        torch.save(STATE | {"history": Trap(tmp_path / "trap")}, path)
    offer = "best.pt beside it is intact: copy it over latest.pt to use it"
    assert refused(path).endswith(f"; {offer}")
    best.write_bytes(b"")
    assert "best.pt" not in refused(path)
    assert "beside it" not in refused(best)
