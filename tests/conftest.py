"""What the tests share: tiny settings, a small corpus, and a way to run a rung's main()."""

import dataclasses
import importlib
import os
import re
import tempfile
from pathlib import Path

import pytest
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str

import data
from lab.ladder import RUNGS

torch.set_num_threads(1)  # for tensors this small, a second thread only costs
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the programs that tests start

OUT = tempfile.TemporaryDirectory()

# All sizes differ, so that a swapped axis shows.
TINY = {
    "batch_size": 4,
    "block_size": 5,
    "n_embd": 18,
    "n_head": 3,
    "n_layer": 2,
    "learning_rate": 1e-2,
    "max_iters": 3,
    "eval_interval": 2,
    "eval_iters": 2,
    "device": "cpu",
    "max_new_tokens": 7,
    "out_dir": OUT.name,
    "tokenizer": "char",
}
TEXT = "The quick brown fox jumps over the lazy dog.\nAnd then it sleeps, and dreams of hens.\n" * 9
VOCAB_SIZE = len(set(TEXT))


def tiny(rung, **changes):
    """The tiny Config of a rung; settings that the rung lacks are left out."""
    names = {field.name for field in dataclasses.fields(rung.Config)}
    values = TINY | {"dropout": 0.0} | changes
    return rung.Config(**{name: value for name, value in values.items() if name in names})


def tiny_flags(rung, **changes):
    """The tiny settings of a rung as a command line."""
    names = {field.name for field in dataclasses.fields(rung.Config)}
    values = {name: value for name, value in (TINY | changes).items() if name in names}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def losses_and_sample(output: str) -> str:
    """What every rung prints; not what later ones say of their speed and of the whole split."""
    output = re.sub(r", [\d,]+ tokens/s$", "", output, flags=re.MULTILINE)
    more = r"^(model FLOPs utilisation: \d+%|whole validation split: .*)\n"
    return re.sub(more, "", output, flags=re.MULTILINE)


@pytest.fixture(params=RUNGS)
def rung(request):
    """Each rung in turn, imported."""
    return importlib.import_module(request.param)


@pytest.fixture(params=RUNGS[1:])
def attention_rung(request):
    """Each rung that has attention in turn, imported."""
    return importlib.import_module(request.param)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A small text file."""
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def small_encoding() -> tiktoken.Encoding:
    """GPT-2's way to cut a text into words, but 256 bytes and 40 pairs of them in all."""
    pairs = sorted({TEXT[i : i + 2].encode() for i in range(len(TEXT) - 1)})[:40]
    ranks = {bytes([i]): i for i in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)}
    return tiktoken.Encoding(
        "small", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 296}
    )


@pytest.fixture
def bpe(monkeypatch) -> tiktoken.Encoding:
    """A small encoding in the place of GPT-2's, which has to be downloaded."""
    encoding = small_encoding()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@pytest.fixture
def splits():
    """The small text as training and validation tokens for the tiny block size."""
    return data.split(data.CharTokenizer(TEXT).encode(TEXT), TINY["block_size"])
