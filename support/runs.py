"""A training run: a folder that no other run uses, its files, and Ctrl-C that lets it save."""

import errno
import hashlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from data.files import replace_file
from data.flags import InputError, Stopped, read_flags
from support.checkpoints import is_intact, read_checkpoint, script_path
from support.processes import largest_of_all, n_processes, process_rank

RUNS = Path("out")  # the folders of the runs are here, below the current folder
NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]  # as on some network drives
# Settings that only some scripts have, and the values with which they change nothing.
OF_TRAINING = {"grad_accum_steps": 1, "minutes": 0.0}
OF_TOKENS = {"vocab_size": 0, "tokenizer": "char"}
LARGE = 10**9  # bytes of a checkpoint that is announced


def find_checkpoint(out_dir: str, name: str) -> dict:
    """Load a checkpoint, latest.pt or best.pt, of the run in out_dir or, if that is "", the newest.

    Raises InputError if there is none, or none that can be used.
    """
    if out_dir:
        folder = Path(out_dir)
        if not folder.is_dir():
            raise InputError(f"--out_dir {folder}: no such folder; name the folder of a run")
    else:
        runs = sorted(path for path in RUNS.glob("????-??-??_??-??-??_*") if path.is_dir())
        if not runs:
            why = f"no run in {RUNS.resolve()}; train first, or name a folder with --out_dir"
            raise InputError(why)
        folder = runs[-1]
    return read_checkpoint(folder / name)


def read_settings(
    config_class: type, lesson: str, argv: list[str] | None, fixed: list[str]
) -> tuple[Any, dict]:
    """Return the settings, and the checkpoint that a run starts from; empty for a new run.

    With --resume and --sample_only, the settings of the checkpoint take the place of the defaults,
    and a flag must not change those in fixed.
    """
    cfg = read_flags(config_class, lesson, argv)
    if not cfg.resume and not cfg.sample_only:
        return cfg, {}
    saved = find_checkpoint(cfg.out_dir, "best.pt" if cfg.sample_only else "latest.pt")
    config = dict(saved["config"])
    for name in fixed:
        if name not in config:
            writer = script_path(saved["script"])
            why = f"written by {writer}, whose model has no {name}; use that script"
            raise InputError(f"{saved['path']}: {why}")
    needed = {**OF_TRAINING, **OF_TOKENS} if cfg.resume else OF_TOKENS
    for name, value in needed.items():
        if not hasattr(cfg, name) and config.get(name, value) != value:
            flag, writer = f"--{name} {config[name]}", script_path(saved["script"])
            why = f"written by {writer} with {flag}, which this script doesn't have; use that one"
            raise InputError(f"{saved['path']}: {why}")
    if cfg.sample_only:
        config.pop("dtype", None)  # that of training, which this machine may not have
        config.pop("export", None)  # the run has done that
    return read_flags(config_class, lesson, argv, config, fixed), saved


