"""v8b_gpt2_tokens.py: byte pairs, characters of several tokens, losses per character, runs.

The model is that of v7b, with its cache.

How texts become files of token ids is tested in test_token_files.py.
"""

import math
import os
import re
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TEXT, build, random_tokens, refused, tiny, tiny_flags
from tiktoken_ext.openai_public import r50k_pat_str

import data
from data import token_files
from lab.common import generate
from part3_generation import v7b_kv_cache as v7b
from part4_gpt2 import v8b_gpt2_tokens as v8b
from support import hardware
from support.old import runs


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
def no_encoding(monkeypatch):
    """Without a network, tiktoken can't download GPT-2's encoding."""

    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)


def flags(corpus, tokenizer="gpt2", **changes):
    return [*tiny_flags(v8b, tokenizer=tokenizer, **changes), "--data", str(corpus)]


def output(capsys, *words) -> tuple[str, str]:
    """Run main(); return what it prints on standard output and standard error.

    Without the speed, which is never the same.
    """
    capsys.readouterr()
    v8b.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return re.sub(r", [\d,]+ tokens/s", "", out), err


def saved(folder, name="latest.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


# ---- the model


def decisive(model):
    """The model with random weights that make each choice uneven, and depend on the whole text."""
    for name, parameter in model.named_parameters():
        mean = float(parameter.ndim == 1 and name.endswith("weight"))  # those of LayerNorm
        std = 0.5 if parameter.ndim == 2 else 0.1
        torch.nn.init.normal_(parameter, mean, std)
    return model.eval()


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3}],
    ids=["by default", "with all filters"],
)
def test_with_characters_the_text_is_that_of_v7b(sampling):
    """Before the caches are full, and after they have started again."""
    old, new = build(v7b).eval(), decisive(build(v8b, **sampling))
    weights = new.state_dict().items()
    old.load_state_dict({name.replace("ln_", "norm_"): weight for name, weight in weights})
    idx = random_tokens(3, 2)
    torch.manual_seed(5)
    expected = generate(v7b, old, idx, 20, tiny(v7b, **sampling))
    torch.manual_seed(5)
    assert torch.equal(new.generate(idx, 20), expected)


@pytest.mark.parametrize("lengths", [[24], [1] * 24, [10, 1, 1, 12], [3, 4, 1, 9, 7], [1, 23]])
def test_tokens_may_come_to_the_cache_in_pieces_of_any_length(lengths):
    model = decisive(build(v8b, block_size=24))
    idx = random_tokens(3, 24)
    caches = model.make_caches(3)
    pieces = [model(piece, caches=caches)[0] for piece in idx.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx)[0])
    assert [cache.length for cache in caches] == [24, 24]


@pytest.mark.parametrize(
    ("n_embd", "dtype", "supported", "expected"),
    [
        (128, "auto", True, torch.bfloat16),
        (18, "bfloat16", True, torch.bfloat16),
        (18, "auto", True, torch.float32),
        (128, "float32", True, torch.float32),
        (128, "auto", False, torch.float32),
    ],
)
def test_weights_have_the_dtype_of_the_matmuls_while_sampling(
    corpus, capsys, monkeypatch, n_embd, dtype, supported, expected
):
    """But a token is chosen in float32, and what is trained and saved is float32, too."""
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: supported)
    weights, logits, trained = set(), set(), set()
    real_stream, real_choose, real_train = v8b.LanguageModel.stream, v8b.choose_token, v8b.train

    def stream(model, *args):
        weights.update(parameter.dtype for parameter in model.parameters())
        return real_stream(model, *args)

    def choose_token(*args):
        logits.add(args[0].dtype)
        return real_choose(*args)

    def train(model, *args):
        trained.update(parameter.dtype for parameter in model.parameters())
        return real_train(model, *args)

    monkeypatch.setattr(v8b.LanguageModel, "stream", stream)
    monkeypatch.setattr(v8b, "choose_token", choose_token)
    monkeypatch.setattr(v8b, "train", train)
    sizes = {"n_embd": n_embd, "n_head": 2, "n_layer": 1, "dtype": dtype}
    out, _ = output(
        capsys, *flags(corpus, "char", max_iters=1, max_new_tokens=30, prompt="The ", **sizes)
    )
    assert (weights, logits, trained) == ({expected}, {torch.float32}, {torch.float32})
    sample = out.partition("bits per character\n")[2]
    assert sample.startswith("The ")
    assert len(sample) == 4 + 30 + 1
    assert set(sample) <= set(TEXT)


