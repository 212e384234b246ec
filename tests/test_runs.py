"""support/runs.py: folders of runs, one run at a time, what they write, and Ctrl-C."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_flags
from filelock import FileLock
from test_checkpoints import STATE

import data
from data import flags, setting
from lab.ladder import ROOT
from part2_training import v6d_checkpoints as v6d
from support import checkpoints, runs


@dataclasses.dataclass
class Config:
    """The settings that a run makes use of."""

    device: str = setting("the device", "cpu")
    n_embd: int = setting("a size", 18)
    max_iters: int = setting("training steps", 5)
    data: str = setting("the text", "shakespeare")
    val_data: str = setting("the text of validation", "")
    out_dir: str = setting("folder of the run", "")
    resume: bool = setting("continue a run", False)
    sample_only: bool = setting("only sample", False)


def make_run(folder="", saved=None, text="ab", **changes):
    cfg = Config(out_dir=str(folder), **changes)
    tokenizer = data.CharTokenizer(text)
    return runs.Run(cfg, "x/v6d_checkpoints.py", tokenizer, text, saved or {})


def state_after(step):
    """A part of a checkpoint: what the training loop gives to a run."""
    return {"model": {"weight": torch.arange(3.0) + step}, "optimizer": {}, "step": step}


def saved_run(folder):
    """Save a run with one loss estimate; return its latest checkpoint."""
    run = make_run(folder)
    with run:
        run.save(state_after(3), 3.5, 4.0)
    return checkpoints.read_checkpoint(folder / "latest.pt")


# ---- settings, and the checkpoint to start from


def read_settings(*words):
    return runs.read_settings(Config, "", list(words), ["n_embd"])


def test_a_new_run_starts_from_nothing():
    cfg, saved = read_settings("--max_iters", "7")
    assert (cfg.max_iters, saved) == (7, {})


def test_the_settings_of_a_checkpoint_take_the_place_of_the_defaults(tmp_path):
    torch.save(STATE | {"config": {"n_embd": 24, "max_iters": 9}}, tmp_path / "latest.pt")
    words = ["--resume", "--out_dir", str(tmp_path)]
    cfg, saved = read_settings(*words)
    assert (cfg.n_embd, cfg.max_iters, saved["step"]) == (24, 9, 3)
    cfg, _ = read_settings(*words, "--max_iters", "11")
    assert (cfg.n_embd, cfg.max_iters) == (24, 11)
    with pytest.raises(data.InputError, match="--n_embd 18: the checkpoint has 24"):
        read_settings(*words, "--n_embd", "18")


def test_the_newest_run_is_the_one_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["2025-01-02_03-04-05_v6d", "2024-12-31_23-59-59_v7b", "notes", "z_9_x"]
    for name in names:
        Path("out", name).mkdir(parents=True)
        for file in ("latest.pt", "best.pt"):
            torch.save(STATE | {"script": f"{name} {file}"}, Path("out", name, file))
    Path("out", "9999-01-02_03-04-05_file").write_text("", encoding="utf-8")
    for words, expected in [
        (["--resume"], f"{names[0]} latest.pt"),
        (["--sample_only"], f"{names[0]} best.pt"),
        (["--resume", "--out_dir", "out/notes"], "notes latest.pt"),
        (["--sample_only", "--out_dir", "out/notes"], "notes best.pt"),
    ]:
        _, saved = read_settings(*words)
        assert saved["script"] == expected


# ---- the folders of runs


def test_a_new_run_makes_a_folder_when_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = make_run()
    assert not Path("out").exists()
    with run:
        assert run.folder.is_dir()
    assert capsys.readouterr().err == f"folder: {run.folder}\n"


def test_runs_that_begin_at_the_same_time_make_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "2025-01-02_03-04-05")
    found = []
    barrier = threading.Barrier(8)

    def begin():
        run = make_run()
        barrier.wait()
        with run:
            found.append(run.folder)
            barrier.wait()

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8


def test_the_folder_is_kept_for_one_run(tmp_path):
    folder = tmp_path / "out" / "run"
    with make_run(folder):
        refusal = pytest.raises(data.InputError, match="another run is using it")
        with refusal, make_run(folder):
            pass
        with make_run(tmp_path / "other"):
            pass
    with make_run(folder):
        pass


@pytest.mark.parametrize("name", ["latest.pt", "best.pt", "log.jsonl"])
def test_a_new_run_needs_a_folder_without_a_run(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(data.InputError, match="already holds a run"), make_run(tmp_path):
        pass
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_resumed_run_keeps_its_folder(tmp_path):
    saved_run(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    saved = checkpoints.read_checkpoint(tmp_path / "moved" / "latest.pt")
    run = make_run("other", saved)
    with run:
        assert run.folder == tmp_path / "moved"
    assert run.history == {3: (3.5, 4.0)}


def test_a_resumed_run_needs_its_best_weights(tmp_path):
    saved = saved_run(tmp_path)
    for damage in (lambda path: path.write_bytes(b"damaged"), Path.unlink):
        damage(tmp_path / "best.pt")
        with pytest.raises(data.InputError, match="best.pt: missing or damaged; copy latest.pt"):
            make_run(tmp_path, saved)


def test_a_resumed_run_needs_its_text_and_its_steps(tmp_path):
    saved = saved_run(tmp_path)
    with pytest.raises(data.InputError, match="--data shakespeare: not the text that this run"):
        make_run(tmp_path, saved, text="abab")
    with pytest.raises(data.InputError, match="--val_data b.txt: not the text that this run"):
        make_run(tmp_path, saved, text="abab", val_data="b.txt")
    with pytest.raises(data.InputError, match="--max_iters 2: the run is at step 3 already"):
        make_run(tmp_path, saved, max_iters=2)


def test_a_checkpoint_that_another_run_replaces_in_the_meantime_is_not_continued(tmp_path):
    """A run that is resumed reads latest.pt before it has the folder for itself."""
    saved = saved_run(tmp_path)
    late = make_run(tmp_path, saved)
    os.utime(tmp_path / "latest.pt", ns=(1, saved["modified"] + 1))
    with pytest.raises(data.InputError, match="another run has just replaced it; try again"), late:
        pass
    with FileLock(tmp_path / "lock", timeout=0):
        pass


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path):
    for error in (KeyboardInterrupt, data.InputError, ZeroDivisionError):
        with pytest.raises(error), make_run(tmp_path):
            raise error
        with FileLock(tmp_path / "lock", timeout=0):
            pass


# ---- what a run writes


def test_a_checkpoint_says_what_run_it_belongs_to(tmp_path):
    saved = saved_run(tmp_path)
    assert saved["script"] == "v6d_checkpoints"
    assert saved["config"] == dataclasses.asdict(Config(out_dir=str(tmp_path)))
    assert (saved["tokenizer"], saved["characters"]) == ("char", "\nab")
    assert saved["corpus"] == "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"
    assert saved["history"] == {3: (3.5, 4.0)}
    assert saved["model"]["weight"].tolist() == [3.0, 4.0, 5.0]


def test_the_best_and_the_latest_weights_are_kept(tmp_path):
    run = make_run(tmp_path)
    with run:
        for step, val_loss in enumerate([5.0, 2.0, 3.0, 2.0, 4.0]):
            run.save(state_after(step), 1.0, val_loss)
        run.save_latest(state_after(9))
    assert run.best()["step"] == 3
    latest = checkpoints.read_checkpoint(tmp_path / "latest.pt")
    assert latest["step"] == 9
    assert list(latest["history"]) == [0, 1, 2, 3, 4]


def test_an_estimate_that_is_made_again_takes_the_place_of_the_first(tmp_path):
    saved = saved_run(tmp_path)
    run = make_run(tmp_path, saved)
    with run:
        run.save(state_after(3), 3.5, 4.0)
    assert run.history == {3: (3.5, 4.0)}
    assert len((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_the_log_is_one_line_of_json_for_each_estimate(tmp_path):
    run = make_run(tmp_path)
    with run:
        run.save(state_after(0), 4.5, 4.25)
        run.save(state_after(2), 1.0, 1e-9)
    lines = (tmp_path / "log.jsonl").read_bytes().decode("utf-8").split("\n")
    assert lines[0] == '{"step": 0, "train_loss": 4.5, "val_loss": 4.25}'
    assert json.loads(lines[1]) == {"step": 2, "train_loss": 1.0, "val_loss": 1e-9}
    assert lines[2:] == [""]


@pytest.mark.parametrize("limit", [0, 100, 1000, 1500])
def test_a_disk_that_fills_up_leaves_all_files_as_they_were(tmp_path, limit):
    resource = pytest.importorskip("resource")
    saved = saved_run(tmp_path)
    run = make_run(tmp_path, saved)
    with run:
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            with pytest.raises(data.InputError, match="can't save best.pt"):
                run.save(state_after(4), 1.0, 1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    saved_run(tmp_path)
    synced = []
    real = os.fsync

    def fsync(number):
        real(number)
        synced.append(os.fstat(number).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    run = make_run(tmp_path, checkpoints.read_checkpoint(tmp_path / "latest.pt"))
    with run:
        run.save(state_after(4), 1.0, 1.0)
    names = ("best.pt", "latest.pt", "log.jsonl")
    assert synced == [(tmp_path / name).stat().st_size for name in names]


def test_a_run_without_a_folder_only_keeps_its_losses():
    run = runs.UnsavedRun()
    run.save(state_after(2), 1.0, 2.0)
    run.save_latest(state_after(3))
    assert run.is_new
    assert not run.stop_requested()
    assert run.history == {2: (1.0, 2.0)}


# ---- Ctrl-C and other signals

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_once_and_then_ends_the_program(tmp_path, capsys, number):
    def handler(*_):
        raise AssertionError("the signal belongs to the run")

    run = make_run(tmp_path)
    old = signal.signal(number, handler)
    try:
        with pytest.raises(flags.Stopped) as stop, run:
            assert not run.stop_requested()
            signal.raise_signal(number)
            assert run.stop_requested()
            assert signal.getsignal(number) == signal.SIG_DFL, "the next one ends the program"
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, old)
    assert stop.value.number == number
    command = f'python "part2_training/v6d_checkpoints.py" --resume --out_dir "{tmp_path}"'
    lines = [
        "stopping after this step or loss estimate",
        f"stopped and saved; to continue: {command}",
    ]
    assert capsys.readouterr().err.splitlines() == [f"folder: {tmp_path}", *lines]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_the_program_ignores_stays_ignored(tmp_path, number):
    """As SIGHUP under nohup, and SIGINT in the background of a shell."""
    run = make_run(tmp_path)
    old = signal.signal(number, signal.SIG_IGN)
    try:
        with run:
            signal.raise_signal(number)
            assert not run.stop_requested()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, old)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has the real one")
def test_ctrl_break_on_windows_stops_a_run_too(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with pytest.raises(flags.Stopped) as stop, make_run(tmp_path):
            signal.raise_signal(signal.SIGBREAK)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert stop.value.number == signal.SIGUSR1


STOPPED_WITHOUT_READERS = """
import os, signal, sys
from part2_training import v6d_checkpoints as v6d
real = v6d.train_step

