"""Checkpoints: files that are whole or not there, and that can't run code when they are read."""

import json
import pickle
import sys
from pathlib import Path
from zipfile import ZipFile

import torch

from data.files import replace_file
from data.flags import InputError

COURSE = Path(__file__).parent.parent.parent
# What a checkpoint holds, by name and type.
CONTENTS = {
    "folder": str, "script": str, "config": dict, "tokenizer": str, "characters": str,
    "corpus": str, "model": dict, "optimizer": dict, "step": int, "random_state": torch.Tensor,
    "log": list,
}


def write_checkpoint(state: dict, path: Path) -> None:
    """Replace the file at path by state; if that fails, the old file stays as it was.

    Raises InputError if it can't be written.
    """
    replace_file(path, lambda unfinished: torch.save(state, unfinished), "--out_dir")


def write_log(log: list[dict], path: Path) -> None:
    """Replace the file at path by one line of JSON for each entry of the log."""
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    replace_file(path, lambda unfinished: unfinished.write(lines.encode("utf-8")), "--out_dir")


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
    if isinstance(state, dict) and "history" in state:
        writer = script_path(str(state.get("script")))
        raise InputError(f"{path}: written by {writer} in another format; use that script")
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


def from_here(path: Path) -> Path:
    """A path as it may be typed in the current folder: short, if it is below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def script_path(script: str) -> Path:
    """The path of a script of the course, as it may be typed; for another script, its name."""
    for path in [*COURSE.glob("*.py"), *COURSE.glob("part*/*.py")]:
        if path.stem == script:
            return from_here(path)
    return Path(f"{script}.py")


def writer_of(state: dict) -> str:
    """The script that wrote a checkpoint, in words."""
    path = script_path(state["script"])
    if path.exists():
        return str(path)
    return f"{path} (its new name is in {from_here(COURSE / 'docs' / 'names.md')})"


def load_weights(model: torch.nn.Module, state: dict) -> None:
    """Copy the weights of a checkpoint into a model; raises InputError if they don't fit."""
    script = Path(sys.modules[type(model).__module__].__file__).stem
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError):
        why = "damaged: its weights don't fit its settings"
        if state["script"] != script:
            why = f"written by {writer_of(state)}, whose model has other weights; use that script"
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
        why = f"{why}, or written by a script with another optimizer; use {writer_of(state)}"
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
