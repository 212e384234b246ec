"""data/hardware.py: bfloat16 on each device, the compiler's check, and the memory that is kept."""

import ctypes
import sys

import data
from data import hardware

import pytest
import torch


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "amx_tile": True, "avx512_f": True}, False),
        ({"neon": True}, False),
    ],
)
def test_a_cpu_supports_bfloat16_if_it_has_the_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: not expected)
    assert data.supports_bfloat16("cpu") is expected
    assert data.supports_bfloat16("cpu:0") is expected


def test_a_pytorch_that_can_not_tell_has_no_bfloat16_on_the_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert data.supports_bfloat16("cpu") is False


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_only_emulates_bfloat16_does_not_support_it(monkeypatch, device):
    has = {"emulation": True, "hardware": True}

    def is_supported(including_emulation=True):
        return has["hardware"] or (including_emulation and has["emulation"])

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert data.supports_bfloat16(device)
    has["hardware"] = False
    assert not data.supports_bfloat16(device)


def test_other_devices_do_not_support_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert data.supports_bfloat16("mps") is False
    assert data.supports_bfloat16("meta") is False


def test_a_compiler_that_works_is_accepted(monkeypatch):
    calls = []

    def compiler(function):
        def compiled(tensor):
            calls.append(tensor.device.type)
            return function(tensor)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    data.check_compiler("cpu")
    assert calls == ["cpu"]


def test_a_compiler_that_fails_is_refused_with_the_first_line_of_its_message(monkeypatch):
    def compiler(function):
        def compiled(tensor):
            raise RuntimeError("no compiler found\nand fifty lines of advice")

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(data.InputError) as caught:
        data.check_compiler("cpu")
    assert str(caught.value) == "--compile: no compiler found; use --no-compile"


def has_mallopt():
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not has_mallopt(), reason="only glibc has mallopt")
def test_the_memory_of_a_freed_tensor_is_there_for_the_next():
    """Memory that came from the system anew would cost a page fault for each of its pages."""
    import resource

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    data.keep_freed_memory()
    torch.ones(2**25)  # freed at once
    before = faults()
    tensor = torch.ones(2**24)  # 64 MiB, which are 32 pages even if those are huge ones
    assert faults() - before < 16
    assert tensor.sum() == 2**24


@pytest.mark.skipif(not has_mallopt(), reason="only glibc has mallopt")
def test_the_heap_grows_by_large_blocks_and_never_shrinks():
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    data.keep_freed_memory()
    start = libc.sbrk(0)  # the end of the heap
    block = libc.malloc(2**28)  # 256 MiB, none of which is ever touched
    end = libc.sbrk(0)
    assert end - start > 2**20
    libc.free(block)
    assert libc.sbrk(0) == end


def test_other_systems_keep_no_memory(monkeypatch):
    def library(name):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", library)
    for platform in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        data.keep_freed_memory()


def test_a_linux_without_glibc_keeps_no_memory(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    data.keep_freed_memory()


def test_triton_is_found_if_it_is_installed(monkeypatch):
    for found, expected in ((object(), True), (None, False)):
        monkeypatch.setattr(hardware, "find_spec", lambda name, found=found: found)
        assert data.has_triton() is expected
