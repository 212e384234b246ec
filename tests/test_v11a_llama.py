"""v11a_llama.py: the settings that make v9d's model that of Llama and Qwen3.

That it computes what they compute is tested in test_v11c_llama_weights.py, with transformers.
"""

import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB_SIZE, build, random_tokens, refused, shaken, tiny, tiny_flags
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from part5_modern import v9d_gqa as v9d
from part7_released import v11a_llama as v11a
from support import hardware

SMOLLM2_135M = {
    "n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
QWEN3_0_6B = {
    "n_layer": 28, "n_head": 16, "n_kv_head": 8, "n_embd": 1024, "intermediate_size": 3072,
    "head_size": 128, "qk_norm": True, "tie_word_embeddings": True,
}
LLAMA_3_2_1B = {
    "n_layer": 16, "n_head": 32, "n_kv_head": 8, "n_embd": 2048, "intermediate_size": 8192,
    "tie_word_embeddings": True,
}
# Another value of each setting in SIZES than that of a tiny run.
OTHERS = {
    "n_embd": 24, "n_head": 1, "n_layer": 1, "n_kv_head": 3, "head_size": 8,
    "intermediate_size": 40, "rms_norm_eps": 1e-6, "rope_theta": 1000.0, "rope_factor": 8.0,
    "rope_low_freq_factor": 2.0, "rope_high_freq_factor": 3.0,
    "original_max_position_embeddings": 100,
}


def decisive(model):
    """The model with random weights that make each choice uneven, and depend on the whole text."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
    return model.eval()


def sizes_of(model) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def frequencies_of(cfg) -> torch.Tensor:
    return v11a.rotation_angles(torch.ones(1).long(), cfg)[0]


def n_parameters(sizes: dict, vocab_size: int) -> int:
    with torch.device("meta"):
        model = v11a.LanguageModel(tiny(v11a, **sizes), vocab_size)
    return sum(parameter.numel() for parameter in model.parameters())


# ---- v9d, and what may differ


def test_a_new_model_has_the_weights_of_v9d():
    old, new = build(v9d).state_dict(), build(v11a).state_dict()
    assert list(new) == list(old)
    assert all(torch.equal(new[name], weight) for name, weight in old.items())


def test_without_flags_it_is_v9d():
    old, new = decisive(build(v9d)), build(v11a).eval()
    new.load_state_dict(old.state_dict())
    idx, targets = random_tokens(3, 5), random_tokens(3, 5)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        assert torch.equal(actual, expected)
    texts = []
    for script, model in ((v9d, old), (v11a, new)):
        torch.manual_seed(5)
        tokens = list(model.stream(idx[:, :2], 20, tiny(script)))
        texts.append(torch.cat(tokens, dim=1))
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_flags_it_trains_and_samples_as_v9d(corpus, tmp_path, capsys, monkeypatch, dtype):
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    changes = {"max_iters": 8, "warmup_iters": 2, "dropout": 0.2, "max_new_tokens": 50}
    outputs, states = [], []
    for script in (v9d, v11a):
        folder = tmp_path / script.__name__
        flags = tiny_flags(script, out_dir=folder, dtype=dtype, **changes)
        script.main([*flags, "--data", str(corpus)])
        outputs.append(re.sub(r", [\d,]+ tokens/s", "", capsys.readouterr().out))
        states.append(torch.load(folder / "latest.pt", weights_only=True))
    assert outputs[0] == outputs[1]
    old, new = states
    assert new["history"] == old["history"]
    assert len(old["history"]) == 5
    for name, weight in old["model"].items():
        assert torch.equal(new["model"][name], weight), name


def test_heads_may_have_any_even_size():
    """n_embd, 18, need not be a multiple of n_head then."""
    expected = sizes_of(build(v11a))
    for n_head, n_kv_head, head_size in ((3, 1, 10), (3, 3, 2), (4, 2, 6)):
        sizes = {"n_head": n_head, "n_kv_head": n_kv_head, "head_size": head_size}
        model = build(v11a, **sizes)
        for name in expected:
            if name.endswith("attention.query.weight"):
                expected[name] = (n_head * head_size, 18)
            if name.endswith(("attention.key.weight", "attention.value.weight")):
                expected[name] = (n_kv_head * head_size, 18)
            if name.endswith("attention.projection.weight"):
                expected[name] = (18, n_head * head_size)
        assert sizes_of(model) == expected
        cache = v11a.KVCache(tiny(v11a, **sizes), 2, torch.device("cpu"))
        assert cache.keys.shape == cache.values.shape == (2, n_kv_head, 5, head_size)


@pytest.mark.parametrize(("intermediate_size", "hidden"), [(0, 48), (7, 7), (100, 100)])
def test_the_feed_forward_network_may_have_any_width(intermediate_size, hidden):
    layer = v11a.FeedForward(tiny(v11a, intermediate_size=intermediate_size))
    assert layer.gate.weight.shape == layer.expansion.weight.shape == (hidden, 18)
    assert layer.projection.weight.shape == (18, hidden)


def normalised(x, weight):
    """RMSNorm by hand."""
    return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight


def test_the_result_in_bfloat16_is_that_in_float32_rounded():
    norm = v11a.RMSNorm(384, 1e-5)
    x = 30 * torch.randn(9, 384).bfloat16()
    expected = norm(x.float())
    actual = norm.bfloat16()(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected.bfloat16())


def test_weights_in_bfloat16_scale_the_result():
    norm = shaken(v11a.RMSNorm(384, 1e-5))
    norm.bfloat16()
    x = torch.randn(9, 384).bfloat16()
    expected = torch.nn.functional.rms_norm(x.float(), (384,), norm.weight.float(), 1e-5)
    actual = norm(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_by_hand(qk_norm):
    """Each head's query and key are normalised, but no value, and then they are rotated."""
    changes = {"head_size": 10, "qk_norm": qk_norm, "rms_norm_eps": 0.1}
    cfg = tiny(v11a, **changes)
    layer = decisive(v11a.MultiHeadAttention(cfg))
    x = torch.randn(2, 5, 18)
    angles = v11a.rotation_angles(torch.arange(5), cfg)
    cos, sin = angles.cos(), angles.sin()
    queries = (x @ layer.query.weight.T).view(2, 5, 3, 10)
    key, value = x @ layer.key.weight.T, x @ layer.value.weight.T
    if qk_norm:
        key = normalised(key, layer.key_norm.weight)
    future = torch.ones(5, 5).triu(1).bool()
    outputs = []
    for query in queries.unbind(2):
        if qk_norm:
            query = normalised(query, layer.query_norm.weight)
        scores = v11a.rotate(query, cos, sin) @ v11a.rotate(key, cos, sin).mT / math.sqrt(10)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
    expected = torch.cat(outputs, dim=-1) @ layer.projection.weight.T
    torch.testing.assert_close(layer(x, cos, sin), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lengths", [[9] + [1] * 15, [24], [1] * 24])
def test_all_of_it_works_through_the_cache(lengths):
    sizes = {
        "block_size": 24, "qk_norm": True, "head_size": 10, "rope_factor": 8.0,
        "rope_theta": 100.0, "tie_word_embeddings": True, "original_max_position_embeddings": 60,
    }
    model = decisive(build(v11a, **sizes))
    idx = random_tokens(3, 24)
    expected, _ = model(idx)
    caches = [v11a.KVCache(tiny(v11a, **sizes), 3, idx.device) for _ in model.blocks]
    pieces = [model(piece, caches=caches)[0] for piece in idx.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-4)


def test_every_normalisation_has_the_same_eps():
    model = decisive(build(v11a, qk_norm=True, rms_norm_eps=0.3))
    norms = [module for module in model.modules() if isinstance(module, v11a.RMSNorm)]
    assert len(norms) == 2 * 4 + 1
    for norm in norms:
        x = 0.5 * torch.randn(3, len(norm.weight))
        torch.testing.assert_close(norm(x), F.rms_norm(x, norm.weight.shape, norm.weight, 0.3))


# ---- rotation


def test_rope_theta_is_the_base_of_the_frequencies():
    positions = torch.arange(50)
    pairs = torch.arange(4)
    for rope_theta in (1.0, 100.0, 1e6):
        cfg = tiny(v11a, head_size=8, rope_theta=rope_theta)
        expected = positions[:, None] * rope_theta ** (-2 * pairs / 8)
        torch.testing.assert_close(v11a.rotation_angles(positions, cfg), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500_000.0, "rope_factor": 8.0},
        {"rope_theta": 500_000.0, "rope_factor": 32.0},
        {"rope_factor": 2.5, "rope_low_freq_factor": 0.5, "rope_high_freq_factor": 20.0},
        {"rope_factor": 4.0, "original_max_position_embeddings": 60},
    ],
    ids=["Llama 3.1", "Llama 3.2", "other limits", "a short context"],
)
def test_slowed_rotations_are_those_of_transformers(changes):
    cfg = tiny(v11a, head_size=64, **changes)
    rope_parameters = {
        "rope_type": "llama3", "rope_theta": cfg.rope_theta, "factor": cfg.rope_factor,
        "low_freq_factor": cfg.rope_low_freq_factor, "high_freq_factor": cfg.rope_high_freq_factor,
        "original_max_position_embeddings": cfg.original_max_position_embeddings,
    }
    config = LlamaConfig(hidden_size=128, head_dim=64, rope_parameters=rope_parameters)
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config)
    assert scale == 1
    frequencies = frequencies_of(cfg)
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0)

    slowdown = frequencies_of(replace(cfg, rope_factor=1.0)) / frequencies
    is_fast, is_slow = slowdown < 1.00001, slowdown > 0.99999 * cfg.rope_factor
    assert is_fast.any() and is_slow.any() and not (is_fast | is_slow).all(), "all three kinds"

    positions = torch.randint(1000, (50,))
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), positions[None])
    angles = v11a.rotation_angles(positions, cfg).repeat(1, 2)
    torch.testing.assert_close(angles.cos(), cos[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(angles.sin(), sin[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("low", ["4", "5.5"])
def test_a_slow_frequency_must_be_below_a_fast_one(corpus, tmp_path, capsys, low):
    """Otherwise no frequency would be between them, or every one would be both."""
    flags = tiny_flags(v11a, out_dir=tmp_path / "run", rope_low_freq_factor=low)
    line = refused(v11a, capsys, *flags, "--data", corpus)
    assert line == "error: --rope_low_freq_factor: must be below --rope_high_freq_factor"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"rope_theta": 100.0}, {"rope_factor": 8.0}])
def test_the_model_rotates_as_the_settings_say(changes):
    old = decisive(build(v11a, original_max_position_embeddings=20))
    new = build(v11a, original_max_position_embeddings=20, **changes).eval()
    new.load_state_dict(old.state_dict())
    idx = random_tokens(3, 5)
    difference = (old(idx)[0] - new(idx)[0]).abs()
    assert difference[:, 0].max() < 1e-5, "position 0 isn't rotated"
    assert difference[:, 2:].max() > 0.1


# ---- tied embeddings


def test_the_output_layer_may_be_the_token_embedding():
    tied, untied = build(v11a, tie_word_embeddings=True), build(v11a)
    assert tied.lm_head.weight is tied.token_embedding.weight
    assert untied.lm_head.weight is not untied.token_embedding.weight
    saved = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert saved == VOCAB_SIZE * 18


def test_a_run_with_tied_embeddings_saves_them_once_and_goes_on(corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [*tiny_flags(v11a, out_dir=folder, max_new_tokens=40), "--data", str(corpus)]
    v11a.main([*flags, "--tie_word_embeddings"])
    sample = re.sub(r"^step .*\n", "", capsys.readouterr().out, flags=re.MULTILINE)
    state = torch.load(folder / "latest.pt", weights_only=True)
    weights = state["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["token_embedding.weight"].data_ptr()
    assert len(state["optimizer"]) == len(weights) - 1
    v11a.main(["--sample_only", "--out_dir", str(folder)])
    assert capsys.readouterr().out == sample
    v11a.main(["--resume", "--out_dir", str(folder), "--max_iters", "4"])
    weights = torch.load(folder / "latest.pt", weights_only=True)["model"]
    assert torch.equal(weights["lm_head.weight"], weights["token_embedding.weight"])
    assert not torch.equal(weights["lm_head.weight"], state["model"]["lm_head.weight"])


# ---- sizes of released models


@pytest.mark.parametrize(
    ("sizes", "vocab_size", "expected"),
    [(SMOLLM2_135M, 49_152, 134_515_008), (QWEN3_0_6B, 151_936, 596_049_920)],
    ids=["SmolLM2-135M", "Qwen3-0.6B"],
)
def test_released_models_have_as_many_parameters(sizes, vocab_size, expected):
    assert n_parameters(sizes, vocab_size) == expected


def test_llama_has_as_many_parameters_as_in_transformers():
    config = LlamaConfig(
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, hidden_size=2048,
        intermediate_size=8192, tie_word_embeddings=True, vocab_size=128_256,
    )
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    assert n_parameters(LLAMA_3_2_1B, 128_256) == expected


# ---- main


def test_a_checkpoint_keeps_its_settings(corpus, tmp_path, capsys):
    v11a.main([*tiny_flags(v11a, out_dir=tmp_path), "--data", str(corpus)])
    switches = {"qkv_bias", "qk_norm", "tie_word_embeddings"}
    assert set(v11a.SIZES) == OTHERS.keys() | switches
    for mode in ("--resume", "--sample_only"):
        for name, value in OTHERS.items():
            line = refused(v11a, capsys, mode, "--out_dir", tmp_path, f"--{name}", value)
            assert line.startswith(f"error: --{name} {value}: the checkpoint has ")
        for name in switches:
            line = refused(v11a, capsys, mode, "--out_dir", tmp_path, f"--{name}")
            assert line.startswith(f"error: --{name} True: the checkpoint has False, ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 20}, "--n_embd 20: not a multiple of --n_head 3"),
        ({"n_embd": 15}, "5 is odd, but rotation needs pairs"),
        ({"head_size": 7}, "7 is odd, but rotation needs pairs"),
        ({"head_size": -2}, "--head_size -2: must be at least 0 "),
        ({"head_size": 8, "n_kv_head": 2}, "--n_head 3: not a multiple of --n_kv_head 2"),
    ],
)
def test_impossible_heads_are_refused(corpus, capsys, changes, message):
    flags = [*tiny_flags(v11a), *(f"--{name}={value}" for name, value in changes.items())]
    line = refused(v11a, capsys, *flags, "--data", corpus)
    assert message in line
