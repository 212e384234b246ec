"""v8c_gpt2.py: the architecture of GPT-2, and the presets.

That it computes what they compute is tested in test_v8d_gpt2_weights.py, with transformers.
"""

import math

import pytest
import torch
from conftest import build, random_tokens, refused, shaken, tiny, tiny_flags
from torch.nn import functional as F

from data import token_files
from part4_gpt2 import v8c_gpt2 as v8c
from support import hardware

# ---- sizes


@pytest.mark.parametrize(
    ("preset", "vocab_size", "n_parameters"),
    [
        ("gpt2", 50_257, 124_439_808),
        ("gpt2-medium", 50_257, 354_823_168),
        ("gpt2-large", 50_257, 774_030_080),
        ("gpt2-xl", 50_257, 1_557_611_200),
    ],
)
def test_presets_have_the_parameters_of_the_released_models(preset, vocab_size, n_parameters):
    with torch.device("meta"):
        model = v8c.LanguageModel(tiny(v8c, **v8c.PRESETS[preset]), vocab_size)
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def settings(*flags):
    """The settings of a new run."""
    cfg, saved = v8c.read_settings([*flags, "--tokenizer", "char", "--device", "cpu"])
    assert saved == {}
    return cfg


@pytest.mark.parametrize("preset", v8c.PRESETS)
def test_a_preset_sets_its_sizes_and_nothing_else(preset):
    plain, cfg = settings("--dtype", "float32"), settings("--dtype", "float32", "--preset", preset)
    assert vars(cfg) == vars(plain) | v8c.PRESETS[preset] | {"preset": preset}


def test_a_flag_overrides_any_size_of_a_preset():
    typed = {"n_layer": 3, "n_head": 5, "n_embd": 35, "block_size": 9}
    for name, value in typed.items():
        cfg = settings("--preset", "gpt2-xl", f"--{name}", str(value))
        assert vars(cfg).items() >= (v8c.PRESETS["gpt2-xl"] | {name: value}).items()


def test_the_dtype_depends_on_the_sizes_of_the_preset(monkeypatch):
    """It is decided when they are known, and so is the tokenizer."""
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    assert settings().dtype == "float32"
    assert settings("--preset", "gpt2").dtype == "bfloat16"
    assert settings("--preset", "gpt2", "--n_embd", "96").dtype == "float32"
    monkeypatch.setattr(token_files, "choose_tokenizer", lambda name: f"chosen for {name}")
    assert settings("--preset", "gpt2").tokenizer == "chosen for char"


def test_a_preset_is_refused_for_a_run_that_has_begun(corpus, tmp_path, capsys):
    """A run that began with a preset goes on with it, and with the sizes that flags had changed."""
    for preset in ("gpt2-xl", ""):
        folder = tmp_path / f"run {preset}"
        chosen = ["--preset", preset] if preset else []
        v8c.main([*tiny_flags(v8c, out_dir=folder), "--data", str(corpus), *chosen])
        for mode in ("--resume", "--sample_only"):
            line = refused(v8c, capsys, mode, "--out_dir", folder, "--preset", "gpt2")
            assert line.startswith(f"error: --preset gpt2: the checkpoint has {preset!r}, ")
        again = [["--preset", preset], []] if preset else [[]]
        for n, typed in enumerate(again, start=4):
            v8c.main(["--resume", "--out_dir", str(folder), "--max_iters", str(n), *typed])
        config = torch.load(folder / "latest.pt", weights_only=True)["config"]
        assert config["preset"] == preset
        assert (config["max_iters"], config["n_embd"]) == (n, 18)


# ---- the architecture


def test_the_output_layer_is_the_token_embedding():
    model = build(v8c)
    assert model.lm_head.weight is model.token_embedding.weight
    model(random_tokens(2, 5), random_tokens(2, 5))[1].backward()
    gradient = model.token_embedding.weight.grad
    assert (gradient != 0).any(dim=1).all(), "the output layer reaches every token"


def test_linear_layers_have_biases_but_for_the_output_layer():
    for name, module in build(v8c).named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (module.bias is None) == (name == "lm_head"), name


def test_weights_start_small_and_projections_smaller():
    sizes = {"n_embd": 192, "n_layer": 8, "block_size": 99}
    torch.manual_seed(1)
    for name, parameter in v8c.LanguageModel(tiny(v8c, **sizes), 200).named_parameters():
        if parameter.ndim == 2:
            is_projection = name.endswith("projection.weight")
            std = 0.02 / 4 if is_projection else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert parameter.unique().tolist() == [float("norm" in name and "weight" in name)], name


def test_gelu_is_the_approximation_with_tanh():
    x = torch.linspace(-6, 6, 999).view(37, 27)
    layer = v8c.FeedForward(tiny(v8c, n_embd=27))
    for linear in (layer.expansion, layer.projection):
        torch.nn.init.zeros_(linear.bias)
        torch.nn.init.eye_(linear.weight)
    by_hand = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(layer(x), by_hand)
    assert (layer(x) - F.gelu(x)).abs().max() > 1e-4


def test_dropout_is_applied_to_the_embeddings_in_training_only():
    model = shaken(build(v8c, dropout=0.5))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    idx = random_tokens(4, 5)
    model.train()(idx)
    model.eval()(idx)
    dropped, kept = seen
    positions = torch.arange(5)
    assert torch.equal(kept, model.token_embedding(idx) + model.position_embedding(positions))
    is_dropped = dropped == 0
    assert 0.3 < is_dropped.float().mean() < 0.7
    assert torch.equal(dropped, (2 * kept).masked_fill(is_dropped, 0))
