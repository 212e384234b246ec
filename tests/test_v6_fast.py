"""v6_fast.py computes what v5 does, in float32 and in bfloat16, and reports its speed."""

import re

import data

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, random_tokens, refused, tiny, tiny_flags
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import v5_gpt
import v6_fast

SIZES = {
    "tiny": {},
    "one head": {"n_head": 1, "n_layer": 1},
    "many heads": {"n_head": 12, "n_embd": 96, "n_layer": 11},  # block 10 sorts before block 2
}


def fused(state):
    """v5's weights, or their gradients, with the names and shapes that they have in v6.

    The query weights of all heads, then the key weights, then the value weights make one matrix
    of (3 * n_embd, n_embd).
    """
    kept = {name: tensor for name, tensor in state.items() if ".heads." not in name}
    for attention in {name.split(".heads.")[0] for name in state if ".heads." in name}:
        heads = [name for name in state if name.startswith(f"{attention}.heads.")]
        parts = [n for part in ("query", "key", "value") for n in heads if f".{part}." in n]
        kept[f"{attention}.query_key_value.weight"] = torch.cat([state[name] for name in parts])
    return kept


def make_pair(**changes):
    """A v5 model, a v6 model with the same weights, and a batch."""
    torch.manual_seed(2)
    cfg = tiny(v5_gpt, **changes)
    slow = v5_gpt.LanguageModel(cfg, VOCAB_SIZE)
    for parameter in slow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fast = v6_fast.LanguageModel(tiny(v6_fast, **changes), VOCAB_SIZE)
    fast.load_state_dict(fused(slow.state_dict()))
    x, y = random_tokens(2, cfg.batch_size, cfg.block_size)
    return slow, fast, x, y


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", SIZES)
def test_logits_loss_and_gradients_equal_those_of_v5(size):
    slow, fast, x, y = make_pair(**SIZES[size])
    expected, expected_loss = slow(x, y)
    logits, loss = fast(x, y)
    assert relative_error(logits, expected) < 1e-5
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    expected_loss.backward()
    loss.backward()
    actual = gradients(fast)
    for name, gradient in fused(gradients(slow)).items():
        assert relative_error(actual[name], gradient) < 1e-5, name


def test_bfloat16_comes_close(monkeypatch):
    """GELU stands in for ReLU, whose gradient jumps when rounding changes the sign of its input."""
    monkeypatch.setattr(F, "relu", F.gelu)
    slow, fast, x, y = make_pair(n_head=4, n_embd=96, n_layer=3, block_size=64, batch_size=8)
    fast.use_bfloat16 = True  # every CPU can, if slowly
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
        assert relative_error(actual[name], gradient) < 2e-2, name


def test_training_follows_v5(splits):
    slow, fast, _, _ = make_pair()
    histories = []
    for script, model in ((v5_gpt, slow), (v6_fast, fast)):
        torch.manual_seed(4)
        cfg = tiny(script, max_iters=40, eval_interval=10, learning_rate=3e-3)
        histories.append(script.train(model, *splits, cfg))
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-4)
    assert histories[0][-1][1] < histories[0][0][1] - 0.1


