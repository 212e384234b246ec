"""What the tests share: tiny settings, a small text, and ways to run a script's main()."""

import dataclasses
import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
import torch

import data

torch.set_num_threads(1)  # for tensors this small, a second thread only costs time
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the programs that tests start

# In the background of a shell, Ctrl-C is ignored, and so it would be in the programs that tests
# start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # which nohup ignores
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

OUT = tempfile.TemporaryDirectory()

# All sizes differ, so that a swapped axis shows.
TINY = {
    "batch_size": 4,
    "block_size": 5,
    "n_embd": 18,
    "n_head": 3,
    "n_kv_head": 1,
    "n_layer": 2,
    "learning_rate": 1e-2,
    "max_iters": 3,
    "eval_interval": 2,
    "epochs": 2,
    "subset": 9,
    "eval_iters": 2,
    "device": "cpu",
    "max_new_tokens": 7,
    "tokenizer": "char",
    "vocab_size": 270,
    "sft_iters": 2,
    "n_answers": 2,
}
TEXT = "The quick brown fox jumps over the lazy dog.\nAnd then it sleeps, and dreams of hens.\n" * 9
VOCAB_SIZE = len(set(TEXT))


def tiny(script, **changes):
    """The tiny Config of a script; settings that it lacks are left out."""
    names = {field.name for field in dataclasses.fields(script.Config)}
    values = TINY | {"dropout": 0.0, "compile": False} | changes
    return script.Config(**{name: value for name, value in values.items() if name in names})


def tiny_flags(script, **changes):
    """The tiny settings of a script as a command line, with a new folder for a run."""
    names = {field.name for field in dataclasses.fields(script.Config)}
    folder = {"out_dir": tempfile.mkdtemp(dir=OUT.name)}
    values = {name: value for name, value in (TINY | folder | changes).items() if name in names}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def build(script, **changes):
    """A script's tiny model."""
    torch.manual_seed(1)
    return script.LanguageModel(tiny(script, **changes), VOCAB_SIZE)


def shaken(model):
    """The model with every parameter at a random value, so that no zero hides a mistake."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def stacked(weights):
    """The weights of v9d with queries, keys and values in one matrix, as v9c has them."""
    stack = {}
    for name, weight in weights.items():
        if name.endswith("attention.query.weight"):
            layer = name.removesuffix("query.weight")
            matrices = [weights[f"{layer}{part}.weight"] for part in ("query", "key", "value")]
            stack[f"{layer}query_key_value.weight"] = torch.cat(matrices)
        elif not name.endswith(("attention.key.weight", "attention.value.weight")):
            stack[name] = weight
    return stack


def random_tokens(*shape: int) -> torch.Tensor:
    """Token ids of the small text, drawn at random."""
    return torch.randint(VOCAB_SIZE, shape)


def losses_and_sample(output: str) -> str:
    """What every script prints, without what later ones add about speed and the whole split."""
    output = re.sub(r", [\d,]+ tokens/s$", "", output, flags=re.MULTILINE)
    more = r"^validation loss: .*\n"
    return re.sub(more, "", output, flags=re.MULTILINE)


def refused(script, capsys, *flags) -> str:
    """Run main() with flags that it must refuse with status 2; return its one line of error.

    Only the line that lists the settings, and progress bars, may come before it.
    """
    with pytest.raises(SystemExit) as stop:
        script.main([str(flag) for flag in flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.endswith("\n")
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return line


def refused_input(call, *args) -> str:
    """Let a function refuse its arguments; return its message as a user would see it."""
    with pytest.raises(data.InputError) as error:
        call(*args)
    return " ".join(str(error.value).split())


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A small text file."""
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def splits():
    """The small text as training and validation tokens for the tiny block size."""
    return data.split(data.CharTokenizer(TEXT).encode(TEXT), TINY["block_size"])
