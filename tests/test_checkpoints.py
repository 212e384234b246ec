"""data/checkpoints.py: files that are whole or not there, folders of runs, and Ctrl-C."""

import dataclasses
import hashlib
import io
import os
import signal
import threading
import zipfile
from pathlib import Path

import data
from data import checkpoints, flags

import pytest
import torch
from filelock import FileLock

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


@dataclasses.dataclass
class Config:
    """The settings of which describe_run makes use."""

    out_dir: str = ""
    data: str = "shakespeare"
    max_iters: int = 5
    sample_only: bool = False


class Trap:
    """Hostile contents of a file: a reader that isn't careful makes a folder at path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def path(tmp_path):
    """A good checkpoint."""
    data.write_checkpoint(STATE, tmp_path / "latest.pt")
    return tmp_path / "latest.pt"


def refused(path) -> str:
    """Let read_checkpoint refuse a file, which stays as it was; return the message."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(data.InputError) as error:
        data.read_checkpoint(path)
    assert (path.read_bytes() if path.is_file() else None) == before
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def run_in(folder):
    return {"folder": str(folder), "script": "v6d_checkpoints"}


# ---- writing and reading files


def test_a_checkpoint_comes_back_as_it_was_written(path):
    state = data.read_checkpoint(path)
    assert state["folder"] == str(path.parent), "the folder is where the file was found"
    assert state.pop("path") == str(path)
    for name in ("model", "optimizer", "random_state"):
        assert str(state.pop(name)) == str(STATE[name])
    assert state | {"folder": "out/run"} == {name: STATE[name] for name in state}


def test_a_write_that_fails_leaves_the_old_file_as_it_was(path):
    before = path.read_bytes()
    for error in (OSError(28, "No space left on device"), RuntimeError("unexpected pos 64")):

        def write(file, error=error):
            file.write(b"the first half")
            raise error

        with pytest.raises(data.InputError) as stop:
            checkpoints.replace_file(path, write)
        assert str(stop.value).startswith(f"--out_dir {path.parent}: can't save latest.pt (")
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_the_old_file_as_it_was(path):
    before = path.read_bytes()

    def write(file):
        file.write(b"the first half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.replace_file(path, write)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000])
def test_a_disk_that_fills_up_while_pytorch_writes(path, limit):
    resource = pytest.importorskip("resource")
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(data.InputError, match="can't save latest.pt"):
            data.write_checkpoint(STATE | {"step": 4}, path)
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
    data.write_checkpoint(STATE | {"model": {"weight": torch.zeros(5000)}}, path)
    assert sizes == [path.stat().st_size]
    assert sizes != [old_size]
    path = path.with_name("log.jsonl")
    path.write_bytes(b"")
    old_size = 0
    data.write_log(STATE["log"], path)
    assert sizes[1] == path.stat().st_size > 0


def test_the_log_is_one_line_of_json_for_each_entry(tmp_path):
    log = [{"step": 0, "val_loss": 4.25}, {"step": 2, "val_loss": 1e-9}]
    data.write_log(log, tmp_path / "log.jsonl")
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


# ---- the folders of runs


def describe(cfg, state=None, text="ab"):
    return data.describe_run(cfg, "x/v6d_checkpoints.py", data.CharTokenizer(text), text, state)


def test_what_a_run_says_about_itself(tmp_path):
    cfg = Config(out_dir=str(tmp_path / "run"))
    assert describe(cfg, text="ba") == {
        "folder": str(tmp_path / "run"),
        "script": "v6d_checkpoints",
        "config": dataclasses.asdict(cfg),
        "tokenizer": "char",
        "characters": "\nab",
        "corpus": hashlib.sha256(b"ba").hexdigest(),
    }
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_folder():
    state = describe(Config(out_dir="first")) | {"folder": "moved", "step": 3, "log": []}
    run = describe(Config(out_dir="other", max_iters=3), state)
    assert run["folder"] == "moved"
    assert run["config"]["max_iters"] == 3


def test_a_resumed_run_needs_its_best_weights(path):
    state = describe(Config()) | {"folder": str(path.parent), "step": 3, "log": STATE["log"]}
    with pytest.raises(data.InputError, match="best.pt: missing or damaged; copy latest.pt over"):
        describe(Config(), state)
    data.write_checkpoint(STATE, path.with_name("best.pt"))
    assert describe(Config(), state)["folder"] == str(path.parent)


def test_the_newest_run_is_the_one_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["2025-01-02_03-04-05_v6d", "2024-12-31_23-59-59_v7b", "notes", "z_9_x"]
    for name in names:
        Path("out", name).mkdir(parents=True)
        for file in ("latest.pt", "best.pt"):
            data.write_checkpoint(STATE | {"script": f"{name} {file}"}, Path("out", name, file))
    Path("out", "9999-01-02_03-04-05_file").write_text("", encoding="utf-8")
    for cfg, expected in [
        (Config(), f"{names[0]} latest.pt"),
        (Config(sample_only=True), f"{names[0]} best.pt"),
        (Config(out_dir="out/notes"), "notes latest.pt"),
        (Config(out_dir="out/notes", sample_only=True), "notes best.pt"),
    ]:
        assert checkpoints.find_checkpoint(cfg)["script"] == expected


# ---- Ctrl-C, and one run at a time


def test_the_folder_is_made_and_kept_for_one_run(tmp_path, capsys):
    folder = tmp_path / "out" / "run"
    with data.running(run_in(folder)):
        assert folder.is_dir()
        refusal = pytest.raises(data.InputError, match="another run is using it")
        with refusal, data.running(run_in(folder)):
            pass
        with data.running(run_in(tmp_path / "other")):
            pass
    with data.running(run_in(folder)):
        pass
    assert capsys.readouterr().err.startswith(f"folder: {folder}\n")


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path):
    for error in (KeyboardInterrupt, data.InputError, ZeroDivisionError):
        with pytest.raises(error), data.running(run_in(tmp_path)):
            raise error
        with FileLock(tmp_path / "lock", timeout=0):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_once_and_then_ends_the_program(tmp_path, capsys, number):
    def handler(*_):
        raise AssertionError("the signal belongs to the run")

    old = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stop, data.running(run_in(tmp_path)):
            assert not data.stop_requested()
            signal.raise_signal(number)
            assert data.stop_requested()
            assert signal.getsignal(number) == signal.SIG_DFL, "the next one ends the program"
            raise KeyboardInterrupt
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, old)
    assert not data.stop_requested()
    assert stop.type is (KeyboardInterrupt if number == signal.SIGINT else flags.Terminated)
    command = f'python v6d_checkpoints.py --resume --out_dir "{tmp_path}"'
    lines = ["stopping after this step", f"stopped and saved; to continue: {command}"]
    assert capsys.readouterr().err.splitlines() == [f"folder: {tmp_path}", *lines]


def test_the_handlers_are_those_from_before_the_run(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for error in (None, KeyboardInterrupt, data.InputError):
        try:
            with data.running(run_in(tmp_path)):
                assert all(signal.getsignal(number) not in before for number in numbers)
                if error is not None:
                    raise error
        except (KeyboardInterrupt, data.InputError):
            pass
        assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run():
        with data.running(run_in(tmp_path)):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
