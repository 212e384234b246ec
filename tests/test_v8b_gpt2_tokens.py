"""v8b_gpt2_tokens.py: byte pairs, losses per byte, and runs in tokens of any length.

The model is that of v7b. How texts become files of token ids is tested in test_token_files.py, and
how tokens become text in test_terminal.py.
"""

import math
import os
import re
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TEXT, refused, tiny, tiny_flags
from tiktoken_ext.openai_public import r50k_pat_str

import data
from data import prepare, token_files
from lab.common import train
from part3_generation import v7b_kv_cache as v7b
from part4_gpt2 import v8b_gpt2_tokens as v8b


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


def output(capsys, *words, script=v8b) -> tuple[str, str]:
    """Run main(); return what it prints on standard output and standard error.

    Without the speed, which is never the same.
    """
    capsys.readouterr()
    script.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return re.sub(r", [\d,]+ tokens/s", "", out), err


def saved(folder, name="latest.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def test_with_characters_a_run_is_that_of_v7b(corpus, capsys, tmp_path):
    """Its losses, its weights and its sample, which is longer than the cache."""
    outputs, states = [], []
    for script in (v7b, v8b):
        folder = tmp_path / script.__name__
        settings = {"out_dir": folder, "dropout": 0.3, "warmup_iters": 1, "max_new_tokens": 30}
        words = [*tiny_flags(script, **settings), "--data", corpus]
        out, _ = output(capsys, *words, script=script)
        outputs.append(re.sub(r"^validation loss: .*\n", "", out, flags=re.MULTILINE))
        states.append(saved(folder))
    assert outputs[0] == outputs[1]
    assert states[0]["history"] == states[1]["history"]
    assert list(states[0]["model"]) == list(states[1]["model"])
    for name, weight in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], weight), name


# ---- the tokenizer


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's files")
def test_token_ids_are_those_of_gpt2():
    tokenizer = v8b.BPETokenizer()
    assert tokenizer.n_vocab == token_files.N_VOCAB == 50_257
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode([15496, 995]) == "Hello world"
    assert tokenizer.end_of_text == [token_files.END_OF_TEXT]
    assert tokenizer.decode(tokenizer.end_of_text) == "<|endoftext|>"


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


# ---- losses of tokens of any length


class Repeat:
    """A tokenizer whose token n stands for n characters, of two bytes each."""

    def decode(self, tokens):
        return "".join("ë" * token for token in tokens)


def described(loss, tokens, tokenizer=None):
    """A validation loss as describe_best says it."""
    tokens = np.asarray(tokens, dtype=np.uint16) if isinstance(tokens, list) else tokens
    return v8b.describe_best({0: (0.0, loss)}, tokens, tokenizer or Repeat())


@pytest.mark.parametrize(
    ("loss", "token", "said"),
    [
        (math.log(2), 1, "0.6931 nats per token, perplexity 2, 0.500 bits/byte"),
        (math.log(2), 4, "0.6931 nats per token, perplexity 2, 0.125 bits/byte"),
        (math.log(8), 1, "2.0794 nats per token, perplexity 8, 1.500 bits/byte"),
        (0.0, 3, "0.0000 nats per token, perplexity 1, 0.000 bits/byte"),
    ],
)
def test_a_loss_in_other_units(loss, token, said):
    assert described(loss, [token]) == said


def test_the_lowest_of_the_validation_losses_is_described():
    history = {0: (0.1, math.log(8)), 2: (0.3, math.log(2)), 4: (0.2, math.log(4))}
    said = v8b.describe_best(history, np.array([1], dtype=np.uint16), Repeat())
    assert said == described(math.log(2), [1])


def test_a_character_of_one_byte_needs_as_many_bits_as_that_byte():
    tokenizer = data.CharTokenizer(TEXT)
    said = described(math.log(2), tokenizer.encode(TEXT), tokenizer)
    assert said.endswith(", 1.000 bits/byte")


def test_a_huge_loss_still_has_a_perplexity():
    assert "perplexity 1.014e+304" in described(9999.0, [1])


def test_the_length_of_a_token_is_the_mean_over_the_first_million():
    def bits(tokens):
        return float(described(1000 * math.log(2), tokens).split()[-2])

    assert bits([1, 2, 6]) == pytest.approx(1000 / 3 / 2, abs=1e-3)
    tokens = np.ones(1_000_010, dtype="<u2")
    tokens[-10:] = 9001
    tokens[:9] = 1001
    expected = 1000 / (2 * (9 * 1001 + 999_991) / 1_000_000)
    assert bits(tokens) == pytest.approx(expected, abs=1e-3)
    assert bits(tokens[5:15]) == pytest.approx(1000 / (2 * (4 * 1001 + 6) / 10), abs=1e-3)


