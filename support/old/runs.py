"""What keeps a run safe: a folder that no other run uses, and Ctrl-C that lets it save."""

import hashlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.flags import InputError, Stopped
from support.old.checkpoints import is_intact, read_checkpoint, script_path
from support.processes import n_processes, process_rank

RUNS = Path("out")  # the folders of the runs are here, below the current folder

stop_event = threading.Event()  # set by the first Ctrl-C during a run


def describe_run(cfg: Any, file: str, tokenizer: Any, corpus: str, state: dict | None) -> dict:
    """Return what every checkpoint of a run says about it.

    cfg: the settings. file: the file of the script. corpus: the text, or checksums of its tokens.
    state: the checkpoint to continue from, or None for a new run. Raises InputError if the run
    can't start or continue.
    """
    corpus = hashlib.sha256(corpus.encode("utf-8")).hexdigest()
    if state is None:
        folder = new_folder(cfg.out_dir, Path(file).stem)
    else:
        folder = Path(state["folder"])
        check_resumable(cfg, state, corpus)
    return {
        "folder": str(folder), "script": Path(file).stem, "config": asdict(cfg),
        "tokenizer": tokenizer.name, "characters": "".join(tokenizer.characters), "corpus": corpus,
    }


def check_resumable(cfg: Any, state: dict, corpus: str) -> None:
    """Raise InputError if a run can't continue from state with these settings and this corpus."""
    best = Path(state["folder"], "best.pt")
    if state["log"] and not is_intact(best):
        raise InputError(f"{best}: missing or damaged; copy latest.pt over it to continue")
    if state["corpus"] != corpus:
        why = "not the text that this run was trained on; give that one"
        raise InputError(f"--data {cfg.data}: {why}")
    if cfg.max_iters < state["step"]:
        why = f"the run is at step {state['step']} already; leave the flag out, or give more"
        raise InputError(f"--max_iters {cfg.max_iters}: {why}")


def new_folder(out_dir: str, script: str) -> Path:
    """The folder for a new run: out_dir or, if that is empty, out/<date>_<time>_<script>.

    Raises InputError if it already holds a run.
    """
    if not out_dir:
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{script}"
        folder, n = RUNS / name, 1
        while folder.exists():  # a run that began in the same second
            n += 1
            folder = RUNS / f"{name}_{n}"
        return folder
    folder = Path(out_dir)
    try:
        is_used = (folder / "latest.pt").exists() or (folder / "best.pt").exists()
    except OSError as error:  # no permission, a name that is too long, ...
        why = f"can't use it ({error.strerror}); name another folder"
        raise InputError(f"--out_dir {folder}: {why}") from None
    if is_used:
        why = "already holds a run; continue it (--resume) or name another folder"
        raise InputError(f"--out_dir {folder}: {why}")
    return folder


def find_checkpoint(cfg: Any) -> dict:
    """Load latest.pt, or best.pt if only to sample, of the run in cfg.out_dir or of the newest.

    Raises InputError if there is none, or none that can be used.
    """
    if cfg.out_dir:
        folder = Path(cfg.out_dir)
        if not folder.is_dir():
            raise InputError(f"--out_dir {folder}: no such folder; name the folder of a run")
    else:
        runs = sorted(path for path in RUNS.glob("????-??-??_??-??-??_*") if path.is_dir())
        if not runs:
            why = f"no run in {RUNS.resolve()}; train first, or name a folder with --out_dir"
            raise InputError(why)
        folder = runs[-1]
    return read_checkpoint(folder / ("best.pt" if cfg.sample_only else "latest.pt"))


@contextmanager
def running(run: dict) -> Iterator[None]:
    """Make the folder of a run, keep other runs out of it, and note Ctrl-C for stop_requested.

    When stop_requested returns True, the training loop should save and raise KeyboardInterrupt. A
    second Ctrl-C ends the program at once. Raises InputError if another run is using the folder,
    or if it can't be made.
    """
    folder = Path(run["folder"])
    print(f"folder: {folder}", file=sys.stderr)
    lock = FileLock(folder / "lock")
    try:
        if process_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)  # the system lets go of it even if the program is killed
    except Timeout:
        why = "another run is using it; wait until it ends, or name another folder"
        raise InputError(f"--out_dir {folder}: {why}") from None
    except OSError as error:
        why = f"can't write there ({error.strerror}); name another folder"
        raise InputError(f"--out_dir {folder}: {why}") from None

    received = []

    def request_stop(number: int, _: Any) -> None:
        received.append(number)
        stop_event.set()
        if n_processes() == 1:  # torchrun repeats each signal, and ends what takes too long
            signal.signal(number, signal.SIG_DFL)
        print("stopping after this step", file=sys.stderr)

    previous_handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            previous_handlers[number] = signal.signal(number, request_stop)
    try:
        yield
        if received:  # too late for the run to notice
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        typed = Path(sys.argv[0])  # not so in a notebook, for example
        script = typed if typed.stem == run["script"] else script_path(run["script"])
        command = f'python "{script}" --resume --out_dir "{folder}"'
        print(f"stopped and saved; to continue: {command}", file=sys.stderr)
        raise Stopped(received[0] if received else signal.SIGINT) from None
    finally:
        stop_event.clear()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        lock.release()


def stop_requested() -> bool:
    """Whether, during the running block, Ctrl-C was pressed or the system sent SIGTERM."""
    return stop_event.is_set()
