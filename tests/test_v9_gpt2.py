"""v9_gpt2.py: GPT-2 and GPT-1 compared with transformers, weights in and out, files of tokens.

Also what no other script has: gradient accumulation, and processes that act as one.
"""

import contextlib
import functools
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

import data

import huggingface_hub
import numpy as np
import pytest
import tiktoken
import torch
from conftest import TEXT, TINY, VOCAB_SIZE, random_tokens, refused, tiny, tiny_flags
from safetensors.torch import load_file, save_file
from tiktoken_ext.openai_public import r50k_pat_str
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

import v9_gpt2 as v9
from lab.ladder import ROOT

KINDS = {
    "GPT-2": (GPT2Config, GPT2LMHeadModel, "pre"),
    "GPT-1": (OpenAIGPTConfig, OpenAIGPTLMHeadModel, "post"),
}
SIZE = {"n_positions": 24, "n_embd": 36, "n_layer": 3, "n_head": 3, "layer_norm_epsilon": 1e-3}


@pytest.fixture(autouse=True)
def quick_utilisation(monkeypatch):
    """Skip the matrix products that measure the machine; they take longer than a tiny run."""
    monkeypatch.setattr(v9, "repeat", lambda product, number: [1.0])


def make_reference(kind: str, **changes):
    """A random model of transformers, whose choices are far from even."""
    config, model, _ = KINDS[kind]
    torch.manual_seed(2)
    made = model(config(vocab_size=97, bos_token_id=0, eos_token_id=0, **SIZE | changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture(params=KINDS)
def released(request, tmp_path):
    """A folder with a small model of either kind, and the model."""
    model = make_reference(request.param)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def gpt2_folder(tmp_path) -> Path:
    """A folder with a small GPT-2."""
    make_reference("GPT-2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, *flags: str):
    """The settings and the model that --init_from makes of a folder."""
    cfg, weights = v9.read_settings(["--device", "cpu", "--init_from", str(folder), *flags])
    model = v9.LanguageModel(cfg, 97).eval()
    v9.load_released(model, weights, cfg)
    return cfg, model


def small_encoding() -> tiktoken.Encoding:
    """It cuts a text into words as GPT-2's does, but has only 256 bytes and 40 pairs of them."""
    pairs = sorted({TEXT[i : i + 2].encode() for i in range(len(TEXT) - 1)})[:40]
    ranks = {bytes([i]): i for i in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)}
    return tiktoken.Encoding(
        "small", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 296}
    )


@pytest.fixture
def bpe(monkeypatch) -> tiktoken.Encoding:
    """A small encoding instead of GPT-2's, which needs a download."""
    encoding = small_encoding()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@pytest.fixture
def bytes_below_97(monkeypatch):
    """An encoding of single bytes, instead of GPT-2's, with the vocabulary of make_reference."""
    ranks = {bytes([i]): i for i in range(97)}
    encoding = tiktoken.Encoding("97", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


@pytest.fixture
def no_encoding(monkeypatch):
    """Without a network, tiktoken can't download GPT-2's encoding."""

    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)


def without_speed(output: str) -> str:
    """What main() printed, without what depends on the speed of the machine."""
    return re.sub(r", [\d,]+ tokens/s|utilisation: .*", "", output)


def whole_loss(capsys) -> float:
    """The loss on the whole validation split, as main() printed it."""
    return float(re.search(r"split: loss (\d\.\d+)", capsys.readouterr().out)[1])


# ---- the same function as transformers


def test_logits_and_losses_equal_those_of_transformers(released):
    folder, theirs = released
    _, ours = load(folder)
    idx = torch.randint(97, (3, 24))
    for T in (1, 7, 24):
        expected = theirs(idx[:, :T], labels=idx[:, :T])
        logits, _ = ours(idx[:, :T])
        assert (logits - expected.logits).abs().max() < 1e-4
        if T > 1:  # they shift the labels themselves
            _, loss = ours(idx[:, : T - 1], idx[:, 1:T])
            assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-4)