def train_step(model, optimizer, tokens, step, cfg):
    real(model, optimizer, tokens, step, cfg)
    if step == 5:
        print("ready", flush=True)
        os.read(0, 1)  # until the test has closed its end of the pipes
        os.kill(os.getpid(), signal.SIGINT)

v6d.train_step = train_step
v6d.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a program there")
def test_a_run_that_nobody_reads_any_more_still_saves(tmp_path, corpus):
    """As in `... 2>&1 | tee log`, where Ctrl-C ends tee, too, and when the terminal is closed."""
    words = tiny_flags(v6d, out_dir=tmp_path / "run", max_iters=10**6, eval_interval=10**6)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED_WITHOUT_READERS, *words, "--data", str(corpus)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    while b"ready" not in process.stdout.readline():
        pass
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 130
    assert checkpoints.read_checkpoint(tmp_path / "run" / "latest.pt")["step"] == 6


def test_an_error_matters_more_than_a_signal(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(data.InputError, match="no space"), run:
        run.signals.append(signal.SIGINT)
        raise data.InputError("no space")


def test_the_command_to_continue_is_the_one_that_was_typed(tmp_path, capsys, monkeypatch):
    """A copy of a script, perhaps in another copy of the course, continues itself."""
    monkeypatch.setattr(sys, "argv", ["copies/v6d_checkpoints.py", "--device", "cpu"])
    run = make_run(tmp_path)
    with pytest.raises(flags.Stopped), run:
        run.signals.append(signal.SIGINT)
    script = Path("copies", "v6d_checkpoints.py")
    assert f'to continue: python "{script}" --resume --out_dir ' in capsys.readouterr().err


def test_the_handlers_are_those_from_before_the_run(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    for error in (None, KeyboardInterrupt, data.InputError):
        try:
            with make_run(tmp_path):
                assert all(signal.getsignal(number) not in before for number in SIGNALS)
                if error is not None:
                    raise error
        except (KeyboardInterrupt, data.InputError):
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def use():
        with make_run(tmp_path):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [before]


def test_only_the_script_that_is_made_for_torchrun_works_with_it():
    """The second process leaves the message to the first, which torchrun would end otherwise."""
    program = "import bigram, time; time.sleep = print; bigram.main([])"
    for rank, shown in {"0": "", "1": "20\n"}.items():
        environment = os.environ | {"TORCHELASTIC_RUN_ID": "1", "RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (2, shown)
        assert done.stderr.startswith("error: torchrun: only v8e_distributed.py can share its work")


# ---- file systems without locks, and large checkpoints


def test_without_locks_a_run_goes_on_with_a_notice(tmp_path, monkeypatch, capsys):
    def fail(lock, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.FileLock, "acquire", fail)
    run = make_run(tmp_path)
    with run:
        run.save(state_after(3), 3.5, 4.0)
    assert "notice: this file system has no locks, so nothing keeps" in capsys.readouterr().err
    assert checkpoints.read_checkpoint(tmp_path / "latest.pt")["step"] == 3


def test_a_lock_that_may_not_be_made_is_an_error(tmp_path, monkeypatch):
    def fail(lock, timeout):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(runs.FileLock, "acquire", fail)
    with pytest.raises(data.InputError, match="can't write there"), make_run(tmp_path):
        pass


def test_a_large_checkpoint_is_announced_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "LARGE", 1000)
    run = make_run(tmp_path)
    with run:
        for step in range(3):
            run.save(state_after(step), 3.5, 4.0 - step)
    notices = [line for line in capsys.readouterr().err.splitlines() if "notice" in line]
    assert notices == [
        f"notice: {tmp_path / name} takes 0.0 GB of the disk" for name in ("best.pt", "latest.pt")
    ]
    monkeypatch.setattr(runs, "LARGE", 10**9)
    with make_run(tmp_path / "other") as _:
        pass
    assert "notice" not in capsys.readouterr().err


def test_the_writer_of_a_checkpoint_without_a_setting_is_named(tmp_path, monkeypatch):
    saved_run(tmp_path)
    monkeypatch.chdir(ROOT)
    for mode in ("--resume", "--sample_only"):
        with pytest.raises(data.InputError) as stop:
            runs.read_settings(Config, "", [mode, "--out_dir", str(tmp_path)], ["n_kv_head"])
        name = "latest.pt" if mode == "--resume" else "best.pt"
        writer = Path("part2_training", "v6d_checkpoints.py")
        why = f"written by {writer}, whose model has no n_kv_head; use that script"
        assert str(stop.value) == f"{tmp_path / name}: {why}"


@dataclasses.dataclass
class ParallelConfig(Config):
    """The settings of a script with more of them."""

    grad_accum_steps: int = setting("parts of a batch", 1)
    minutes: float = setting("time for training", 0.0)
    vocab_size: int = setting("size of the vocabulary", 0)
    tokenizer: str = setting("how text becomes tokens", "char")


@pytest.mark.parametrize(("name", "value"), [("grad_accum_steps", 2), ("minutes", 1.5)])
def test_a_script_without_a_setting_does_not_drop_it(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(ROOT)
    for folder, changes in ((tmp_path / "with", {name: value}), (tmp_path / "without", {})):
        cfg = ParallelConfig(out_dir=str(folder), **changes)
        run = runs.Run(cfg, "x/v6d_checkpoints.py", data.CharTokenizer("ab"), "ab", {})
        with run:
            run.save(state_after(3), 3.5, 4.0)
    assert read_settings("--resume", "--out_dir", str(tmp_path / "without"))[1]["step"] == 3
    assert read_settings("--sample_only", "--out_dir", str(tmp_path / "with"))[1]["step"] == 3
    with pytest.raises(data.InputError) as stop:
        read_settings("--resume", "--out_dir", str(tmp_path / "with"))
    writer = Path("part2_training", "v6d_checkpoints.py")
    why = f"with --{name} {value}, which this script doesn't have; use that one"
    assert str(stop.value).endswith(f"latest.pt: written by {writer} {why}")


@pytest.mark.parametrize("flag", ["--resume", "--sample_only"])
@pytest.mark.parametrize(("name", "value"), [("vocab_size", 1024), ("tokenizer", "gpt2")])
def test_a_script_without_other_tokens_names_the_one_that_has_them(tmp_path, flag, name, value):
    for folder, changes in ((tmp_path / "with", {name: value}), (tmp_path / "without", {})):
        cfg = ParallelConfig(out_dir=str(folder), **changes)
        run = runs.Run(cfg, "x/v8a_byte_pairs.py", data.CharTokenizer("ab"), "ab", {})
        with run:
            run.save(state_after(3), 3.5, 4.0)
    assert read_settings(flag, "--out_dir", str(tmp_path / "without"))[1]["step"] == 3
    with pytest.raises(data.InputError) as stop:
        read_settings(flag, "--out_dir", str(tmp_path / "with"))
    why = f"with --{name} {value}, which this script doesn't have; use that one"
    assert "v8a_byte_pairs.py" in str(stop.value)
    assert str(stop.value).endswith(why)


def test_the_best_weights_are_kept_without_averages(tmp_path):
    run = make_run(tmp_path)
    with run:
        run.save({**state_after(3), "optimizer": {0: {"step": torch.tensor(3.0)}}}, 3.5, 4.0)
    assert checkpoints.read_checkpoint(tmp_path / "best.pt")["optimizer"] == {}
    assert len(checkpoints.read_checkpoint(tmp_path / "latest.pt")["optimizer"]) == 1