class Shapes(TorchDispatchMode):
    """While it is active, it collects the shape of every tensor that PyTorch makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.seen.add(tuple(value.shape))
        return out


def test_attention_makes_no_tensor_of_all_pairs_of_positions():
    slow, fast, x, y = make_pair(dropout=0.5, block_size=7, batch_size=2)
    has_pairs = []
    for model in (slow, fast):
        with Shapes() as shapes:
            model(x, y)[1].backward()
        assert (2, 7, 18) in shapes.seen
        has_pairs.append(any(shape[-2:] == (7, 7) for shape in shapes.seen))
    assert has_pairs == [True, False]


def test_dropout_of_values_keeps_the_mean():
    torch.manual_seed(5)
    attention = v6_fast.MultiHeadAttention(tiny(v6_fast, dropout=0.3))
    x = torch.randn(1, 5, 18)
    expected = attention.eval()(x)
    attention.train()
    with torch.no_grad():
        draws = attention(x.expand(4000, -1, -1))
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


@pytest.fixture
def hardware(monkeypatch):
    """The names of the hardware that this machine seems to have; empty at first."""
    names = set()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in names)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in names)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: "gpu" in names)
    return names


@pytest.mark.parametrize(
    ("device", "has", "n_embd", "expected"),
    [
        ("cpu", "gpu", 384, "float32"),
        ("cpu", "amx", 384, "bfloat16"),
        ("cpu", "avx512", 384, "bfloat16"),
        ("cpu", "amx", 96, "float32"),
        ("cuda:1", "gpu", 96, "bfloat16"),
        ("cuda", "amx", 384, "float32"),
        ("mps", "gpu", 384, "float32"),
    ],
)
def test_auto_chooses_the_faster_dtype(hardware, device, has, n_embd, expected):
    hardware.add(has)
    assert v6_fast.choose_dtype(tiny(v6_fast, device=device, n_embd=n_embd)) == expected


def test_a_dtype_can_be_chosen_by_name(hardware):
    with pytest.raises(data.InputError, match="--dtype bfloat16: .*float32"):
        v6_fast.choose_dtype(tiny(v6_fast, dtype="bfloat16"))
    hardware.add("amx")
    assert v6_fast.LanguageModel(tiny(v6_fast, dtype="bfloat16"), VOCAB_SIZE).use_bfloat16
    cfg = tiny(v6_fast, dtype="float32", n_embd=384)
    assert not v6_fast.LanguageModel(cfg, VOCAB_SIZE).use_bfloat16


def test_other_dtypes_are_refused(capsys):
    line = refused(v6_fast, capsys, "--dtype", "float16")
    assert "argument --dtype: invalid choice" in line
    assert "float32" in line


def test_compiling_needs_a_compiler(corpus, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    line = refused(v6_fast, capsys, *tiny_flags(v6_fast), "--data", corpus, "--compile")
    assert line.startswith("error: --compile: ")
    assert line.endswith("; use --no-compile")


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


def test_batches_equal_those_of_the_helper(splits):
    cfg = tiny(v6_fast)
    torch.manual_seed(6)
    expected = data.get_batch(splits[0], cfg.batch_size, cfg.block_size, "cpu")
    torch.manual_seed(6)
    for actual, batch in zip(v6_fast.get_batch(splits[0], cfg), expected, strict=True):
        assert torch.equal(actual, batch)


def test_batches_from_tokens_on_the_device():
    cfg = tiny(v6_fast, batch_size=1000)
    tokens = torch.arange(20, dtype=torch.int32) * 1000  # each token tells its position
    x, y = v6_fast.get_batch(tokens, cfg)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (1000, 5)
    starts = x[:, :1] // 1000
    assert torch.equal(x, (starts + torch.arange(5)) * 1000)
    assert torch.equal(y, x + 1000)
    assert set(starts.flatten().tolist()) == set(range(15)), "every window, and no other"


def test_tokens_per_second_count_only_the_time_of_training(splits, monkeypatch, capsys):
    """By a clock on which each training step takes 2 seconds and each loss estimate 1000."""
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


def test_utilisation_counts_flops_as_the_paper_does(monkeypatch):
    """At full size, by a clock on which the matrix product takes a second."""
    cfg = v6_fast.Config(device="cpu")
    monkeypatch.setattr(v6_fast, "repeat", lambda product, number: [1.5, 1.0, 2.0])
    with torch.device("meta"):
        model = v6_fast.LanguageModel(cfg, 65)
    N = 6 * 12 * 384**2 + 384 * 65
    flops_per_token = 6 * N + 12 * 6 * 6 * 64 * 256
    expected = 1000 * flops_per_token / (2 * 1024**3)
    assert v6_fast.utilisation(model, 1000.0, cfg) == pytest.approx(expected)


def test_a_run_prints_losses_its_speed_and_a_sample(corpus, capsys):
    v6_fast.main([*tiny_flags(v6_fast), "--data", str(corpus), "--prompt", "The "])
    lines = capsys.readouterr().out.split("\n", maxsplit=4)
    for step, line in zip((0, 2, 3), lines, strict=False):
        loss = r"\d+\.\d{4}"
        pattern = rf"step {step}: train loss {loss}, val loss {loss}, [\d,]+ tokens/s"
        assert re.fullmatch(pattern, line)
    assert re.fullmatch(r"model FLOPs utilisation: \d+%", lines[3])
    assert lines[4].startswith("The ")
    assert len(lines[4]) == 4 + 7 + 1