def test_cached_logits_equal_those_of_transformers(released):
    folder, theirs = released
    cfg, ours = load(folder)
    idx = torch.randint(97, (2, 24))
    cache = torch.empty(cfg.n_layer, 2, 2, cfg.n_head, 24, cfg.n_embd // cfg.n_head)
    with torch.inference_mode():
        expected = theirs(idx).logits
        first, _ = ours(idx[:, :5], cache=cache[..., :5, :])
        steps = [ours(idx[:, i : i + 1], cache=cache[..., : i + 1, :])[0] for i in range(5, 24)]
    assert (torch.cat((first, *steps), dim=1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_equals_that_of_transformers(tmp_path, kind):
    theirs = make_reference(kind, n_positions=64)
    for name, parameter in theirs.named_parameters():  # or the text repeats one token for ever
        if "embed" in name or ".wte" in name or ".wpe" in name:
            std = 1.0 if ".wpe" in name or "positions" in name else 0.05
            torch.nn.init.normal_(parameter, std=std)
        elif parameter.ndim == 1:
            torch.nn.init.constant_(parameter, float("ln" in name and "weight" in name))
    theirs.save_pretrained(tmp_path)
    _, ours = load(tmp_path)
    idx = torch.randint(97, (2, 9))
    how = dict(attention_mask=torch.ones_like(idx), max_new_tokens=50, do_sample=False)
    expected = theirs.generate(idx, eos_token_id=None, pad_token_id=0, **how)
    text = ours.generate(idx, 50, temperature=0.0)
    assert text.shape == (2, 59)
    assert torch.equal(text, expected)
    assert len(set(text[0, 9:].tolist())) > 4, "not the same few tokens for ever"


def test_exported_models_load_in_transformers(released, tmp_path, capfd):
    folder, theirs = released
    cfg, ours = load(folder, "--export", str(tmp_path / "new" / "export"))
    v9.export(ours, cfg)
    capfd.readouterr()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "export").eval()
    assert not re.search("not initialized|not used|MISSING|UNEXPECTED", capfd.readouterr().err)
    assert type(again) is type(theirs)
    assert again.config.layer_norm_epsilon == 1e-3
    idx = torch.randint(97, (2, 24))
    assert (again(idx).logits - theirs(idx).logits).abs().max() < 1e-4
    _, back = load(tmp_path / "new" / "export")
    for name, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)
    files = {path.name for path in (tmp_path / "new" / "export").iterdir()}
    assert files == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_an_export_has_the_logits_of_the_trained_model(tmp_path, corpus, bpe, norm):
    flags = [*tiny_flags(v9, tokenizer="gpt2", out_dir=tmp_path / "out"), "--data", str(corpus)]
    v9.main([*flags, "--norm", norm, "--export", str(tmp_path / "export")])
    state = torch.load(tmp_path / "out" / "latest.pt", weights_only=True)
    ours = v9.LanguageModel(tiny(v9, norm=norm), bpe.n_vocab).eval()
    ours.load_state_dict(state["model"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    idx = torch.randint(bpe.n_vocab, (2, 5))
    assert (theirs(idx).logits - ours(idx)[0]).abs().max() < 1e-4


def test_files_with_plain_names_and_with_masks_load(released):
    """Like OpenAI's own files: no "transformer." before the names, but the masks of attention."""
    folder, theirs = released
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    for i in range(3):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    weights |= {"position_ids": torch.arange(24), "lm_head.weight": torch.ones(97, 36)}
    save_file(weights, folder / "model.safetensors")
    idx = torch.randint(97, (2, 24))
    assert (load(folder)[1](idx)[0] - theirs(idx).logits).abs().max() < 1e-4


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
def test_presets_have_the_parameters_of_the_released_models(preset, vocab_size, n_parameters):
    cfg, _ = v9.read_settings(["--device", "cpu", "--preset", preset])
    with torch.device("meta"):
        model = v9.LanguageModel(cfg, vocab_size)
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_flags_override_released_sizes_and_those_override_presets(tmp_path):
    cfg, _ = v9.read_settings(["--preset", "gpt1", "--n_layer", "3", "--device", "cpu"])
    assert (cfg.norm, cfg.n_layer, cfg.n_embd, cfg.block_size) == ("post", 3, 768, 512)
    make_reference("GPT-1").save_pretrained(tmp_path)
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


# ---- weights that can't be used


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "relu"}, "'activation_function': 'relu'"),
        ({"afn": "swish"}, "'afn': 'swish'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx': True"),
        ({"scale_attn_weights": False}, "'scale_attn_weights': False"),
        ({"tie_word_embeddings": False}, "'tie_word_embeddings': False"),
        ({"model_type": "llama"}, "KeyError: 'llama'"),
        ({"n_positions": None}, "--block_size: invalid int value: 'None'"),
        ({"n_head": 5}, "--n_head 5"),
        ({"n_layer": 4}, "h.3.attn.c_attn.bias, "),
        ({"n_layer": 2}, "h.2.attn.c_attn.bias, "),
        ({"n_positions": 25}, "misshapen: "),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    gpt2_folder, bytes_below_97, capsys, change, said
):
    path = gpt2_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | change), encoding="utf-8")
    flags = ["--device", "cpu", "--init_from", gpt2_folder, "--max_iters", "0"]
    assert said in refused(v9, capsys, *flags)


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "gpt2"}'])
def test_a_file_that_is_no_configuration_is_refused(gpt2_folder, capsys, text):
    (gpt2_folder / "config.json").write_text(text, encoding="utf-8")
    line = refused(v9, capsys, "--device", "cpu", "--init_from", gpt2_folder)
    assert f"--init_from {gpt2_folder}: can't start from it" in line


