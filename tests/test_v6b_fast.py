"""v6b_fast.py computes what v6a does, in float32 and in bfloat16, and reports its speed.

How the speed is measured is tested in test_stopwatch.py, and copies to a GPU in test_hardware.py.
"""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import (
    build,
    losses_and_sample,
    random_tokens,
    refused,
    shaken,
    tiny,
    tiny_flags,
)
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
        ("cpu", "auto", 128, "bfloat16"),
        ("cpu", "auto", 127, "float32"),
        ("cuda:1", "auto", 96, "bfloat16"),
        ("cpu", "bfloat16", 96, "bfloat16"),
        ("cpu", "float32", 384, "float32"),
        ("cuda", "float32", 384, "float32"),
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
        assert v6b.choose_dtype(tiny(v6b, device=device, dtype=dtype, n_embd=384)) == "float32"


def test_the_dtype_depends_on_the_device_of_the_settings(monkeypatch):
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: device == "cuda:1")
    assert v6b.choose_dtype(tiny(v6b, device="cuda:1")) == "bfloat16"
    assert v6b.choose_dtype(tiny(v6b, device="cuda:0")) == "float32"


def test_bfloat16_is_refused_where_the_hardware_does_not_support_it(
    float32_hardware, capsys, corpus
):
    line = refused(v6b, capsys, *tiny_flags(v6b), "--data", corpus, "--dtype", "bfloat16")
    assert line.startswith("error: --dtype bfloat16: not supported on cpu")
    assert line.endswith("use --dtype float32")


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "bfloat16"), ("float32", "float32")])
def test_a_run_chooses_its_dtype_once_and_shows_it(
    bfloat16_hardware, corpus, capsys, monkeypatch, dtype, expected
):
    chosen, used = [], []
    real_choose, real_autocast = v6b.choose_dtype, v6b.autocast

    def choose_dtype(cfg):
        chosen.append(cfg.dtype)
        return real_choose(cfg)

    def autocast(cfg):
        used.append(cfg.dtype)
        return real_autocast(cfg)

    monkeypatch.setattr(v6b, "choose_dtype", choose_dtype)
    monkeypatch.setattr(v6b, "autocast", autocast)
    v6b.main([*tiny_flags(v6b, n_embd=129), "--data", str(corpus), "--dtype", dtype])
    first_line = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(rf"model: [\d,]+ parameters, {expected}, on cpu", first_line)
    assert chosen == [dtype]
    assert used == [expected] * (3 + 3 * 2 * 2), "in each step, and each batch of an estimate"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_follows_the_settings_alone(monkeypatch, dtype):
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda _: pytest.fail("a second choice"))
    with v6b.autocast(tiny(v6b, dtype=dtype, device="cpu:0")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, dtype)
    calls = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: calls.append((args, options)))
    v6b.autocast(tiny(v6b, dtype=dtype, device="cuda:1"))
    assert calls == [(("cuda",), {"dtype": torch.bfloat16, "enabled": dtype == "bfloat16"})]


def test_other_dtypes_are_refused(capsys):
    line = refused(v6b, capsys, "--dtype", "float16")
    assert "argument --dtype: invalid choice" in line
    assert "float32" in line


def test_bfloat16_comes_close(monkeypatch):
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
def test_training_and_loss_estimates_run_in_the_chosen_dtype(splits, dtype):
    cfg = tiny(v6b, dtype=dtype)
    model = build(v6b)
    used = set()
    model.lm_head.register_forward_hook(lambda *args: used.add((model.training, args[-1].dtype)))
    v6b.train(model, *splits, cfg)
    assert used == {(True, getattr(torch, dtype)), (False, getattr(torch, dtype))}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


# ---- training


def losses_of(history):
    return list(history.values())


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
    assert list(histories[0]) == list(histories[1]) == [0, 10, 20, 30, 40]
    np.testing.assert_allclose(losses_of(histories[0]), losses_of(histories[1]), rtol=1e-4)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert histories[0][40][0] < histories[0][0][0] - 0.1
    assert not any(fused[:40])
    assert fused[40:] == [True] * 40


