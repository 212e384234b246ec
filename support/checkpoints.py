"""Checkpoints: files that are whole or not there, and that can't run code when they are read."""

import math
import pickle
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from data.flags import InputError

COURSE = Path(__file__).parent.parent
# What a checkpoint holds, by name and type.
CONTENTS = {
    "script": str, "config": dict, "tokenizer": str, "characters": str, "corpus": str,
    "model": dict, "optimizer": dict, "step": int, "history": dict,
}
# A commit whose scripts all read checkpoints with a random state and a log.
OLD_COMMIT = "3b6abd2"


def read_checkpoint(path: Path) -> dict:
    """Load a checkpoint onto the CPU, without running any code that may be in it.

    Its "path" is where it was found, and "modified" when that file was written, in nanoseconds.
    Raises InputError, which says what is wrong and what helps, if it can't be used.
    """
    try:
        modified = path.stat().st_mtime_ns if path.exists() else None
        state = load(path)
    except InputError as error:
        best = path.with_name("best.pt")
        if path == best or not is_intact(best):
            raise
        why = f"{error}; {best.name} beside it is intact: copy it over {path.name} to use it"
        raise InputError(why) from None
    state["path"] = str(path)
    state["modified"] = modified
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
            folders = [info.filename for info in archive.infolist() if info.external_attr & 0x10]
        if damaged is not None or folders:  # torch.load leaves out what is called a folder
            raise ValueError(f"{damaged or folders[0]} in it is damaged")
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
    check_contents(state, path)
    return state


def check_contents(state: dict, path: Path) -> None:
    """Raise InputError if a checkpoint lacks a part, or if its step or history is impossible."""
    if isinstance(state, dict) and "random_state" in state:
        writer = script_path(str(state.get("script")))
        why = f"written by {writer} in another format, which commit {OLD_COMMIT} of it can read"
        raise InputError(f"{path}: {why}")
    for name, kind in CONTENTS.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            why = f"not a checkpoint of this course (it lacks {name!r})"
            raise InputError(f"{path}: {why}")
    if state["step"] < 0:
        raise InputError(f"{path}: damaged (its step is {state['step']})")
    for step, losses in state["history"].items():
        is_pair = isinstance(losses, tuple) and [type(loss) for loss in losses] == [float, float]
        if type(step) is not int or not is_pair or not all(map(math.isfinite, losses)):
            raise InputError(f"{path}: damaged (its history has {losses!r} at step {step!r})")
    if not state["history"]:
        raise InputError(f"{path}: damaged (its history is empty)")
    seconds = state.get("seconds", 0.0)  # the clock of v10c
    if type(seconds) is not float or not 0 <= seconds < math.inf:
        raise InputError(f"{path}: damaged (its seconds are {seconds!r})")
    checks = {"bpe": check_merges, "file": check_tokenizer_file}
    if state["tokenizer"] in checks:
        try:
            fits = checks[state["tokenizer"]](state["tokenizer_content"])
        except Exception:  # tokenizers has no class of its own for a damaged file
            fits = False
        if not fits:
            raise InputError(f"{path}: damaged (its tokenizer can't be used)")


def check_merges(content: dict) -> bool:
    """Whether each merge that v8a has learned is of two tokens that come before it."""
    ids_before = [range(256 + i) for i in range(len(content["merges"]))]
    pairs = zip(content["merges"], ids_before, strict=True)
    return all(first in ids and second in ids for (first, second), ids in pairs)


def check_tokenizer_file(content: dict) -> bool:
    """Whether a checkpoint's copy of a tokenizer.json can be used. Some mistakes raise errors."""
    from tokenizers import Tokenizer  # here, because only v11b and later need it

    Tokenizer.from_str(content["json"])
    ends = content["end_of_text"]
    if type(content["n_vocab"]) is not int or content["n_vocab"] < 1 or not isinstance(ends, list):
        return False
    return all(type(token) is int for token in ends)


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