def test_weights_that_are_missing_extra_or_of_another_size_are_named(gpt2_folder):
    path = gpt2_folder / "model.safetensors"
    weights = load_file(path)
    name = "transformer.h.1.ln_2.bias"
    missing = {n: w for n, w in weights.items() if n != name}
    extra = weights | {"transformer.h.3.extra": torch.ones(2)}
    misshapen = weights | {name: torch.ones(1)}
    named = ("h.1.ln_2.bias", "h.3.extra", "h.1.ln_2.bias")
    for tensors, wrong in zip((missing, extra, misshapen), named, strict=True):
        save_file(tensors, path)
        with pytest.raises(data.InputError, match=f"--init_from .*misshapen: {wrong};"):
            load(gpt2_folder)


@pytest.mark.parametrize("damage", ["missing", "cut", "noise"])
def test_damaged_weights_are_refused(gpt2_folder, capsys, damage):
    path = gpt2_folder / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(whole[:-99] if damage == "cut" else os.urandom(5000))
    line = refused(v9, capsys, "--device", "cpu", "--init_from", gpt2_folder)
    assert f"--init_from {gpt2_folder}: can't start from it" in line


def test_weights_for_another_vocabulary_are_refused(released, bpe, capsys):
    folder, _ = released
    line = refused(v9, capsys, "--device", "cpu", "--init_from", folder, "--max_iters", "0")
    assert f"--init_from {folder}: " in line
    assert "misshapen: wte.weight; " in line or "misshapen: tokens_embed.weight; " in line