# ---- runs in byte pairs


def test_a_run_says_what_its_loss_is_per_token_and_per_byte(corpus, bpe, capsys):
    out, err = output(capsys, *flags(corpus, prompt="Zoë <|endoftext|>"))
    tokens = bpe.encode_ordinary(TEXT)
    n = len(tokens) * 9 // 10
    assert f"tokens: {n:,} for training, {len(tokens) - n:,} for validation\n" in err
    line = re.search(
        r"^validation loss: (\S+) nats per token, perplexity (\S+), (\S+) bits/byte$",
        out, re.MULTILINE,
    )  # fmt: skip
    loss, perplexity, bits = (float(number) for number in line.groups())
    estimates = re.findall(r"val loss (\S+)", out)
    assert line[1] == min(estimates)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    n_bytes = len(bpe.decode_bytes(tokens[n:]))
    assert bits == pytest.approx(loss / math.log(2) * (len(tokens) - n) / n_bytes, abs=1e-3)
    assert "\nZoë <|endoftext|>" in out, "characters that the corpus lacks, and no special token"


def test_a_sample_may_have_characters_of_several_tokens_and_an_end(
    corpus, bpe, capsys, monkeypatch
):
    tokens = iter([*"世界!".encode(), 296, *b"fox", *"界".encode(), *b"dog"])
    monkeypatch.setattr(v8b, "choose_token", lambda *_: torch.tensor([[next(tokens)]]))
    settings = {"num_samples": 2, "max_new_tokens": 9, "prompt": "Zoë ", "stop": "界d"}
    out, _ = output(capsys, *flags(corpus, max_iters=0, **settings))
    assert out.endswith(" bits/byte\nZoë 世界!\n---\nZoë fox\n")
    assert list(tokens) == [*b"og"]


def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    corpus, bpe, capsys, tmp_path, monkeypatch
):
    """A checkpoint keeps the tokenizer, and a sample from it needs no text."""
    settings = {"dropout": 0.3, "warmup_iters": 0, "learning_rate": 0.1}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    out, _ = output(capsys, *flags(corpus, "auto", out_dir=straight, **settings))
    real = v8b.train_step

    def train_step(model, optimizer, tokens, step, cfg):
        real(model, optimizer, tokens, step, cfg)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(v8b, "train_step", train_step)
        with pytest.raises(SystemExit):
            v8b.main(flags(corpus, "auto", out_dir=resumed, **settings))
    stopped = saved(resumed)
    assert stopped["step"] == 1
    assert (stopped["tokenizer"], stopped["config"]["tokenizer"]) == ("gpt2", "gpt2")
    assert stopped["characters"] == ""
    output(capsys, "--resume", "--out_dir", resumed)
    weights, expected = saved(resumed)["model"], saved(straight)["model"]
    assert list(weights) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    corpus.unlink()
    sample, _ = output(capsys, "--sample_only", "--out_dir", resumed)
    assert sample == out.partition("bits/byte\n")[2]


def test_a_run_in_characters_keeps_them(corpus, capsys, tmp_path, no_encoding):
    """Without GPT-2's files, and without its text."""
    out, _ = output(capsys, *flags(corpus, "auto", out_dir=tmp_path / "run"))
    assert saved(tmp_path / "run")["config"]["tokenizer"] == "char"
    corpus.unlink()
    sample, err = output(capsys, "--sample_only", "--out_dir", tmp_path / "run")
    assert sample == out.partition("bits/byte\n")[2]
    assert "notice: " not in err


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
    prepare.write_token_file(path, [corpus])
    v8b.main(["--resume", "--out_dir", str(trained), "--max_iters", "4", "--data", str(path)])
    assert saved(trained)["step"] == 4


def test_a_file_of_token_ids_trains_as_its_text_does(corpus, bpe, capsys, tmp_path):
    val_text = tmp_path / "val.txt"
    val_text.write_text(TEXT[50:200], encoding="utf-8")
    for text in (corpus, val_text):
        path = text.with_suffix(".bin")
        prepare.write_token_file(path, [text])
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
    """A memory map that notes what is read of it."""

    read = []

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if isinstance(key, np.ndarray):
            self.read.append(found)
        return found


def test_training_reads_only_its_own_windows_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "counting.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    monkeypatch.setattr(Recorder, "read", [])
    cfg = tiny(v8b, max_iters=3, eval_interval=100)
    splits = data.split(Recorder(path, dtype="<u2", mode="r"), cfg.block_size)
    assert Recorder.read == []
    train(v8b, v8b.LanguageModel(cfg, 1000), *splits, cfg)
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
