"""The laws of the ladder: standalone, one lesson a diff, small diffs, importable, one shape."""

import ast
import subprocess
import sys

import pytest

from lab.ladder import PAIRS, ROOT, RUNGS, changed_lines, source

# The course at a glance. From each rung to the next: the lesson, the parts of the program that it
# adds, the parts that it changes, and those whose work it does in another way. Whatever is not
# named here is the same, byte for byte.
COURSE = {
    "v2_single_head": {
        "lesson": "look back: every position picks what it needs from those before it",
        "adds": ["Config.n_embd", "Head"],
        "changes": [
            "Config.learning_rate",
            "LanguageModel.__init__",
            "LanguageModel.forward",
            "LanguageModel.generate",
        ],
    },
    "v3_multi_head": {
        "lesson": "look for several things at once, then mix what was found",
        "adds": ["Config.n_head", "MultiHeadAttention"],
        "changes": ["LanguageModel.__init__"],
    },
    "v4_feedforward": {
        "lesson": "think about what was gathered, each position for itself",
        "adds": ["FeedForward"],
        "changes": ["LanguageModel.__init__", "LanguageModel.forward"],
    },
    "v5_gpt": {
        "lesson": "do both many times over, in blocks that can be stacked and still train",
        "adds": ["Config.n_layer", "Config.dropout", "Block"],
        "changes": [
            "Head.__init__",
            "Head.forward",
            "MultiHeadAttention.__init__",
            "MultiHeadAttention.forward",
            "FeedForward.__init__",
            "FeedForward.forward",
            "LanguageModel.__init__",
            "LanguageModel.forward",
        ],
    },
    "v6_fast": {
        "lesson": "compute the same function in the way that keeps the machine busy",
        "replaces": ["Head"],
        "adds": [
            "import ctypes",
            "import time",
            "from importlib.util",
            "from timeit",
            "Config.dtype",
            "Config.compile",
            "choose_dtype",
            "get_batch",
            "utilisation",
            "keep_machine_busy",
        ],
        "changes": [
            "MultiHeadAttention.__init__",
            "MultiHeadAttention.forward",
            "LanguageModel.__init__",
            "LanguageModel.forward",
            "estimate_loss",
            "train",
        ],
    },
    "v7_training": {
        "lesson": "train it as real runs are trained: a recipe, checkpoints, many processes",
        "adds": [
            "import json",
            "import os",
            "import signal",
            "from contextlib",
            "from pathlib",
            "from zipfile",
            "Config.weight_decay",
            "Config.warmup_iters",
            "Config.grad_accum_steps",
            "Config.out_dir",
            "Config.resume",
            "Config.sample_only",
            "whole_loss",
            "make_optimizer",
            "learning_rate_at",
            "save_checkpoint",
            "load_checkpoint",
            "join_processes",
        ],
        "changes": [
            "from dataclasses",
            "from torch",
            "Config.learning_rate",
            "Config.max_iters",
            "train",
            "main",
        ],
    },
    "v8_sampling": {
        "lesson": "read each token once, and choose the next one with care",
        "adds": [
            "from collections.abc",
            "from itertools",
            "Config.prompt_file",
            "Config.num_samples",
            "Config.stop",
            "Config.temperature",
            "Config.top_k",
            "Config.top_p",
            "Config.repetition_penalty",
            "LanguageModel.stream",
            "apply_repetition_penalty",
            "apply_temperature",
            "apply_top_k",
            "apply_top_p",
            "choose_token",
            "text_of",
            "lay_out_for_rows",
        ],
        "changes": [
            "MultiHeadAttention.forward",
            "Block.forward",
            "LanguageModel.forward",
            "LanguageModel.generate",
            "main",
        ],
    },
    "v9_gpt2": {
        "lesson": "close the last gaps to GPT-2, and its weights load",
        "adds": [
            "import re",
            "import tiktoken",
            "from huggingface_hub",
            "from safetensors.torch",
            "PRESETS",
            "SIZES",
            "RELEASED_NAMES",
            "FIXED",
            "Config.tokenizer",
            "Config.preset",
            "Config.norm",
            "Config.layer_norm_epsilon",
            "Config.init_from",
            "Config.export",
            "Config.val_data",
            "Config.epochs",
            "Config.subset",
            "read_settings",
            "released_weights",
            "load_released",
            "export",
            "make_tokenizer",
            "load_tokens",
        ],
        "changes": [
            "Config.batch_size",
            "Config.max_iters",
            "Config.eval_interval",
            "Config.out_dir",
            "MultiHeadAttention.__init__",
            "FeedForward.forward",
            "Block.__init__",
            "Block.forward",
            "LanguageModel.__init__",
            "get_batch",
            "load_checkpoint",
            "main",
        ],
    },
}
MOST_CHANGED_LINES = {
    "v2_single_head": 60,
    "v3_multi_head": 30,
    "v4_feedforward": 30,
    "v5_gpt": 60,
    "v6_fast": 150,
    "v7_training": 200,
    "v8_sampling": 150,
    "v9_gpt2": 200,
}
MOST_LINES = {"data/__init__.py": 150, "v5_gpt.py": 240, "v9_gpt2.py": 700}