def test_an_export_that_can_not_be_written_is_refused(tmp_path, corpus, capsys):
    folder = tmp_path / "file"
    folder.write_text("mine", encoding="utf-8")
    line = refused(v9, capsys, *tiny_flags(v9), "--data", corpus, "--export", folder)
    assert line.startswith(f"error: --export {folder}: ")
    assert folder.read_text(encoding="utf-8") == "mine"


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
    """The part of the Hugging Face hub that its client asks for."""

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
def hub(folder: Path, monkeypatch):
    """Serve a folder as the weights of "gpt2", and download them from here to a fresh cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.got = {path.name: path.read_bytes() for path in folder.iterdir()}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    where = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": f"{folder}-cache"}
    download = functools.partial(huggingface_hub.hf_hub_download, **where)
    monkeypatch.setattr(v9, "hf_hub_download", download)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


SAMPLE_GPT2 = ["--init_from", "gpt2", "--max_iters", "0", "--max_new_tokens", "20"]
SAMPLE_GPT2 += ["--temperature", "0", "--prompt", "ABC", "--device", "cpu"]


def test_weights_are_downloaded_once_and_then_need_no_network(
    gpt2_folder, bytes_below_97, capsys, monkeypatch
):
    with hub(gpt2_folder, monkeypatch) as server:
        for _ in range(2):
            v9.main(SAMPLE_GPT2)
        assert len([got for got in server.got if got.endswith("model.safetensors")]) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    v9.main(SAMPLE_GPT2)
    idx = torch.tensor([[65, 66, 67]])
    how = dict(attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False)
    model = make_reference("GPT-2")
    expected = model.generate(idx, eos_token_id=None, pad_token_id=0, **how)
    assert capsys.readouterr().out == 3 * (bytes(expected[0].tolist()).decode() + "\n")


@pytest.mark.parametrize("lacking", ["all", "weights", "the end"])
def test_a_download_that_fails_is_refused(gpt2_folder, capsys, monkeypatch, lacking):
    with hub(gpt2_folder, monkeypatch) as server:
        if lacking == "all":
            server.files.clear()
        elif lacking == "weights":
            del server.files["model.safetensors"]
        else:
            server.files["model.safetensors"] = server.files["model.safetensors"][:-99]
        line = refused(v9, capsys, *SAMPLE_GPT2)
    assert line.startswith("error: --init_from gpt2: can't start from it")


def test_no_network_is_one_line(capsys, monkeypatch):
    def fail(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(v9, "hf_hub_download", fail)
    line = refused(v9, capsys, *SAMPLE_GPT2)
    assert line.startswith("error: --init_from gpt2: can't start from it")
    assert "no route to host" in line


def test_no_network_and_an_empty_cache_are_one_line(tmp_path):
    """In a process of its own: the client of the hub reads its environment when it starts."""
    done = subprocess.run(
        [sys.executable, "v9_gpt2.py", *SAMPLE_GPT2], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --init_from gpt2: can't start from it")
    assert done.stderr.count("\n") == 1


# ---- the tokenizer


def test_without_the_gpt2_tokenizer_a_run_uses_characters(no_encoding, corpus, capsys):
    flags = [*tiny_flags(v9, tokenizer="auto"), "--data", str(corpus)]
    v9.main(flags)
    out, err = capsys.readouterr()
    assert "notice: no GPT-2 tokenizer (no network); set TIKTOKEN_CACHE_DIR" in err
    v9.main([*flags, "--tokenizer", "char"])
    assert without_speed(capsys.readouterr().out) == without_speed(out)


def test_what_needs_the_gpt2_tokenizer_is_refused_without_it(
    no_encoding, gpt2_folder, corpus, capsys, tmp_path
):
    np.zeros(200, np.uint16).tofile(tmp_path / "a.bin")
    flags = [*tiny_flags(v9, tokenizer="auto"), "--data", corpus]
    for more in (
        ["--tokenizer", "gpt2"], ["--init_from", gpt2_folder, "--max_iters", "0"],
        ["--data", tmp_path / "a.bin"], ["--val_data", tmp_path / "a.bin"],
    ):  # fmt: skip
        line = refused(v9, capsys, *flags, *more)
        assert "--tokenizer gpt2: no GPT-2 tokenizer (no network)" in line
        assert "TIKTOKEN_CACHE_DIR" in line


def test_one_notice_is_enough_without_shakespeare(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(data.corpora, "SHAKESPEARE", tmp_path / "missing.txt")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    v9.main([*tiny_flags(v9), "--subset", "9000"])
    assert capsys.readouterr().err.count("notice: ") == 1


def test_a_folder_called_gpt2_comes_before_the_download(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_reference("GPT-2").save_pretrained("gpt2")
    cfg, _ = v9.read_settings(["--device", "cpu", "--init_from", "gpt2"])
    assert cfg.n_embd == 36


def test_a_run_with_byte_pairs(corpus, capsys, bpe):
    flags = [*tiny_flags(v9, tokenizer="auto"), "--data", str(corpus)]
    v9.main([*flags, "--prompt", "Zoë <|endoftext|>"])
    out = capsys.readouterr().out
    assert "bits per token" in out
    assert "\nZoë <|endoftext|>" in out, "bytes that the corpus lacks, and no special token"


def test_a_checkpoint_keeps_its_tokens(corpus, capsys, bpe, tmp_path):
    flags = ["--data", str(corpus), "--out_dir", str(tmp_path / "out")]
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), *flags])
    text = capsys.readouterr().out.partition("per token\n")[2]
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), *flags, "--sample_only", "--prompt", "The"])
    assert capsys.readouterr().out.startswith("The")
    for tokenizer in ("gpt2", "auto"):
        v9.main([*tiny_flags(v9, tokenizer=tokenizer), *flags, "--resume"])
        assert capsys.readouterr().out.partition("per token\n")[2] == text
    for mode in ("--resume", "--sample_only"):
        line = refused(v9, capsys, *tiny_flags(v9, tokenizer="char"), *flags, mode)
        assert "--tokenizer char: not that of the checkpoint" in line
    line = refused(v9, capsys, *tiny_flags(v9), *flags, "--resume", "--norm", "post")
    assert "--norm post: " in line
    assert "has pre" in line


def test_fine_tuning_goes_on_from_an_exported_folder(corpus, capsys, bpe, tmp_path):
    flags = [*tiny_flags(v9, tokenizer="gpt2", max_iters=100, eval_interval=100, eval_iters=1)]
    flags += ["--data", str(corpus), "--out_dir", str(tmp_path / "out")]
    v9.main([*flags, "--export", str(tmp_path / "first")])
    first = whole_loss(capsys)
    flags += ["--init_from", str(tmp_path / "first")]
    v9.main([*flags, "--max_iters", "1", "--learning_rate", "1e-9"])
    assert whole_loss(capsys) == pytest.approx(first, abs=2e-4)
    v9.main(flags)
    assert whole_loss(capsys) < first


def test_released_weights_without_training_steps_are_only_sampled(corpus, capsys, bpe, tmp_path):
    v9.main([*tiny_flags(v9, tokenizer="gpt2"), "--data", str(corpus), "--export", str(tmp_path)])
    capsys.readouterr()
    sizes = ["--max_new_tokens", "9", "--device", "cpu", "--prompt", "The", "--data", "missing.txt"]
    v9.main([*sizes, "--init_from", str(tmp_path), "--max_iters", "0", "--out_dir", "/dev/null/x"])
    out = capsys.readouterr().out
    assert out.startswith("The")
    assert "loss" not in out


# ---- corpora


def test_the_tokens_of_a_text_are_kept_beside_it(tmp_path, bpe):
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


def test_a_folder_where_nothing_can_be_kept_does_no_harm(corpus, bpe, monkeypatch):
    def fail(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "replace", fail)
    tokenizer = v9.make_tokenizer(tiny(v9, tokenizer="gpt2"), "")
    tokens = v9.load_tokens("--data", tokenizer, tiny(v9, data=str(corpus)))
    assert tokens.tolist() == bpe.encode_ordinary(TEXT)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's files")
def test_encoding_in_pieces_gives_the_tokens_of_the_whole_text(tmp_path):
    tokenizer = v9.make_tokenizer(tiny(v9, tokenizer="gpt2"), "")
    assert tokenizer.encode("Hello world", "--prompt") == [15496, 995]
    path = tmp_path / "text.txt"
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    path.write_text("\n\n \n".join(m.read_text(encoding="utf-8") for m in modules), "utf-8")
    tokens = v9.load_tokens("--data", tokenizer, tiny(v9, data=str(path)))
    assert tokens.tolist() == tokenizer.encode_ordinary(data.load_text(path))


class Recorder(np.memmap):
    """A memory map that notes which of its tokens are read."""

    read = []

    def __getitem__(self, key):
        if isinstance(key, np.ndarray):
            self.read.append(key)
        return super().__getitem__(key)


def test_training_reads_only_its_own_windows_of_a_file(tmp_path):
    """They start where get_batch draws, and those for training are in the first 90 % of it."""
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    cfg = tiny(v9, max_iters=3, eval_interval=100)
    tokens = Recorder(tmp_path / "train.bin", np.uint16, "r")
    train_data, val_data = data.split(tokens, cfg.block_size)
    assert isinstance(train_data, np.memmap)
    assert np.shares_memory(train_data, tokens)
    for split, least, most in ((train_data, 0, 900), (val_data, 900, 1000)):
        Recorder.read = []
        torch.manual_seed(4)
        starts = torch.randint(len(split) - 5, (4, 1))
        torch.manual_seed(4)
        x, y = v9.get_batch(split, cfg)
        assert torch.equal(x, least + starts + torch.arange(5))
        assert torch.equal(y, x + 1)
        (windows,) = Recorder.read
        assert windows.shape == (4, 6)
        assert least <= least + windows.min() <= least + windows.max() < most

    Recorder.read = []
    model = v9.LanguageModel(cfg, 1000)
    v9.train(model, train_data, val_data, cfg)
    assert len(Recorder.read) == 3 + 2 * 2 * cfg.eval_iters
    assert all(windows.shape == (4, 6) for windows in Recorder.read)
    assert max(windows.max() for windows in Recorder.read) < 900


def test_files_of_tokens_train_as_their_text_does(tmp_path, corpus, bpe, capsys):
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
        outputs.append(without_speed(out))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_batches_do_not_keep_a_file_in_memory(tmp_path, bpe):
    """600 batches touch most of a file of 64 MiB, but little of it stays."""

    def mapped() -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"RssFile:\s+(\d+)", status)[1]) / 1024  # MiB

    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(2**26)
    cfg = tiny(v9, data=str(path))
    tokenizer = v9.make_tokenizer(tiny(v9, tokenizer="gpt2"), "")
    tokens, _ = data.split(v9.load_tokens("--data", tokenizer, cfg), cfg.block_size)
    before = mapped()
    for _ in range(600):
        v9.get_batch(tokens, cfg)
    assert mapped() - before < 8
    for _ in range(600):
        data.get_batch(tokens, cfg.batch_size, cfg.block_size, "cpu")
    assert mapped() - before > 16, "what get_batch of the helper does not give back"


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
def test_files_of_tokens_that_do_not_fit_are_refused(
    tmp_path, bpe, capsys, corpus, name, content, said
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    flags = tiny_flags(v9, tokenizer="gpt2")
    line = refused(v9, capsys, *flags, "--data", path)
    assert line.startswith("error: --data")
    assert said in line
    line = refused(v9, capsys, *flags, "--data", corpus, "--val_data", path)
    assert line.startswith(f"error: --val_data {path}")


def test_validation_can_be_on_a_text_of_its_own(tmp_path, capsys, corpus):
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
    assert "--val_data: the corpus has no 'Ü'" in refused(v9, capsys, *flags, other)


def test_epochs_are_passes_over_the_training_tokens(corpus, capsys, tmp_path):
    n = len(TEXT) * 9 // 10
    flags = [*tiny_flags(v9), "--data", str(corpus), "--epochs", "2", "--grad_accum_steps", "3"]
    v9.main(flags)
    last = math.ceil(2 * n / (4 * 5 * 3))
    assert re.findall(r"^step (\d+):", capsys.readouterr().out, re.M)[-1] == str(last)


def test_a_subset_is_the_beginning_of_the_text(corpus, capsys):
    flags = [*tiny_flags(v9), "--data", str(corpus)]
    v9.main([*flags, "--subset", "300"])
    part = capsys.readouterr().out
    corpus.write_text(TEXT[:300], encoding="utf-8")
    v9.main(flags)
    assert without_speed(part) == without_speed(capsys.readouterr().out)


def test_other_choices_are_refused(capsys):
    for flag in ("--preset", "--norm", "--tokenizer"):
        line = refused(v9, capsys, flag, "other")
        assert f"argument {flag}: invalid choice: 'other' (choose from" in line


# ---- its own cache, and text from bytes


@pytest.mark.parametrize(("block_size", "length"), [(24, 1), (24, 23), (5, 9), (1, 1)])
def test_cached_text_equals_uncached_text(block_size, length):
    """Also after the cache was full, when the last half of the text is read again."""
    torch.manual_seed(3)
    model = v9.LanguageModel(tiny(v9, block_size=block_size), VOCAB_SIZE).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # or the text would hardly depend on what came before
            torch.nn.init.normal_(parameter, std=0.5)
    idx = random_tokens(2, length)
    how = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3}
    torch.manual_seed(5)
    actual = model.generate(idx, 30, **how)
    torch.manual_seed(5)
    begin = max(0, length - block_size)  # the first token in view
    for _ in range(30):
        if idx.shape[1] - begin > block_size:
            begin = idx.shape[1] - max(1, block_size // 2)
        logits, _ = model(idx[:, begin:])
        idx = torch.cat((idx, v9.choose_token(logits[:, -1], idx, **how)), dim=1)
    assert torch.equal(actual, idx)


class Bytes:
    """A tokenizer of single bytes; a character takes up to four of them."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_text_comes_one_character_at_a_time():
    text = "naïve 世界 🙂 end"
    pieces = v9.text_of(iter(text.encode("utf-8")), Bytes(), "")
    assert [piece for piece in pieces if piece] == list(text)


