"""What keeps a run safe: its folder, checkpoints that are whole or not there, and Ctrl-C."""

import hashlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from data.flags import InputError, Terminated
from data.processes import n_processes, process_rank

import torch
from filelock import FileLock, Timeout

RUNS = Path("out")  # the folders of the runs are here, below the current folder

# What a checkpoint holds, by name and type.
CONTENTS = {
    "folder": str, "script": str, "config": dict, "tokenizer": str, "characters": str,
    "corpus": str, "model": dict, "optimizer": dict, "step": int, "random_state": torch.Tensor,
    "log": list,
}

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
        command = f'python {run["script"]}.py --resume --out_dir "{folder}"'
        print(f"stopped and saved; to continue: {command}", file=sys.stderr)
        if received[:1] == [signal.SIGTERM]:
            raise Terminated from None
        raise
    finally:
        stop_event.clear()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        lock.release()


def stop_requested() -> bool:
    """Whether, during the running block, Ctrl-C was pressed or the system sent SIGTERM."""
    return stop_event.is_set()


def write_checkpoint(state: dict, path: Path) -> None:
    """Replace the file at path by state; if that fails, the old file stays as it was.

    Raises InputError if it can't be written.
    """
    replace_file(path, lambda unfinished: torch.save(state, unfinished))


def write_log(log: list[dict], path: Path) -> None:
    """Replace the file at path by one line of JSON for each entry of the log."""
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    replace_file(path, lambda unfinished: unfinished.write(lines.encode("utf-8")))


def replace_file(
    path: Path, write: Callable, flag: str = "--out_dir", ending: str = "unfinished"
) -> None:
    """Call write on a temporary file and, once it is complete, rename that to path.

    Raises InputError, naming flag, if it can't be written; then the old file stays as it was.
    ending: that of the temporary file, if other programs may be writing the same file.
    """
    unfinished = path.with_name(f"{path.name}.{ending}")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the new name
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch reports some write errors as RuntimeError
        why = f"can't save {path.name} ({error}); the files that were there are intact"
        raise InputError(f"{flag} {path.parent}: {why}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict:
    """Load a checkpoint onto the CPU, without running any code that may be in it.

    Its "folder" is where it was found. Raises InputError, which says what is wrong and what helps,
    if it can't be used.
    """
    try:
        state = load(path)
    except InputError as error:
        best = path.with_name("best.pt")
        if path == best or not is_intact(best):
            raise
        why = f"{error}; {best.name} beside it is intact: copy it over {path.name} to use it"
        raise InputError(why) from None
    state["path"] = str(path)
    state["folder"] = str(path.parent)
    return state


def is_intact(path: Path) -> bool:
    """Whether there is a checkpoint at path that load can read."""
    try:
        load(path)
    except InputError:
        return False
    return True


def load(path: Path) -> dict:
    """Load a checkpoint; raises InputError, which says what is wrong with it."""
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums, which torch.load doesn't
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        why = "no such file; either the run ended before it saved, or this isn't its folder"
        raise InputError(f"{path}: {why}") from None
    except OSError as error:  # no permission, a folder, ...
        raise InputError(f"{path}: can't read it ({error.strerror})") from None
    except pickle.UnpicklingError:
        why = "holds more than weights and settings; not loaded, because that could run code"
        raise InputError(f"{path}: {why}") from None
    except Exception as error:  # which class it has depends on the damage
        raise InputError(f"{path}: damaged, or not a checkpoint at all ({error})") from None
    for name, kind in CONTENTS.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            why = f"not a checkpoint of this course (it lacks {name!r})"
            raise InputError(f"{path}: {why}")
    try:
        check_contents(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error})") from None
    return state


def check_contents(state: dict) -> None:
    """Raise RuntimeError, TypeError or ValueError if a part of a checkpoint is impossible."""
    torch.Generator().set_state(state["random_state"])
    if state["step"] < 0:
        raise ValueError(f"its step is {state['step']}")
    for entry in state["log"]:
        if not isinstance(entry, dict):
            raise TypeError(f"its log has {entry!r}")
        types = {"step": int, "train_loss": float, "val_loss": float, "tokens_per_second": float}
        for name, kind in types.items():
            if type(entry.get(name)) is not kind:
                raise ValueError(f"its log has {entry}")


def load_weights(model: torch.nn.Module, state: dict) -> None:
    """Copy the weights of a checkpoint into a model; raises InputError if they don't fit."""
    script = Path(sys.modules[type(model).__module__].__file__).stem
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError):
        why = "damaged: its weights don't fit its settings"
        if state["script"] != script:
            why = f"written by {state['script']}.py, whose model has other weights; use that script"
        raise InputError(f"{state['path']}: {why}") from None


def load_averages(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Copy the averages of a checkpoint into a new optimizer; InputError if they don't fit.

    The learning rate and the weight decay stay those of the optimizer, because a flag may have
    changed them.
    """
    groups = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if state["step"] > 0:
                    check_averages(optimizer.state[parameter], parameter)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = f"damaged: the optimizer's averages don't fit ({error})"
        why = f"{why}, or written by a script with another optimizer; use {state['script']}.py"
        raise InputError(f"{state['path']}: {why}") from None


def check_averages(averages: dict, parameter: torch.Tensor) -> None:
    """Raise ValueError if an optimizer's averages don't have the shape of their parameter."""
    if "average" in averages:  # that of Muon
        shapes = {"average": parameter.shape}
    else:  # those of AdamW
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    for name, shape in shapes.items():
        if averages[name].shape != shape or averages[name].is_sparse:
            raise ValueError(f"{name} has shape {tuple(averages[name].shape)}")
