"""support/hardware.py: bfloat16 on each device, the compiler, copies to a GPU, kept memory."""

import ctypes
import sys

import pytest
import torch

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
    # raising=False: PyTorch up to 2.9 has no such function.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: not expected)
    assert hardware.supports_bfloat16("cpu") is expected
    assert hardware.supports_bfloat16("cpu:0") is expected


def test_a_pytorch_that_can_not_tell_has_no_bfloat16_on_the_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
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
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
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
    assert hardware.compiler_works("cpu")
    assert calls == ["cpu"]


@pytest.mark.parametrize("fails_at_once", [False, True])  # as on too new a version of Python
def test_a_notice_has_the_first_line_of_what_a_compiler_says(monkeypatch, capsys, fails_at_once):
    def compiler(function):
        def compiled(tensor):
            raise RuntimeError("no compiler found\nand fifty lines of advice")

        return compiled(None) if fails_at_once else compiled

    monkeypatch.setattr(torch, "compile", compiler)
    assert not hardware.compiler_works("cpu")
    notice = "notice: --compile: no compiler found; training without it\n"
    assert capsys.readouterr().err == notice


class Copies:
    """What was pinned, and what was sent where: (tensor, device, non_blocking)."""

    def __init__(self):
        self.pinned = []
        self.sent = []


@pytest.fixture
def copies(monkeypatch):
    """Records how tensors are copied, instead of copying them; that needs no GPU."""
    copies = Copies()

    def pin(tensor):
        assert tensor.is_contiguous()  # PyTorch copies others to ordinary memory first
        copies.pinned.append(tensor.clone())
        return copies.pinned[-1]

    def send(tensor, device, non_blocking=False):
        copies.sent.append((tensor, device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", send)
    return copies


def window_and_targets():
    """Two tensors of which neither is contiguous, as data.get_batch makes them."""
    windows = torch.arange(24).view(4, 6)
    return [windows[:, :-1], windows[:, 1:]]


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_fetches_contiguous_tensors_from_pinned_memory_itself(copies, device):
    tensors = window_and_targets()
    assert not any(tensor.is_contiguous() for tensor in tensors)
    copied = hardware.to_device(tensors, device)
    assert len(copies.pinned) == len(copies.sent) == 2
    for pinned, (sent, to, non_blocking) in zip(copies.pinned, copies.sent, strict=True):
        assert sent is pinned
        assert to == device
        assert non_blocking
    assert all(map(torch.equal, copied, tensors))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_get_no_pinned_memory(copies, device):
    tensors = window_and_targets()
    hardware.to_device(tensors, device)
    assert copies.pinned == []
    assert all(map(torch.equal, [sent for sent, _, _ in copies.sent], tensors))
    assert [to for _, to, _ in copies.sent] == [device] * 2


def test_tensors_keep_their_order_and_their_numbers_on_the_way():
    tensors = window_and_targets()
    copied = hardware.to_device(tensors, "cpu")
    assert len(copied) == 2
    assert all(map(torch.equal, copied, tensors))
    on_meta = hardware.to_device([torch.ones(2, 3), torch.ones(4)], "meta")
    assert [tensor.device.type for tensor in on_meta] == ["meta", "meta"]
    assert [tuple(tensor.shape) for tensor in on_meta] == [(2, 3), (4,)]


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_copies_from_ordinary_memory_are_finished_before_it_is_freed(copies, device):
    """Otherwise an MPS device may read what is there later (PyTorch's issue 189690)."""
    hardware.to_device(window_and_targets(), device)
    assert [non_blocking for _, _, non_blocking in copies.sent] == [False, False]


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


@pytest.fixture
def gpu_machine(monkeypatch, tmp_path):
    """A Linux machine with Triton, a compiler, Python's headers and a GPU."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware, "find_spec", lambda name: {"triton": object()}.get(name))
    monkeypatch.setattr(hardware.shutil, "which", lambda name: {"cc": "/bin/cc"}.get(name))
    monkeypatch.setattr(hardware.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(hardware, "best_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.delenv("CC", raising=False)


def test_a_gpu_machine_with_everything_can_compile(gpu_machine):
    assert hardware.can_compile()


def test_without_triton_a_gpu_machine_can_not_compile(gpu_machine, monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    assert not hardware.can_compile()


def test_triton_does_not_support_old_gpus(gpu_machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert not hardware.can_compile()


def test_on_linux_triton_needs_a_c_compiler_and_headers(gpu_machine, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: {"mycc": "x"}.get(name))
    assert not hardware.can_compile()
    monkeypatch.setenv("CC", "mycc")
    assert hardware.can_compile()
    (tmp_path / "Python.h").unlink()
    assert not hardware.can_compile()
    monkeypatch.setattr(hardware.sys, "platform", "win32")
    assert hardware.can_compile(), "Triton for Windows brings its own"


def test_without_a_gpu_that_works_its_capability_is_not_asked_for(gpu_machine, monkeypatch):
    """With one that doesn't, PyTorch may answer with an error, which no import should end in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "best_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: pytest.fail("no GPU"))
    assert hardware.can_compile()

