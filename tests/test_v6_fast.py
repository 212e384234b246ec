"""v6_fast.py: the function of v5 from the same weights, in float32 and bfloat16, and its speed."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, tiny, tiny_flags
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import v5_gpt
import v6_fast
from lab.ladder import ROOT, fused

SIZES = {
    "tiny": {},
    "one head": {"n_head": 1, "n_layer": 1},
    "twelve heads": {"n_head": 12, "n_embd": 96, "n_layer": 11},  # block 10 sorts before block 2
    "small": {"n_head": 4, "n_embd": 96, "n_layer": 3, "block_size": 64, "batch_size": 24},
}


def pair(**changes):
    """A v5 model and the v6 model of the same weights, and a batch."""
    torch.manual_seed(2)
    cfg = tiny(v5_gpt, **changes)
    slow = v5_gpt.LanguageModel(cfg, VOCAB_SIZE)
    for parameter in slow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fast = v6_fast.LanguageModel(tiny(v6_fast, **changes), VOCAB_SIZE)
    fast.load_state_dict(fused(slow.state_dict()))
    x, y = torch.randint(VOCAB_SIZE, (2, cfg.batch_size, cfg.block_size))
    return slow, fast, x, y


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", SIZES)
def test_the_weights_of_v5_give_the_same_logits_loss_and_gradients(size):
    slow, fast, x, y = pair(**SIZES[size])
    expected, expected_loss = slow(x, y)
    logits, loss = fast(x, y)
    assert relative_error(logits, expected) < 1e-5
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    expected_loss.backward()
    loss.backward()
    actual = gradients(fast)
    for name, gradient in fused(gradients(slow)).items():
        assert relative_error(actual[name], gradient) < 1e-5, name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bfloat16_gives_nearly_the_same(size, activation, monkeypatch):
    """To 2 %; but where rounding turns an input of ReLU to the other side of 0, its gradient goes
    from 0 to 1 or back, which no precision of the rest can mend. So those are compared with GELU.
    """
    monkeypatch.setattr(F, "relu", getattr(F, activation))
    slow, fast, x, y = pair(**SIZES[size])
    fast.use_bfloat16 = True  # on every CPU, however slow
    expected, expected_loss = slow(x, y)
    logits, loss = fast(x, y)
    assert logits.dtype == loss.dtype == torch.float32
    assert 1e-4 < relative_error(logits, expected) < 2e-2
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-2)
    expected_loss.backward()
    loss.backward()
    actual = gradients(fast)
    for name, gradient in fused(gradients(slow)).items():
        assert actual[name].dtype == torch.float32
        assert activation == "relu" or relative_error(actual[name], gradient) < 2e-2, name


def test_training_goes_the_way_of_v5(splits):
    slow, fast, _, _ = pair()
    histories = []
    for rung, model in ((v5_gpt, slow), (v6_fast, fast)):
        torch.manual_seed(4)
        cfg = tiny(rung, max_iters=40, eval_interval=10, learning_rate=3e-3)
        histories.append(rung.train(model, *splits, cfg))
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-4)
    assert histories[0][-1][1] < histories[0][0][1] - 0.1


class Shapes(TorchDispatchMode):
    """Within it, the shapes of all tensors that are made are noted."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.seen.add(tuple(value.shape))
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_tensor_of_all_pairs_of_positions(dropout):
    for number, model in enumerate(pair(dropout=dropout, block_size=7, batch_size=2)[:2]):
        x = torch.randint(VOCAB_SIZE, (2, 7))
        with Shapes() as shapes:
            model(x, x)[1].backward()
        assert (2, 7, 18) in shapes.seen
        assert any(shape[-2:] == (7, 7) for shape in shapes.seen) == (number == 0)


def test_dropout_of_values_keeps_the_expectation():
    torch.manual_seed(5)
    attention = v6_fast.MultiHeadAttention(tiny(v6_fast, dropout=0.3))
    x = torch.randn(1, 5, 18)
    expected = attention.eval()(x)
    attention.train()
    with torch.no_grad():
        draws = torch.cat([attention(x) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert error.min() > 0
    assert ((draws.mean(0) - expected[0]).abs() < 5 * error).all()


def test_dropout_is_on_the_values_and_after_each_projection():
    model = v6_fast.LanguageModel(tiny(v6_fast, dropout=0.5), VOCAB_SIZE)
    dropped = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda _, args, __: dropped.append(args[0].shape))
    model(torch.zeros(4, 5, dtype=torch.int64))
    assert dropped == [(4, 3, 5, 6), (4, 5, 18), (4, 5, 18)] * 2


@pytest.mark.parametrize(
    ("device", "hardware", "n_embd", "expected"),
    [
        ("cpu", {}, 384, "float32"),
        ("cpu", {"amx"}, 384, "bfloat16"),
        ("cpu", {"avx512"}, 384, "bfloat16"),
        ("cpu", {"amx", "avx512"}, 96, "float32"),
        ("cpu", {"cuda"}, 384, "float32"),
        ("cuda", {"cuda"}, 96, "bfloat16"),
        ("cuda:1", {"cuda"}, 384, "bfloat16"),
        ("cuda", {"amx", "avx512"}, 384, "float32"),
        ("mps", {"amx", "avx512", "cuda"}, 384, "float32"),
    ],
)
def test_the_dtype_fits_the_device(monkeypatch, device, hardware, n_embd, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in hardware)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in hardware)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: "cuda" in hardware)
    cfg = tiny(v6_fast, device=device, n_embd=n_embd)
    assert v6_fast.choose_dtype(cfg) == expected
    cfg.dtype = "float32"
    assert v6_fast.choose_dtype(cfg) == "float32"
    cfg.dtype = "bfloat16"
    if expected == "bfloat16" or (n_embd == 96 and hardware):
        assert v6_fast.choose_dtype(cfg) == "bfloat16"
        cfg = tiny(v6_fast, dtype="bfloat16")
        if device == "cpu":
            assert v6_fast.LanguageModel(cfg, VOCAB_SIZE).use_bfloat16
    else:
        with pytest.raises(data.InputError, match="--dtype bfloat16: .*float32"):
            v6_fast.choose_dtype(cfg)


