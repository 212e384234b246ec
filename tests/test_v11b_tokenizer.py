"""v11b_tokenizer.py: the tokens of a tokenizer.json, compared with transformers, and their text.

How support/llama_files.py reads the files is tested in test_llama_files.py, and how tokens become
text while they come, in test_terminal.py.
"""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, losses_and_sample, refused, tiny_flags
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import data
from part7_released import v11a_llama as v11a
from part7_released import v11b_tokenizer as v11b
from support import llama_files, terminal

# Every character beyond ASCII takes several tokens.
STORY = "Zoë naïvely said:  “Ça va?”\n\n  🙂 世界 🙃\tthe fox jumps  over 12345 dogs.\n"


def byte_level(text: str = TEXT) -> Tokenizer:
    """Byte-pair encoding like that of SmolLM2 and Qwen3; "<|end|>" is its token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": ["<|end|>"], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, **how))
    return tokenizer


def llama3() -> Tokenizer:
    """It cuts words with a regular expression, and begins every text with a special token."""
    tokenizer = byte_level()
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    cut = pre_tokenizers.Split(words, "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.add_special_tokens(["<|begin|>"])
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[begin]
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Like that of Llama 2: "▁" for spaces, also before a text, and tokens for single bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    names = ["<unk>", "<s>", "</s>", *bytes_, *learned["vocab"]]
    tokenizer = Tokenizer(models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    ))  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names[:3]])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Like the one before, in the words of newer files."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


MAKERS = {maker.__name__: maker for maker in (byte_level, llama3, sentencepiece, metaspace)}


@pytest.fixture(scope="module", params=MAKERS)
def any_path(request, tmp_path_factory) -> Path:
    """The path of a tokenizer.json of each kind."""
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    MAKERS[request.param]().save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a byte-level tokenizer.json. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("byte_level")
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


def load(path: Path):
    return v11b.FileTokenizer(llama_files.read_tokenizer(path, "--tokenizer"))


def one_by_one(ids):
    """Token ids as LanguageModel.stream yields them."""
    return (torch.tensor([[token]]) for token in ids)


def flags(corpus, **changes):
    return [*tiny_flags(v11b, **changes), "--data", str(corpus)]


def output(capsys, *flags):
    capsys.readouterr()
    v11b.main([str(flag) for flag in flags])
    return capsys.readouterr().out


# ---- the same tokens as transformers


@pytest.mark.parametrize("text", [TEXT, STORY, " fox", "fox ", "The<|end|> end</s>", "🙂", "\n"])
def test_tokens_equal_those_of_transformers(any_path, text):
    ours, theirs = load(any_path), PreTrainedTokenizerFast(tokenizer_file=str(any_path))
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.n_vocab == len(theirs)


@pytest.mark.parametrize("text", [TEXT, STORY, "fox "])
def test_decoding_gives_the_text_back(any_path, text):
    tokenizer = load(any_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- where a text ends


@pytest.mark.parametrize(
    ("config", "generation", "n_shown"),
    [
        (None, None, 9),
        ({"eos_token_id": 5}, None, 5),
        ({"eos_token_id": [7, 3]}, None, 3),
        ({"eos_token_id": None}, None, 9),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, 7),
        ({"eos_token_id": 5}, {"eos_token_id": [6, 8]}, 6),
        ({"eos_token_id": 5}, {"eos_token_id": None}, 5),
        ({"eos_token_id": 5}, {}, 5),
        (None, {"eos_token_id": [4]}, 4),
    ],
)
def test_a_stream_ends_at_a_token_that_ends_a_text(folder, tmp_path, config, generation, n_shown):
    """The tokens here are 60, 61, 62, ..., and those that end a text so many after the 60."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    contents = {"config.json": config, "generation_config.json": generation}
    for name, content in contents.items():
        if content is None:
            continue
        ids = content.get("eos_token_id")
        if isinstance(ids, list):
            content = {"eos_token_id": [60 + i for i in ids]}
        elif ids is not None:
            content = {"eos_token_id": 60 + ids}
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load(tmp_path)
    ids = list(range(60, 69))
    tokens = one_by_one(ids)
    text = "".join(terminal.decode_stream(tokens, tokenizer, []))
    assert text == tokenizer.decode(ids[:n_shown])
    assert len(list(tokens)) == max(0, 9 - n_shown - 1), "it takes no more tokens"