def load_weights(model: torch.nn.Module, state: dict) -> None:
    """Copy the weights of a checkpoint into a model; raises InputError if they don't fit."""
    script = Path(sys.modules[type(model).__module__].__file__).stem
    try:
        if not all(weight.is_floating_point() for weight in state["model"].values()):
            raise TypeError  # load_state_dict would convert them
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError):
        why = "damaged: its weights don't fit its settings"
        if state["script"] != script:
            writer = script_path(state["script"])
            why = f"written by {writer}, whose model has other weights; use that script"
        raise InputError(f"{state['path']}: {why}") from None
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise InputError(f"{state['path']}: damaged: some of its weights aren't finite numbers")


def load_base(
    model: torch.nn.Module, tokenizer: Any, cfg: Any, sizes: list[str]
) -> None:
    """Start a model from the best weights of another run, that in cfg.base.

    Its alphabet may be a smaller one, in which characters have other ids. The characters and
    special tokens that it lacks keep the random weights that they have in the model. Raises
    InputError if there is no such run, or if its sizes aren't those of cfg.
    """
    folder = Path(cfg.base)
    if not folder.is_dir():
        raise InputError(f"--base {folder}: no such folder; name the folder of a run")
    base = read_checkpoint(folder / "best.pt")
    for name in sizes:
        if name not in base["config"]:
            why = f"written by {script_path(base['script'])}, whose model has no {name}"
            raise InputError(f"--base {folder}: {why}; use a run of v9d")
        size = base["config"][name]
        if size != getattr(cfg, name):
            raise InputError(f"--base {folder}: has --{name} {size}; give --{name} {size}")
    unknown = sorted(set(base["characters"]) - set(tokenizer.ids))
    if unknown:
        why = f"its text has {unknown[0]!r}, which the alphabet of this run lacks"
        raise InputError(f"--base {folder}: {why}; use the same --data")
    ids = [tokenizer.ids[character] for character in base["characters"]]
    if base["tokenizer"] == tokenizer.name:
        ids += range(len(tokenizer.ids), tokenizer.n_vocab)  # the special tokens
    for name in ("token_embedding.weight", "lm_head.weight"):
        grown = model.state_dict()[name].detach().cpu().clone()  # (V, n_embd)
        grown[ids] = base["model"][name]
        base["model"][name] = grown
    load_weights(model, base)


def load_averages(optimizer: torch.optim.Optimizer, state: dict, name: str = "") -> None:
    """Copy the averages of a checkpoint into a new optimizer; InputError if they don't fit.

    The learning rate and the weight decay stay those of the optimizer, because a flag may have
    changed them. name: that of the optimizer, if the checkpoint has the averages of several.
    """
    if not state["optimizer"] and state["step"] > 0:
        why = "has weights and no averages, so the optimizer starts with new ones"
        print(f"notice: {state['path']}: {why}", file=sys.stderr)
        return
    groups = optimizer.state_dict()["param_groups"]
    try:
        averages = state["optimizer"][name] if name else state["optimizer"]
        optimizer.load_state_dict({"state": averages, "param_groups": groups})
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if state["step"] > 0:
                    check_averages(optimizer, parameter)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        writer, script = script_path(state["script"]), Path(sys.argv[0]).stem
        why = "damaged"
        if script != state["script"]:
            why = f"damaged, or written with another optimizer by {writer}; use that script"
        raise InputError(f"{state['path']}: its averages don't fit ({error}): {why}") from None


def check_averages(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """Raise ValueError or KeyError if an optimizer lacks averages, or if their shapes are wrong."""
    shapes = {"average": parameter.shape}  # Muon's
    if isinstance(optimizer, torch.optim.AdamW):
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    averages = optimizer.state[parameter]
    for name, shape in shapes.items():
        if averages[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(averages[name].shape)}")
        if averages[name].layout != torch.strided or not averages[name].is_contiguous():
            raise ValueError(f"{name} isn't contiguous")  # AdamW would write beside it
