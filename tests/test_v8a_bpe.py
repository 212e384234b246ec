"""v8a_bpe.py: byte pairs, streamed characters of several tokens, and losses per character."""

import math
import os
import re
import threading

import data

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TEXT, losses_and_sample, refused, tiny_flags
from tiktoken_ext.openai_public import r50k_pat_str

import v8a_bpe as v8a


@pytest.fixture
def bpe(monkeypatch) -> tiktoken.Encoding:
    """An encoding of single bytes in place of GPT-2's, which needs a download."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


class Bytes:
    """A tokenizer of single bytes; a character takes up to four of them."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def stream(text: bytes, stop: str = "") -> list[str]:
    """The pieces of a text whose tokens are its bytes."""
    tokens = (torch.tensor([[byte]]) for byte in text)
    return list(v8a.stream_text(tokens, Bytes(), stop))


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's files")
def test_the_ids_are_those_of_gpt2():
    tokenizer = v8a.BPETokenizer()
    assert tokenizer.n_vocab == 50_257
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode(tokenizer.encode("Zoë <|endoftext|>")) == "Zoë <|endoftext|>"
    assert 50_256 not in tokenizer.encode("<|endoftext|>"), "plain text, not the special token"


def test_text_comes_one_character_at_a_time():
    text = "naïve 世界 🙂 end"
    assert [piece for piece in stream(text.encode("utf-8")) if piece] == list(text)


def test_bytes_that_are_not_text_become_question_marks():
    text = b"a\xe4\xb8\x96\xff\xfeb" + "世".encode()[:2]
    assert "".join(stream(text)) == text.decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("x世界y", "世界", "x"), ("ab\ufffd", "\ufffd", "ab"), ("ab\ufffdc", "\ufffd", "ab")],
)
def test_text_ends_before_a_stop_of_several_bytes(text, stop, expected):
    assert "".join(stream(text.encode("utf-8"), stop)) == expected


def test_a_loss_in_three_units():
    report = v8a.in_units(math.log(2) * 6, token_length=3.0)
    assert report == "4.1589 nats per token, perplexity 64, 2.000 bits per character"
    assert "perplexity inf" not in v8a.in_units(1e6, 1.0)


def test_the_length_of_a_token_in_characters():
    ids = np.frombuffer("世a".encode(), dtype=np.uint8).astype(np.uint16)
    assert v8a.characters_per_token(ids, Bytes()) == 2 / 4


def test_without_gpt2s_files_a_run_uses_characters(corpus, capsys, monkeypatch):
    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    v8a.main([*tiny_flags(v8a, tokenizer="auto"), "--data", str(corpus)])
    out, err = capsys.readouterr()
    assert err.count("notice: can't load GPT-2's tokenizer (no network); set TIKTOKEN_CACHE") == 1
    v8a.main([*tiny_flags(v8a, tokenizer="char"), "--data", str(corpus)])
    assert losses_and_sample(capsys.readouterr().out) == losses_and_sample(out)
    line = refused(v8a, capsys, *tiny_flags(v8a, tokenizer="gpt2"), "--data", corpus)
    assert line.startswith("error: --tokenizer gpt2: can't load GPT-2's tokenizer (no network)")


def test_a_run_in_byte_pairs_keeps_its_tokenizer_and_its_corpus(corpus, tmp_path, bpe, capsys):
    folder = str(tmp_path / "run")
    flags = ["--data", str(corpus), "--out_dir", folder]
    v8a.main([*tiny_flags(v8a, tokenizer="gpt2"), *flags, "--prompt", "Zoë"])
    out = capsys.readouterr().out
    sample = out.partition("bits per character\n")[2]
    nats, bits = re.search(r"loss (\S+) nats per token, .*, (\S+) bits per char", out).groups()
    assert float(bits) == pytest.approx(float(nats) / math.log(2), abs=1e-3)
    v8a.main(["--out_dir", folder, "--sample_only"])
    assert capsys.readouterr().out == sample
    v8a.main(["--out_dir", folder, "--resume", "--max_iters", "4"])
    assert "step 4: " in capsys.readouterr().out
    line = refused(v8a, capsys, "--out_dir", folder, "--sample_only", "--tokenizer", "char")
    assert line.startswith("error: --tokenizer char: the checkpoint has 'gpt2', ")
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("fox", "cat"), encoding="utf-8")
    line = refused(v8a, capsys, "--out_dir", folder, "--resume", "--data", other)
    assert "not the text that this run was trained on" in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_a_corpus_can_come_through_a_pipe(tmp_path, corpus, bpe, capsys, tokenizer):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(TEXT,), daemon=True)
    writer.start()
    v8a.main([*tiny_flags(v8a, tokenizer=tokenizer), "--data", str(pipe)])
    writer.join()
    piped = capsys.readouterr().out
    v8a.main([*tiny_flags(v8a, tokenizer=tokenizer), "--data", str(corpus)])
    assert losses_and_sample(piped) == losses_and_sample(capsys.readouterr().out)


def test_training_reads_a_file_of_ids(tmp_path, corpus, bpe, capsys):
    path = tmp_path / "corpus.bin"
    data.token_files.write_token_file(path, [corpus], "--out", "TEXT")
    v8a.main([*tiny_flags(v8a, tokenizer="gpt2"), "--data", str(path)])
    out = losses_and_sample(capsys.readouterr().out)
    v8a.main([*tiny_flags(v8a, tokenizer="gpt2"), "--data", str(corpus)])
    assert losses_and_sample(capsys.readouterr().out) == out