# ---- runs


@pytest.fixture
def released(folder, tmp_path) -> Path:
    """A folder as a model's, whose texts end at the token 0, and which has padded its vocabulary.

    Tests may change it.
    """
    released = tmp_path / "released"
    shutil.copytree(folder, released)
    config = {"vocab_size": 320, "eos_token_id": 0}
    (released / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return released


def test_a_run_trains_on_the_tokens_of_the_file(any_path, corpus, capsys, monkeypatch):
    corpus.write_text(STORY * 20, encoding="utf-8")
    seen = []

    def train(model, train_data, val_data, *_):
        seen.append((model.lm_head.out_features, train_data, val_data))
        raise data.InputError("seen enough")

    monkeypatch.setattr(v11b, "train", train)
    refused(v11b, capsys, *flags(corpus, tokenizer=any_path))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(any_path))
    n_vocab, train_data, val_data = seen[0]
    assert n_vocab == len(theirs)
    assert [*train_data, *val_data] == theirs.encode(STORY * 20)


def test_a_sample_is_the_prompt_and_the_text_of_the_tokens(
    released, corpus, capsys, monkeypatch
):
    ids = load(released).encode(" jumps 🙂<|end|> and sleeps")
    monkeypatch.setattr(v11b.LanguageModel, "stream", lambda *_: one_by_one(ids))
    out = output(capsys, *flags(corpus, tokenizer=released, prompt="The fox", num_samples=2))
    found = re.search(r"^validation loss: \S+ nats per token, .*\n", out, flags=re.MULTILINE)
    assert out[found.end() :] == "The fox jumps 🙂\n---\nThe fox jumps 🙂\n"


def test_a_checkpoint_has_its_tokenizer(released, corpus, tmp_path, capsys, monkeypatch):
    """Also its end of a text, and how many tokens the model has."""
    run = tmp_path / "run"
    out = output(capsys, *flags(corpus, tokenizer=released, out_dir=run, prompt="The"))
    again = ["--out_dir", run, "--device", "cpu"]
    ids = load(released).encode(" fox<|end|> jumps")
    shutil.rmtree(released)
    assert out.endswith("\n" + output(capsys, "--sample_only", *again))
    assert "step 4: " in output(capsys, "--resume", *again, "--max_iters", "4")
    state = torch.load(run / "latest.pt", weights_only=True)
    assert state["tokenizer_content"].keys() == {"json", "n_vocab", "end_of_text"}
    assert len(state["model"]["token_embedding.weight"]) == 320
    monkeypatch.setattr(v11b.LanguageModel, "stream", lambda *_: one_by_one(ids))
    assert output(capsys, "--sample_only", *again) == "The fox\n"


def test_token_ids_above_65535_are_not_cut_off(tmp_path, corpus, capsys, monkeypatch):
    words = [f"w{i}" for i in range(70_001)]
    large = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    large.pre_tokenizer = pre_tokenizers.Whitespace()
    large.save(str(tmp_path / "tokenizer.json"))
    corpus.write_text("w70000 w3 w65536 " * 30, encoding="utf-8")
    seen = []

    def train(model, train_data, val_data, cfg, *_):
        seen.extend([train_data, val_data])
        x, y = data.get_batch(train_data, cfg.batch_size, cfg.block_size, cfg.device)
        _, loss = model(x, y)
        assert loss.isfinite()
        seen.extend([x, y])
        raise data.InputError("seen enough")

    monkeypatch.setattr(v11b, "train", train)
    refused(v11b, capsys, *flags(corpus, tokenizer=tmp_path, n_embd=6, n_head=1, prompt="w3"))
    for tokens in seen:
        assert set(np.unique(tokens)) == {3, 65_536, 70_000}