def discard_output() -> None:
    """Let nothing that is still printed stop the program: nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # a notebook's have no file number
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class UnsavedRun:
    """A run without a folder: it is always new, writes nothing, and nothing stops it."""

    is_new = True

    def __init__(self) -> None:
        self.history = {}

    def save(self, state: dict, train_loss: float, val_loss: float) -> None:
        """Keep the losses, in nats, of a loss estimate."""
        self.history[state["step"]] = (train_loss, val_loss)

    def save_latest(self, state: dict) -> None:
        """Do nothing."""

    def stop_requested(self) -> bool:
        """No."""
        return False


class Run:
    """A run with a folder. In a with statement, it has that for itself, and notices Ctrl-C.

    Then stop_requested is True, and the training loop should save and end; after that, the with
    statement says how to continue the run, and ends the program. A second Ctrl-C ends it at once.

    If torchrun has started several processes, the first has the folder, and writes for all.
    """

    def __init__(self, cfg: Any, file: str, tokenizer: Any, corpus: str, saved: dict) -> None:
        """cfg: the settings. file: that of the script. corpus: the text.

        saved: the checkpoint to continue from; empty for a new run. Raises InputError if the run
        can't continue from there.
        """
        self.out_dir = cfg.out_dir
        self.saved = saved
        self.is_new = not saved
        self.history = saved.get("history", {})  # step: (train loss, validation loss), in nats
        self.about = {  # what each of its checkpoints says about the run
            "script": Path(file).stem, "config": asdict(cfg), "tokenizer": tokenizer.name,
            "characters": "".join(getattr(tokenizer, "characters", "")),
            "corpus": hashlib.sha256(corpus.encode("utf-8")).hexdigest(),
        }
        if hasattr(tokenizer, "content"):
            self.about["tokenizer_content"] = tokenizer.content
        self.signals = []  # the numbers of those that asked the run to stop
        if saved:
            self.check_resumable(cfg)

    def check_resumable(self, cfg: Any) -> None:
        """Raise InputError if the run can't continue with these settings and this text."""
        best = Path(self.saved["path"]).with_name("best.pt")
        if not is_intact(best):
            raise InputError(f"{best}: missing or damaged; copy latest.pt over it to continue")
        if self.saved["corpus"] != self.about["corpus"]:
            why = "not the text that this run was trained on; give that one"
            name = "data"
            if getattr(cfg, "val_data", "") != self.saved["config"].get("val_data", ""):
                name = "val_data"
            if getattr(cfg, "conversations", ""):
                name = "conversations"
            raise InputError(f"--{name} {getattr(cfg, name)}: {why}")
        step = self.saved["step"]
        if getattr(cfg, "max_iters", step) < step:
            why = f"the run is at step {step} already; leave the flag out, or give more"
            raise InputError(f"--max_iters {cfg.max_iters}: {why}")

    def __enter__(self) -> None:
        """Raises InputError if the folder can't be made, or if another run is using it."""
        if process_rank() == 0:
            self.take_folder()
        self.handle_signals()

    def take_folder(self) -> None:
        """Make or find the folder, and lock it; raises InputError as __enter__."""
        try:
            self.folder = self.open_folder()
            print(f"folder: {self.folder}", file=sys.stderr)
            self.lock = FileLock(self.folder / "lock")
            self.take_lock()
            self.check_unchanged()
        except Timeout:
            why = "another run is using it; wait until it ends, or name another folder"
            raise InputError(f"--out_dir {self.folder}: {why}") from None
        except OSError as error:
            why = f"can't write there ({error.strerror}); name another folder"
            raise InputError(f"--out_dir {self.out_dir or RUNS}: {why}") from None

    def take_lock(self) -> None:
        """Lock the folder; raises Timeout if it is locked. Without locks, print a notice."""
        try:
            self.lock.acquire(timeout=0)  # the system lets go of it even if the program is killed
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            why = "this file system has no locks, so nothing keeps a second run out of the folder"
            print(f"notice: {why}", file=sys.stderr)

    def check_unchanged(self) -> None:
        """Raise InputError if the checkpoint has been replaced before the run had its folder."""
        if self.is_new or Path(self.saved["path"]).stat().st_mtime_ns == self.saved["modified"]:
            return
        self.lock.release()
        raise InputError(f"{self.saved['path']}: another run has just replaced it; try again")

    def open_folder(self) -> Path:
        """Make the folder of a new run; return that of an old one."""
        if not self.is_new:
            return Path(self.saved["path"]).parent
        if self.out_dir:
            folder = Path(self.out_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if any((folder / name).exists() for name in ("latest.pt", "best.pt", "log.jsonl")):
                why = "already holds a run; continue it (--resume) or name another folder"
                raise InputError(f"--out_dir {folder}: {why}")
            return folder
        RUNS.mkdir(exist_ok=True)
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{self.about['script']}"
        folder, n = RUNS / name, 1
        while True:
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # a run that began in the same second
                n += 1
                folder = RUNS / f"{name}_{n}"

    def handle_signals(self) -> None:
        """Note Ctrl-C, and the signals that stop programs on clusters and in closed terminals."""
        self.previous_handlers = {}
        if threading.current_thread() is not threading.main_thread():
            return  # no other may handle signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)  # only Windows has SIGBREAK, but no SIGHUP
            # nohup has its programs ignore SIGHUP, and a shell those in the background SIGINT.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.previous_handlers[number] = signal.signal(number, self.note_signal)

    def note_signal(self, number: int, _: Any) -> None:
        """Handle a signal: ask the training loop to stop. The same one again ends the program."""
        self.signals.append(number)
        if n_processes() == 1:  # torchrun repeats each signal, and ends what takes too long
            signal.signal(number, signal.SIG_DFL)
        try:
            print("stopping after this step or loss estimate", file=sys.stderr, flush=True)
        except OSError:  # the terminal is closed, or Ctrl-C has also ended the reader of a pipe
            discard_output()

    def __exit__(self, error: type | None, *_: Any) -> None:
        """Raises Stopped if a signal came, even if it was too late for the training loop."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if process_rank() == 0:
            self.lock.release()
            if error is not None:
                self.remove_unused_folder()
        if error is None and self.stop_requested():
            if process_rank() == 0:
                self.say_how_to_continue()
            raise Stopped(self.signals[0])

    def remove_unused_folder(self) -> None:
        """Remove the folder that a mistake has ended the run in, before it saved anything."""
        files = [path.name for path in self.folder.iterdir()]
        if self.is_new and not self.out_dir and files in ([], ["lock"]):
            with suppress(OSError):
                (self.folder / "lock").unlink(missing_ok=True)
                self.folder.rmdir()

    def say_how_to_continue(self) -> None:
        """Print the command that resumes the run."""
        typed = Path(sys.argv[0])  # not so in a notebook, for example
        name = self.about["script"]
        script = typed if typed.stem == name else script_path(name)
        command = f'python "{script}" --resume --out_dir "{self.folder}"'
        print(f"stopped and saved; to continue: {command}", file=sys.stderr)

    def stop_requested(self) -> bool:
        """Whether Ctrl-C was pressed, or the system wants the program, or one of many, to end."""
        number = largest_of_all(self.signals[0] if self.signals else 0)
        if number > 0 and not self.signals:  # another process was asked, so all stop together
            self.signals.append(number)
        return number > 0

    def save(self, state: dict, train_loss: float, val_loss: float) -> None:
        """Save a checkpoint after a loss estimate: best.pt if it is the best, latest.pt, log.jsonl.

        If the program is killed between two of them, the resumed run makes the estimate again, and
        writes all three. Raises InputError if one can't be written; then the old file stays.
        """
        self.history[state["step"]] = (train_loss, val_loss)
        if val_loss == min(val_loss for _, val_loss in self.history.values()):
            # Only to sample from, so without the optimizer's averages, which are twice as large.
            self.write("best.pt", {**state, "optimizer": {}})
        self.write("latest.pt", state)
        self.write_log()

    def save_latest(self, state: dict) -> None:
        """Save a checkpoint between two loss estimates, as latest.pt; raises InputError as save."""
        self.write("latest.pt", state)

    def write(self, name: str, state: dict) -> None:
        """Replace the file called name by a checkpoint."""
        if process_rank() > 0:
            return
        whole = {**self.about, "history": self.history, **state}
        path = self.folder / name
        is_first = not path.exists()
        replace_file(path, lambda file: torch.save(whole, file), "--out_dir")
        if is_first and path.stat().st_size > LARGE:
            gigabytes = path.stat().st_size / 10**9
            print(f"notice: {path} takes {gigabytes:.1f} GB of the disk", file=sys.stderr)

    def write_log(self) -> None:
        """Replace log.jsonl by one line of JSON for each loss estimate."""
        if process_rank() > 0:
            return
        lines = ""
        for step, (train_loss, val_loss) in self.history.items():
            entry = {"step": step, "train_loss": train_loss, "val_loss": val_loss}
            lines += json.dumps(entry) + "\n"
        path = self.folder / "log.jsonl"
        replace_file(path, lambda file: file.write(lines.encode("utf-8")), "--out_dir")

    def best(self) -> dict:
        """Load the checkpoint with the lowest validation loss."""
        return read_checkpoint(self.folder / "best.pt")

    def best_loss(self) -> float:
        """The lowest validation loss so far, in nats."""
        return min(val_loss for _, val_loss in self.history.values())