def test_bytes_that_are_not_text_become_question_marks():
    tokens = [*"a世".encode(), 0xFF, 0xFE, *b"b", *"世".encode()[:2]]
    expected = bytes(tokens).decode("utf-8", errors="replace")
    assert "".join(v9.text_of(iter(tokens), Bytes(), "")) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("x世界y", "世界", "x"), ("ab\ufffd", "\ufffd", "ab"), ("ab\ufffdc", "\ufffd", "ab")],
)
def test_text_ends_before_a_stop_of_several_bytes(text, stop, expected):
    assert "".join(v9.text_of(iter(text.encode("utf-8")), Bytes(), stop)) == expected


# ---- large batches from small ones, and from several processes


def assert_same_weights(a, b):
    """Check that two models, given as dicts of weights, are the same up to rounding.

    The bias of the keys adds the same to all scores of a query, which the softmax ignores. So its
    gradient is 0 but for rounding, and AdamW, which rescales gradients, makes it a random walk.
    """
    assert list(a) == list(b)
    for name in a:
        parts = zip(a[name].chunk(3), b[name].chunk(3), strict=True)  # query, key, value
        for part, (x, y) in zip(("query", "key", "value"), parts, strict=True):
            if not (name.endswith("query_key_value.bias") and part == "key"):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5, msg=name)