def test_characters_are_tokens_as_before(corpus, tmp_path, capsys):
    """Without a tokenizer.json, this is v11a_llama.py."""
    v11a.main([*tiny_flags(v11a, out_dir=tmp_path / "v11a"), "--data", str(corpus)])
    expected = capsys.readouterr().out
    out = output(capsys, *flags(corpus, out_dir=tmp_path / "v11b"))
    out, n = re.subn(r"^validation loss: .*\n", "", out, flags=re.MULTILINE)
    assert n == 1
    assert losses_and_sample(out) == losses_and_sample(expected)
    assert len(losses_and_sample(out)) > 50
    weights = {}
    for name in ("v11a", "v11b"):
        weights[name] = torch.load(tmp_path / name / "best.pt", weights_only=True)["model"]
    assert list(weights["v11a"]) == list(weights["v11b"])
    for name, weight in weights["v11a"].items():
        assert torch.equal(weight, weights["v11b"][name]), name


# ---- units of a loss


def described(loss, ids, tokenizer) -> str:
    """The description of a run whose second loss estimate, the best, is this one."""
    history = {0: (0.1, loss + 1), 5: (9.0, loss), 9: (0.1, loss + 2)}
    return v11b.describe_best(history, np.array(ids, dtype=np.uint32), tokenizer)


def test_the_best_loss_is_given_in_three_units(any_path):
    """Bits per byte of the text, whatever the tokens are."""
    tokenizer = load(any_path)
    ids = tokenizer.encode(STORY * 3)
    bits = 2 * len(ids) / math.log(2) / len(tokenizer.decode(ids).encode("utf-8"))
    expected = f"2.0000 nats per token, perplexity 7.389, {bits:.3f} bits/byte"
    assert described(2.0, ids, tokenizer) == expected


def test_a_character_may_have_several_bytes():
    tokenizer = data.CharTokenizer("é世🙂")
    said = described(math.log(2), tokenizer.encode("é世🙂"), tokenizer)
    assert said == "0.6931 nats per token, perplexity 2, 0.333 bits/byte"


def test_a_million_tokens_are_enough_for_the_bytes_of_one():
    tokenizer = data.CharTokenizer("aé")
    ids = np.repeat(tokenizer.encode("aé"), 1_000_000)
    assert described(math.log(2), ids, tokenizer).endswith(", 1.000 bits/byte")


def test_a_huge_loss_has_units_too():
    said = described(1e6, [1], data.CharTokenizer("a"))
    assert said.startswith("1000000.0000 nats per token, perplexity 1.01")


