"""The laws of the course: standalone scripts, one idea per diff, small diffs, the same order."""

import ast
import inspect
import subprocess
import sys

import pytest

import data
from lab import ladder
from lab.ladder import (
    PAIRS,
    PARENTS,
    ROOT,
    SCRIPTS,
    changed_lines,
    load,
    part_of,
    path_of,
    source,
)

# The course at a glance. For each script: its parent, its lesson, and the definitions that it adds
# to its parent, changes in it, or replaces by better ones. Everything else is the same in both,
# byte for byte.
COURSE = {
    "v2_single_head": {
        "parent": "bigram",
        "lesson": "look back: each position gathers information from the ones before it",
        "adds": ["Config.n_embd", "Head"],
        "changes": [
            "Config.learning_rate",
            "LanguageModel.__init__",
            "LanguageModel.forward",
            "LanguageModel.generate",
        ],
    },
    "v3_multi_head": {
        "parent": "v2_single_head",
        "lesson": "look for several things at once, then mix what was found",
        "adds": ["Config.n_head", "MultiHeadAttention"],
        "changes": ["LanguageModel.__init__"],
    },
    "v4_feedforward": {
        "parent": "v3_multi_head",
        "lesson": "process what was gathered, at each position separately",
        "adds": ["FeedForward"],
        "changes": ["LanguageModel.__init__", "LanguageModel.forward"],
    },
    "v5_gpt": {
        "parent": "v4_feedforward",
        "lesson": "repeat both in a stack of blocks, built so that a deep stack still trains",
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
    "v6a_fused_attention": {
        "parent": "v5_gpt",
        "lesson": "compute the same attention with fewer and larger operations",
        "replaces": ["Head"],
        "adds": [],
        "changes": ["MultiHeadAttention.__init__", "MultiHeadAttention.forward"],
    },
    "v6b_fast": {
        "parent": "v6a_fused_attention",
        "lesson": "train the same model with less computation and less waiting",
        "adds": [
            "from collections.abc",
            "from support",
            "from support.stopwatch",
            "Config.dtype",
            "Config.compile",
            "choose_dtype",
            "autocast",
            "compile_model",
        ],
        "changes": ["from dataclasses", "estimate_loss", "train_step", "train", "main"],
    },
    "v6c_recipe": {
        "parent": "v6b_fast",
        "lesson": "train by the recipe of real runs: warm-up, decay, clipping",
        "adds": [
            "from support.notices",
            "Config.weight_decay",
            "Config.warmup_iters",
            "make_optimizer",
            "learning_rate_at",
        ],
        "changes": ["Config.learning_rate", "train_step", "train"],
    },
    "v6d_checkpoints": {
        "parent": "v6c_recipe",
        "lesson": "keep a run safe: save it, resume it exactly, sample from its best weights",
        "adds": [
            "Config.out_dir",
            "Config.resume",
            "Config.sample_only",
            "SIZES",
            "checkpoint",
            "restore",
        ],
        "changes": [
            "from support",
            "Config.eval_iters",
            "estimate_loss",
            "train_step",
            "train",
            "main",
        ],
    },
    "v7a_sampling": {
        "parent": "v6d_checkpoints",
        "lesson": "choose the next token with care",
        "replaces": ["LanguageModel.generate"],
        "adds": [
            "Config.temperature",
            "Config.top_k",
            "Config.top_p",
            "Config.repetition_penalty",
            "Config.num_samples",
            "Config.prompt_file",
            "Config.stop",
            "LanguageModel.stream",
            "apply_repetition_penalty",
            "apply_top_k",
            "apply_top_p",
            "choose_token",
        ],
        "changes": [
            "from collections.abc",
            "from support",
            "main",
        ],
    },
    "v7b_kv_cache": {
        "parent": "v7a_sampling",
        "lesson": "compute the keys and values of each token only once",
        "adds": ["KVCache"],
        "changes": [
            "MultiHeadAttention.forward",
            "Block.forward",
            "LanguageModel.__init__",
            "LanguageModel.forward",
            "LanguageModel.stream",
        ],
    },
    "v8a_byte_pairs": {
        "parent": "v7b_kv_cache",
        "lesson": "learn tokens from the text: byte-pair encoding by hand",
        "adds": [
            "import re",
            "from collections",
            "from itertools",
            "Config.vocab_size",
            "WORD",
            "learn_merges",
            "merge",
            "BytePairTokenizer",
            "make_tokenizer",
        ],
        "changes": ["SIZES", "main"],
    },
    "v8b_gpt2_tokens": {
        "parent": "v7b_kv_cache",
        "lesson": "read parts of words, from files that may be larger than the memory",
        "adds": [
            "import tiktoken",
            "Config.tokenizer",
            "Config.val_data",
            "BPETokenizer",
            "make_tokenizer",
            "describe_best",
        ],
        "changes": [
            "from data",
            "Config.batch_size",
            "Config.max_iters",
            "Config.eval_interval",
            "Config.data",
            "SIZES",
            "main",
        ],
    },
    "v8c_gpt2": {
        "parent": "v8b_gpt2_tokens",
        "lesson": "take over the architecture of the released models",
        "adds": ["PRESETS", "Config.preset", "read_settings"],
        "changes": [
            "SIZES",
            "MultiHeadAttention.__init__",
            "FeedForward.forward",
            "LanguageModel.__init__",
            "LanguageModel.forward",
            "main",
        ],
    },
    "v8d_gpt2_weights": {
        "parent": "v8c_gpt2",
        "lesson": "start from released weights, and write weights that others can load",
        "adds": [
            "GPT2_NAMES",
            "FINE_TUNING",
            "Config.init_from",
            "Config.export",
            "weights_by_released_name",
            "make_model",
        ],
        "changes": ["from support", "read_settings", "main"],
    },
    "v8e_distributed": {
        "parent": "v8d_gpt2_weights",
        "lesson": "take one step on many batches, in turn and on several GPUs at once",
        "adds": ["Config.grad_accum_steps", "share_gradients"],
        "changes": ["from support", "train_step", "train", "read_settings", "main"],
    },
    "v8f_gpt1": {
        "parent": "v8c_gpt2",
        "lesson": "normalise after each addition, and read other tokens, as GPT-1 did",
        "adds": [
            "from pathlib",
            "from tokenizers",
            "Config.init_from",
            "Config.export",
            "GPT1Tokenizer",
        ],
        "changes": [
            "from support",
            "PRESETS",
            "Config.tokenizer",
            "make_tokenizer",
            "Block",
            "Block.forward",
            "LanguageModel.__init__",
            "LanguageModel.forward",
            "read_settings",
            "main",
        ],
    },
    "v8g_epochs": {
        "parent": "v8f_gpt1",
        "lesson": "go through the text in epochs: every window once, then all of them again",
        "replaces": ["Config.max_iters", "Config.eval_interval"],
        "adds": ["Config.epochs", "Config.subset", "choose_windows", "epoch_batches"],
        "changes": ["SIZES", "learning_rate_at", "train_step", "train"],
    },
    "v9a_rmsnorm": {
        "parent": "v7b_kv_cache",
        "lesson": "normalise by size alone, and leave out the biases",
        "adds": ["RMSNorm"],
        "changes": [
            "MultiHeadAttention.__init__",
            "FeedForward.__init__",
            "Block",
            "Block.__init__",
            "LanguageModel.__init__",
        ],
    },
    "v9b_rope": {
        "parent": "v9a_rmsnorm",
        "lesson": "turn queries and keys by their positions, and let the cache slide",
        "adds": ["rotation_angles", "rotate"],
        "changes": [
            "SIZES",
            "KVCache",
            "KVCache.__init__",
            "KVCache.append",
            "MultiHeadAttention",
            "MultiHeadAttention.__init__",
            "MultiHeadAttention.forward",
            "Block.forward",
            "LanguageModel.__init__",
            "LanguageModel.forward",
            "LanguageModel.stream",
        ],
    },
    "v9c_swiglu": {
        "parent": "v9b_rope",
        "lesson": "let one hidden layer be the gate of another",
        "adds": [],
        "changes": ["FeedForward", "FeedForward.__init__", "FeedForward.forward"],
    },
    "v9d_gqa": {
        "parent": "v9c_swiglu",
        "lesson": "share each key and value among several queries",
        "adds": ["Config.n_kv_head"],
        "changes": [
            "SIZES",
            "KVCache.__init__",
            "KVCache.append",
            "MultiHeadAttention",
            "MultiHeadAttention.__init__",
            "MultiHeadAttention.forward",
        ],
    },
    "v10a_muon": {
        "parent": "v9d_gqa",
        "lesson": "take steps of the same size in all directions of a weight matrix",
        "replaces": ["make_optimizer"],
        "adds": ["orthogonalise", "Muon", "make_optimizers"],
        "changes": ["train_step", "checkpoint", "restore", "train"],
    },
    "v10b_tricks": {
        "parent": "v10a_muon",
        "lesson": "know what each small change behind the speed records is worth",
        "adds": [
            "Config.qk_norm",
            "Config.zero_init",
            "Config.embedding_norm",
            "Config.bigrams",
            "Config.smear",
            "Config.value_embeddings",
            "Config.slow_head",
            "Config.relu_squared",
            "LanguageModel.embed",
        ],
        "changes": [
            "Config.weight_decay",
            "SIZES",
            "KVCache.__init__",
            "MultiHeadAttention.__init__",
            "MultiHeadAttention.forward",
            "FeedForward",
            "FeedForward.__init__",
            "FeedForward.forward",
            "Block.forward",
            "LanguageModel.__init__",
            "LanguageModel.forward",
            "make_optimizers",
            "train_step",
        ],
    },
    "v10c_speedrun": {
        "parent": "v10b_tricks",
        "lesson": "reach the lowest loss within a given time",
        "adds": [
            "import time",
            "from itertools",
            "SHORT",
            "LONG",
            "LONGEST",
            "BUDGETS",
            "Config.minutes",
            "progress_at",
            "read_settings",
        ],
        "changes": ["learning_rate_at", "train_step", "checkpoint", "restore", "train", "main"],
    },
    "v11a_llama": {
        "parent": "v9d_gqa",
        "lesson": "have every setting that Llama and Qwen3 have",
        "adds": [
            "Config.head_size",
            "Config.intermediate_size",
            "Config.qkv_bias",
            "Config.qk_norm",
            "Config.tie_word_embeddings",
            "Config.rms_norm_eps",
            "Config.rope_theta",
            "Config.rope_factor",
            "Config.rope_low_freq_factor",
            "Config.rope_high_freq_factor",
            "Config.original_max_position_embeddings",
            "head_size_of",
        ],
        "changes": [
            "SIZES",
            "KVCache.__init__",
            "rotation_angles",
            "RMSNorm.forward",
            "MultiHeadAttention.__init__",
            "MultiHeadAttention.forward",
            "FeedForward.__init__",
            "Block.__init__",
            "LanguageModel.__init__",
            "LanguageModel.forward",
        ],
    },
    "v11b_tokenizer": {
        "parent": "v11a_llama",
        "lesson": "read and write the tokens of any released model",
        "adds": [
            "from pathlib",
            "from tokenizers",
            "Config.tokenizer",
            "FileTokenizer",
            "make_tokenizer",
            "describe_best",
        ],
        "changes": ["from support", "SIZES", "main"],
    },
    "v11c_llama_weights": {
        "parent": "v11b_tokenizer",
        "lesson": "load the weights of a released model, and write your own the same way",
        "adds": [
            "LLAMA_NAMES",
            "FINE_TUNING",
            "Config.init_from",
            "Config.export",
            "read_settings",
            "weights_by_released_name",
            "make_model",
        ],
        "changes": ["from support", "KVCache.__init__", "LanguageModel.stream", "main"],
    },
    "v11d_chat": {
        "parent": "v11c_llama_weights",
        "lesson": "talk to a model: one text of all messages, and a cache that stays between them",
        "adds": [
            "Config.system",
            "Config.show_tokens",
            "Config.allow_special",
            "common_length",
            "Conversation",
            "talk",
        ],
        "changes": [
            "from support",
            "MultiHeadAttention.forward",
            "LanguageModel.forward",
            "read_settings",
            "main",
        ],
    },
    "v12a_sft": {
        "parent": "v9d_gqa",
        "lesson": "answer questions: conversations, and a loss on the answers alone",
        "replaces": [
            "Config.prompt",
            "Config.max_new_tokens",
            "Config.num_samples",
            "Config.prompt_file",
            "Config.stop",
        ],
        "adds": [
            "Config.task",
            "Config.n_demonstrations",
            "Config.conversations",
            "Config.base",
            "Config.ask",
            "ChatTokenizer",
            "encode",
            "answer",
        ],
        "changes": [
            "from data",
            "from support",
            "Config.batch_size",
            "Config.block_size",
            "Config.max_iters",
            "Config.eval_iters",
            "Config.temperature",
            "estimate_loss",
            "train_step",
            "train",
            "main",
        ],
    },
    "v12b_grpo": {
        "parent": "v12a_sft",
        "lesson": "learn from one's own answers, and from nothing but whether they are right",
        "replaces": ["from support.notices"],
        "adds": [
            "Config.sft_iters",
            "Config.n_answers",
            "Config.rl_learning_rate",
            "advantages_of",
            "grpo_step",
            "update",
        ],
        "changes": [
            "Config.max_iters",
            "Config.eval_interval",
            "Config.task",
            "Config.base",
            "learning_rate_at",
            "train_step",
            "train",
            "main",
        ],
    },
    "v12c_dpo": {
        "parent": "v12a_sft",
        "lesson": "learn from pairs of a better and a worse answer",
        "adds": ["import copy", "Config.beta", "Config.n_questions", "draw_pairs", "Preference"],
        "changes": [
            "Config.learning_rate",
            "Config.max_iters",
            "Config.eval_interval",
            "Config.eval_iters",
            "Config.warmup_iters",
            "Config.task",
            "Config.base",
            "estimate_loss",
            "train_step",
            "train",
            "main",
        ],
    },
}
MOST_CHANGED_LINES = 100
# Law 4: how long and how branched a function may be.
MOST_LINES, MOST_BRANCHES = 40, 12  # of train and main
MOST_LINES_OF_OTHERS = 50


def parts(script: str) -> dict[str, str]:
    """Cut a script into named parts, in order, each with the comments and blank lines above it.

    A function is a part, and so is any other statement. A class is a part up to its docstring, and
    so is each of its members: "LanguageModel", "LanguageModel.forward", "Config.n_embd".
    """
    text = source(script)
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
        assert name not in named, f"{script}: {name} is there twice"
        named[name] = "".join(lines[begin:end])
        begin = end
    named["the end of the file"] = "".join(lines[begin:])
    return named


def test_the_table_has_every_script_and_its_parent():
    assert {script: row["parent"] for script, row in COURSE.items()} == {
        script: parent for script, parent in PARENTS.items() if parent
    }
    assert list(PARENTS)[0] == "bigram"
    files = {path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("part*/*.py")]}
    assert files == {path_of(script) for script in SCRIPTS}