def test_generation_in_bfloat16_is_close_to_that_in_float32():
    model = decisive(build(v8b, block_size=24))
    idx = random_tokens(3, 24)
    expected, _ = model(idx)
    model.bfloat16()
    caches = model.make_caches(3)
    with torch.no_grad():
        pieces = [model(piece, caches=caches)[0] for piece in idx.split([9, 1, 1, 13], dim=1)]
    logits = torch.cat(pieces, dim=1)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


# ---- the tokenizer


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's files")
def test_token_ids_are_those_of_gpt2():
    tokenizer = v8b.BPETokenizer()
    assert tokenizer.n_vocab == token_files.N_VOCAB == 50_257
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode([15496, 995]) == "Hello world"
    assert tokenizer.decode([token_files.END_OF_TEXT]) == "<|endoftext|>"


def test_any_text_can_be_encoded_and_comes_back(bpe):
    tokenizer = v8b.BPETokenizer()
    text = "Zoë dreams\r\n\tof 世界 🙂 \0"
    tokens = tokenizer.encode(text, "--prompt")
    assert len(tokens) > len(text)
    assert max(tokens) < tokenizer.n_vocab == 297
    assert all(type(token) is int for token in tokens)
    assert tokenizer.decode(tokens) == text


def test_a_special_token_in_a_text_is_plain_text(bpe):
    tokenizer = v8b.BPETokenizer()
    tokens = tokenizer.encode("<|endoftext|>")
    assert 296 not in tokens
    assert tokenizer.decode(tokens) == "<|endoftext|>"


def test_bytes_that_are_not_a_character_are_decoded_as_a_question_mark(bpe):
    assert v8b.BPETokenizer().decode([*b"fox", 0xE4, *b"hen"]) == "fox\ufffdhen"


def test_without_gpt2s_files_a_run_is_the_one_with_characters(no_encoding, corpus, capsys):
    out, err = output(capsys, *flags(corpus, "auto", warmup_iters=0))
    assert err.count("notice: ") == 1
    assert "notice: can't load GPT-2's tokenizer (no network)" in err
    expected, err = output(capsys, *flags(corpus, "char", warmup_iters=0))
    assert "notice: " not in err
    assert out == expected