def test_a_run_ends_with_its_best_loss_on_the_validation_tokens(
    folder, corpus, capsys, monkeypatch
):
    losses = iter([1.0, 5.0, 1.0, 2.0, 1.0, 4.0])  # the second estimate is the best
    monkeypatch.setattr(v11b, "estimate_loss", lambda *_: next(losses))
    corpus.write_text("the fox " * 90 + "dog 🙂 🙃 " * 10, encoding="utf-8")
    out = output(capsys, *flags(corpus, tokenizer=folder, prompt="fox"))
    tokenizer = load(folder)
    ids = tokenizer.encode(corpus.read_text(encoding="utf-8"))
    expected = described(2.0, ids[len(ids) * 9 // 10 :], tokenizer)
    assert f"\nvalidation loss: {expected}\n" in out
    assert expected != described(2.0, ids, tokenizer)


# ---- what a user may get wrong


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.json", None), ("missing/tokenizer.json", None), ("text.json", b"The fox"),
        ("other.json", b'{"model": 3}'), ("empty.json", b""), ("noise.json", bytes(range(256))),
    ],
)  # fmt: skip
def test_a_path_without_a_tokenizer_is_refused(corpus, tmp_path, capsys, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    run = tmp_path / "run"
    line = refused(v11b, capsys, *flags(corpus, tokenizer=path, out_dir=run))
    why = "can't read it" if content is None else "not a tokenizer.json"
    assert line.startswith(f"error: --tokenizer {path}: {why} (")
    assert "()" not in line
    assert not run.exists()


def test_a_folder_without_a_tokenizer_is_refused(corpus, tmp_path, capsys):
    line = refused(v11b, capsys, *flags(corpus, tokenizer=tmp_path))
    path = tmp_path / "tokenizer.json"
    assert line.startswith(f"error: --tokenizer {path}: can't read it (No such file")
    assert line.endswith("; give the path of a tokenizer.json")


@pytest.fixture
def few_letters(tmp_path) -> Path:
    """A tokenizer.json that has no tokens for other letters, and none for spaces."""
    letters = {letter: i for i, letter in enumerate("foxhens")}
    tokenizer = Tokenizer(models.BPE(letters, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "letters.json"))
    return tmp_path / "letters.json"


@pytest.mark.parametrize("flag", ["prompt", "stop", "prompt_file", "data"])
@pytest.mark.parametrize("text", ["fox dog", " \n "])
def test_a_text_that_can_not_be_encoded_is_refused(
    few_letters, tmp_path, capsys, flag, text, corpus
):
    """One with letters that have no tokens, and one that is no tokens at all."""
    corpus.write_text("fox hens " * 90, encoding="utf-8")
    value = text
    if flag in ("data", "prompt_file"):
        value = tmp_path / "text.txt"
        value.write_text(text, encoding="utf-8")
    typed = {"tokenizer": few_letters, "data": corpus, "prompt": "fox", flag: value}
    line = refused(v11b, capsys, *tiny_flags(v11b, **typed))
    assert line.startswith(f"error: --{flag}: the tokenizer ")


def test_half_a_character_in_the_prompt_is_refused(folder, corpus, capsys):
    """A terminal that doesn't send UTF-8 makes such a prompt of an accent."""
    line = refused(v11b, capsys, *flags(corpus, tokenizer=folder, prompt="Zo\udceb"))
    assert line.startswith("error: --prompt: the tokenizer can't encode it (")


def test_a_run_keeps_its_tokenizer(folder, corpus, tmp_path, capsys):
    for name, before, after in (("file", folder, "char"), ("char", "char", folder)):
        run = tmp_path / name
        output(capsys, *flags(corpus, tokenizer=before, out_dir=run, max_iters=0))
        for mode in ("--resume", "--sample_only"):
            line = refused(v11b, capsys, mode, "--out_dir", run, "--tokenizer", after)
            has = f"the checkpoint has {str(before)!r}, which can't be changed"
            assert line.startswith(f"error: --tokenizer {after}: {has}; ")


# ---- what else a tokenizer.json may say


@pytest.mark.parametrize("kind", ["truncation", "padding"])
def test_a_text_is_neither_cut_off_nor_padded(tmp_path, kind):
    tokenizer = byte_level()
    expected = tokenizer.encode(TEXT[:50]).ids
    if kind == "truncation":
        tokenizer.enable_truncation(4)
    else:
        tokenizer.enable_padding(length=200)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode(TEXT[:50]) == expected


def test_ids_may_have_gaps(tmp_path, corpus):
    tokenizer = Tokenizer(models.WordLevel({"fox": 0, "hen": 9}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus.write_text("fox hen " * 90, encoding="utf-8")
    assert load(tmp_path).n_vocab == 10
    flags = tiny_flags(v11b, tokenizer=tmp_path, prompt="hen")
    v11b.main([*flags, "--data", str(corpus)])
