"""Several processes that act as one program: torchrun starts them, one for each GPU."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from data.flags import InputError


def process_rank() -> int:
    """The number of this process among those that torchrun has started; 0 without torchrun."""
    return int(os.environ["RANK"]) if is_launched() else 0


def n_processes() -> int:
    """How many processes torchrun has started, on all machines; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return distributed.is_available() and distributed.is_torchelastic_launched()


def device_of_process(device: str) -> str:
    """The device for this process, "cuda:1" for the second on a machine; otherwise device.

    Raises InputError if there is no such GPU, or if processes can't work together on device.
    """
    if not is_launched():
        return device
    if device.startswith("cuda"):
        n, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if int(os.environ["LOCAL_WORLD_SIZE"]) > n:
            raise InputError(f"--device {device}: only {n} GPUs; use --nproc_per_node={n}")
        torch.cuda.set_device(local_rank)
        return f"cuda:{local_rank}"
    if not device.startswith("cpu"):
        raise InputError(f"--device {device}: torchrun's processes need cuda or cpu; use one")
    return device


@contextmanager
def joined_processes() -> Iterator[None]:
    """Connect torchrun's processes while the block runs; without torchrun, just run it.

    After the block, the first process goes on alone, and the others end. If one of them ends in
    the block, the others can't go on: then the first raises InputError, and the others end without
    a word.
    """
    if n_processes() == 1:
        yield
        return
    # GPUs share gradients through nccl, except on Windows, which has none. The rest goes through
    # gloo.
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    try:
        yield
        # A process that exits while a thread of gloo still frees its last tensor is aborted
        # (https://github.com/pytorch/pytorch/issues/190489). Waiting for the others takes longer.
        distributed.barrier()
    except RuntimeError as error:
        if not is_lost_connection(error):
            unmute()
            raise
        if process_rank() > 0:
            sys.exit(1)
        why = "another process of this run has ended, so it stops"
        remedy = "--resume continues from the last checkpoint, which is intact"
        raise InputError(f"{why}; {remedy}") from None
    except Exception as error:
        if not isinstance(error, InputError):  # which all have, and the first one reports
            unmute()
        raise
    finally:
        distributed.destroy_process_group()
    if process_rank() > 0:
        sys.exit()


def largest_of_all(number: int) -> int:
    """The largest number that any of the processes has given; each must call this."""
    if n_processes() == 1:
        return number
    largest = torch.tensor(number)  # ()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest.item())


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether error says that a process doesn't answer; gloo has no class of its own for that."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def mute() -> None:
    """Print nothing from now on, if this isn't the first process: all would print the same."""
    if process_rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def unmute() -> None:
    """Print again: an error that only this process has must be seen."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