def test_small_batches_add_up_to_a_large_one(splits, monkeypatch):
    models = []
    for batch_size, steps in ((4, 3), (12, 1)):
        torch.manual_seed(1)
        cfg = tiny(v9, batch_size=batch_size, grad_accum_steps=steps, max_iters=4, warmup_iters=0)
        model = v9.LanguageModel(cfg, VOCAB_SIZE)
        rows = iter(random_tokens(100, TINY["block_size"] + 1))

        def batch(tokens, cfg, rows=rows, model=model):
            if not model.training:
                return torch.zeros(2, 1, TINY["block_size"], dtype=torch.int64)
            windows = torch.stack([next(rows) for _ in range(cfg.batch_size)])
            return windows[:, :-1], windows[:, 1:]

        monkeypatch.setattr(v9, "get_batch", batch)
        v9.train(model, *splits, cfg)
        models.append(model)
    assert_same_weights(models[0].state_dict(), models[1].state_dict())


def test_every_batch_has_a_seed_of_its_own(splits, monkeypatch):
    seeds = []
    real = torch.manual_seed

    def manual_seed(seed):
        seeds.append(seed)
        return real(seed)

    monkeypatch.setattr(torch, "manual_seed", manual_seed)
    for seed in (7, 8):
        cfg = tiny(v9, seed=seed, max_iters=9, grad_accum_steps=2)
        v9.train(v9.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg)
    assert len(seeds) == len(set(seeds)) == 2 * 9 * 2


