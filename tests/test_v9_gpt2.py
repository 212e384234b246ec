"""v9_gpt2.py: GPT-2 and GPT-1 beside those of transformers, weights in and out, files of tokens."""

import contextlib
import hashlib
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TEXT, TINY, tiny, tiny_flags
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

import data
import v9_gpt2 as v9
from lab.ladder import ROOT

KINDS = {
    "GPT-2": (GPT2Config, GPT2LMHeadModel, "pre"),
    "GPT-1": (OpenAIGPTConfig, OpenAIGPTLMHeadModel, "post"),
}
SIZE = {"n_positions": 24, "n_embd": 36, "n_layer": 3, "n_head": 3, "layer_norm_epsilon": 1e-3}


def reference(kind: str, vocab_size: int = 97, **changes):
    """A random model of transformers, with weights so large that its choices are far from even."""
    config, model, _ = KINDS[kind]
    torch.manual_seed(2)
    made = model(config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **SIZE | changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture(params=KINDS)
def released(request, tmp_path):
    """A folder with a small model of either kind, and the model."""
    model = reference(request.param)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def loaded(folder: Path, vocab_size: int = 97, *flags: str):
    """The settings and the model that --init_from makes of a folder."""
    cfg, weights = v9.read_settings(["--device", "cpu", "--init_from", str(folder), *flags])
    model = v9.LanguageModel(cfg, vocab_size).eval()
    v9.load_released(model, weights, cfg)
    return cfg, model


def refused(capsys, *flags) -> str:
    """The one line that main() says of what it refuses with status 2, be it after the settings."""
    with pytest.raises(SystemExit) as stop:
        v9.main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    *before, line = err.splitlines()
    assert all(said.startswith("small defaults, ") for said in before)
    return line


# ---- the same function as transformers


@pytest.mark.parametrize("vocab_size", [2, 97, 101, 1031])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_are_those_of_transformers(tmp_path, kind, vocab_size):
    theirs = reference(kind, vocab_size)
    theirs.save_pretrained(tmp_path)
    _, ours = loaded(tmp_path, vocab_size)
    idx = torch.randint(vocab_size, (3, 24))
    for T in (1, 7, 24):
        expected = theirs(idx[:, :T], labels=idx[:, :T])
        logits, _ = ours(idx[:, :T])
        assert (logits - expected.logits).abs().max() < 1e-4
        if T > 1:  # they shift the labels themselves
            _, loss = ours(idx[:, : T - 1], idx[:, 1:T])
            assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-4)


def test_logits_with_the_cache_are_those_of_transformers(released):
    folder, theirs = released
    cfg, ours = loaded(folder)
    idx = torch.randint(97, (2, 24))
    cache = torch.empty(cfg.n_layer, 2, 2, cfg.n_head, 24, cfg.n_embd // cfg.n_head)
    with torch.inference_mode():
        expected = theirs(idx).logits
        first, _ = ours(idx[:, :5], cache=cache[..., :5, :])
        steps = [ours(idx[:, i : i + 1], cache=cache[..., : i + 1, :])[0] for i in range(5, 24)]
    assert (torch.cat((first, *steps), dim=1) - expected).abs().max() < 1e-4


def test_greedy_text_of_50_tokens_is_that_of_transformers(tmp_path):
    for kind in KINDS:
        theirs = reference(kind, n_positions=64)
        for name, parameter in theirs.named_parameters():  # or the text is one token for ever
            if "embed" in name or ".wte" in name or ".wpe" in name:
                std = 1.0 if ".wpe" in name or "positions" in name else 0.05
                torch.nn.init.normal_(parameter, std=std)
            elif parameter.ndim == 1:
                torch.nn.init.constant_(parameter, float("ln" in name and "weight" in name))
        theirs.save_pretrained(tmp_path / kind)
        _, ours = loaded(tmp_path / kind)
        idx = torch.randint(97, (2, 9))
        how = dict(attention_mask=torch.ones_like(idx), max_new_tokens=50, do_sample=False)
        expected = theirs.generate(idx, eos_token_id=None, pad_token_id=0, **how)
        text = ours.generate(idx, 50, temperature=0.0)
        assert text.shape == (2, 59)
        assert torch.equal(text, expected)
        assert len(set(text[0, 9:].tolist())) > 4, "not the same few tokens for ever"


def test_exported_models_load_in_transformers(released, tmp_path, capfd):
    folder, theirs = released
    cfg, ours = loaded(folder, 97, "--export", str(tmp_path / "new" / "export"))
    v9.export(ours, cfg)
    capfd.readouterr()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "export").eval()
    assert not re.search("not initialized|not used|MISSING|UNEXPECTED", capfd.readouterr().err)
    assert type(again) is type(theirs)
    assert again.config.layer_norm_epsilon == 1e-3
    idx = torch.randint(97, (2, 24))
    assert (again(idx).logits - theirs(idx).logits).abs().max() < 1e-4
    _, back = loaded(tmp_path / "new" / "export")
    for name, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)
    files = {path.name for path in (tmp_path / "new" / "export").iterdir()}
    assert files == {"config.json", "model.safetensors"}


