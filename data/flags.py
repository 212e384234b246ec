"""Settings, command-line flags and error messages, the same in every script."""

import argparse
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch


class InputError(ValueError):
    """Something the user typed can't work. The message names it and says what to do."""


class Stopped(KeyboardInterrupt):
    """A signal ends the program: that of Ctrl-C, or SIGTERM, which stops programs on clusters."""

    def __init__(self, number: int) -> None:
        self.number = number


def stop(number: int, _: Any) -> None:
    """Handle a signal like Ctrl-C, so that what is cleaned up then is cleaned up here too."""
    raise Stopped(number)


@contextmanager
def command_line(torchrun: bool = False) -> Iterator[None]:
    """Run the block inside; report a user's mistake in one line and exit with status 2.

    torchrun: whether the program can be one of several that torchrun has started.
    """
    for name in ("stdout", "stderr"):  # closed, or a Windows program without a console
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        # Show each line at once, and print "?" for a character that the terminal can't show.
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM)
    handles_sigterm = in_main_thread and previous != signal.SIG_IGN  # no other thread may
    if handles_sigterm:
        signal.signal(signal.SIGTERM, stop)
    try:
        if not torchrun:
            refuse_torchrun()
        yield
    except Stopped as error:
        sys.exit(128 + error.number)  # the status that shells expect
    except KeyboardInterrupt:
        why = "scripts before v6d_checkpoints.py save nothing of what they have trained"
        print(f"stopped; {why}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.exit(141)  # the status that shells expect when a reader such as head closes the pipe
    except InputError as error:
        exit_with_error(str(error))
    except OSError as error:  # a full disk, a missing permission, ...
        exit_with_error(str(error))
    except (MemoryError, RuntimeError) as error:
        # PyTorch raises RuntimeError for many reasons. When memory runs out, the message says
        # "allocate" on every device; anything else is a bug and keeps its traceback.
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        exit_with_error("out of memory; try a smaller --batch_size, --block_size or --n_embd")
    finally:
        if handles_sigterm:
            signal.signal(signal.SIGTERM, previous)


def exit_with_error(message: str) -> None:
    """Print message on standard error, as a single line, and exit with status 2."""
    wait_for_first_process()
    one_line = " ".join(message.split())
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(2)


def refuse_torchrun() -> None:
    """Raise InputError if torchrun has started this program, which would do everything twice."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    why = "only v8e_distributed.py can share its work among processes"
    raise InputError(f"torchrun: {why}; start this script with python")


def wait_for_first_process() -> None:
    """Under torchrun, give the first process the time to report a mistake that all have.

    When one process ends, torchrun ends the others, and the first may not have printed yet.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
        time.sleep(20)


NO_LIMIT = 2**31  # larger sizes and counts would only overflow later


def setting(
    text: str, default: Any = None, *, gpu: Any = None, cpu: Any = None, least: float = 0,
    below: float = NO_LIMIT, most: float = NO_LIMIT, choices: list[str] | None = None,
) -> Any:
    """Declare a field of Config, which is also a command-line flag.

    text: what the setting means, for --help.
    default: its default; or, where they differ, gpu and cpu: that on a GPU (CUDA or MPS) and that
    on the CPU.
    least, below, most: the range of a number, least <= number < below and number <= most.
    choices: the only values that a string may have.
    """
    if default is not None:
        gpu = cpu = default
    limits = {"least": least, "below": below, "most": most, "choices": choices}
    metadata = {"text": text, "cpu": cpu, **limits}
    return field(default=gpu, metadata=metadata)


def read_flags(
    config_class: type, lesson: str, argv: list[str] | None, saved: dict[str, Any] | None = None,
    fixed: Sequence[str] = (),
) -> Any:
    """Turn command-line flags into a config_class; a flag not given gets its device's default.

    lesson is what --help shows above the flags. argv is the list of flags, or None for those
    that this program was started with; a notebook has none. Raises InputError for a flag or value
    that can't be used.

    saved: the settings of a checkpoint, which take the place of the defaults.
    fixed: names of settings in saved that a flag must not change.
    """
    if argv is None and Path(sys.argv[0]).stem.endswith("kernel_launcher"):
        why = "in a notebook, the flags are a list"
        raise InputError(f'main(): {why}; call main([]) or main(["--max_iters", "500"])')
    flags = vars(make_parser(config_class, lesson).parse_args(argv))  # only the flags given
    saved = check_saved(config_class, saved or {})
    for name in fixed:
        if name not in saved:
            raise InputError(f"the checkpoint has no setting {name}; use the script that wrote it")
        if flags.get(name, saved[name]) != saved[name]:
            why = f"the checkpoint has {saved[name]!r}, which can't be changed; leave the flag out"
            raise InputError(f"--{name} {flags[name]}: {why}")
    if "device" not in flags and ("device" not in saved or not is_usable(saved["device"])):
        flags["device"] = best_device()
    flags = saved | flags
    if not is_usable(flags["device"]):
        why = "PyTorch can't use it on this machine"
        raise InputError(f"--device {flags['device']}: {why}; try --device cpu")
    if flags["device"].startswith("cpu"):
        for f in fields(config_class):
            flags.setdefault(f.name, f.metadata["cpu"])
    cfg = config_class(**flags)
    check_ranges(cfg)
    return cfg


def check_saved(config_class: type, saved: dict[str, Any]) -> dict[str, Any]:
    """Those of the saved settings that config_class has; InputError for one of the wrong type."""
    known = {}
    for f in fields(config_class):
        if f.name not in saved:
            continue
        value = saved[f.name]
        if f.type is float and type(value) is int:
            value = float(value)
        choices = f.metadata["choices"]
        is_possible = choices is None or value in choices or value == f.default
        if type(value) is not f.type or not is_possible:
            raise InputError(f"the checkpoint's setting {f.name} is {value!r}; it is damaged")
        known[f.name] = value
    return known


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake as an InputError, without the usage message."""

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments: --([\w-]+)", message)
        if unknown:
            flags = [flag.lstrip("-") for flag in self._option_string_actions]
            close = get_close_matches(unknown[1], flags, n=1)
            if close:
                message = f"{message}; did you mean --{close[0]}?"
        raise InputError(f"{message}; see --help")


def make_parser(config_class: type, lesson: str) -> Parser:
    """A parser with one flag for each field of config_class."""
    parser = Parser(
        description=lesson,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # the lesson shows how to run the script
        argument_default=argparse.SUPPRESS,  # flags not given stay out of the result
    )
    for f in fields(config_class):
        choices = f.metadata["choices"]
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif choices:
            options = {"type": f.type, "choices": choices}
        else:
            options = {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument(f"--{f.name}", help=help_text(f), **options)
    return parser


def help_text(f: Field) -> str:
    """What a setting means, its default on this machine, and its default on the other kind."""
    text, gpu, cpu = f.metadata["text"], f.default, f.metadata["cpu"]
    if f.name == "device":
        defaults = f"default: {best_device()!r}"
    elif gpu == cpu:
        defaults = f"default: {cpu!r}"
    elif best_device() == "cpu":
        defaults = f"default: {cpu!r}; on a GPU: {gpu!r}"
    else:
        defaults = f"default: {gpu!r}; on the CPU: {cpu!r}"
    return f"{text} ({defaults})".replace("%", "%%")  # argparse fills in what follows a single %


def best_device() -> str:
    """The device used when --device isn't given: "cuda", "mps" or "cpu"."""
    # A GPU may be there and yet be too old for this PyTorch, so try it.
    if torch.cuda.is_available() and is_usable("cuda"):
        return "cuda"
    if torch.backends.mps.is_available() and is_usable("mps"):
        return "mps"
    return "cpu"


def is_usable(device: str) -> bool:
    """Whether PyTorch can compute on device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):  # which of them depends on the device
        return False
    return True


def check_ranges(cfg: Any) -> None:
    """Raise InputError if a number in cfg is outside the range its setting allows."""
    for f in fields(cfg):
        if f.type not in (int, float):
            continue
        value, least = getattr(cfg, f.name), f.metadata["least"]
        below, most = f.metadata["below"], f.metadata["most"]
        if not (least <= value < below and value <= most):  # also refuses NaN
            end = f"below {below}" if below <= most else f"at most {most}"
            raise InputError(f"--{f.name} {value}: must be at least {least} and {end}")
