"""support/checkpoints.py: files that are whole or not there, and what is wrong with others."""

import io
import os
import zipfile

import pytest
import torch

import data
from support import checkpoints

STATE = {
    "folder": "out/run",
    "script": "v6d_checkpoints",
    "config": {"n_embd": 18},
    "tokenizer": "char",
    "characters": "\nab",
    "corpus": "0" * 64,
    "model": {"weight": torch.arange(300.0)},
    "optimizer": {0: {"exp_avg": torch.ones(300)}},
    "step": 3,
    "random_state": torch.Generator().get_state(),
    "log": [{"step": 0, "train_loss": 4.0, "val_loss": 4.0, "tokens_per_second": 0.0}],
}


class Trap:
    """Hostile contents of a file: a reader that isn't careful makes a folder at path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def path(tmp_path):
    """A good checkpoint."""
    checkpoints.write_checkpoint(STATE, tmp_path / "latest.pt")
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


# ---- writing and reading files


def test_a_checkpoint_comes_back_as_it_was_written(path):
    state = checkpoints.read_checkpoint(path)
    assert state["folder"] == str(path.parent), "the folder is where the file was found"
    assert state.pop("path") == str(path)
    for name in ("model", "optimizer", "random_state"):
        assert str(state.pop(name)) == str(STATE[name])
    assert state | {"folder": "out/run"} == {name: STATE[name] for name in state}


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000])
def test_a_disk_that_fills_up_while_pytorch_writes(path, limit):
    resource = pytest.importorskip("resource")
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(data.InputError, match="can't save latest.pt"):
            checkpoints.write_checkpoint(STATE | {"step": 4}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(path, monkeypatch):
    sizes = []
    real = os.fsync

    def fsync(number):
        real(number)
        sizes.append(os.fstat(number).st_size)
        assert path.stat().st_size == old_size

    monkeypatch.setattr(os, "fsync", fsync)
    old_size = path.stat().st_size
    checkpoints.write_checkpoint(STATE | {"model": {"weight": torch.zeros(5000)}}, path)
    assert sizes == [path.stat().st_size]
    assert sizes != [old_size]
    path = path.with_name("log.jsonl")
    path.write_bytes(b"")
    old_size = 0
    checkpoints.write_log(STATE["log"], path)
    assert sizes[1] == path.stat().st_size > 0


def test_the_log_is_one_line_of_json_for_each_entry(tmp_path):
    log = [{"step": 0, "val_loss": 4.25}, {"step": 2, "val_loss": 1e-9}]
    checkpoints.write_log(log, tmp_path / "log.jsonl")
    text = (tmp_path / "log.jsonl").read_bytes()
    assert text == b'{"step": 0, "val_loss": 4.25}\n{"step": 2, "val_loss": 1e-09}\n'


def flip(content, part):
    """Change one bit in the middle of a part of the content."""
    i = content.index(part) + len(part) // 2
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


def other_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<document/>")
    return file.getvalue()


WEIGHT = STATE["model"]["weight"].numpy().tobytes()
DAMAGES = {
    "empty": lambda content: b"",
    "text": lambda content: b"Once upon a time",
    "first half": lambda content: content[: len(content) // 2],
    "last byte cut": lambda content: content[:-1],
    "flipped weight": lambda content: flip(content, WEIGHT),
    "flipped settings": lambda content: flip(content, b"n_embd"),
    "zeros": lambda content: bytes(len(content)),
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
    assert refused(path) == "not a checkpoint of this course (it lacks 'folder')"


@pytest.mark.parametrize("name", STATE)
def test_a_checkpoint_must_be_complete(path, name):
    incomplete = {other: value for other, value in STATE.items() if other != name}
    for state in (incomplete, STATE | {name: None}, STATE | {name: 2.5}):
        torch.save(state, path)
        assert refused(path) == f"not a checkpoint of this course (it lacks {name!r})"


def test_a_hostile_file_is_refused_and_does_nothing(path, tmp_path):
    torch.save(STATE | {"log": [Trap(tmp_path / "trap")]}, path)
    assert refused(path).startswith("holds more than weights and settings; not loaded")
    assert not (tmp_path / "trap").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "trap").exists(), "the trap works on a careless reader"


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
        torch.save(STATE | {"log": Trap(tmp_path / "trap")}, path)
    offer = "best.pt beside it is intact: copy it over latest.pt to use it"
    assert refused(path).endswith(f"; {offer}")
    best.write_bytes(b"")
    assert "best.pt" not in refused(path)
    assert "beside it" not in refused(best)