def test_what_was_trained_is_exported_and_gives_the_same_logits(tmp_path, corpus, bpe):
    for norm in ("pre", "post"):
        flags = [*tiny_flags(v9, tokenizer="gpt2"), "--data", str(corpus), "--norm", norm]
        v9.main([*flags, "--export", str(tmp_path / norm)])
        state = torch.load(Path(TINY["out_dir"]) / "latest.pt", weights_only=True)
        ours = v9.LanguageModel(tiny(v9, norm=norm), bpe.n_vocab).eval()
        ours.load_state_dict(state["model"])
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / norm).eval()
        idx = torch.randint(bpe.n_vocab, (2, 5))
        assert (theirs(idx).logits - ours(idx)[0]).abs().max() < 1e-4


def test_files_without_a_prefix_and_with_masks_load(released):
    """As OpenAI's own are: no "transformer." before the names, and the masks of attention."""
    folder, theirs = released
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    for i in range(3):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    weights |= {"position_ids": torch.arange(24), "lm_head.weight": torch.ones(97, 36)}
    save_file(weights, folder / "model.safetensors")
    idx = torch.randint(97, (2, 24))
    assert (loaded(folder)[1](idx)[0] - theirs(idx).logits).abs().max() < 1e-4


# ---- the architecture


@pytest.mark.parametrize(
    ("preset", "vocab_size", "n_parameters"),
    [
        ("gpt1", 40_478, 116_534_784),
        ("gpt2", 50_257, 124_439_808),
        ("gpt2-medium", 50_257, 354_823_168),
        ("gpt2-large", 50_257, 774_030_080),
        ("gpt2-xl", 50_257, 1_557_611_200),
    ],
)
def test_presets_have_as_many_parameters_as_the_released_models(preset, vocab_size, n_parameters):
    cfg, _ = v9.read_settings(["--device", "cpu", "--preset", preset])
    with torch.device("meta"):
        model = v9.LanguageModel(cfg, vocab_size)
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_flags_win_over_presets_and_released_sizes(tmp_path):
    cfg, _ = v9.read_settings(["--preset", "gpt1", "--n_layer", "3", "--device", "cpu"])
    assert (cfg.norm, cfg.n_layer, cfg.n_embd, cfg.block_size) == ("post", 3, 768, 512)
    reference("GPT-1").save_pretrained(tmp_path)
    cfg, _ = v9.read_settings(["--init_from", str(tmp_path), "--n_head=9", "--preset", "gpt2"])
    assert (cfg.norm, cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.block_size) == ("post", 3, 36, 9, 24)
    assert cfg.layer_norm_epsilon == 1e-3


def test_the_head_is_the_embedding_and_projections_start_small():
    torch.manual_seed(1)
    model = v9.LanguageModel(tiny(v9, n_embd=192, n_layer=8), 1000)
    assert model.lm_head.weight is model.token_embedding.weight
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 0.02 / 4 if name.endswith("projection.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert parameter.unique().tolist() == [float("ln" in name and "weight" in name)], name


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-6, 6, 999).view(37, 27)
    layer = v9.FeedForward(tiny(v9, n_embd=27))
    for linear in (layer.expansion, layer.projection):
        torch.nn.init.zeros_(linear.bias)
        torch.nn.init.eye_(linear.weight)
    by_hand = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(layer(x), by_hand)
    assert (layer(x) - F.gelu(x)).abs().max() > 1e-4


