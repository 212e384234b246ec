"""v11c_llama_weights.py: Llama and Qwen in and out, compared with transformers, and fine-tuning.

How the files of models are found, read and refused is tested in test_llama_files.py and
test_model_files.py.
"""

import json
import logging
import os
import re
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, refused, tiny_flags
from safetensors.torch import load_file
from test_v11b_tokenizer import byte_level
from tokenizers import AddedToken
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import data
from part7_released import v11b_tokenizer as v11b
from part7_released import v11c_llama_weights as v11c
from support import hardware, llama_files, model_files

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
N_VOCAB = 300  # the tokens of byte_level()
SIZES = {
    "vocab_size": N_VOCAB, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-3,
    "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 700.0}
BRIEFLY = ["--device", "cpu", "--max_new_tokens", "1"]
ONE_FILE, SHARDS = "1GB", "20KB"

# Every two values occur together: kind, tied, key/value heads, width of a head, rotation, files.
CASES = [
    ("llama", True, 1, 8, DEFAULT, ONE_FILE),
    ("llama", True, 3, 12, LLAMA3, SHARDS),
    ("llama", False, 1, 12, LLAMA3, ONE_FILE),
    ("llama", False, 3, 8, DEFAULT, SHARDS),
    ("qwen2", True, 1, 8, LLAMA3, SHARDS),
    ("qwen2", True, 3, 12, DEFAULT, ONE_FILE),
    ("qwen2", False, 1, 12, DEFAULT, SHARDS),
    ("qwen2", False, 3, 8, LLAMA3, ONE_FILE),
    ("qwen3", True, 1, 12, DEFAULT, SHARDS),
    ("qwen3", True, 3, 8, LLAMA3, ONE_FILE),
    ("qwen3", False, 1, 8, LLAMA3, SHARDS),
    ("qwen3", False, 3, 12, DEFAULT, ONE_FILE),
]


def make_reference(kind: str, **changes):
    """A random model of transformers, whose choices are far from even."""
    config, model = KINDS[kind]
    if kind == "mistral":
        changes["sliding_window"] = None
    torch.manual_seed(2)
    made = model(config(**SIZES | changes))
    for name, parameter in made.named_parameters():
        std = 0.15 if name.endswith("bias") else 0.2  # larger biases would hide what is read
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=std)
    return made.eval()


def save(model, folder: Path, size: str = ONE_FILE) -> None:
    """Write a model of transformers as it is released, with a tokenizer."""
    model.save_pretrained(folder, max_shard_size=size)
    byte_level().save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(name_of, case)))
def released(request, tmp_path_factory):
    """A folder with a small model of each kind, and the model. Tests must not write to it."""
    kind, tied, n_kv_head, head_dim, rope, size = request.param
    sizes = {"num_key_value_heads": n_kv_head, "head_dim": head_dim, "tie_word_embeddings": tied}
    model = make_reference(kind, rope_parameters=rope, **sizes)
    folder = tmp_path_factory.mktemp("released")
    save(model, folder, size)
    assert (folder / "model.safetensors.index.json").exists() == (size == SHARDS)
    return folder, model


def name_of(value) -> str:
    """A part of the name of a case."""
    return value["rope_type"] if isinstance(value, dict) else str(value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a small Llama in float32. Tests may change it."""
    save(make_reference("llama"), tmp_path / "model")
    return tmp_path / "model"


def settings(folder: Path, *typed: str):
    """The settings of a run that starts from a folder."""
    cfg, saved, released = v11c.read_settings(
        ["--init_from", str(folder), "--device", "cpu", *map(str, typed)]
    )
    assert saved == {}
    assert released == llama_files.read_config(folder)
    return cfg


def load(folder: Path, *typed: str, dtype: str = "float32"):
    """The model that --init_from makes of a folder, to sample from it."""
    cfg = settings(folder, "--sample_only", *typed)
    released = llama_files.read_config(folder)
    return v11c.make_model(replace(cfg, dtype=dtype), released, released["vocab_size"]).eval()


def in_pieces(model, idx, lengths, *typed: str, folder: Path):
    """The logits of idx, if it comes to the caches of a model in pieces of these lengths."""
    cfg = settings(folder, *typed)
    caches = [v11c.KVCache(cfg, len(idx), model.lm_head.weight) for _ in model.blocks]
    return torch.cat([model(piece, caches=caches)[0] for piece in idx.split(lengths, dim=1)], 1)


def load_in_transformers(folder: Path):
    """The model that transformers makes of a folder, without a single warning."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            model.generate(torch.zeros(1, 2).long(), max_new_tokens=1, do_sample=False)
    finally:
        logger.removeHandler(handler)
    assert said == []
    assert not any(report.values())
    return model.eval()


def flags(corpus, **changes):
    return [*tiny_flags(v11c, **changes), "--data", str(corpus)]


def output(capsys, *flags):
    capsys.readouterr()
    v11c.main([str(flag) for flag in flags])
    return capsys.readouterr().out


def largest_difference(ours, theirs) -> float:
    return (ours - theirs).abs().max().item()


# ---- the same function as transformers


@torch.no_grad()
def test_logits_equal_those_of_transformers(released):
    folder, theirs = released
    ours = load(folder)
    idx = torch.randint(N_VOCAB, (3, 60))
    for T in (1, 7, 60):
        logits, _ = ours(idx[:, :T])
        assert logits.shape == (3, T, N_VOCAB)
        assert largest_difference(logits, theirs(idx[:, :T]).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5, 59, 60])
