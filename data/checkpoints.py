"""Files that survive a crash: the folder of a run, whole checkpoints or none, and Ctrl-C."""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import BadZipFile, ZipFile, is_zipfile

from data.flags import InputError

import torch
from filelock import FileLock, Timeout

RUNS = Path("out")  # where the folders of the runs are, below the current folder


def new_run(out_dir: str, script: str) -> Path:
    """Make the folder of a new run: out_dir or, if that is empty, out/<date>_<time>_<script>.

    Raises InputError if the folder can't be made or already holds a run.
    """
    folder = Path(out_dir) if out_dir else unused_name(time.strftime("%Y-%m-%d_%H-%M-%S"), script)
    if any((folder / name).exists() for name in ("latest.pt", "best.pt")):
        why = "already holds a run; go on with it (--resume), or name another folder"
        raise InputError(f"--out_dir {folder}: {why}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"can't make this folder ({error.strerror}); name another"
        raise InputError(f"--out_dir {folder}: {why}") from None
    return folder


def unused_name(now: str, script: str) -> Path:
    """The folder for a run that starts now; two runs of the same second get different ones."""
    folder, n = RUNS / f"{now}_{script}", 1
    while folder.exists():
        n += 1
        folder = RUNS / f"{now}_{script}_{n}"
    return folder


def find_run(out_dir: str) -> Path:
    """The folder of an earlier run: out_dir or, if that is empty, the newest in out/.

    Raises InputError if there is none.
    """
    if out_dir:
        if not Path(out_dir).is_dir():
            raise InputError(f"--out_dir {out_dir}: no such folder; name that of an earlier run")
        return Path(out_dir)
    runs = sorted(path for path in RUNS.glob("????-??-??_??-??-??_*") if path.is_dir())
    if not runs:
        raise InputError(f"no run in {RUNS.resolve()}; train first, or name a folder (--out_dir)")
    return runs[-1]


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of folder during the block, even if this one is killed in it.

    Raises InputError if another run is using the folder, or if it can't be written to.
    """
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        why = "another run is using it; wait until it ends, or name another folder"
        raise InputError(f"--out_dir {folder}: {why}") from None
    except OSError as error:
        why = f"can't write there ({error.strerror}); name another folder"
        raise InputError(f"--out_dir {folder}: {why}") from None
    try:
        yield
    finally:
        lock.release()


def write_checkpoint(state: dict, path: Path) -> None:
    """Replace the file at path by state; if that fails, the old file stays as it was.

    Raises InputError if it can't be written.
    """
    replace_file(path, lambda unfinished: torch.save(state, unfinished))


def write_text(text: str, path: Path) -> None:
    """Replace the text file at path; if that fails, the old file stays as it was.

    Raises InputError if it can't be written.
    """
    replace_file(path, lambda unfinished: unfinished.write(text.encode("utf-8")))


def replace_file(path: Path, write: Callable) -> None:
    """Let write fill a new file, and put it in the place of the one at path once it is complete."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the new name
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch reports some write errors as RuntimeError
        raise InputError(f"--out_dir {path.parent}: can't save {path.name} ({error})") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def read_checkpoint(path: Path, contents: dict[str, type]) -> dict:
    """Load a checkpoint onto the CPU, without running any code that may be in it.

    contents: what it must hold, with the type of each. Raises InputError, which says what is wrong
    and what helps, if the file isn't such a checkpoint.
    """
    best = path.with_name("best.pt")
    try:
        return load(path, contents)
    except InputError as error:
        if path == best or not is_intact(best, contents):
            raise
        message = f"{error}; {best.name} beside it is intact: copy it over {path.name} to use it"
        raise InputError(message) from None


def is_intact(path: Path, contents: dict[str, type]) -> bool:
    """Whether load can read the checkpoint at path."""
    try:
        load(path, contents)
    except InputError:
        return False
    return True


def load(path: Path, contents: dict[str, type]) -> dict:
    """Load a checkpoint; raises InputError, which says what is wrong with it."""
    try:
        if not is_zipfile(path.open("rb")):
            raise InputError(f"{path}: damaged, or not a checkpoint at all")
        with ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums, which torch.load doesn't
        if damaged is not None:
            raise InputError(f"{path}: damaged (the checksum of {damaged} is wrong)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        why = "no such file; either the run ended before it saved, or this isn't its folder"
        raise InputError(f"{path}: {why}") from None
    except OSError as error:  # no permission, a folder, ...
        raise InputError(f"{path}: can't read it ({error.strerror})") from None
    except pickle.UnpicklingError:
        why = "holds more than weights and settings; not loaded, because that could run code"
        raise InputError(f"{path}: {why}") from None
    except (RuntimeError, BadZipFile, EOFError, KeyError) as error:
        raise InputError(f"{path}: damaged, or not a checkpoint at all ({error})") from None
    for name, kind in contents.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            why = f"not a checkpoint of this course (it lacks {name!r})"
            raise InputError(f"{path}: {why}")
    return state


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and the signal SIGTERM wait until the block is complete."""
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield
        return
    waiting = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in waiting:
        signal.raise_signal(number)