def test_one_notice_is_enough_without_shakespeare(bpe, capsys, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(data.corpora, "SHAKESPEARE", tmp_path / "missing.txt")
    monkeypatch.setattr(data.corpora, "python_library", lambda: TEXT)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    for tokenizer in ("char", "gpt2"):
        _, err = output(capsys, *tiny_flags(v8b, tokenizer=tokenizer, warmup_iters=0))
        assert err.count("notice: ") == 1


def test_gpt2s_tokenizer_without_its_files_is_refused(no_encoding, corpus, capsys):
    line = refused(v8b, capsys, *flags(corpus, "gpt2"))
    assert line.startswith("error: --tokenizer gpt2: can't load GPT-2's tokenizer (no network)")
    assert "TIKTOKEN_CACHE_DIR" in line


# ---- from tokens to text


class Bytes:
    """A tokenizer of single bytes; a character takes up to four of them."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def pieces(tokens, stop=""):
    """What stream_text shows for these bytes."""
    return list(v8b.stream_text((torch.tensor([[token]]) for token in tokens), Bytes(), stop))


def test_a_character_is_shown_once_its_last_token_is_there():
    text = "naïve 世界 🙂 end"
    assert [piece for piece in pieces(text.encode()) if piece] == list(text)
    tokens = iter([torch.tensor([[byte]]) for byte in "世界".encode()])
    assert next(v8b.stream_text(tokens, Bytes(), "")) == "世"
    assert len(list(tokens)) == 3, "those of the next character are not asked for"


def test_bytes_that_are_no_character_become_question_marks():
    tokens = [*"a世".encode(), 0xFF, 0xFE, *b"b", *"世".encode()[:2]]
    expected = bytes(tokens).decode("utf-8", errors="replace")
    assert expected.endswith("b\ufffd")
    assert "".join(pieces(tokens)) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("x世界y", "世界", "x"),
        ("世世界y", "世界", "世"),
        ("x世", "世界", "x世"),
        ("naïve🙂", "🙂", "naïve"),
        ("ab\ufffd", "\ufffd", "ab"),
        ("ab\ufffdc", "\ufffd", "ab"),
    ],
)
def test_the_text_ends_before_a_stop_of_several_bytes(text, stop, expected):
    assert "".join(pieces(text.encode(), stop)) == expected


def test_a_stop_in_bytes_that_never_became_a_character_ends_the_text():
    rest = b"one" + "世".encode()[:2]
    assert "".join(pieces(rest)) == "one\ufffd"
    assert "".join(pieces(rest, "e\ufffd")) == "on"
    assert "".join(pieces(rest, "\ufffd\ufffd")) == "one\ufffd"


# ---- losses of tokens of any length


@pytest.mark.parametrize(
    ("loss", "token_length", "said"),
    [
        (math.log(2), 1, "0.6931 nats per token, perplexity 2, 1.000 bits per character"),
        (math.log(2), 4, "0.6931 nats per token, perplexity 2, 0.250 bits per character"),
        (math.log(8), 0.5, "2.0794 nats per token, perplexity 8, 6.000 bits per character"),
        (0.0, 3.3, "0.0000 nats per token, perplexity 1, 0.000 bits per character"),
    ],
)
def test_a_loss_in_other_units(loss, token_length, said):
    assert v8b.in_units(loss, token_length) == said


def test_a_huge_loss_still_has_a_perplexity():
    assert "perplexity 1.014e+304" in v8b.in_units(9999.0, 1.0)


class Repeat:
    """A tokenizer whose token n stands for n characters."""

    def decode(self, tokens):
        return "".join("x" * token for token in tokens)


def test_the_length_of_a_token_is_the_mean_over_the_first_million(tmp_path):
    assert v8b.characters_per_token(np.array([1, 2, 6], dtype=np.uint16), Repeat()) == 3
    tokens = np.ones(1_000_010, dtype="<u2")
    tokens[-10:] = 9
    tokens[:9] = 1001
    tokens.tofile(tmp_path / "long.bin")
    file = token_files.TokenFile(tmp_path / "long.bin", 0, len(tokens), "")
    expected = (9 * 1001 + 999_991) / 1_000_000
    assert v8b.characters_per_token(tokens, Repeat()) == expected
    assert v8b.characters_per_token(file, Repeat()) == expected
    assert v8b.characters_per_token(file[5:15], Repeat()) == (4 * 1001 + 6) / 10


# ---- runs in byte pairs


def test_a_run_says_what_its_loss_is_per_token_and_per_character(corpus, bpe, capsys):
    out, err = output(capsys, *flags(corpus, prompt="Zoë <|endoftext|>"))
    tokens = bpe.encode_ordinary(TEXT)
    n = len(tokens) * 9 // 10
    assert f"tokens: {n:,} for training, {len(tokens) - n:,} for validation\n" in err
    line = re.search(
        r"^validation loss (\S+) nats per token, perplexity (\S+), (\S+) bits per character$",
        out, re.MULTILINE,
    )  # fmt: skip
    loss, perplexity, bits = (float(number) for number in line.groups())
    estimates = re.findall(r"val loss (\S+)", out)
    assert line[1] == min(estimates)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    characters = len(bpe.decode(tokens[n:]))
    assert bits == pytest.approx(loss / math.log(2) * (len(tokens) - n) / characters, abs=1e-3)
    assert "\nZoë <|endoftext|>" in out, "characters that the corpus lacks, and no special token"


def test_a_resumed_run_ends_as_one_that_was_never_stopped(corpus, bpe, capsys, tmp_path):
    """A checkpoint keeps the tokenizer, and a sample from it needs no text."""
    settings = {"eval_interval": 1, "dropout": 0.3, "warmup_iters": 0, "learning_rate": 0.1}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    out, _ = output(capsys, *flags(corpus, "auto", out_dir=straight, max_iters=3, **settings))
    with pytest.MonkeyPatch.context() as patch:
        stops = iter([False] * 9 + [True] * 9)
        patch.setattr(runs, "stop_requested", lambda: next(stops))
        with pytest.raises(SystemExit):
            v8b.main(flags(corpus, "auto", out_dir=resumed, max_iters=3, **settings))
    stopped = saved(resumed)
    assert 0 < stopped["step"] < 3
    assert (stopped["tokenizer"], stopped["config"]["tokenizer"]) == ("gpt2", "gpt2")
    output(capsys, "--resume", "--out_dir", resumed)
    weights, expected = saved(resumed)["model"], saved(straight)["model"]
    assert list(weights) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    corpus.unlink()
    sample, _ = output(capsys, "--sample_only", "--out_dir", resumed)
    assert sample == out.partition("bits per character\n")[2]


@pytest.fixture
def trained(corpus, bpe, tmp_path) -> Path:
    """The folder of a run in byte pairs on the small text."""
    v8b.main(flags(corpus, out_dir=tmp_path / "run"))
    return tmp_path / "run"


def test_a_checkpoint_keeps_its_tokenizer(trained, capsys):
    for mode in ("--resume", "--sample_only"):
        line = refused(v8b, capsys, mode, "--out_dir", trained, "--tokenizer", "char")
        assert line.startswith("error: --tokenizer char: the checkpoint has 'gpt2', which can't be")


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_a_run_goes_on_with_its_own_corpus_only(tokenizer, corpus, bpe, capsys, tmp_path):
    """Even another text in the same file, with the same characters and the same length."""
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1], encoding="utf-8")
    v8b.main(flags(corpus, tokenizer, out_dir=tmp_path / "run"))
    resume = ["--resume", "--out_dir", tmp_path / "run", "--max_iters", 4]
    said = "not the text that this run was trained on; give that one"
    assert refused(v8b, capsys, *resume, "--data", other) == f"error: --data {other}: {said}"
    assert said in refused(v8b, capsys, *resume, "--val_data", other)
    shutil.copy(other, corpus)
    assert refused(v8b, capsys, *resume) == f"error: --data {corpus}: {said}"
    corpus.write_text(TEXT, encoding="utf-8")
    v8b.main([str(word) for word in resume])
    assert saved(tmp_path / "run")["step"] == 4


def test_a_run_goes_on_with_the_file_of_token_ids_of_its_text(trained, corpus, tmp_path):
    path = tmp_path / "prepared.bin"
    token_files.write_token_file(path, [corpus], "--out", "TEXT")
    v8b.main(["--resume", "--out_dir", str(trained), "--max_iters", "4", "--data", str(path)])
    assert saved(trained)["step"] == 4


def test_a_file_of_token_ids_trains_as_its_text_does(corpus, bpe, capsys, tmp_path):
    val_text = tmp_path / "val.txt"
    val_text.write_text(TEXT[50:200], encoding="utf-8")
    for text in (corpus, val_text):
        path = text.with_suffix(".bin")
        token_files.write_token_file(path, [text], "--out", "TEXT")
    for val_data in (None, val_text):
        outputs = []
        for ending in (".txt", ".bin"):
            words = flags(corpus.with_suffix(ending))
            if val_data is not None:
                words += ["--val_data", val_data.with_suffix(ending)]
            out, err = output(capsys, *words)
            outputs.append((out, re.search(r"tokens: .*", err)[0]))
        assert outputs[0] == outputs[1]
    n_tokens = [len(bpe.encode_ordinary(text)) for text in (TEXT, TEXT[50:200])]
    expected = "tokens: {:,} for training, {:,} for validation".format(*n_tokens)
    assert outputs[0][1] == expected


class Recorder(np.memmap):
    """A memory map that notes the positions that are read."""

    read = []

    def __getitem__(self, key):
        if isinstance(key, np.ndarray):
            self.read.append(key)
        return super().__getitem__(key)


def test_training_reads_only_its_own_windows_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "counting.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    monkeypatch.setattr(np, "memmap", Recorder)
    monkeypatch.setattr(Recorder, "read", [])
    cfg = tiny(v8b, max_iters=3, eval_interval=100)
    splits = data.split(token_files.TokenFile(path, 0, 1000, ""), cfg.block_size)
    assert Recorder.read == []
    v8b.train(v8b.LanguageModel(cfg, 1000), *splits, cfg)
    assert len(Recorder.read) == 3 + 2 * 2 * cfg.eval_iters, "batches, and two estimates"
    assert all(windows.shape == (4, 6) for windows in Recorder.read)
    of_validation = [windows for windows in Recorder.read if windows.max() >= 900]
    assert len(of_validation) == 2 * cfg.eval_iters
    assert all(windows.min() >= 900 and windows.max() < 1000 for windows in of_validation)


@contextmanager
def pipe(path, text):
    """A named pipe that can be read once; opened again, it isn't there."""

    def write():
        with path.open("w", encoding="utf-8") as file:  # waits for the reader
            path.unlink()
            file.write(text)

    os.mkfifo(path)
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    yield
    thread.join()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_a_corpus_may_come_from_a_pipe(tokenizer, corpus, bpe, capsys, tmp_path):
    expected, _ = output(capsys, *flags(corpus, tokenizer))
    train, val = tmp_path / "train", tmp_path / "val"
    with pipe(train, TEXT):
        out, _ = output(capsys, *flags(train, tokenizer))
    assert out == expected
    expected, _ = output(capsys, *flags(corpus, tokenizer), "--val_data", corpus)
    with pipe(train, TEXT), pipe(val, TEXT):
        out, _ = output(capsys, *flags(train, tokenizer), "--val_data", val)
    assert out == expected
