"""v6b_fast.py computes what v6a does, in float32 and in bfloat16, and reports its speed."""

import copy
import re

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import build, random_tokens, refused, shaken, tiny, tiny_flags
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
from part2_training import v6a_fused_attention as v6a
from part2_training import v6b_fast as v6b
from support import hardware


@pytest.fixture
def bfloat16_hardware(monkeypatch):
    """A machine whose devices all support bfloat16; every CPU can emulate it."""
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)


@pytest.fixture
def float32_hardware(monkeypatch):
    """A machine whose devices don't support bfloat16."""
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: False)


def relative_error(actual, expected):
    return ((actual.float() - expected).norm() / expected.norm()).item()


# ---- bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "n_embd", "expected"),
    [
        ("cpu", "auto", 128, torch.bfloat16),
        ("cpu", "auto", 127, torch.float32),
        ("cuda:1", "auto", 96, torch.bfloat16),
        ("cpu", "bfloat16", 96, torch.bfloat16),
        ("cpu", "float32", 384, torch.float32),
        ("cuda", "float32", 384, torch.float32),
    ],
)
def test_auto_means_bfloat16_except_for_a_narrow_model_on_a_cpu(
    bfloat16_hardware, device, dtype, n_embd, expected
):
    cfg = tiny(v6b, device=device, dtype=dtype, n_embd=n_embd)
    assert v6b.choose_dtype(cfg) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_auto_means_float32_without_support_for_bfloat16(float32_hardware, device):
    for dtype in ("auto", "float32"):
        assert v6b.choose_dtype(tiny(v6b, device=device, dtype=dtype, n_embd=384)) == torch.float32


def test_the_dtype_depends_on_the_device_of_the_settings(monkeypatch):
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: device == "cuda:1")
    assert v6b.choose_dtype(tiny(v6b, device="cuda:1")) == torch.bfloat16
    assert v6b.choose_dtype(tiny(v6b, device="cuda:0")) == torch.float32


def test_bfloat16_is_refused_where_the_hardware_does_not_support_it(
    float32_hardware, capsys, corpus
):
    line = refused(v6b, capsys, *tiny_flags(v6b), "--data", corpus, "--dtype", "bfloat16")
    assert line.startswith("error: --dtype bfloat16: not supported on cpu")
    assert line.endswith("use --dtype float32")


def test_other_dtypes_are_refused(capsys):
    line = refused(v6b, capsys, "--dtype", "float16")
    assert "argument --dtype: invalid choice" in line
    assert "float32" in line


def test_bfloat16_comes_close(bfloat16_hardware, monkeypatch):
    """GELU stands in for ReLU, whose gradient jumps when rounding changes the sign of its input."""
    monkeypatch.setattr(F, "relu", F.gelu)
    model = build(v6b, n_head=4, n_embd=96, n_layer=3, block_size=64)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    other = copy.deepcopy(model)
    x, y = random_tokens(2, 8, 64)
    expected, expected_loss = model(x, y)
    with v6b.autocast(tiny(v6b, dtype="bfloat16")):
        logits, loss = other(x, y)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert 1e-4 < relative_error(logits, expected) < 2e-2
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-2)
    expected_loss.backward()
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert relative_error(parameter.grad, parameters[name].grad) < 2e-2, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_and_loss_estimates_run_in_the_chosen_dtype(bfloat16_hardware, splits, dtype):
    cfg = tiny(v6b, dtype=dtype)
    model = build(v6b)
    used = set()
    model.lm_head.register_forward_hook(lambda *args: used.add((model.training, args[-1].dtype)))
    v6b.train(model, *splits, cfg)
    assert used == {(True, getattr(torch, dtype)), (False, getattr(torch, dtype))}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


# ---- training


def test_training_in_float32_follows_v6a_with_a_fused_optimizer(splits):
    fused, histories, models = [], [], []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: fused.append(optimizer.defaults["fused"])
    )
    for script in (v6a, v6b):
        cfg = tiny(script, dtype="float32", max_iters=40, eval_interval=10, learning_rate=3e-3)
        model = shaken(build(script))
        torch.manual_seed(4)
        histories.append(script.train(model, *splits, cfg))
        models.append(model)
    hook.remove()
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-4)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert histories[0][-1][1] < histories[0][0][1] - 0.1
    assert not any(fused[:40])
    assert fused[40:] == [True] * 40


def test_batches_are_those_of_the_helper(splits):
    cfg = tiny(v6b)
    torch.manual_seed(6)
    expected = data.get_batch(splits[0], cfg.batch_size, cfg.block_size, "cpu")
    torch.manual_seed(6)
    for actual, batch in zip(v6b.get_batch(splits[0], cfg), expected, strict=True):
        assert torch.equal(actual, batch)


class LikeCuda(str):
    """The name of the CPU, which a script takes for that of a GPU."""

    def startswith(self, prefix):
        return prefix == "cuda"