def test_a_step_copies_its_batch_without_making_python_wait(splits, monkeypatch):
    """The batch that the seed gives, from the CPU to the device of the settings."""
    cfg = tiny(v6b)
    model = build(v6b)
    optimizer = torch.optim.AdamW(model.parameters())
    copied, seen = [], []
    real = hardware.to_device

    def to_device(tensors, device):
        copied.append((tensors, device))
        return real([tensor.clone() for tensor in tensors], device)

    monkeypatch.setattr(hardware, "to_device", to_device)
    model.register_forward_hook(lambda _, args, __: seen.append(args))
    torch.manual_seed(6)
    v6b.train_step(model, optimizer, splits[0], cfg)
    torch.manual_seed(6)
    expected = data.get_batch(splits[0], cfg.batch_size, cfg.block_size, "cpu")
    [(tensors, device)] = copied
    assert device == cfg.device
    for batch in (tensors, *seen):
        assert all(map(torch.equal, batch, expected))
    assert len(seen) == 1


class LikeCuda(str):
    """The name of the CPU, which a script takes for that of a GPU."""

    def startswith(self, prefix):
        return prefix == "cuda"


def test_the_batches_of_training_on_a_gpu_come_from_pinned_memory(splits, monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    v6b.train(build(v6b), *splits, tiny(v6b, device=LikeCuda("cpu")))
    assert pinned == [(4, 5), (4, 5)] * 3


def test_training_keeps_freed_memory(splits, monkeypatch):
    calls = []
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: calls.append(1))
    v6b.train(build(v6b), *splits, tiny(v6b, max_iters=0))
    assert calls == [1]


# ---- torch.compile


def test_without_a_compiler_a_run_trains_all_the_same(corpus, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    argv = [*tiny_flags(v6b), "--data", str(corpus)]
    v6b.main(argv)
    expected = losses_and_sample(capsys.readouterr().out)
    torch._dynamo.reset()  # forget what another test has compiled
    with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}):
        v6b.main([*argv, "--compile"])
    out, err = capsys.readouterr()
    assert losses_and_sample(out) == expected
    notices = [line for line in err.splitlines() if line.startswith("notice: ")]
    assert len(notices) == 1
    assert notices[0].startswith("notice: --compile: ")
    assert notices[0].endswith("; training without it")


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
    np.testing.assert_allclose(*map(losses_of, histories), rtol=1e-5)


def test_without_compile_a_model_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda _: pytest.fail("not wanted"))
    model = build(v6b)
    assert v6b.compile_model(model, tiny(v6b, compile=False)) is model


def test_the_compiler_is_tried_on_the_device_of_the_settings(monkeypatch):
    works = {"cuda:0": False, "cuda:1": True}
    monkeypatch.setattr(hardware, "compiler_works", works.get)
    monkeypatch.setattr(torch, "compile", lambda target: ("compiled", target))
    model = build(v6b)
    cfg = tiny(v6b, compile=True, device="cuda:1")
    assert v6b.compile_model(model, cfg) == ("compiled", model)
    assert v6b.compile_model(model, replace(cfg, device="cuda:0")) is model


# ---- a whole run


def test_a_run_prints_losses_its_speed_and_a_sample(corpus, capsys):
    v6b.main([*tiny_flags(v6b), "--data", str(corpus), "--prompt", "The "])
    lines = capsys.readouterr().out.split("\n", maxsplit=3)
    loss = r"\d+\.\d{4}"
    for step, line in zip((0, 2, 3), lines, strict=False):
        speed = r", [\d,]+ tokens/s" if step > 0 else ""
        assert re.fullmatch(rf"step {step}: train loss {loss}, val loss {loss}{speed}", line)
    assert lines[3].startswith("The ")
    assert len(lines[3]) == 4 + 7 + 1
