"""v8f_gpt1.py: GPT-1's architecture, its weights and its tokens, compared with transformers.

What it has of v8c and v8d (presets, starts, exports, flags that contradict each other) is tested
there.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import TEXT, build, random_tokens, refused, shaken, tiny, tiny_flags
from safetensors.torch import load_file
from test_v8d_gpt2_weights import load_in_transformers
from tokenizers import Tokenizer, models, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OpenAIGPTTokenizer,
)

from part4_gpt2 import v8f_gpt1 as v8f
from support import gpt1_files, gpt2_files, model_files

SIZES = {"n_positions": 24, "n_embd": 36, "n_layer": 3, "n_head": 3}
ODD = "Zoë's FOX,  (12 hens)\n\n\t世界!"


def make_gpt1_tokenizer() -> OpenAIGPTTokenizer:
    """The class of transformers for GPT-1, with tokens that were learned from the small text."""
    empty = OpenAIGPTTokenizer().backend_tokenizer
    learned = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    learned.normalizer = empty.normalizer
    learned.pre_tokenizer = empty.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=96, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    learned.train_from_iterator([TEXT], trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return OpenAIGPTTokenizer(vocab=model["vocab"], merges=merges)


REFERENCE = make_gpt1_tokenizer()
N_VOCAB = len(REFERENCE)


def make_reference(**changes) -> OpenAIGPTLMHeadModel:
    """A random GPT-1 of transformers, whose choices are far from even."""
    torch.manual_seed(2)
    made = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**{"vocab_size": N_VOCAB} | SIZES | changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture
def released(tmp_path):
    """A folder with a small GPT-1 and its tokens, and the model."""
    model = make_reference()
    model.save_pretrained(tmp_path / "model")
    REFERENCE.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def settings(folder, *typed):
    """The settings of a run that starts from a folder, and what was read there."""
    cfg, saved, read = v8f.read_settings(["--init_from", str(folder), "--device", "cpu", *typed])
    assert saved == {}
    return cfg, read


def load(folder, *typed) -> v8f.LanguageModel:
    """The model of v8f with the weights in a folder."""
    cfg, _ = settings(folder, *typed)
    model = v8f.LanguageModel(cfg, N_VOCAB)
    gpt1_files.load_weights(model, folder)
    return model.eval()


def output(capsys, *words) -> str:
    capsys.readouterr()
    v8f.main([str(word) for word in words])
    return capsys.readouterr().out


# ---- the architecture


def normalised(x, layer):
    """LayerNorm by hand."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * layer.weight + layer.bias


def test_a_block_normalises_after_each_addition():
    block = shaken(v8f.Block(tiny(v8f)))
    x = torch.randn(2, 5, 18)
    y = normalised(x + block.attention(x), block.norm_1)
    torch.testing.assert_close(block(x), normalised(y + block.feed_forward(y), block.norm_2))