def parts(rung: str) -> dict[str, str]:
    """A rung cut into named parts, in order, each with the comments and blank lines above it.

    A function is a part, and so is any other statement; a class is one for its head and one for
    each member: "LanguageModel", "LanguageModel.forward", "Config.n_embd".
    """
    text = source(rung)
    module = ast.parse(text)
    starts = []  # (name, last line of the part)

    def cut(node, prefix=""):
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        name = getattr(node, "name", None) or getattr(target, "id", None) or ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            name = f"from {node.module}"
        if isinstance(node, ast.ClassDef):
            head = [n for n in node.body if isinstance(n, ast.Expr)]
            starts.append((name, head[-1].end_lineno if head else node.lineno))
            for member in node.body:
                if member not in head:
                    cut(member, f"{name}.")
        else:
            starts.append((prefix + name, node.end_lineno))

    for node in module.body[1:]:
        cut(node)
    lines = text.splitlines(keepends=True)
    named, begin = {}, module.body[0].end_lineno + 1  # below the lesson and an empty line
    for name, end in starts:
        assert name not in named, f"{rung}: {name} is there twice"
        named[name] = "".join(lines[begin:end])
        begin = end
    named["the end of the file"] = "".join(lines[begin:])
    return named


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_diff_is_the_lesson_and_nothing_else(before, after):
    old, new = parts(before), parts(after)
    gone = [name for name in old if name not in new and name.split(".")[0] in new]
    assert gone == [], "a lesson drops or renames nothing"
    gone = [name for name in old if name not in new and "." not in name]
    assert gone == COURSE[after].get("replaces", [])

    added = [name for name in new if name not in old]
    whole = [name for name in added if name.split(".")[0] not in added or "." not in name]
    assert whole == COURSE[after]["adds"]

    kept = [name for name in old if name in new]
    assert [name for name in kept if old[name] != new[name]] == COURSE[after]["changes"]
    assert [name for name in new if name in old] == kept, "what stays keeps its order"


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_diffs_are_small(before, after):
    assert 0 < changed_lines(before, after) <= MOST_CHANGED_LINES[after]


@pytest.mark.parametrize("name", MOST_LINES)
def test_files_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MOST_LINES[name]


@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_stands_alone(rung):
    allowed = sys.stdlib_module_names | {"torch", "numpy", "tqdm", "data"}
    if rung == "v9_gpt2":
        allowed |= {"tiktoken", "safetensors", "huggingface_hub"}
    for node in ast.walk(ast.parse(source(rung))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] in allowed
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_has_the_same_shape(rung):
    module = ast.parse(source(rung))
    names = [node.name for node in module.body if hasattr(node, "name")]
    first_to_last = ["Config", "LanguageModel", "estimate_loss", "train", "main"]
    assert [name for name in names if name in first_to_last] == first_to_last
    assert (names[0], names[-1]) == ("Config", "main")
    parts_of_the_model = [n.name for n in module.body if getattr(n, "bases", None)]
    assert parts_of_the_model[-1] == "LanguageModel", "the smallest first"
    lesson = ast.get_docstring(module).splitlines()
    assert lesson[0].startswith(f"{rung}.py: ")
    assert 10 <= len(lesson) <= 20
    assert f"python {rung}.py" in "\n".join(lesson)
    assert any(line.startswith("Expect:") for line in lesson)


@pytest.mark.parametrize("rung", RUNGS)
def test_importing_a_rung_reads_no_corpus_and_prints_nothing(rung):
    program = f"""
import sys
import data  # and with it torch, which opens files of its own
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
import {rung}
own = [name for name in opened if "site-packages" not in name]  # not what packages read for theirs
sys.exit([name for name in own if not name.endswith((".py", ".pyc", ".zip", "boot_id"))] or 0)
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
