"""v8d_gpt2_weights.py: models in and out, compared with transformers, and fine-tuning.

How the files of models are found, read and written is tested in test_gpt2_files.py.
"""

import json
import logging
import os
import re
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import TEXT, refused, tiny, tiny_flags
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import data
from part4_gpt2 import v8d_gpt2_weights as v8d
from support import gpt2_files, hardware, runs

SIZES = {"n_positions": 24, "n_embd": 36, "n_layer": 3, "n_head": 3}


def make_reference(**changes):
    """A random model of transformers, whose choices are far from even."""
    ids = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(2)
    made = GPT2LMHeadModel(GPT2Config(**ids | SIZES | changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture
def released(tmp_path):
    """A folder with a small GPT-2, and the model."""
    model = make_reference()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def gpt2_folder(tmp_path) -> Path:
    """A folder with a small GPT-2."""
    make_reference().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


get_encoding = tiktoken.get_encoding


@pytest.fixture(autouse=True)
def ascii_tokens(monkeypatch):
    """97 tokens, a byte each and an end, instead of those of GPT-2, which need a download."""
    first = [10, *range(32, 126), 195]  # the last one is the beginning of a character
    ranks = {bytes([byte]): i for i, byte in enumerate(first)}
    encoding = tiktoken.Encoding(
        "97", pat_str=".|\n", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 96}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    monkeypatch.setattr(gpt2_files, "N_VOCAB", 97)
    monkeypatch.setattr(gpt2_files, "SOME_TOKENS", {"\u0120": 1})
    return encoding


def settings(folder: Path, *typed: str):
    """The settings of a run that starts from a folder, and what was read there."""
    words = ["--init_from", str(folder), "--device", "cpu", *typed]
    cfg, saved, released = v8d.read_settings(words)
    assert saved == {}
    return cfg, released


def load(folder: Path, *typed: str):
    """The model that --init_from makes of a folder."""
    return v8d.make_model(*settings(folder, *typed), 97).eval()


def text_after(model, idx: torch.Tensor, n: int, cfg) -> torch.Tensor:
    """idx, int64 (B, T), and n tokens after it."""
    return torch.cat([idx, *model.stream(idx, n, cfg)], dim=1)


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
    return [*tiny_flags(v8d, **changes), "--data", str(corpus)]


def output(capsys, *flags):
    capsys.readouterr()
    v8d.main([str(flag) for flag in flags])
    return capsys.readouterr().out


def best_weights(run: Path):
    return torch.load(run / "best.pt", weights_only=True)["model"]


# ---- the same function as transformers


@pytest.mark.parametrize("vocab_size", [97, 128])
def test_logits_equal_those_of_transformers(tmp_path, vocab_size):
    """Also without the tokens that only pad the vocabulary to a multiple of 64."""
    theirs = make_reference(vocab_size=vocab_size)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    idx = torch.randint(97, (3, 24))
    for T in (1, 7, 24):
        logits, _ = ours(idx[:, :T])
        assert logits.shape == (3, T, 97)
        assert (logits - theirs(idx[:, :T]).logits[:, :, :97]).abs().max() < 1e-4


def test_losses_equal_those_of_transformers(released):
    folder, theirs = released
    idx = torch.randint(97, (3, 24))
    _, loss = load(folder)(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(theirs(idx, labels=idx).loss.item(), abs=1e-4)


def test_logits_from_the_cache_equal_those_of_transformers(released):
    folder, theirs = released
    ours = load(folder)
    idx = torch.randint(97, (2, 24))
    expected = theirs(idx).logits
    caches = [v8d.KVCache(settings(folder)[0], 2, idx.device) for _ in ours.blocks]
    begin = 0
    for piece in idx.split([5] + [1] * 19, dim=1):
        logits, _ = ours(piece, caches=caches)
        end = begin + piece.shape[1]
        assert (logits - expected[:, begin:end]).abs().max() < 1e-4
        begin = end
    assert begin == 24


def test_greedy_text_equals_that_of_transformers(tmp_path):
    theirs = make_reference(n_positions=64)
    for name, parameter in theirs.named_parameters():  # or the text repeats one token for ever
        if "wpe" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        elif "wte" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif parameter.ndim == 1:
            torch.nn.init.constant_(parameter, float("ln" in name and "weight" in name))
    theirs.save_pretrained(tmp_path)
    cfg, released = settings(tmp_path, "--temperature", "0")
    ours = v8d.make_model(cfg, released, 97).eval()
    idx = torch.randint(97, (2, 9))
    how = {"attention_mask": torch.ones_like(idx), "max_new_tokens": 50, "do_sample": False}
    expected = theirs.generate(idx, eos_token_id=None, pad_token_id=0, **how)
    text = text_after(ours, idx, 50, cfg)
    assert text.shape == (2, 59)
    assert torch.equal(text, expected)
    assert len(set(text[0, 9:].tolist())) > 4, "not the same few tokens for ever"


@torch.no_grad()
def test_upcasting_changes_nothing_in_float32(tmp_path):
    theirs = make_reference(reorder_and_upcast_attn=True, attn_implementation="eager")
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["reorder_and_upcast_attn"] is True
    idx = torch.randint(97, (3, 24))
    assert (load(tmp_path)(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


# ---- distilgpt2, which has half of the layers of GPT-2

DISTILGPT2 = {
    "_num_labels": 1, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
    "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02, "label2id": {"LABEL_0": 0},
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 6, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip


def test_distilgpt2_has_as_many_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2_files, "N_VOCAB", 50_257)
    (tmp_path / "config.json").write_text(json.dumps(DISTILGPT2), encoding="utf-8")
    cfg, _ = settings(tmp_path)
    with torch.device("meta"):
        model = v8d.LanguageModel(cfg, 50_257)
    assert sum(p.numel() for p in model.parameters()) == 81_912_576


@torch.no_grad()
def test_a_model_like_distilgpt2_is_the_same_in_both_directions(tmp_path, capsys):
    """Narrower, but with its entries, its masks, and a copy of its embedding as output layer."""
    folder, export = tmp_path / "model", tmp_path / "export"
    sizes = {"n_embd": 48, "n_head": 12, "n_layer": 6, "n_positions": 64}
    theirs = make_reference(**sizes)
    theirs.save_pretrained(folder)
    changes = {**sizes, "n_ctx": 64, "vocab_size": 97, "bos_token_id": 96, "eos_token_id": 96}
    (folder / "config.json").write_text(json.dumps(DISTILGPT2 | changes), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    for i in range(6):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    idx = torch.randint(97, (2, 64))
    expected = theirs(idx).logits
    assert (load(folder)(idx)[0] - expected).abs().max() < 1e-4
    output(capsys, "--init_from", folder, "--sample_only", "--export", export, "--device", "cpu")
    again = load_in_transformers(export)
    assert (again.config.n_layer, again.config.n_head) == (6, 12)
    assert (again(idx).logits - expected).abs().max() < 1e-4
    assert (load(export)(idx)[0] - expected).abs().max() < 1e-4


# ---- exports


def test_an_exported_model_is_the_same_in_transformers_and_here(
    released, tmp_path, capsys
):
    folder, theirs = released
    export = tmp_path / "new" / "export"
    output(capsys, "--init_from", folder, "--sample_only", "--export", export, "--device", "cpu")
    again = load_in_transformers(export)
    assert type(again) is type(theirs)
    idx = torch.randint(97, (2, 24))
    assert (again(idx).logits - theirs(idx).logits).abs().max() < 1e-4
    weights = load(folder).state_dict()
    for name, weight in load(export).state_dict().items():
        assert torch.equal(weight, weights[name]), name
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [type(theirs).__name__], "where vLLM looks"


def test_auto_tokenizer_has_the_tokens_of_an_export(released, tmp_path, capsys, ascii_tokens):
    """And knows where a text ends, as does generate."""
    folder, _ = released
    export = tmp_path / "export"
    output(capsys, "--init_from", folder, "--sample_only", "--export", export, "--device", "cpu")
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.encode(TEXT) == ascii_tokens.encode(TEXT)
    assert tokenizer.decode(ascii_tokens.encode(TEXT)) == TEXT
    assert len(tokenizer) == 97
    assert tokenizer.encode("hens<|endoftext|>") == [*ascii_tokens.encode("hens"), 96]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 96)
    assert load_in_transformers(export).generation_config.eos_token_id == 96


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_the_best_weights_of_a_run_are_exported(corpus, tmp_path, capsys, monkeypatch, tokenizer):
    losses = iter([1.0, 5.0, 1.0, 2.0, 1.0, 4.0])  # the second estimate is the best
    monkeypatch.setattr(v8d, "estimate_loss", lambda *_: next(losses))
    changes = {"tokenizer": tokenizer, "warmup_iters": 0}
    run, export = tmp_path / "run", tmp_path / "export"
    v8d.main(flags(corpus, out_dir=run, export=export, **changes))
    assert capsys.readouterr().err.count(f"exported to {export}\n") == 1
    weights = best_weights(run)
    n_vocab = len(weights["token_embedding.weight"])
    ours = v8d.LanguageModel(tiny(v8d, **changes), n_vocab).eval()
    ours.load_state_dict(weights)
    idx = torch.randint(n_vocab, (2, 5))
    logits, _ = ours(idx)
    theirs = load_in_transformers(export)
    assert (theirs(idx).logits - logits).abs().max() < 1e-4
    latest = torch.load(run / "latest.pt", weights_only=True)["model"]
    ours.load_state_dict(latest)
    assert (ours(idx)[0] - logits).abs().max() > 1e-3


def test_the_alphabet_of_a_character_model_comes_with_its_export(corpus, tmp_path, capsys):
    export = tmp_path / "export"
    text = output(capsys, *flags(corpus, export=export, prompt="The ", max_new_tokens=60))
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    assert config["characters"] == "".join(sorted(set(TEXT)))
    sampling = ["--sample_only", "--prompt", "The ", "--max_new_tokens", "60", "--device", "cpu"]
    sampling += ["--data", "missing.txt"]
    assert text.endswith(" bits/byte\n" + output(capsys, "--init_from", export, *sampling))
    line = refused(v8d, capsys, "--init_from", export, *sampling, "--prompt", "Zoë")
    assert line.startswith("error: --prompt: ")
    assert "'Z', 'ë'" in line


def test_a_text_with_unknown_characters_can_not_go_on_training_a_character_model(
    corpus, tmp_path, capsys
):
    export = tmp_path / "export"
    v8d.main(flags(corpus, export=export, max_iters=0))
    tuning = ["--init_from", export, "--data", corpus, "--max_iters", "1", "--device", "cpu"]
    output(capsys, *tuning, "--out_dir", tmp_path / "known")
    corpus.write_text(TEXT.replace("q", "Q"), encoding="utf-8")  # just as many characters
    line = refused(v8d, capsys, *tuning, "--out_dir", tmp_path / "unknown")
    assert line.startswith("error: --data")
    assert "'Q'" in line
    assert not (tmp_path / "unknown").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "model"])
def test_an_unusable_export_is_refused_before_any_work(
    gpt2_folder, corpus, tmp_path, capsys, monkeypatch, place
):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(data, "load_text", lambda *_: pytest.fail("too late"))
    run = tmp_path / "run"
    line = refused(v8d, capsys, *flags(corpus, out_dir=run, export=tmp_path / place))
    assert line.startswith(f"error: --export {tmp_path / place}: ")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert not run.exists()


@pytest.fixture(scope="module")
def exported_run(tmp_path_factory):
    """The folder of a finished run, and where it has exported to. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    v8d.main(flags(folder / "corpus.txt", out_dir=folder / "run", export=folder / "export"))
    return folder / "run", folder / "export"


def test_a_checkpoint_can_be_exported_without_training(exported_run, tmp_path, capsys):
    run, first = exported_run
    before = sorted(path.name for path in run.iterdir())
    out = output(capsys, "--sample_only", "--out_dir", run, "--export", tmp_path / "second")
    assert "loss" not in out
    assert len(list(first.iterdir())) == len(list((tmp_path / "second").iterdir()))
    for name in (path.name for path in first.iterdir()):
        assert (tmp_path / "second" / name).read_bytes() == (first / name).read_bytes()
    assert sorted(path.name for path in run.iterdir()) == before


def test_sampling_does_not_export_again(exported_run, capsys):
    run, export = exported_run
    before = {path: path.stat().st_mtime_ns for path in export.iterdir()}
    capsys.readouterr()
    v8d.main(["--sample_only", "--out_dir", str(run)])
    assert "export" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in export.iterdir()} == before


def test_a_resumed_run_exports_where_it_should(corpus, tmp_path):
    run, first, second = tmp_path / "run", tmp_path / "first", tmp_path / "second"
    v8d.main(flags(corpus, out_dir=run, export=first))
    shutil.rmtree(first)  # as if the run had been killed before
    v8d.main(["--resume", "--out_dir", str(run), "--max_iters", "4"])
    v8d.main(["--resume", "--out_dir", str(run), "--max_iters", "5", "--export", str(second)])
    expected = {}
    for export in (first, second):
        expected[export] = load_file(export / "model.safetensors")["wte.weight"]
    assert not torch.equal(expected[first], expected[second])
    assert torch.equal(expected[second], best_weights(run)["token_embedding.weight"])


# ---- where a run starts, and its settings


def test_a_run_starts_in_one_of_four_ways(gpt2_folder, exported_run):
    run, _ = exported_run
    cfg, saved, released = v8d.read_settings(["--device", "cpu"])
    assert (saved, released) == ({}, {})
    assert cfg.learning_rate == 3e-3
    for mode, name in {"--resume": "latest.pt", "--sample_only": "best.pt"}.items():
        cfg, saved, released = v8d.read_settings([mode, "--out_dir", str(run), "--export", ""])
        assert saved["path"] == str(run / name)
        assert released == {}
        assert (cfg.learning_rate, cfg.n_embd) == (1e-2, 18)
    cfg, saved, released = v8d.read_settings(["--init_from", str(gpt2_folder), "--device", "cpu"])
    assert saved == {}
    assert released == gpt2_files.read_config(gpt2_folder)
    assert (cfg.learning_rate, cfg.n_embd) == (3e-5, 36)


@pytest.mark.parametrize(
    ("flag", "typed"),
    [
        ("--resume", ["--resume"]),
        ("--resume", ["--resume", "--out_dir", "missing"]),
        ("--out_dir", ["--sample_only", "--out_dir", "missing"]),
        ("--preset", ["--preset", "gpt2"]),
        ("--preset", ["--sample_only", "--preset", "gpt2-xl"]),
    ],
)
def test_flags_that_contradict_a_start_from_released_weights_are_refused(
    capsys, monkeypatch, flag, typed
):
    """Before anything is downloaded, or read from a run."""
    monkeypatch.setattr(gpt2_files, "find_folder", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(runs, "find_checkpoint", lambda *_: pytest.fail("too late"))
    line = refused(v8d, capsys, "--init_from", "gpt2", *typed)
    why = f"can't be used together with {flag}; leave one of them out"
    assert line == f"error: --init_from gpt2: {why}"


def test_a_released_model_brings_its_sizes(released):
    folder, _ = released
    cfg, _ = settings(folder)
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size) == (3, 3, 36, 24)
    assert (cfg.tokenizer, cfg.preset) == ("gpt2", "")


def test_the_dtype_is_that_for_the_sizes_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    for n_embd, dtype in {36: "float32", 129: "bfloat16"}.items():
        make_reference(n_embd=n_embd).save_pretrained(tmp_path)
        assert settings(tmp_path)[0].dtype == dtype
        assert settings(tmp_path, "--dtype", "float32")[0].dtype == "float32"


def test_fine_tuning_has_defaults_of_its_own(gpt2_folder):
    cfg, _ = settings(gpt2_folder)
    assert vars(cfg).items() >= v8d.FINE_TUNING.items()
    assert cfg.learning_rate < v8d.Config.learning_rate / 10
    assert cfg.dropout > 0
    assert cfg.warmup_iters == cfg.max_iters / 10
    typed = {"learning_rate": 0.5, "dropout": 0.0, "batch_size": 9, "warmup_iters": 7}
    words = [word for name, value in typed.items() for word in (f"--{name}", str(value))]
    cfg, _ = settings(gpt2_folder, *words)
    assert vars(cfg).items() >= (v8d.FINE_TUNING | typed).items()


def test_fine_tuning_is_the_same_on_a_gpu(gpt2_folder, monkeypatch):
    monkeypatch.setattr(data.flags, "is_usable", lambda device: True)
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: False)
    on_cpu = asdict(settings(gpt2_folder)[0])
    on_gpu = asdict(settings(gpt2_folder, "--device", "cuda")[0])
    for name in ("device", "compile"):
        del on_cpu[name], on_gpu[name]
    assert on_gpu == on_cpu


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_layer", "2"), ("n_head", "4"), ("n_embd", "72"), ("tokenizer", "char")],
)
def test_other_sizes_are_refused_by_name(gpt2_folder, capsys, name, value):
    its = {"n_layer": 3, "n_head": 3, "n_embd": 36, "tokenizer": "gpt2"}[name]
    line = refused(v8d, capsys, "--init_from", gpt2_folder, f"--{name}", value)
    why = f"the model has {its!r}, which can't be changed; leave the flag out"
    assert line == f"error: --{name} {value}: {why}"
    settings(gpt2_folder, f"--{name}", str(its))


def test_a_shorter_block_size_crops_the_positions(released):
    folder, theirs = released
    cfg, read = settings(folder, "--block_size", "7")
    ours = v8d.make_model(cfg, read, 97).eval()
    assert ours.position_embedding.weight.shape == (7, 36)
    idx = torch.randint(97, (3, 7))
    assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    assert text_after(ours, idx, 9, cfg).shape == (3, 16)


def test_a_longer_block_size_is_refused(gpt2_folder, capsys):
    line = refused(v8d, capsys, "--init_from", gpt2_folder, "--block_size", "25")
    assert line == "error: --block_size 25: the model has only 24 positions"


def test_a_model_for_another_tokenizer_is_refused(tmp_path, capsys):
    make_reference(vocab_size=98).save_pretrained(tmp_path)
    line = refused(v8d, capsys, "--init_from", tmp_path, "--sample_only")
    said = f"--init_from {tmp_path / 'config.json'}: its vocabulary has 98 tokens, the tokenizer 97"
    assert line.startswith(f"error: {said}; ")


def test_without_the_files_of_its_tokenizer_a_model_is_refused(gpt2_folder, capsys, monkeypatch):
    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    line = refused(v8d, capsys, "--init_from", gpt2_folder, "--sample_only")
    assert "can't load GPT-2's tokenizer (no network); set TIKTOKEN_CACHE_DIR" in line


# ---- sampling and fine-tuning


def test_a_released_model_just_generates(released, tmp_path, capsys, monkeypatch, ascii_tokens):
    """It needs no corpus, and writes nothing."""
    folder, theirs = released
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    sampling = ["--sample_only", "--temperature", "0", "--max_new_tokens", "15"]
    prompt = ["--prompt", "ABC", "--data", "missing.txt", "--device", "cpu"]
    out = output(capsys, "--init_from", folder, *sampling, *prompt)
    idx = torch.tensor([ascii_tokens.encode("ABC")])
    how = {"attention_mask": torch.ones_like(idx), "max_new_tokens": 15, "do_sample": False}
    expected = theirs.generate(idx, eos_token_id=None, pad_token_id=0, **how)
    assert 96 not in expected
    assert out == ascii_tokens.decode(expected[0].tolist()) + "\n"
    assert list(here.iterdir()) == []


def test_a_text_ends_where_the_model_ends_it(gpt2_folder, ascii_tokens, capsys, monkeypatch):
    tokens = iter([*ascii_tokens.encode("fox"), 96, 5])
    monkeypatch.setattr(v8d, "choose_token", lambda *_: torch.tensor([[next(tokens)]]))
    out = output(capsys, "--init_from", gpt2_folder, "--sample_only", "--prompt", "The ")
    assert out == "The fox\n"
    assert list(tokens) == [5]


def test_fine_tuning_starts_from_the_released_weights(
    gpt2_folder, ascii_tokens, corpus, tmp_path, capsys
):
    flags = ["--init_from", gpt2_folder, "--data", corpus, "--eval_iters", "1", "--device", "cpu"]
    flags += ["--out_dir", tmp_path / "run", "--block_size", "20", "--learning_rate", "1e-2"]
    flags += ["--max_iters", "20", "--eval_interval", "20", "--warmup_iters", "2"]
    out = output(capsys, *flags)
    losses = [float(loss) for loss in re.findall(r"val loss (\d+\.\d+)", out)]
    tokens = torch.tensor(ascii_tokens.encode(TEXT))
    val_data = tokens[len(tokens) * 9 // 10 :]
    starts = [i * (len(val_data) - 21) // 3 for i in range(4)]  # evenly spread
    windows = torch.stack([val_data[start : start + 21] for start in starts])
    with torch.no_grad():
        logits, _ = load(gpt2_folder)(windows[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert losses[0] == pytest.approx(expected.item(), abs=2e-4)
    assert losses[1] < 0.9 * losses[0]


def test_a_fine_tuned_run_goes_on_without_the_released_model(
    gpt2_folder, corpus, tmp_path, capsys
):
    run = tmp_path / "run"
    tuning = ["--init_from", gpt2_folder, "--data", corpus, "--max_iters", "2", "--device", "cpu"]
    output(capsys, *tuning, "--out_dir", run, "--max_new_tokens", "5")
    shutil.rmtree(gpt2_folder)
    output(capsys, "--resume", "--out_dir", run, "--max_iters", "3")
    state = torch.load(run / "latest.pt", weights_only=True)
    assert state["step"] == 3
    assert state["config"]["init_from"] == str(gpt2_folder)
    assert state["config"]["learning_rate"] == v8d.FINE_TUNING["learning_rate"]
    assert len(output(capsys, "--sample_only", "--out_dir", run)) > 5


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's files")
def test_a_model_with_the_vocabulary_of_gpt2_padded_generates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    monkeypatch.setattr(gpt2_files, "N_VOCAB", 50_257)
    sizes = {"n_embd": 2, "n_head": 1, "n_layer": 1, "vocab_size": 50_304}
    make_reference(**sizes).save_pretrained(tmp_path)
    flags = ["--sample_only", "--max_new_tokens", "3", "--device", "cpu", "--prompt", "Hens"]
    assert output(capsys, "--init_from", tmp_path, *flags).startswith("Hens")