@pytest.mark.parametrize(("parent", "child"), PAIRS)
def test_the_diff_is_the_lesson_and_nothing_else(parent, child):
    old, new = parts(parent), parts(child)
    gone = [name for name in old if name not in new]
    whole = [name for name in gone if "." not in name or name.split(".")[0] in new]
    assert whole == COURSE[child].get("replaces", []), "a lesson drops or renames nothing else"

    added = [name for name in new if name not in old]
    classes = [name for name in added if not name.startswith("from ")]  # whose members are theirs
    whole = [name for name in added if name.split(".")[0] not in classes or "." not in name]
    assert whole == COURSE[child]["adds"]

    kept = [name for name in old if name in new]
    assert [name for name in kept if old[name] != new[name]] == COURSE[child]["changes"]
    assert [name for name in new if name in old] == kept, "what stays keeps its order"


@pytest.mark.parametrize(("parent", "child"), PAIRS)
def test_a_diff_is_one_idea_long(parent, child):
    assert 0 < changed_lines(parent, child) <= MOST_CHANGED_LINES


def test_the_diffs_up_to_part_3_are_shorter_still():
    counts = [changed_lines(*pair) for pair in PAIRS if part_of(pair[1]) <= 3]
    assert max(counts) <= 80
    assert sum(count < 50 for count in counts) >= len(counts) / 2