# ---- what does not load says why


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "relu"}, "'activation_function': 'relu'"),
        ({"afn": "swish"}, "'afn': 'swish'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx': True"),
        ({"scale_attn_weights": False}, "'scale_attn_weights': False"),
        ({"tie_word_embeddings": False}, "'tie_word_embeddings': False"),
        ({"model_type": "llama"}, "KeyError: 'llama'"),
        ({"model_type": None}, "KeyError: None"),
        ({"n_positions": None}, "--block_size: invalid int value: 'None'"),
        ({"n_head": 5}, "--n_head 5"),
        ({"n_layer": 4}, "h.3.attn.c_attn.bias, "),
        ({"n_layer": 2}, "h.2.attn.c_attn.bias, "),
        ({"n_positions": 25}, "misshapen: "),
    ],
)
def test_configurations_that_do_not_fit(released, capsys, monkeypatch, change, said):
    folder, _ = released
    encoding = tiktoken.Encoding(
        "97", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(97)}, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | change), encoding="utf-8")
    line = refused(capsys, "--device", "cpu", "--init_from", folder, "--max_iters", "0")
    assert said in line


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json", '{"model_type": "gpt2"}'])
def test_configurations_that_are_none(released, capsys, text):
    folder, _ = released
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert f"--init_from {folder}: " in refused(capsys, "--device", "cpu", "--init_from", folder)


def test_weights_that_are_missing_extra_or_of_another_size(released):
    folder, _ = released
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "transformer.h.1.ln_2.bias"
    others = {
        "h.1.ln_2.bias": {n: w for n, w in weights.items() if n != name},
        "h.3.extra": weights | {"transformer.h.3.extra": torch.ones(2)},
        "h.1.ln_2.bias ": weights | {name: torch.ones(1)},
    }
    for wrong, tensors in others.items():
        save_file(tensors, path)
        with pytest.raises(data.InputError, match=f"--init_from .*misshapen: {wrong.strip()};"):
            loaded(folder)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "a folder", "noise"])
def test_damaged_weights(released, capsys, damage):
    folder, _ = released
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": whole[:-99], "noise": os.urandom(5000)}[damage])
    line = refused(capsys, "--device", "cpu", "--init_from", folder)
    assert f"--init_from {folder}: can't start from it" in line