def test_logits_from_the_cache_equal_those_of_transformers(released, n):
    folder, theirs = released
    idx = torch.randint(N_VOCAB, (2, 60))
    logits = in_pieces(load(folder), idx, [n] + [1] * (60 - n), folder=folder)
    assert largest_difference(logits, theirs(idx).logits) < 1e-4


@torch.no_grad()
def test_logits_beyond_the_cache_equal_those_of_transformers_with_a_banded_mask(released):
    """Each position sees the last block_size positions."""
    folder, theirs = released
    idx = torch.randint(N_VOCAB, (2, 40))
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    band = causal & causal.tril(diagonal=-10).logical_not()
    mask = band.expand(2, 1, 40, 40)
    expected = theirs(idx, attention_mask=mask).logits
    assert largest_difference(expected, theirs(idx).logits) > 1e-2
    short = ["--block_size", "10"]
    logits = in_pieces(load(folder, *short), idx, [4] + [1] * 36, *short, folder=folder)
    assert largest_difference(logits, expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [8, 12])
def test_a_mistral_without_sliding_windows_is_a_llama(tmp_path, head_dim):
    theirs = make_reference("mistral", head_dim=head_dim)
    save(theirs, tmp_path)
    idx = torch.randint(N_VOCAB, (2, 60))
    assert largest_difference(load(tmp_path)(idx)[0], theirs(idx).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_that_no_layer_uses_change_nothing(tmp_path, kind):
    windows = {"use_sliding_window": True, "sliding_window": 4}
    theirs = make_reference(kind, max_window_layers=2, **windows)
    save(theirs, tmp_path)
    idx = torch.randint(N_VOCAB, (2, 60))
    expected = theirs(idx).logits
    assert largest_difference(load(tmp_path)(idx)[0], expected) < 1e-4
    used = make_reference(kind, max_window_layers=1, **windows)
    assert largest_difference(used(idx).logits, expected) > 1e-2
    save(used, tmp_path)
    with pytest.raises(data.InputError, match="it has sliding windows"):
        settings(tmp_path)


def test_losses_equal_those_of_transformers(released):
    folder, theirs = released
    idx = torch.randint(N_VOCAB, (3, 24))
    _, loss = load(folder)(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(theirs(idx, labels=idx).loss.item(), abs=1e-4)


def continued(theirs, idx, eos_token_id=None):
    """The most likely 50 tokens after idx, by transformers."""
    how = {"attention_mask": torch.ones_like(idx), "max_new_tokens": 50, "do_sample": False}
    return theirs.generate(idx, eos_token_id=eos_token_id, pad_token_id=0, **how)


def greedy(folder, idx, **how):
    """The most likely 50 tokens after idx, by the model in a folder."""
    cfg = settings(folder, "--sample_only", "--temperature", "0")
    return torch.cat([idx, *load(folder, **how).stream(idx, 50, cfg)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_equals_that_of_transformers(tmp_path, kind):
    rope = DEFAULT if kind == "mistral" else LLAMA3
    theirs = make_reference(kind, rope_parameters=rope)
    save(theirs, tmp_path)
    idx = torch.randint(N_VOCAB, (2, 9))
    text = greedy(tmp_path, idx)
    assert text.shape == (2, 59)
    assert torch.equal(text, continued(theirs, idx))
    assert len(set(text[0, 9:].tolist())) > 9, "not the same few tokens for ever"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_released_model_just_generates(tmp_path, capsys, monkeypatch, kind):
    """It needs no corpus, writes nothing, and ends where transformers ends."""
    folder, here = tmp_path / "model", tmp_path / "here"
    theirs = make_reference(kind)
    save(theirs, folder)
    here.mkdir()
    monkeypatch.chdir(here)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    idx = torch.tensor([tokenizer.encode("The fox")])
    n_prompt = idx.shape[1]
    endless = continued(theirs, idx)[0].tolist()
    new = [i for i in range(n_prompt + 5, n_prompt + 40) if endless[i] not in endless[:i]]
    end_of_text = [endless[new[0]], endless[new[1]]]
    for eos_token_id in (None, end_of_text[1], end_of_text):
        saved = {"eos_token_id": eos_token_id}
        (folder / "generation_config.json").write_text(json.dumps(saved), encoding="utf-8")
        sampling = ["--sample_only", "--temperature", "0", "--max_new_tokens", "50"]
        prompt = ["--prompt", "The fox", "--data", "missing.txt", "--device", "cpu"]
        out = output(capsys, "--init_from", folder, *sampling, *prompt)
        ids = continued(theirs, idx, eos_token_id)[0].tolist()
        if eos_token_id is None:
            assert ids == endless
        else:
            assert n_prompt + 5 < len(ids) < len(endless)
            ids = ids[:-1]
        assert out == tokenizer.decode(ids) + "\n"
    assert list(here.iterdir()) == []


# ---- released models, from their config.json

SMOLLM2_135M = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
    "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
}  # fmt: skip
QWEN3_600M = {
    "model_type": "qwen3", "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "attention_bias": False, "vocab_size": 151936,
}  # fmt: skip
QWEN2_500M = {
    "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
LLAMA_1B = {
    "model_type": "llama", "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "attention_bias": False, "mlp_bias": False, "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "n_parameters"),
    [
        (SMOLLM2_135M, 134_515_008), (QWEN2_500M, 494_032_768), (QWEN3_600M, 596_049_920),
        (LLAMA_1B, 1_235_814_400),
    ],
    ids=["SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B"],
)
def test_released_models_have_as_many_parameters(tmp_path, config, n_parameters):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    cfg = settings(tmp_path)
    assert cfg.block_size == 1024, "whatever the model is trained for"
    with torch.device("meta"):
        model = v11c.LanguageModel(cfg, config["vocab_size"])
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    weights = v11c.weights_by_released_name(model)
    assert sum(weight.numel() for weight in weights.values()) == n_parameters


# ---- memory and dtypes


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_released_weights_are_the_parameters_themselves(kind, tied, tmp_path):
    theirs = make_reference(kind, tie_word_embeddings=tied)
    save(theirs, tmp_path)
    model = load(tmp_path)
    weights = v11c.weights_by_released_name(model)
    shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {weight.untyped_storage().data_ptr() for weight in weights.values()} == own
    for weight in weights.values():
        weight.zero_()
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", model_files.DTYPES)
def test_a_model_has_its_dtype_from_the_start(folder, monkeypatch, dtype):
    """Not only after it was in memory with a larger one."""
    seen = set()

    class LanguageModel(v11c.LanguageModel):
        def to_empty(self, device):
            seen.update((p.device.type, p.dtype) for p in self.parameters())
            return super().to_empty(device=device)

    monkeypatch.setattr(v11c, "LanguageModel", LanguageModel)
    model = load(folder, dtype=dtype)
    expected = model_files.DTYPES[dtype]
    assert seen == {("meta", expected)}
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert torch.ones(1).dtype == torch.float32


def dtypes_used(monkeypatch, capsys, *typed) -> set:
    """The dtypes of the weights with which main() samples, or trains."""
    seen = set()

    def stream(model, *_):
        seen.update(parameter.dtype for parameter in model.parameters())
        return iter([])

    def train(model, *_):
        seen.update(parameter.dtype for parameter in model.parameters())
        raise data.InputError("seen enough")

    monkeypatch.setattr(v11c.LanguageModel, "stream", stream)
    monkeypatch.setattr(v11c, "train", train)
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    if "--sample_only" in typed:
        v11c.main([str(word) for word in typed])
    else:
        refused(v11c, capsys, *typed)
    return seen


@pytest.mark.parametrize(
    ("stored", "typed", "expected"),
    [
        (torch.bfloat16, [], torch.bfloat16),
        (torch.float16, [], torch.float16),
        (torch.float32, [], torch.float32),
        (torch.bfloat16, ["--dtype", "float32"], torch.float32),
        (torch.float32, ["--dtype", "bfloat16"], torch.bfloat16),
    ],
)
def test_samples_are_drawn_in_the_dtype_of_the_file(
    tmp_path, corpus, capsys, monkeypatch, stored, typed, expected
):
    """A flag overrides it, and training needs float32."""
    save(make_reference("qwen3").to(stored), tmp_path / "model")
    typed = ["--init_from", tmp_path / "model", "--device", "cpu", *typed]
    assert dtypes_used(monkeypatch, capsys, *typed, "--sample_only") == {expected}
    training = ["--data", corpus, "--block_size", "9", "--out_dir", tmp_path / "run"]
    assert dtypes_used(monkeypatch, capsys, *typed, *training) == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_matmuls_in_training_is_not_that_of_the_files(tmp_path, dtype):
    """A narrow model trains faster in float32 on a CPU."""
    save(make_reference("llama").to(model_files.DTYPES[dtype]), tmp_path)
    assert settings(tmp_path).dtype == "float32"
    assert settings(tmp_path, "--sample_only").dtype == dtype


@torch.no_grad()
def test_bfloat16_is_close_to_float32(tmp_path):
    theirs = make_reference("qwen3", rope_parameters=LLAMA3).to(torch.bfloat16)
    save(theirs, tmp_path)
    idx = torch.randint(N_VOCAB, (2, 60))
    exact = load(tmp_path)(idx)[0]
    logits = load(tmp_path, dtype="bfloat16")(idx)[0]
    assert logits.dtype == torch.bfloat16
    error = largest_difference(logits.float(), exact)
    assert 0 < error < 1.5 * largest_difference(theirs(idx).logits.float(), exact)


@pytest.mark.parametrize("dtype", model_files.DTYPES)
def test_the_cache_has_the_dtype_of_the_weights_and_tokens_are_chosen_in_float32(
    folder, monkeypatch, dtype
):
    caches, logits = [], []
    model = load(folder, dtype=dtype)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: caches.extend(kwargs["caches"]), with_kwargs=True
    )
    real = v11c.choose_token

    def choose_token(values, *args):
        logits.append(values)
        return real(values, *args)

    monkeypatch.setattr(v11c, "choose_token", choose_token)
    list(model.stream(torch.randint(N_VOCAB, (2, 9)), 3, settings(folder)))
    tensors = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
    assert {tensor.dtype for tensor in tensors} == {model_files.DTYPES[dtype]}
    assert {values.dtype for values in logits} == {torch.float32}


# ---- exports


@torch.no_grad()
def test_an_exported_model_is_the_same_in_transformers_and_here(released, tmp_path, capsys):
    folder, theirs = released
    export = tmp_path / "new" / "export"
    output(capsys, "--init_from", folder, "--sample_only", "--export", export, *BRIEFLY)
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    names |= {"tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in export.iterdir()} == names
    again = load_in_transformers(export)
    assert type(again) is type(theirs)
    idx = torch.randint(N_VOCAB, (2, 60))
    assert largest_difference(again(idx).logits, theirs(idx).logits) < 1e-4
    ours = load(export)
    assert largest_difference(ours(idx)[0], theirs(idx).logits) < 1e-4
    stored = load_file(export / "model.safetensors")
    weights = dict(theirs.named_parameters())
    assert set(stored) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(stored[name], weight), name
    assert llama_files.read_config(export) == {
        **llama_files.read_config(folder), "tokenizer": str(export), "folder": export
    }  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    assert tokenizer.encode(TEXT) == byte_level().encode(TEXT).ids


@torch.no_grad()
def test_an_export_is_the_same_for_programs_that_read_only_old_entries(released, tmp_path, capsys):
    """As transformers before version 5, which doesn't know rope_parameters, and says nothing."""
    folder, theirs = released
    export = tmp_path / "export"
    output(capsys, "--init_from", folder, "--sample_only", "--export", export, *BRIEFLY)
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"], config["dtype"]
    (export / "config.json").write_text(json.dumps(config), encoding="utf-8")
    idx = torch.randint(N_VOCAB, (2, 60))
    assert largest_difference(load_in_transformers(export)(idx).logits, theirs(idx).logits) < 1e-4
    del config["rope_theta"], config["rope_scaling"]
    (export / "config.json").write_text(json.dumps(config), encoding="utf-8")
    logits = load_in_transformers(export)(idx).logits
    assert largest_difference(logits, theirs(idx).logits) > 1e-2, "the entries matter"


def same_in_auto_tokenizer(folder: Path, tokenizer, text: str):
    """AutoTokenizer of a folder, which gives the ids of a tokenizer and has no other tokens."""
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text).ids
    assert theirs.encode(text) == ids
    assert len(theirs) == tokenizer.get_vocab_size()
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    return theirs


@pytest.mark.parametrize("sizes", [[], ["--qk_norm"]], ids=["llama", "qwen3"])
@pytest.mark.parametrize("end", ["special", "lstrip", "a word", "none"])
def test_auto_tokenizer_takes_a_tokenizer_of_ones_own_as_it_is(
    corpus, tmp_path, capsys, sizes, end
):
    """And knows where a text ends, unless the end is an ordinary token."""
    tokenizer = byte_level()
    if end in ("special", "lstrip"):
        tokenizer.add_tokens([AddedToken("<end>", special=True, lstrip=end == "lstrip")])
    tokenizer.enable_truncation(3)
    ids = {"special": 300, "lstrip": 300, "a word": tokenizer.token_to_id("he"), "none": None}
    (tmp_path / "tokens").mkdir()
    tokenizer.save(str(tmp_path / "tokens" / "tokenizer.json"))
    config = {"eos_token_id": ids[end]}
    (tmp_path / "tokens" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    export = tmp_path / "export"
    typed = {"tokenizer": tmp_path / "tokens", "max_iters": 0, "export": export}
    output(capsys, *flags(corpus, **typed), *sizes)
    tokenizer.no_truncation()
    text = f"{TEXT} <end>Zoë 世\n\n <end> then he,  s.He can 't <s>"
    theirs = same_in_auto_tokenizer(export, tokenizer, text)
    assert theirs.eos_token_id == (300 if end in ("special", "lstrip") else None)
    model = load_in_transformers(export)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == ids[end]


def save_qwen(folder: Path) -> None:
    """Write the files of a tokenizer as Qwen's, in the two ways that there are."""
    trained = json.loads(byte_level().to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    template = "{% for message in messages %}<|end|>{{ message.content }}\n{% endfor %}"
    tokenizer = Qwen2Tokenizer(
        trained["vocab"], merges, eos_token="<|end|>", pad_token="<|end|>", unk_token=None,
        chat_template=template, model_max_length=2000,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("later", ["at once", "from a checkpoint"])
def test_the_files_beside_a_tokenizer_come_with_an_export(
    tmp_path, corpus, capsys, monkeypatch, kind, later
):
    """Also if a run is exported that no longer has the model it started from."""
    folder, run, export = tmp_path / "model", tmp_path / "run", tmp_path / "export"
    save(make_reference(kind), folder)
    save_qwen(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}', encoding="utf-8")
    ends = {"eos_token_id": [0, 9], "pad_token_id": 0, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    theirs = AutoTokenizer.from_pretrained(folder)
    starting = ["--init_from", folder, *BRIEFLY]
    if later == "at once":
        output(capsys, *starting, "--sample_only", "--export", export)
    else:
        tuning = ["--data", corpus, "--max_iters", "0", "--block_size", "20", "--out_dir", run]
        output(capsys, *starting, *tuning)
        shutil.rmtree(folder)
        output(capsys, "--sample_only", "--out_dir", run, "--export", export)
    for name in set(before) - {"config.json", "model.safetensors"}:
        assert (export / name).read_bytes() == before[name], name
    assert set(before) >= {"tokenizer_config.json", "chat_template.jinja"}
    again = AutoTokenizer.from_pretrained(export)
    assert type(again) is type(theirs)
    assert again.encode(TEXT + "<|end|>") == theirs.encode(TEXT + "<|end|>")
    assert (len(again), again.eos_token_id, again.model_max_length) == (N_VOCAB, 0, 2000)
    chat = [{"role": "user", "content": "The fox?"}]
    assert again.apply_chat_template(chat, tokenize=False) == "<|end|>The fox?\n"
    assert load_in_transformers(export).generation_config.eos_token_id == [0, 9]


def test_biases_and_norms_together_are_a_qwen3(corpus, tmp_path, capsys):
    """Which has one more bias; here it is zero."""
    run, export = tmp_path / "run", tmp_path / "export"
    typed = flags(corpus, out_dir=run, export=export, warmup_iters=0)
    output(capsys, *typed, "--qk_norm", "--qkv_bias")
    state = torch.load(run / "best.pt", weights_only=True)
    n_vocab = len(state["model"]["token_embedding.weight"])
    ours = v11c.LanguageModel(v11c.Config(**state["config"]), n_vocab).eval()
    ours.load_state_dict(state["model"])
    assert ours.blocks[0].attention.query.bias.abs().max() > 1e-3
    theirs = load_in_transformers(export)
    assert type(theirs) is Qwen3ForCausalLM
    idx = torch.randint(n_vocab, (2, 5))
    assert largest_difference(theirs(idx).logits, ours(idx)[0]) < 1e-4
    line = refused(v11c, capsys, "--init_from", export, "--sample_only")
    assert "it has biases in attention" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_export_keeps_the_dtype(tmp_path, capsys, dtype):
    save(make_reference("llama").to(dtype), tmp_path / "model")
    typed = ["--init_from", tmp_path / "model", "--sample_only", *BRIEFLY]
    cases = (("same", "auto", dtype), ("larger", "float32", torch.float32))
    for export, typed_dtype, expected in cases:
        output(capsys, *typed, "--dtype", typed_dtype, "--export", tmp_path / export)
        stored = load_file(tmp_path / export / "model.safetensors").values()
        assert {weight.dtype for weight in stored} == {expected}
        assert load_in_transformers(tmp_path / export).dtype == expected


@pytest.mark.parametrize("eos_token_id", [None, 7, [7, 3]])
def test_an_export_ends_its_texts_like_the_model(folder, tmp_path, capsys, eos_token_id):
    saved = {"eos_token_id": eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(saved), encoding="utf-8")
    export = tmp_path / "export"
    output(capsys, "--init_from", folder, "--sample_only", "--export", export, *BRIEFLY)
    assert load_in_transformers(export).config.eos_token_id == eos_token_id
    expected = llama_files.read_tokenizer(folder, "--tokenizer")["end_of_text"]
    assert llama_files.read_tokenizer(export, "--tokenizer")["end_of_text"] == expected


@pytest.mark.parametrize("sizes", [
    ["--n_kv_head", "1"], ["--qk_norm", "--tie_word_embeddings", "--n_kv_head", "3"],
    ["--qkv_bias", "--head_size", "8", "--rope_theta", "99"],
    ["--head_size", "8", "--intermediate_size", "24", "--rope_theta", "99", "--rope_factor", "4",
     "--original_max_position_embeddings", "4"],
], ids=["default", "qwen3", "qwen2", "llama3"])  # fmt: skip
def test_the_best_weights_of_a_run_are_exported(corpus, tmp_path, capsys, monkeypatch, sizes):
    losses = iter([1.0, 5.0, 1.0, 2.0, 1.0, 4.0])  # the second estimate is the best
    monkeypatch.setattr(v11c, "estimate_loss", lambda *_: next(losses))
    (tmp_path / "tokens").mkdir()
    byte_level().save(str(tmp_path / "tokens" / "tokenizer.json"))
    run, export = tmp_path / "run", tmp_path / "export"
    typed = {"tokenizer": tmp_path / "tokens", "warmup_iters": 0, "out_dir": run, "export": export}
    v11c.main([*flags(corpus, **typed), *sizes])
    assert capsys.readouterr().err.count(f"exported to {export}\n") == 1
    state = torch.load(run / "best.pt", weights_only=True)
    ours = v11c.LanguageModel(v11c.Config(**state["config"]), N_VOCAB).eval()
    ours.load_state_dict(state["model"])
    theirs = load_in_transformers(export)
    kinds = {"--qk_norm": Qwen3ForCausalLM, "--qkv_bias": Qwen2ForCausalLM}
    assert type(theirs) is next((kinds[word] for word in sizes if word in kinds), LlamaForCausalLM)
    idx = torch.randint(N_VOCAB, (2, 5))
    logits = ours(idx)[0].detach()
    assert largest_difference(theirs(idx).logits, logits) < 1e-4
    assert largest_difference(load(export)(idx)[0], logits) < 1e-4
    ours.load_state_dict(torch.load(run / "latest.pt", weights_only=True)["model"])
    assert largest_difference(ours(idx)[0], logits) > 1e-3
    again = tmp_path / "again"
    output(capsys, "--sample_only", "--out_dir", run, "--export", again)
    for path in export.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_the_characters_of_a_model_come_with_its_export(corpus, tmp_path, capsys):
    export = tmp_path / "export"
    text = output(capsys, *flags(corpus, export=export, prompt="The ", max_new_tokens=60))
    assert {path.name for path in export.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    assert config["characters"] == "".join(sorted(set(TEXT)))
    load_in_transformers(export)
    sampling = ["--sample_only", "--prompt", "The ", "--max_new_tokens", "60", "--device", "cpu"]
    sampling += ["--data", "missing.txt", "--block_size", "5"]
    sample = output(capsys, "--init_from", export, *sampling)
    assert len(sample) == len("The \n") + 60
    assert text.endswith("\n" + sample)
    line = refused(v11c, capsys, "--init_from", export, *sampling, "--prompt", "Zoë")
    assert line.startswith("error: --prompt: ")
    assert "'Z', 'ë'" in line


def test_a_text_with_unknown_characters_can_not_go_on_training_a_model(corpus, tmp_path, capsys):
    export = tmp_path / "export"
    v11c.main(flags(corpus, export=export, max_iters=0))
    tuning = ["--init_from", export, "--data", corpus, "--max_iters", "1", "--device", "cpu"]
    tuning += ["--block_size", "20", "--max_new_tokens", "5"]
    assert "step 1: " in output(capsys, *tuning, "--out_dir", tmp_path / "known")
    corpus.write_text(TEXT.replace("q", "Q"), encoding="utf-8")  # just as many characters
    line = refused(v11c, capsys, *tuning, "--out_dir", tmp_path / "unknown")
    assert line.startswith("error: --data: ")
    assert "'Q'" in line
    assert not (tmp_path / "unknown" / "latest.pt").exists()


@pytest.mark.parametrize("place", ["file", "model"])
def test_an_unusable_export_is_refused_before_any_work(
    folder, corpus, tmp_path, capsys, monkeypatch, place
):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(data, "load_text", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(llama_files, "read_weights", lambda *_: pytest.fail("too late"))
    for typed in (["--init_from", folder, "--sample_only"], ["--data", corpus]):
        line = refused(v11c, capsys, *typed, "--export", tmp_path / place)
        assert line.startswith(f"error: --export {tmp_path / place}: ")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_sampling_does_not_export_again(corpus, tmp_path, capsys):
    run, export = tmp_path / "run", tmp_path / "export"
    v11c.main(flags(corpus, out_dir=run, export=export, max_iters=0))
    shutil.rmtree(export)
    capsys.readouterr()
    v11c.main(["--sample_only", "--out_dir", str(run)])
    assert "export" not in capsys.readouterr().err
    assert not export.exists()
    v11c.main(["--resume", "--out_dir", str(run), "--max_iters", "1"])
    assert (export / "model.safetensors").exists(), "but a run that goes on exports at its end"


# ---- the settings of a released model


def test_a_released_model_brings_its_sizes(tmp_path):
    save(make_reference("qwen3", rope_parameters=LLAMA3), tmp_path)
    cfg = settings(tmp_path)
    expected = {
        "n_embd": 36, "n_head": 3, "n_layer": 2, "n_kv_head": 1, "head_size": 8,
        "intermediate_size": 40, "qkv_bias": False, "qk_norm": True, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3, "rope_theta": 500.0, "rope_factor": 8.0,
        "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "tokenizer": str(tmp_path),
    }  # fmt: skip
    assert set(expected) == set(v11c.SIZES)
    assert vars(cfg).items() >= expected.items()


def test_fine_tuning_has_defaults_of_its_own(folder):
    cfg = settings(folder)
    assert vars(cfg).items() >= v11c.FINE_TUNING.items()
    assert cfg.learning_rate < v11c.Config.learning_rate / 10
    cfg = settings(folder, "--learning_rate", "0.5", "--dropout", "0.1", "--batch_size", "9")
    assert (cfg.learning_rate, cfg.dropout, cfg.batch_size) == (0.5, 0.1, 9)


def test_fine_tuning_is_the_same_on_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(data.flags, "is_usable", lambda device: True)
    on_cpu = asdict(settings(folder))
    on_gpu = asdict(settings(folder, "--device", "cuda"))
    for name in ("device", "compile"):
        del on_cpu[name], on_gpu[name]
    assert on_gpu == on_cpu


def test_the_warmup_of_fine_tuning_is_a_tenth_of_it(folder):
    assert settings(folder).warmup_iters == v11c.FINE_TUNING["max_iters"] // 10 > 0
    assert settings(folder, "--warmup_iters", "7").warmup_iters == 7


@pytest.mark.parametrize("name", v11c.SIZES)
def test_other_sizes_are_refused_by_name(folder, capsys, name):
    others = {
        "qkv_bias": ["--qkv_bias"], "qk_norm": ["--qk_norm"],
        "tie_word_embeddings": ["--no-tie_word_embeddings"],
        "tokenizer": ["--tokenizer", "char"], "rms_norm_eps": ["--rms_norm_eps", "0.5"],
    }  # fmt: skip
    typed = others.get(name, [f"--{name}", "5"])
    line = refused(v11c, capsys, "--init_from", folder, *typed)
    assert line.startswith(f"error: --{name} ")
    assert "can't be changed" in line


@pytest.mark.parametrize("typed", [["--resume"], ["--sample_only", "--out_dir", "run"]])
def test_a_run_has_only_one_beginning(folder, tmp_path, capsys, monkeypatch, typed):
    """The other flags are refused before anything is read or written."""
    monkeypatch.chdir(tmp_path)
    for name in ("find_folder", "read_config"):
        monkeypatch.setattr(llama_files, name, lambda *_: pytest.fail("too late"))
    line = refused(v11c, capsys, "--init_from", folder, *typed, "--export", "export")
    flag = [word for word in typed if word in ("--resume", "--out_dir")][0]
    why = f"can't be used together with {flag}; leave one of them out"
    assert line == f"error: --init_from {folder}: {why}"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_starts_in_one_of_four_ways(folder, corpus, tmp_path, capsys):
    """With no checkpoint and no released model, with one of them, but never with both."""
    run = ["--out_dir", str(tmp_path / "run")]
    new, tuned = flags(corpus), ["--init_from", str(folder), "--device", "cpu"]
    losses = [4.0, 4.0, 3.0, 3.0, 3.0, 5.0]  # so best.pt and latest.pt differ
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v11c, "estimate_loss", lambda *_: losses.pop(0))
        output(capsys, *flags(corpus, out_dir=tmp_path / "run"))
    for typed, steps, is_released in (
        (new, None, False), ([*run, "--resume"], 3, False), ([*run, "--sample_only"], 2, False),
        (tuned, None, True), ([*tuned, "--sample_only"], None, True),
    ):  # fmt: skip
        cfg, saved, released = v11c.read_settings(typed)
        assert saved.get("step") == steps
        assert bool(released) == is_released
        assert cfg.dtype in model_files.DTYPES, "it is decided"
        assert cfg.n_embd == (36 if is_released else 18)


def test_a_model_without_its_tokenizer_is_refused(folder, capsys):
    (folder / "tokenizer.json").unlink()
    line = refused(v11c, capsys, "--init_from", folder, "--sample_only")
    assert f"{folder / 'tokenizer.json'}: can't read it (" in line


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_refused(tmp_path, capsys):
    save(make_reference("llama", vocab_size=299), tmp_path)
    line = refused(v11c, capsys, "--init_from", tmp_path, "--sample_only")
    assert "its vocab_size is 299, but tokenizer.json has 300 tokens" in line


@torch.no_grad()
def test_a_model_may_have_more_tokens_than_its_tokenizer(tmp_path, capsys):
    theirs = make_reference("llama", vocab_size=320)
    save(theirs, tmp_path)
    idx = torch.randint(320, (2, 30))
    assert largest_difference(load(tmp_path)(idx)[0], theirs(idx).logits) < 1e-4
    flags = ["--sample_only", "--max_new_tokens", "9", "--device", "cpu", "--prompt", "Hens"]
    assert output(capsys, "--init_from", tmp_path, *flags).startswith("Hens")


# ---- fine-tuning


def test_fine_tuning_starts_from_the_released_weights(folder, corpus, tmp_path, capsys):
    typed = ["--init_from", folder, "--data", corpus, "--eval_iters", "9", "--device", "cpu"]
    typed += ["--out_dir", tmp_path / "run", "--block_size", "20", "--learning_rate", "1e-2"]
    typed += ["--max_iters", "20", "--eval_interval", "20", "--max_new_tokens", "5"]
    out = output(capsys, *typed)
    losses = [float(loss) for loss in re.findall(r"val loss (\d+\.\d+)", out)]
    tokens = torch.tensor(byte_level().encode(TEXT).ids)
    val_data = tokens[len(tokens) * 9 // 10 :]
    starts = np.linspace(0, len(val_data) - 21, 9 * v11c.FINE_TUNING["batch_size"]).astype(int)
    windows = torch.stack([val_data[i : i + 21] for i in starts])
    with torch.no_grad():
        logits = load_in_transformers(folder)(windows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert losses[0] == pytest.approx(expected.item(), abs=2e-4)
    assert losses[1] < 0.9 * losses[0]


def test_a_fine_tuned_run_goes_on_without_the_released_model(
    folder, corpus, tmp_path, capsys, monkeypatch
):
    """Its checkpoint has the tokenizer, too, and where a text ends."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 299]}', encoding="utf-8")
    run = tmp_path / "run"
    tuning = ["--init_from", folder, "--data", corpus, "--max_iters", "2", "--device", "cpu"]
    tuning += ["--block_size", "20", "--prompt", "The", "--temperature", "0"]
    out = output(capsys, *tuning, "--out_dir", run, "--max_new_tokens", "15")
    content = llama_files.read_tokenizer(folder, "--tokenizer")
    shutil.rmtree(folder)
    monkeypatch.setattr(llama_files, "find_folder", lambda name: pytest.fail("not needed"))
    assert out.endswith("\n" + output(capsys, "--sample_only", "--out_dir", run))
    output(capsys, "--resume", "--out_dir", run, "--max_iters", "3")
    state = torch.load(run / "latest.pt", weights_only=True)
    assert state["step"] == 3
    assert state["tokenizer_content"] == content
    assert content["end_of_text"] == [0, 299]
    assert state["config"]["init_from"] == str(folder)
    assert state["config"]["learning_rate"] == v11c.FINE_TUNING["learning_rate"]


def test_without_a_released_model_it_is_v11b(corpus, tmp_path, capsys):
    outputs = []
    for script in (v11b, v11c):
        folder = tmp_path / script.__name__
        script.main([*tiny_flags(script, out_dir=folder), "--data", str(corpus)])
        outputs.append(re.sub(r", [\d,]+ tokens/s", "", capsys.readouterr().out))
    assert outputs[0] == outputs[1]


# ---- contexts and dtypes that must last


def test_a_model_keeps_the_block_size_that_it_was_trained_with(corpus, tmp_path, capsys):
    output(capsys, *flags(corpus, export=tmp_path / "export", max_iters=0))
    assert settings(tmp_path / "export").block_size == 5


@pytest.mark.parametrize("context", [4096, 131_072])
def test_an_export_keeps_the_context_of_a_released_model(tmp_path, capsys, context):
    rope = {**LLAMA3, "original_max_position_embeddings": 2048}
    theirs = make_reference("llama", rope_parameters=rope, max_position_embeddings=context)
    save(theirs, tmp_path / "model")
    export = tmp_path / "export"
    flags = ["--init_from", tmp_path / "model", "--sample_only", "--export", export]
    output(capsys, *flags, *BRIEFLY)
    assert load_in_transformers(export).config.max_position_embeddings == context
    assert settings(export).block_size == 1024


@pytest.mark.parametrize(("dtype", "n_embd"), [(torch.bfloat16, 36), (torch.float32, 128)])
def test_the_sample_of_a_fine_tuned_run_can_be_repeated(
    tmp_path, corpus, capsys, monkeypatch, dtype, n_embd
):
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    sizes = {"hidden_size": n_embd, "num_attention_heads": 4, "num_key_value_heads": 2}
    save(make_reference("llama", **sizes).to(dtype), tmp_path / "model")
    dtypes = []

    def stream(model, *_):
        dtypes.append(model.lm_head.weight.dtype)
        return iter([])

    monkeypatch.setattr(v11c.LanguageModel, "stream", stream)
    run = ["--out_dir", tmp_path / "run"]
    tuning = ["--init_from", tmp_path / "model", "--data", corpus, "--max_iters", "0"]
    output(capsys, *tuning, *run, "--block_size", "9", "--device", "cpu")
    output(capsys, "--sample_only", *run)
    assert dtypes[0] == dtypes[1]


def test_a_tokenizer_in_the_way_of_an_export_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokenizer.json").write_text("mine", encoding="utf-8")
    typed = ["--sample_only", "--export", tmp_path / "mine", *BRIEFLY]
    line = refused(v11c, capsys, "--init_from", folder, *typed)
    assert "already holds a model" in line


def test_a_folder_may_be_called_char(folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(folder, tmp_path / "char")
    monkeypatch.chdir(tmp_path)
    output(capsys, "--init_from", "char", "--sample_only", *BRIEFLY)


# ---- a released model itself

needs_smollm2 = pytest.mark.skipif(
    "SMOLLM2" not in os.environ,
    reason="needs SMOLLM2, which names a folder with SmolLM2-135M-Instruct in float32",
)
CORPUS = Path(data.__file__).with_name("tinyshakespeare.txt")
QUESTION = [{"role": "user", "content": "What is the capital of Italy? Answer in one sentence."}]


@torch.no_grad()
@needs_smollm2
def test_smollm2_is_the_same_as_in_transformers(capsys):
    folder = Path(os.environ["SMOLLM2"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.float32
    text = CORPUS.read_text(encoding="utf-8")[:3000]
    ids = tokenizer.encode(text)
    content = llama_files.read_tokenizer(folder, "--tokenizer")
    assert v11c.FileTokenizer(content).encode(text) == ids
    idx = torch.tensor([ids[:512]])
    assert largest_difference(load(folder)(idx)[0], theirs(idx).logits) < 1e-4
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    expected = continued(theirs, prompt)
    assert torch.equal(greedy(folder, prompt), expected)
    assert "Paris" in tokenizer.decode(expected[0])
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    idx = torch.tensor([tokenizer.encode(prompt)])
    how = {"attention_mask": torch.ones_like(idx), "max_new_tokens": 50, "do_sample": False}
    answer = theirs.generate(idx, **how)[0, idx.shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    sampling = ["--init_from", folder, "--sample_only", "--temperature", "0", "--device", "cpu"]
    out = output(capsys, *sampling, "--max_new_tokens", "50", "--prompt", prompt)
    assert out == prompt + tokenizer.decode(answer[:-1]) + "\n"


@torch.no_grad()
@needs_smollm2
def test_an_export_of_smollm2_is_the_same_as_the_model(tmp_path, capsys):
    folder, export = Path(os.environ["SMOLLM2"]), tmp_path / "export"
    output(capsys, "--init_from", folder, "--sample_only", "--export", export, *BRIEFLY)
    text = CORPUS.read_text(encoding="utf-8")[:3000]
    seen = []
    for place in (folder, export):
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place).eval()
        ids = tokenizer.encode(text)
        chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
        prompt = torch.tensor([tokenizer.encode(chat)])
        how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 50, "do_sample": False}
        seen.append({
            "ids": ids, "logits": model(torch.tensor([ids[:512]])).logits.tolist(), "chat": chat,
            "tokens": len(tokenizer), "end": (tokenizer.eos_token, tokenizer.eos_token_id),
            "greedy": continued(model, torch.tensor([ids[:9]])).tolist(),
            "answer": model.generate(prompt, **how).tolist(),
            "ends": (model.config.eos_token_id, model.generation_config.eos_token_id),
        })  # fmt: skip
    for name, value in seen[0].items():
        assert seen[1][name] == value, name
    assert seen[1]["end"] == ("<|im_end|>", 2)
    assert seen[1]["answer"][0][-1] == 2
    assert seen[1]["chat"].startswith("<|im_start|>system\n")