@pytest.mark.parametrize(("device", "n_pinned"), [("cpu", 0), (LikeCuda("cpu"), 2)])
def test_batches_for_a_gpu_come_from_pinned_memory(splits, monkeypatch, device, n_pinned):
    pinned, sent = [], []
    real = torch.Tensor.to

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    def send(tensor, *args, non_blocking=False):
        if non_blocking:
            sent.append(tensor)
        return real(tensor, *args, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", send)
    v6b.get_batch(splits[0], tiny(v6b, device=device))
    assert len(pinned) == n_pinned
    assert len(sent) == 2
    assert all(any(a is b for b in sent) for a in pinned)


# ---- torch.compile


def test_compiling_needs_a_compiler(corpus, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}):
        line = refused(v6b, capsys, *tiny_flags(v6b), "--data", corpus, "--compile")
    assert line.startswith("error: --compile: ")
    assert line.endswith("; use --no-compile")


def test_compiling_changes_no_loss(splits, monkeypatch):
    """With PyTorch's graphs of the model, but without the C++ compiler, which takes a minute."""
    real = torch.compile
    compiled, runs, histories = [], [], []

    def graphs_only(target):
        compiled.append(target)
        graphs = real(target, backend="aot_eager")

        def run(*args):
            runs.append(target)
            return graphs(*args)

        return run

    monkeypatch.setattr(torch, "compile", graphs_only)
    for switch in (False, True):
        assert compiled == []
        model = build(v6b)
        torch.manual_seed(8)
        histories.append(v6b.train(model, *splits, tiny(v6b, compile=switch)))
    assert compiled[-1] is model
    assert runs.count(model) == 3, "one for each step"
    np.testing.assert_allclose(*histories, rtol=1e-5)


# ---- tokens per second


class Gpu:
    """A GPU's clock: a step takes 2 seconds, a loss estimate 1000, and the first step 500 more.

    Python doesn't notice how long a step takes before it waits for the GPU.
    """

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.queued = 500.0
        self.real_batch = v6b.get_batch
        monkeypatch.setattr(v6b, "get_batch", self.batch)
        monkeypatch.setattr(v6b, "estimate_loss", self.estimate)
        monkeypatch.setattr(v6b, "wait_for", self.wait)
        monkeypatch.setattr(v6b.time, "perf_counter", self.clock)

    def batch(self, tokens, cfg):
        self.queued += 2
        return self.real_batch(tokens, cfg)

    def estimate(self, *_):
        self.queued += 1000
        self.wait()
        return 1.0

    def wait(self, device="cpu"):
        self.now += self.queued
        self.queued = 0.0

    def clock(self):
        self.now += 1e-9  # no two readings are the same
        return self.now


@pytest.mark.parametrize(
    ("max_iters", "eval_interval", "expected"),
    [
        (5, 2, {0: "", 2: "10", 4: "10", 5: "10"}),
        (5, 5, {0: "", 5: "10"}),
        (3, 1, {0: "", 1: "", 2: "10", 3: "10"}),
        (0, 1, {0: ""}),
    ],
)
def test_tokens_per_second_count_neither_loss_estimates_nor_the_first_step(
    splits, monkeypatch, capsys, max_iters, eval_interval, expected
):
    """4 windows of 5 tokens in 2 seconds are 10 tokens/s."""
    Gpu(monkeypatch)
    v6b.train(build(v6b), *splits, tiny(v6b, max_iters=max_iters, eval_interval=eval_interval))
    out = capsys.readouterr().out
    lines = re.findall(r"^step (\d+):.* val loss 1\.0000(?:, (.*) tokens/s)?$", out, re.MULTILINE)
    assert {int(step): speed for step, speed in lines} == expected


def test_waiting_reads_a_number_from_the_device_of_the_settings(monkeypatch):
    read = []

    class Number:
        def __init__(self, *_, device):
            self.device = device

        def item(self):
            read.append(self.device)

    monkeypatch.setattr(torch, "zeros", Number)
    v6b.wait_for("cuda:1")
    assert read == ["cuda:1"]


def test_a_run_prints_losses_its_speed_and_a_sample(corpus, capsys):
    v6b.main([*tiny_flags(v6b), "--data", str(corpus), "--prompt", "The "])
    lines = capsys.readouterr().out.split("\n", maxsplit=3)
    loss = r"\d+\.\d{4}"
    for step, line in zip((0, 2, 3), lines, strict=False):
        speed = r", [\d,]+ tokens/s" if step > 0 else ""
        assert re.fullmatch(rf"step {step}: train loss {loss}, val loss {loss}{speed}", line)
    assert lines[3].startswith("The ")
    assert len(lines[3]) == 4 + 7 + 1


def test_pinned_batches_are_contiguous(splits, monkeypatch):
    """PyTorch copies other tensors to ordinary memory before it sends them to a GPU."""
    pinned = []

    def pin(tensor):
        pinned.append(tensor.is_contiguous())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    v6b.get_batch(splits[0], tiny(v6b, device=LikeCuda("cpu")))
    assert pinned == [True, True]