def test_another_vocabulary_than_the_tokenizers(released, bpe, capsys):
    folder, _ = released
    line = refused(capsys, "--device", "cpu", "--init_from", folder, "--max_iters", "0")
    assert "--init_from" in line
    assert "misshapen: wte.weight; " in line or "misshapen: tokens_embed.weight; " in line


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_exports_that_can_not_be_written(tmp_path, corpus, capsys, place):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    folder = tmp_path / "file" / "new" if place == "under a file" else tmp_path / "file"
    with pytest.raises(SystemExit, match="2"):
        v9.main([*tiny_flags(v9), "--data", str(corpus), "--export", str(folder)])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: --export {folder}: ")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_an_export_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    cfg = tiny(v9, export=str(tmp_path))
    v9.export(v9.LanguageModel(cfg, 50), cfg)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(v9, "save_file", fail)
    with pytest.raises(data.InputError, match="no space left"):
        v9.export(v9.LanguageModel(cfg, 50), cfg)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---- the download


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its own client asks for."""

    def do_GET(self):  # noqa: N802
        found = re.fullmatch(r"/openai-community/gpt2/resolve/main/([\w.]+)", self.path)
        content = self.server.files.get(found[1]) if found else None
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
        self.end_headers()
        if self.command == "GET" and content:
            self.server.got.append(self.path)
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def hub(files: dict[str, bytes]):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.got = files, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


PROGRAM = """
import sys, tiktoken
ranks = {bytes([i]): i for i in range(97)}
encoding = tiktoken.Encoding("97", pat_str=".", mergeable_ranks=ranks, special_tokens={})
tiktoken.get_encoding = lambda name: encoding
import v9_gpt2
v9_gpt2.main(sys.argv[1:])
"""


def sample(endpoint: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    """A run that samples from the weights of "gpt2", 97 tokens, at an endpoint."""
    flags = ["--init_from", "gpt2", "--max_iters", "0", "--max_new_tokens", "20"]
    flags += ["--temperature", "0", "--prompt", "ABC", "--device", "cpu"]
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache)} | environment
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags], cwd=ROOT, capture_output=True, encoding="utf-8",
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1"} | environment, timeout=100,
    )


def test_weights_are_downloaded_once_and_found_without_a_network(tmp_path):
    model = reference("GPT-2")
    model.save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with hub(files) as (server, endpoint):
        first = sample(endpoint, tmp_path / "cache")
        assert first.returncode == 0, first.stderr
        again = sample(endpoint, tmp_path / "cache")
        assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
        assert len([got for got in server.got if got.endswith("model.safetensors")]) == 1
    idx = torch.tensor([[65, 66, 67]])
    how = dict(attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False)
    expected = model.generate(idx, eos_token_id=None, pad_token_id=0, **how)
    assert first.stdout == bytes(expected[0].tolist()).decode() + "\n"

    offline = sample(endpoint, tmp_path / "cache", HF_HUB_OFFLINE="1")  # the server is gone, too
    assert (offline.returncode, offline.stdout) == (0, first.stdout), offline.stderr


@pytest.mark.parametrize("lacking", ["all", "model.safetensors", "cut off"])
def test_downloads_that_fail(tmp_path, lacking):
    model = reference("GPT-2")
    model.save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    if lacking == "cut off":
        files["model.safetensors"] = files["model.safetensors"][:-99]
    else:
        files = {name: content for name, content in files.items() if lacking not in ("all", name)}
    with hub(files) as (_, endpoint):
        done = sample(endpoint, tmp_path / "cache")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: --init_from gpt2: can't start from it")
    assert "Traceback" not in done.stderr


def test_no_network_and_no_cache(tmp_path):
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = sample("http://127.0.0.1:9", tmp_path, **environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].startswith("error: --init_from gpt2: ")
        assert "Traceback" not in done.stderr


# ---- the tokenizer


def test_without_the_files_of_the_tokenizer(monkeypatch, corpus, capsys, released):
    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    flags = [*tiny_flags(v9, tokenizer="auto"), "--data", str(corpus)]
    v9.main(flags)
    out, err = capsys.readouterr()
    assert "notice: no GPT-2 tokenizer (no network); set TIKTOKEN_CACHE_DIR" in err
    v9.main([*flags, "--tokenizer", "char"])
    assert re.sub(r", [\d,]+ tokens/s|utilisation: .*", "", capsys.readouterr().out) == re.sub(
        r", [\d,]+ tokens/s|utilisation: .*", "", out
    )
    folder, _ = released
    for more in (["--tokenizer", "gpt2"], ["--init_from", str(folder), "--max_iters", "0"]):
        line = refused(capsys, *flags, *more)
        assert "no network" in line
        assert "TIKTOKEN_CACHE_DIR" in line


def test_one_notice_where_there_is_no_corpus(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(data, "SHAKESPEARE", tmp_path / "missing.txt")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    v9.main([*tiny_flags(v9), "--subset", "9000"])
    assert capsys.readouterr().err.count("notice: ") == 1


def test_tokens_without_their_tokenizer(monkeypatch, capsys, tmp_path):
    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    np.zeros(200, np.uint16).tofile(tmp_path / "a.bin")
    for flags in (["--data", tmp_path / "a.bin"], ["--val_data", tmp_path / "a.bin"]):
        line = refused(capsys, *tiny_flags(v9, tokenizer="auto"), "--subset", "9000", *flags)
        assert "--tokenizer gpt2: no GPT-2 tokenizer" in line


def test_a_folder_comes_before_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    reference("GPT-2").save_pretrained("gpt2")
    cfg, _ = v9.read_settings(["--device", "cpu", "--init_from", "gpt2"])
    assert cfg.n_embd == 36


def test_a_run_in_byte_pairs(corpus, capsys, bpe):
    flags = [*tiny_flags(v9, tokenizer="auto"), "--data", str(corpus)]
    v9.main([*flags, "--prompt", "Zoë <|endoftext|>"])
    out = capsys.readouterr().out
    assert "bits per token" in out
    assert "\nZoë <|endoftext|>" in out, "bytes that the corpus lacks, and no special token"


def test_a_checkpoint_is_sampled_and_resumed_in_its_own_tokens(corpus, capsys, bpe, tmp_path):
    flags = ["--data", str(corpus), "--out_dir", str(tmp_path / "out")]
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), *flags])
    text = capsys.readouterr().out.partition("per token\n")[2]
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), *flags, "--sample_only", "--prompt", "The"])
    assert capsys.readouterr().out.startswith("The")
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), *flags, "--resume"])
    assert capsys.readouterr().out.partition("per token\n")[2] == text
    for more in (["--resume"], ["--sample_only"]):
        v9.main([*tiny_flags(v9, tokenizer="auto"), *flags, *more])
        assert capsys.readouterr().out.partition("per token\n")[2] in (text, "")
        line = refused(capsys, *tiny_flags(v9, tokenizer="char"), *flags, *more)
        assert "--tokenizer char: not that of the checkpoint" in line
    line = refused(capsys, *tiny_flags(v9, tokenizer="gpt2"), *flags, "--resume", "--norm", "post")
    assert "--norm post: " in line
    assert "has pre" in line


def test_fine_tuning_from_an_exported_folder(corpus, capsys, bpe, tmp_path):
    """It starts from the loss that the exported model ended with, and goes on from there."""
    flags = ["--data", str(corpus), "--eval_iters", "50", "--out_dir", str(tmp_path / "out")]
    more = ["--max_iters", "150", "--eval_interval", "150"]
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), *flags, *more, "--export", str(tmp_path / "first")])
    whole = r"whole validation split: loss (\d\.\d+)"
    first = float(re.search(whole, capsys.readouterr().out)[1])
    small = tiny_flags(v9, tokenizer="gpt2", learning_rate=1e-9)
    v9.main([*small, *flags, "--init_from", str(tmp_path / "first"), "--max_iters", "1"])
    second = float(re.search(whole, capsys.readouterr().out)[1])
    assert second == pytest.approx(first, abs=2e-4)
    more += ["--init_from", str(tmp_path / "first")]
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), *flags, *more])
    third = float(re.search(whole, capsys.readouterr().out)[1])
    assert third < first


def test_no_steps_from_released_weights_only_sample(corpus, capsys, bpe, tmp_path):
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), "--data", str(corpus), "--export", str(tmp_path)])
    capsys.readouterr()
    sizes = ["--max_new_tokens", "9", "--device", "cpu", "--prompt", "The", "--data", "missing.txt"]
    v9.main([*sizes, "--init_from", str(tmp_path), "--max_iters", "0", "--out_dir", "/dev/null/x"])
    out = capsys.readouterr().out
    assert out.startswith("The")
    assert "loss" not in out


# ---- corpora


def test_a_text_is_encoded_once_and_kept(tmp_path, bpe):
    bpe = v9.make_tokenizer(tiny(v9, tokenizer="gpt2"), "")
    path, cfg = tmp_path / "my.text.txt", tiny(v9, data="")
    text = "\n\n Hens  dream.\r\n\n\n\tÜber \n  the lazy\x0b dog's 1234 eggs! \n" * 30 + "  "
    path.write_text(text, encoding="utf-8", newline="")
    cfg.data = str(path)
    tokens = v9.load_tokens("--data", bpe, cfg)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == bpe.encode_ordinary(data.load_text(path))
    kept = tmp_path / "my.text.txt.gpt2.bin"
    assert np.fromfile(kept, np.uint16).tolist() == tokens.tolist()
    assert {p.name for p in tmp_path.iterdir()} == {path.name, kept.name}

    tokens[:3].tofile(kept)  # which shows that it is read
    again = v9.load_tokens("--data", bpe, cfg)
    assert isinstance(again, np.memmap)
    assert again.tolist() == tokens[:3].tolist()
    cfg.subset = 20
    part = v9.load_tokens("--data", bpe, cfg)
    assert part.tolist() == bpe.encode_ordinary(data.load_text(path)[:20])
    cfg.subset = 0
    os.utime(path, (time.time() + 9, time.time() + 9))  # the text is newer
    assert v9.load_tokens("--data", bpe, cfg).tolist() == tokens.tolist()
    os.utime(kept, (time.time() - 9, time.time() - 9))
    path.unlink()
    path.write_text("hens", encoding="utf-8")
    os.utime(path, (0, 0))  # an older text, put there later
    assert v9.load_tokens("--data", bpe, cfg).tolist() == bpe.encode_ordinary("hens")


def test_a_folder_in_which_nothing_can_be_kept(corpus, bpe, monkeypatch):
    def fail(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "replace", fail)
    tokenizer = v9.make_tokenizer(tiny(v9, tokenizer="gpt2"), "")
    tokens = v9.load_tokens("--data", tokenizer, tiny(v9, data=str(corpus)))
    assert tokens.tolist() == bpe.encode_ordinary(TEXT)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's files: a download")
def test_the_pieces_of_a_text_have_the_tokens_of_the_whole(tmp_path):
    tokenizer = v9.make_tokenizer(tiny(v9, tokenizer="gpt2"), "")
    assert tokenizer.encode("Hello world", "--prompt") == [15496, 995]
    path = tmp_path / "text.txt"
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    path.write_text("\n\n \n".join(m.read_text(encoding="utf-8") for m in modules), "utf-8")
    tokens = v9.load_tokens("--data", tokenizer, tiny(v9, data=str(path)))
    assert tokens.tolist() == tokenizer.encode_ordinary(data.load_text(path))


class Recorder(np.memmap):
    """A memory map that notes which of its tokens are asked for."""

    asked = []

    def __getitem__(self, key):
        if isinstance(key, np.ndarray):
            self.asked.append(key)
        return super().__getitem__(key)


def test_training_touches_the_windows_that_it_should(tmp_path):
    """Those of get_batch's random starts, of the file's first 90 % for training, and no others."""
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    cfg = tiny(v9, max_iters=3, eval_interval=100)
    tokens = Recorder(tmp_path / "train.bin", np.uint16, "r")
    train_data, val_data = data.split(tokens, cfg.block_size)
    assert isinstance(train_data, np.memmap)
    assert np.shares_memory(train_data, tokens)
    for split, least, most in ((train_data, 0, 900), (val_data, 900, 1000)):
        Recorder.asked = []
        torch.manual_seed(4)
        starts = torch.randint(len(split) - 5, (4, 1))
        torch.manual_seed(4)
        x, y = v9.get_batch(split, cfg)
        assert torch.equal(x, least + starts + torch.arange(5))
        assert torch.equal(y, x + 1)
        (windows,) = Recorder.asked
        assert windows.shape == (4, 6)
        assert least <= least + windows.min() <= least + windows.max() < most

    Recorder.asked = []
    model = v9.LanguageModel(cfg, 1000)
    v9.train(model, train_data, val_data, cfg)
    assert len(Recorder.asked) == 3 + 2 * 2 * cfg.eval_iters
    assert all(windows.shape == (4, 6) for windows in Recorder.asked)
    assert max(windows.max() for windows in Recorder.asked) < 900


def test_bin_files_train_as_the_text_does(tmp_path, corpus, bpe, capsys):
    ids = np.array(bpe.encode_ordinary(TEXT), np.uint16)
    ids.tofile(tmp_path / "all.bin")
    ids[: len(ids) * 9 // 10].tofile(tmp_path / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(tmp_path / "val.bin")
    flags, outputs = tiny_flags(v9, tokenizer="gpt2"), []
    for more in (
        ["--data", corpus],
        ["--data", tmp_path / "all.bin"],
        ["--data", tmp_path / "train.bin", "--val_data", tmp_path / "val.bin"],
    ):
        v9.main([*flags, *map(str, more)])
        out = capsys.readouterr().out
        outputs.append(re.sub(r", [\d,]+ tokens/s|utilisation: .*", "", out))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_however_large_the_file_is(tmp_path):
    program = """