def branches(function: ast.FunctionDef) -> int:
    """1, plus what design calls a branch: a condition, a loop, a block, an `and` or an `or`."""
    kinds = (
        ast.If, ast.For, ast.While, ast.Try, ast.ExceptHandler, ast.With, ast.IfExp,
        ast.comprehension, ast.match_case,
    )  # fmt: skip
    nodes = list(ast.walk(function))
    operators = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + sum(isinstance(node, kinds) for node in nodes) + operators


def functions(text: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]


def length(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_train_and_main_stay_readable(script):
    for function in functions(source(script)):
        if function.name in ("train", "main"):
            assert length(function) <= MOST_LINES, function.name
            assert branches(function) <= MOST_BRANCHES, function.name
        else:
            assert length(function) <= MOST_LINES_OF_OTHERS, function.name


def test_branches_are_counted_as_the_law_says():
    [train] = [f for f in functions(source("v5_gpt")) if f.name == "train"]
    assert branches(train) == 8


def test_no_helper_is_long():
    for path in [*ROOT.glob("data/*.py"), *ROOT.glob("support/*.py")]:
        for function in functions(path.read_text(encoding="utf-8")):
            assert length(function) <= MOST_LINES_OF_OTHERS, f"{path.name}: {function.name}"


def imports(script: str) -> set[str]:
    """The packages that a script imports."""
    names = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stands_alone(script):
    allowed = {"torch", "numpy", "tqdm", "data"}
    if part_of(script) > 1:
        allowed |= {"support"}
    if part_of(script) == 4:
        allowed |= {"tiktoken"}
    with_tokenizers = (
        "v8f_gpt1", "v8g_epochs", "v11b_tokenizer", "v11c_llama_weights", "v11d_chat",
    )  # fmt: skip
    if script in with_tokenizers:
        allowed |= {"tokenizers"}
    assert imports(script) <= sys.stdlib_module_names | allowed


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_the_same_order(script):
    module = ast.parse(source(script))
    names = [node.name for node in module.body if hasattr(node, "name")]
    first_to_last = [
        "Config", "LanguageModel", "choose_token", "estimate_loss", "make_optimizer",
        "learning_rate_at", "train_step", "compile_model", "checkpoint", "restore", "train", "main",
    ]  # fmt: skip
    found = [name for name in names if name in first_to_last]
    assert found == [name for name in first_to_last if name in found]
    assert set(found) >= {"Config", "LanguageModel", "estimate_loss", "train_step", "train", "main"}
    assert (names[0], names[-1]) == ("Config", "main")
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    components = [c.name for c in classes if [ast.unparse(b) for b in c.bases] == ["nn.Module"]]
    assert components[-1] == "LanguageModel", "components come before what they are part of"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_lesson_says_how_to_run_it_and_what_to_expect(script):
    lesson = inspect.cleandoc(ast.get_docstring(ast.parse(source(script)))).splitlines()
    assert lesson[0].startswith(f"{script}.py: ")
    assert 10 <= len(lesson) <= 25
    assert any(line.startswith("New here: ") for line in lesson)
    assert any(line.startswith("Run it:   ") for line in lesson)
    path = path_of(script).as_posix()
    assert f"python {path}" in "\n".join(lesson)
    assert any(line.startswith("Expect:   ") for line in lesson)
    if script != "bigram":
        parent = path_of(PARENTS[script]).as_posix()
        assert f"Diff:     git diff --no-index {parent} {path}" in lesson


def test_importing_a_script_reads_no_file_and_prints_nothing():
    program = """
import importlib, sys
import data, support.runs  # and with them torch, which opens files of its own
import huggingface_hub, safetensors.torch, tiktoken, tokenizers, torch.distributed
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
for script in sys.argv[1:]:
    importlib.import_module(script)
own = [name for name in opened if "site-packages" not in name]  # not what packages read for theirs
sys.exit([name for name in own if not name.endswith((".py", ".pyc", ".zip", "boot_id"))] or 0)
"""
    modules = [load(script).__name__ for script in SCRIPTS]
    command = [sys.executable, "-B", "-c", program, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_tree_and_the_counts_in_the_readme(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    count = changed_lines("bigram", "v2_single_head")
    old = readme.replace(f"| {count} |", "| 1234 |")
    assert old != readme
    texts = {script: source(script) for script in SCRIPTS}
    monkeypatch.setattr(ladder, "source", texts.get)
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    path = tmp_path / "README.md"
    path.write_bytes(old.replace("\n", "\r\n").encode("utf-8"))
    ladder.main(["--update"])
    assert path.read_bytes() == readme.replace("\n", "\r\n").encode("utf-8")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(".py")[0].split("/")[-1].strip() for line in lines] == SCRIPTS
    assert lines[1] == f"  v2_single_head.py  {count} changed lines"
    with pytest.raises(data.InputError, match="v5_gpt.py needs one row"):
        ladder.update_counts(readme.replace("[v5_gpt.py]", "[v5]"))