@pytest.mark.parametrize("name", ["float16", "", "bf16"])
def test_other_dtypes_are_refused(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        v6_fast.main(["--dtype", name])
    err = capsys.readouterr().err
    assert "argument --dtype: invalid choice" in err
    assert "float32" in err
    assert err.count("\n") == 1


def command(*flags):
    return [sys.executable, "v6_fast.py", *map(str, flags)]


def test_compiling_without_a_compiler(corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = [*tiny_flags(v6_fast), "--data", corpus, "--compile"]
    done = subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stdout == ""
    notice, error = done.stderr.splitlines()
    assert notice.startswith("small defaults")
    assert error.startswith("error: --compile: ")
    assert error.endswith("; use --no-compile")


def test_compiling_changes_no_loss(splits, monkeypatch):
    """With PyTorch's graphs of the model, but without the C++ compiler, which takes a minute."""
    real, compiled = torch.compile, []

    def graphs_only(target):
        compiled.append(target)
        return real(target, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", graphs_only)
    histories = []
    for switch in (False, True):
        assert compiled == []
        cfg = tiny(v6_fast, compile=switch, dropout=0.0)
        torch.manual_seed(8)
        model = v6_fast.LanguageModel(cfg, VOCAB_SIZE)
        histories.append(v6_fast.train(model, *splits, cfg))
    assert compiled[-1] is model
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    np.testing.assert_allclose(*histories, rtol=1e-5)


def test_batches_are_those_of_the_helper(splits):
    cfg = tiny(v6_fast)
    torch.manual_seed(6)
    expected = data.get_batch(splits[0], cfg.batch_size, cfg.block_size, "cpu")
    torch.manual_seed(6)
    for actual, batch in zip(v6_fast.get_batch(splits[0], cfg), expected, strict=True):
        assert torch.equal(actual, batch)


def test_batches_from_tokens_on_the_device(splits):
    cfg = tiny(v6_fast, batch_size=4000)
    tokens = np.arange(20, dtype=np.int32) * 1000  # each token tells its place
    x, y = v6_fast.get_batch(torch.from_numpy(tokens), cfg)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (4000, 5)
    places = x[:, :1] // 1000
    assert torch.equal(x, (places + torch.arange(5)) * 1000)
    assert torch.equal(y, x + 1000)
    assert set(places.flatten().tolist()) == set(range(15)), "every window and no other"


def test_tokens_per_second_are_those_of_training_alone(splits, monkeypatch, capsys):
    """On a clock that moves in training steps and loss estimates: 2 seconds each, and 1000."""
    now = [0.0]
    real_estimate, real_batch = v6_fast.estimate_loss, data.get_batch

    def batch(*args):
        now[0] += 2
        return real_batch(*args)

    def estimate(*args):
        loss = real_estimate(*args)
        now[0] += 1000
        return loss

    def clock():
        now[0] += 1e-9  # so that no two readings are the same
        return now[0]

    monkeypatch.setattr(v6_fast.time, "perf_counter", clock)
    monkeypatch.setattr(data, "get_batch", batch)
    monkeypatch.setattr(v6_fast, "estimate_loss", estimate)
    monkeypatch.setattr(v6_fast, "utilisation", lambda model, speed, cfg: speed)
    cfg = tiny(v6_fast, max_iters=5, eval_interval=2)
    v6_fast.train(v6_fast.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg)
    out = capsys.readouterr().out
    speeds = re.findall(r", ([\d,]+) tokens/s$", out, re.MULTILINE)
    assert speeds == ["0", "10", "10", "10"]  # 4 windows of 5 tokens in 2 seconds
    assert "model FLOPs utilisation: 1000%" in out


def test_utilisation_is_of_the_flops_in_the_paper(monkeypatch):
    """At full size, with a clock on which the matrix product takes a second."""
    cfg = v6_fast.Config(device="cpu")
    monkeypatch.setattr(v6_fast, "repeat", lambda product, number: [1.5, 1.0, 2.0])
    with torch.device("meta"):
        model = v6_fast.LanguageModel(cfg, 65)
    N = 6 * 12 * 384**2 + 384 * 65
    flops_per_token = 6 * N + 12 * 6 * 6 * 64 * 256
    expected = 1000 * flops_per_token / (2 * 1024**3)
    assert v6_fast.utilisation(model, 1000.0, cfg) == pytest.approx(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count no page faults")
def test_memory_is_kept(splits):
    program = """
import resource, torch, v6_fast
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
v6_fast.keep_machine_busy(v6_fast.Config(compile=False))
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after * 10 < before, done.stderr
