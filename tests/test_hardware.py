"""support/hardware.py: bfloat16 on each device, the compiler's check, memory that is kept."""

import ctypes
import sys

import pytest
import torch

import data
from support import hardware


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
    assert hardware.supports_bfloat16("cpu") is expected
    assert hardware.supports_bfloat16("cpu:0") is expected


def test_a_pytorch_that_can_not_tell_has_no_bfloat16_on_the_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert hardware.supports_bfloat16("cpu") is False


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_only_emulates_bfloat16_does_not_support_it(monkeypatch, device):
    has = {"emulation": True, "hardware": True}

    def is_supported(including_emulation=True):
        return has["hardware"] or (including_emulation and has["emulation"])

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert hardware.supports_bfloat16(device)
    has["hardware"] = False
    assert not hardware.supports_bfloat16(device)


def test_other_devices_do_not_support_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert hardware.supports_bfloat16("mps") is False
    assert hardware.supports_bfloat16("meta") is False


def test_a_compiler_that_works_is_accepted(monkeypatch):
    calls = []

    def compiler(function):
        def compiled(tensor):
            calls.append(tensor.device.type)
            return function(tensor)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    hardware.check_compiler("cpu")
    assert calls == ["cpu"]


def test_a_compiler_that_fails_is_refused_with_the_first_line_of_its_message(monkeypatch):
    def compiler(function):
        def compiled(tensor):
            raise RuntimeError("no compiler found\nand fifty lines of advice")

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(data.InputError) as caught:
        hardware.check_compiler("cpu")
    assert str(caught.value) == "--compile: no compiler found; use --no-compile"


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has mallopt")
def test_large_blocks_stay_in_a_heap_that_never_shrinks(monkeypatch):
    calls = {}

    class Library:
        def __init__(self, name):
            assert name is None  # the program itself, with all that it has loaded

        def mallopt(self, parameter, value):
            calls[parameter] = value

    monkeypatch.setattr(ctypes, "CDLL", Library)
    hardware.keep_freed_memory()
    assert calls == {-4: 0, -1: -1}  # M_MMAP_MAX and M_TRIM_THRESHOLD in malloc.h
    del Library.mallopt  # as in other C libraries
    hardware.keep_freed_memory()


def test_other_systems_keep_no_memory(monkeypatch):
    def library(name):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", library)
    for platform in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        hardware.keep_freed_memory()


def test_a_linux_without_glibc_keeps_no_memory(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    hardware.keep_freed_memory()


def test_triton_is_found_if_it_is_installed(monkeypatch):
    for found, expected in ((object(), True), (None, False)):
        monkeypatch.setattr(hardware, "find_spec", lambda name, found=found: found)
        assert hardware.has_triton() is expected
