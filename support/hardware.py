"""What the hardware can do, and settings of the whole program that make it faster."""

import ctypes
import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from data.flags import best_device

# Parameters of mallopt and their numbers, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def supports_bfloat16(device: str) -> bool:
    """Whether a CUDA GPU or a CPU multiplies matrices in bfloat16 itself; no for other devices."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.startswith("cpu") and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return False


def can_compile() -> bool:
    """Whether torch.compile can be expected to work on a GPU.

    It needs Triton, which supports GPUs from compute capability 7.0 on and, on Linux, compiles C
    code against Python's headers.
    """
    if find_spec("triton") is None:
        return False
    if sys.platform == "linux" and not has_c_compiler():
        return False
    return best_device() != "cuda" or torch.cuda.get_device_capability() >= (7, 0)


def has_c_compiler() -> bool:
    """Whether there are a C compiler and Python's headers."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return any(shutil.which(name) for name in names if name) and headers.exists()


def compiler_works(device: str) -> bool:
    """Whether torch.compile works on device; if not, a notice says why.

    Not an error: on a GPU it is the default, which nobody has typed.
    """
    try:
        torch.compile(torch.square)(torch.ones(1, device=device))
    except Exception as error:  # which class it has depends on what is missing
        why = str(error).partition("\n")[0]
        print(f"notice: --compile: {why}; training without it", file=sys.stderr)
        return False
    return True


def to_device(tensors: list[torch.Tensor], device: str) -> list[torch.Tensor]:
    """Copy tensors from the CPU to device, without making Python wait for a GPU.

    From ordinary memory, Python waits until the GPU has reached the copy. From pinned memory, the
    GPU fetches a contiguous tensor itself, while Python goes on.
    """
    if not device.startswith("cuda"):
        return [tensor.to(device) for tensor in tensors]
    pinned = [tensor.contiguous().pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in pinned]


def keep_freed_memory() -> None:
    """On Linux, keep the memory of freed tensors for the next ones.

    By default, glibc returns every large block to the system, which must fill each page with zeros
    before the next tensor can have it. At full size on a CPU, that takes more than a tenth of a
    training step (part2_training/README.md).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)  # take large blocks from the heap, not one by one
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