def test_the_last_block_has_the_last_layernorm():
    model = build(v8f)
    seen = []
    model.blocks[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    logits, _ = model(random_tokens(2, 5))
    torch.testing.assert_close(logits, seen[0] @ model.token_embedding.weight.T)


def test_all_weights_start_equally_small():
    torch.manual_seed(1)
    cfg = tiny(v8f, n_embd=192, n_layer=8, block_size=99)
    for name, parameter in v8f.LanguageModel(cfg, 200).named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_the_preset_has_the_parameters_of_the_released_model():
    with torch.device("meta"):
        model = v8f.LanguageModel(tiny(v8f, **v8f.PRESETS["gpt1"]), 40_478)
        theirs = OpenAIGPTLMHeadModel(OpenAIGPTConfig())
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters == sum(p.numel() for p in theirs.parameters()) == 116_534_784
    cfg, _, _ = v8f.read_settings(["--preset", "gpt1", "--tokenizer", "char", "--device", "cpu"])
    assert vars(cfg).items() >= v8f.PRESETS["gpt1"].items()


# ---- the same function as transformers, in both directions


def test_logits_and_losses_equal_those_of_transformers(released):
    folder, theirs = released
    ours = load(folder)
    idx = torch.randint(N_VOCAB, (3, 24))
    for T in (1, 7, 24):
        assert (ours(idx[:, :T])[0] - theirs(idx[:, :T]).logits).abs().max() < 1e-4
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(theirs(idx, labels=idx).loss.item(), abs=1e-4)


def test_logits_from_the_cache_equal_those_of_transformers(released):
    folder, theirs = released
    ours = load(folder)
    idx = torch.randint(N_VOCAB, (2, 24))
    caches = [v8f.KVCache(settings(folder)[0], 2, idx.device) for _ in ours.blocks]
    pieces = [ours(piece, caches=caches)[0] for piece in idx.split([5] + [1] * 19, dim=1)]
    assert (torch.cat(pieces, dim=1) - theirs(idx).logits).abs().max() < 1e-4


def test_an_exported_model_is_the_same_in_transformers_and_here(released, tmp_path, capsys):
    folder, theirs = released
    export = tmp_path / "export"
    words = ["--init_from", folder, "--sample_only", "--export", export, "--device", "cpu"]
    output(capsys, *words, "--max_new_tokens", "3")
    again = load_in_transformers(export)
    assert type(again) is OpenAIGPTLMHeadModel
    idx = torch.randint(N_VOCAB, (2, 24))
    assert (again(idx).logits - theirs(idx).logits).abs().max() < 1e-4
    weights = load_file(folder / "model.safetensors")
    for name, weight in load_file(export / "model.safetensors").items():
        assert torch.equal(weight, weights[f"transformer.{name}"]), name
    assert torch.equal(load(export)(idx)[0], load(folder)(idx)[0])
    assert AutoTokenizer.from_pretrained(export).encode(ODD) == REFERENCE.encode(ODD)


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_a_trained_model_is_the_same_in_transformers(
    corpus, tmp_path, capsys, monkeypatch, tokenizer
):
    monkeypatch.setattr(gpt2_files, "N_VOCAB", N_VOCAB)
    run, export = tmp_path / "run", tmp_path / "export"
    if tokenizer == "gpt2":
        pytest.importorskip("tiktoken")
        try:
            v8f.BPETokenizer()
        except Exception as error:  # no network
            pytest.skip(f"GPT-2's tokens aren't here ({error})")
    flags = tiny_flags(v8f, out_dir=run, export=export, tokenizer=tokenizer, warmup_iters=0)
    output(capsys, *flags, "--data", corpus)
    weights = torch.load(run / "best.pt", weights_only=True)["model"]
    n_vocab = len(weights["token_embedding.weight"])
    ours = v8f.LanguageModel(tiny(v8f), n_vocab).eval()
    ours.load_state_dict(weights)
    idx = torch.randint(n_vocab, (2, 5))
    theirs = load_in_transformers(export)
    assert (theirs(idx).logits - ours(idx)[0]).abs().max() < 1e-4
    sampled = output(capsys, "--init_from", export, "--sample_only", "--prompt", "The", "--device",
                     "cpu", "--max_new_tokens", "3")  # fmt: skip
    assert sampled.startswith("The")


# ---- its tokens


def test_token_ids_and_texts_are_those_of_transformers(released):
    cfg, read = settings(released[0])
    tokenizer = v8f.make_tokenizer(cfg, read, "")
    assert tokenizer.n_vocab == N_VOCAB
    for text in (TEXT, ODD, "The quick brown fox", "the", "QUICK"):
        ids = REFERENCE.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == REFERENCE.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(tokenizer.encode("The QUICK\nfox")) == "the quick fox"
    assert tokenizer.encode("世") == tokenizer.encode("\n ") == [REFERENCE.unk_token_id] == [0]


def test_a_limit_in_the_file_does_not_cut_a_corpus_off(released):
    folder, _ = released
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    cfg, read = settings(folder)
    assert v8f.make_tokenizer(cfg, read, "").encode(TEXT) == REFERENCE.encode(TEXT)


def test_a_run_keeps_the_tokens_that_it_began_with(released, corpus, tmp_path, capsys):
    folder, _ = released
    run = tmp_path / "run"
    flags = tiny_flags(v8f, out_dir=run, tokenizer=folder / "tokenizer.json", prompt="The fox")
    out = output(capsys, *flags, "--data", corpus)
    assert re.search(r"^validation loss: .* bits/byte$", out, re.MULTILINE)
    assert torch.load(run / "latest.pt", weights_only=True)["tokenizer"] == "file"
    sample = out[out.index("The fox") :]
    shutil.rmtree(folder)
    assert output(capsys, "--sample_only", "--out_dir", run) == sample
    output(capsys, "--resume", "--out_dir", run, "--max_iters", "4")
    assert torch.load(run / "latest.pt", weights_only=True)["step"] == 4


def test_a_prompt_without_a_token_is_as_good_as_none(released, capsys):
    words = ["--init_from", released[0], "--sample_only", "--device", "cpu"]
    assert output(capsys, *words, "--prompt", "\n", "--max_new_tokens", "3").startswith("\n")


def test_a_file_that_is_no_tokenizer_is_refused(corpus, capsys):
    line = refused(v8f, capsys, *tiny_flags(v8f, tokenizer=corpus), "--data", corpus)
    assert line.startswith(f"error: --tokenizer {corpus}: not a tokenizer.json (")
    line = refused(v8f, capsys, *tiny_flags(v8f, tokenizer="gtp2"), "--data", corpus)
    assert "--tokenizer gtp2: can't read it" in line


# ---- where a run starts


def test_gpt1_is_downloaded_from_its_repository(released, monkeypatch, capsys):
    def download(*args):
        expected = ["openai-gpt", "openai-community/openai-gpt", ["config.json"]]
        assert args == (*expected, gpt2_files.TOKEN_FILES)
        return released[0]

    monkeypatch.setattr(model_files, "download", download)
    cfg, read = settings("openai-gpt")
    assert (cfg.n_layer, cfg.n_embd, cfg.block_size) == (3, 36, 24)
    assert vars(cfg).items() >= gpt1_files.FINE_TUNING.items()
    assert read["folder"] == released[0]


def test_what_does_not_fit_is_refused(released, tmp_path, capsys):
    folder, _ = released
    words = ["--sample_only", "--device", "cpu"]
    config = GPT2Config(vocab_size=N_VOCAB, bos_token_id=0, eos_token_id=0, **SIZES)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    line = refused(v8f, capsys, "--init_from", tmp_path / "gpt2", *words)
    assert "its model_type is 'gpt2', not 'openai-gpt'; v8d_gpt2_weights.py loads 'gpt2'" in line
    line = refused(v8f, capsys, "--init_from", folder, *words, "--n_layer", "2")
    assert line.startswith("error: --n_layer 2: the model has 3, ")
    line = refused(v8f, capsys, "--init_from", folder, *words, "--preset", "gpt1")
    assert "can't be used together with --preset" in line
    (folder / "tokenizer.json").unlink()
    line = refused(v8f, capsys, "--init_from", folder, *words)
    assert f"its vocabulary has {N_VOCAB} tokens, the tokenizer 50,257" in line