@pytest.mark.skipif(os.name == "nt", reason="gloo under torchrun is not for Windows")
def test_two_processes_equal_one_that_accumulates_twice_as_much(corpus, tmp_path, capsys):
    def flags(name, grad_accum_steps):
        length = {"max_iters": 12, "eval_interval": 6, "warmup_iters": 2, "dropout": 0.2}
        how = {"out_dir": tmp_path / name, "grad_accum_steps": grad_accum_steps}
        return [*tiny_flags(v9, **length, **how), "--data", str(corpus)]

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, "v9_gpt2.py", *flags("two", 2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        v9.main(flags("one", 4))
        one_out = capsys.readouterr().out
        two_out, two_err = process.communicate(timeout=100)
    assert process.returncode == 0, two_err
    assert two_err.count(" parameters, on cpu") == 1
    a, b = (torch.load(tmp_path / name / "latest.pt", weights_only=True) for name in ("one", "two"))
    assert a["step"] == b["step"] == 12
    assert_same_weights(a["model"], b["model"])
    losses = [re.findall(r"loss (\d+\.\d+)", out) for out in (one_out, two_out)]
    assert len(losses[0]) == len(losses[1]) == 2 * 3 + 1, "one process prints, and only one"
    assert float(losses[0][-1]) == pytest.approx(float(losses[1][-1]), abs=2e-4)


def test_processes_share_gradients_once_a_step(splits, monkeypatch):
    """A stand-in for DistributedDataParallel notes when the real one would share gradients."""
    shared, silent = [], []

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *batch):
            shared.append(not silent)
            return self.module(*batch)

        @contextlib.contextmanager
        def no_sync(self):
            silent.append(True)
            yield
            silent.pop()

    monkeypatch.setattr(v9.nn.parallel, "DistributedDataParallel", Wrapper)
    monkeypatch.setattr(v9, "join_processes", lambda cfg: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag: None)
    cfg = tiny(v9, grad_accum_steps=3)
    v9.train(v9.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg)
    assert shared == [False, False, True] * 3
