"""support/runs.py: folders of runs, one run at a time, and Ctrl-C."""

import dataclasses
import hashlib
import signal
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from test_checkpoints import STATE

import data
from data import flags
from support import checkpoints, runs


@dataclasses.dataclass
class Config:
    """The settings of which describe_run makes use."""

    out_dir: str = ""
    data: str = "shakespeare"
    max_iters: int = 5
    sample_only: bool = False


def run_in(folder):
    return {"folder": str(folder), "script": "v6d_checkpoints"}


# ---- the folders of runs


def describe(cfg, state=None, text="ab"):
    return runs.describe_run(cfg, "x/v6d_checkpoints.py", data.CharTokenizer(text), text, state)


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


def test_a_resumed_run_needs_its_best_weights(tmp_path):
    state = describe(Config()) | {"folder": str(tmp_path), "step": 3, "log": STATE["log"]}
    with pytest.raises(data.InputError, match="best.pt: missing or damaged; copy latest.pt over"):
        describe(Config(), state)
    checkpoints.write_checkpoint(STATE, tmp_path / "best.pt")
    assert describe(Config(), state)["folder"] == str(tmp_path)


def test_the_newest_run_is_the_one_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["2025-01-02_03-04-05_v6d", "2024-12-31_23-59-59_v7b", "notes", "z_9_x"]
    for name in names:
        Path("out", name).mkdir(parents=True)
        for file in ("latest.pt", "best.pt"):
            state = STATE | {"script": f"{name} {file}"}
            checkpoints.write_checkpoint(state, Path("out", name, file))
    Path("out", "9999-01-02_03-04-05_file").write_text("", encoding="utf-8")
    for cfg, expected in [
        (Config(), f"{names[0]} latest.pt"),
        (Config(sample_only=True), f"{names[0]} best.pt"),
        (Config(out_dir="out/notes"), "notes latest.pt"),
        (Config(out_dir="out/notes", sample_only=True), "notes best.pt"),
    ]:
        assert runs.find_checkpoint(cfg)["script"] == expected


# ---- Ctrl-C, and one run at a time


def test_the_folder_is_made_and_kept_for_one_run(tmp_path, capsys):
    folder = tmp_path / "out" / "run"
    with runs.running(run_in(folder)):
        assert folder.is_dir()
        refusal = pytest.raises(data.InputError, match="another run is using it")
        with refusal, runs.running(run_in(folder)):
            pass
        with runs.running(run_in(tmp_path / "other")):
            pass
    with runs.running(run_in(folder)):
        pass
    assert capsys.readouterr().err.startswith(f"folder: {folder}\n")


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path):
    for error in (KeyboardInterrupt, data.InputError, ZeroDivisionError):
        with pytest.raises(error), runs.running(run_in(tmp_path)):
            raise error
        with FileLock(tmp_path / "lock", timeout=0):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_once_and_then_ends_the_program(tmp_path, capsys, number):
    def handler(*_):
        raise AssertionError("the signal belongs to the run")

    old = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stop, runs.running(run_in(tmp_path)):
            assert not runs.stop_requested()
            signal.raise_signal(number)
            assert runs.stop_requested()
            assert signal.getsignal(number) == signal.SIG_DFL, "the next one ends the program"
            raise KeyboardInterrupt
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, old)
    assert not runs.stop_requested()
    assert stop.type is (KeyboardInterrupt if number == signal.SIGINT else flags.Terminated)
    command = f'python "part2_training/v6d_checkpoints.py" --resume --out_dir "{tmp_path}"'
    lines = ["stopping after this step", f"stopped and saved; to continue: {command}"]
    assert capsys.readouterr().err.splitlines() == [f"folder: {tmp_path}", *lines]


def test_the_command_to_continue_is_the_one_that_was_typed(tmp_path, capsys, monkeypatch):
    """A copy of a script, perhaps in another copy of the course, continues itself."""
    monkeypatch.setattr(sys, "argv", ["copies/v6d_checkpoints.py", "--device", "cpu"])
    with pytest.raises(KeyboardInterrupt), runs.running(run_in(tmp_path)):
        raise KeyboardInterrupt
    script = Path("copies", "v6d_checkpoints.py")
    assert f'to continue: python "{script}" --resume --out_dir ' in capsys.readouterr().err


def test_the_handlers_are_those_from_before_the_run(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for error in (None, KeyboardInterrupt, data.InputError):
        try:
            with runs.running(run_in(tmp_path)):
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
        with runs.running(run_in(tmp_path)):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