import re, sys, torch, numpy as np, v9_gpt2 as v9
import pathlib, data
cfg = v9.Config(data=sys.argv[1], batch_size=64, block_size=64, device="cpu")
class Tokenizer:
    n_vocab = 50257
def most():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024
before = most()
tokens, _ = data.split(v9.load_tokens("--data", Tokenizer(), cfg), 64)
for _ in range(1000):
    v9.get_batch(tokens, cfg)
print(most() - before)
"""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        for _ in range(40):
            file.write(bytes(2**24))  # 640 MiB in all
    done = subprocess.run(
        [sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150  # MiB


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("odd.bin", bytes(2001), "multiple of the data-type size"),
        ("empty.bin", b"", "empty"),
        ("missing.bin", None, "No such file"),
        ("short.bin", bytes(10), "5 tokens are too few"),
        ("vocabulary.bin", np.full(2000, 297, np.uint16).tobytes(), "token 297 is unknown"),
        ("one.bin", np.r_[np.zeros(2000), 65535].astype(np.uint16).tobytes(), "token 65535"),
    ],
)
def test_files_of_tokens_that_do_not_fit(tmp_path, bpe, capsys, corpus, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    flags = tiny_flags(v9, tokenizer="gpt2")
    line = refused(capsys, *flags, "--data", path)
    assert line.startswith("error: --data")
    assert said in line
    line = refused(capsys, *flags, "--data", corpus, "--val_data", path)
    assert line.startswith(f"error: --val_data {path}")


def test_a_text_to_validate_on(tmp_path, capsys, corpus):
    other = tmp_path / "other.txt"
    other.write_text("dreams of hens " * 40, encoding="utf-8")
    flags = [*tiny_flags(v9), "--data", str(corpus), "--val_data"]
    v9.main(flags[:-1])
    losses = [re.findall(r"split: loss (\S+),|val loss (\S+),", capsys.readouterr().out)]
    v9.main([*flags, str(other)])
    losses += [re.findall(r"split: loss (\S+),|val loss (\S+),", capsys.readouterr().out)]
    assert len(losses[0]) == len(losses[1]) == 4
    assert all(a != b for a, b in zip(*losses, strict=True))
    other.write_text("Ünknown " * 40, encoding="utf-8")
    assert "--val_data: the corpus lacks 'Ü'" in refused(capsys, *flags, str(other))


def test_epochs_are_passes_over_the_training_tokens(corpus, capsys, tmp_path):
    n = len(TEXT) * 9 // 10
    flags = [*tiny_flags(v9), "--data", str(corpus), "--epochs", "2", "--grad_accum_steps", "3"]
    v9.main(flags)
    last = math.ceil(2 * n / (4 * 5 * 3))
    assert re.findall(r"^step (\d+):", capsys.readouterr().out, re.M)[-1] == str(last)


def test_a_subset_is_the_beginning(tmp_path, corpus, capsys):
    flags = [*tiny_flags(v9), "--subset", "300"]
    v9.main([*flags, "--data", str(corpus)])
    part = capsys.readouterr().out
    corpus.write_text(TEXT[:300], encoding="utf-8")
    v9.main([*tiny_flags(v9), "--data", str(corpus)])
    strip = r", [\d,]+ tokens/s|utilisation: .*"
    assert re.sub(strip, "", part) == re.sub(strip, "", capsys.readouterr().out)


@pytest.mark.parametrize("flag", ["--preset", "--norm", "--tokenizer"])
def test_choices_are_named(flag, capsys):
    line = refused(capsys, flag, "other")
    assert f"argument {flag}: invalid choice: 'other' (choose from" in line
