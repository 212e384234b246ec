"""Every shape comment is true: the scripts run under a tracer that checks the comments."""

import ast
import io
import json
import re
import sys
import tokenize

import numpy as np
import pytest
import torch
from conftest import TINY, VOCAB_SIZE, tiny, tiny_flags

import data
from data import tasks
from lab.common import generate
from lab.ladder import PARENTS, SCRIPTS, load
from support import batches

SHAPE = re.compile(r"# (\(.*?\))(?: each| and (\(.*\)))?$")


def shape_comments(text: str) -> dict[int, list[str]]:
    """Line number -> the shapes that the comment at its end, or on the line above, claims."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and (match := SHAPE.match(token.string)):
            is_above = token.line.lstrip().startswith("#")
            line = token.start[0] + 1 if is_above else token.start[0]
            comments[line] = [shape for shape in match.groups() if shape]
    return comments


def statements(text: str) -> dict[int, ast.stmt]:
    """Line number -> the assignment or return statement that is on it, among other lines."""
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assign | ast.Return)]
    return {line: n for n in nodes for line in range(n.lineno, n.end_lineno + 1)}


class LikeCuda(str):
    """The name of the CPU, which a script takes for that of a GPU."""

    def startswith(self, prefix):
        return prefix == "cuda"


class OneToken:
    """For a conversation whose first text is two tokens, and whose second is four."""

    def drop_oldest(self, messages):
        return messages

    def encode(self, messages):
        return [1] * (2 * len(messages))


class ShapeTracer:
    """Checks, line by line as one file runs, that what a line made has the shape it claims."""

    def __init__(self, path: str, vocab_size: int) -> None:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        self.path = path
        self.vocab_size = vocab_size
        self.claims = shape_comments(text)
        self.statements = statements(text)
        self.checked = set()
        self.wrong = []

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != self.path or frame.f_code.co_name.startswith("<"):
            return None
        pending = None  # the statement that is running, with the sizes known before it ran

        def trace_lines(frame, event, arg):
            nonlocal pending
            node = self.statements.get(frame.f_lineno)
            if event == "line" and pending and node is pending[0] and node is not None:
                return trace_lines  # another line of the same
            if pending and event in ("line", "return"):
                self.check(*pending, frame.f_locals, arg)
            pending = (node, self.sizes(frame.f_locals))
            return trace_lines

        return trace_lines

    def sizes(self, names) -> dict[str, int]:
        """What the letters and names in the comments stand for at this point of the run."""
        known = {"B": TINY["batch_size"], "T": TINY["block_size"], "V": self.vocab_size}
        known |= {"min": min, "max": max}
        known |= {name: value for name, value in TINY.items() if isinstance(value, int)}
        known["head_size"] = TINY["n_embd"] // TINY["n_head"]
        if isinstance(names.get("positions"), torch.Tensor):
            known["T"] = len(names["positions"])
        for name in ("idx", "x", "prompt", "logits"):
            if isinstance(names.get(name), torch.Tensor):
                B, *sizes = names[name].shape
                T = sizes[1] if len(sizes) == 3 else sizes[0]  # (B, n_head, T, head_size)
                if not names[name].is_floating_point():
                    T = sizes[-1]  # (B, 2, T)
                known |= {"B": B, "T": T}
                break
        if isinstance(names.get("ids"), list):  # Conversation.read and Conversation.answer
            known |= {"B": 1, "T": len(names["ids"]) - names.get("n_kept", 0)}
        if "key" in names and "x" not in names:  # KVCache.append
            known["B"] = names["key"].shape[0]
        if isinstance(names.get("x"), torch.Tensor):
            known["size"] = names["x"].shape[-1]  # RMSNorm.forward
        if "batch_size" in names:
            known["B"] = names["batch_size"]
        attributes = vars(names["self"]) if "self" in names else {}
        if hasattr(names.get("self"), "expansion"):
            known["hidden"] = names["self"].expansion.out_features
        if hasattr(names.get("self"), "blocks") and hasattr(names["self"].blocks[0], "attention"):
            known["kv_size"] = getattr(names["self"].blocks[0].attention, "kv_size", None)
        known |= {name: value for name, value in attributes.items() if type(value) is int}
        known |= {name: value for name, value in names.items() if type(value) is int}
        for name in ("conversations", "examples"):
            if name in names:
                known["N"] = len(names[name])
        if isinstance(names.get("matrix"), torch.Tensor):  # orthogonalise and Muon.step
            known["rows"], known["columns"] = names["matrix"].shape
            known["n"] = min(names["matrix"].shape)
        if isinstance(names.get("rewards"), torch.Tensor):  # advantages_of
            known.setdefault("n_questions", len(names["rewards"]))
        if isinstance(names.get("tokens"), np.ndarray):  # describe_best
            known["n"] = len(names["tokens"])
        starts = names.get("starts")  # of all of v8g's windows, or of those of a batch
        if isinstance(starts, np.ndarray) and "n_batches" not in names:
            known["n"] = known["B"] = len(starts)
        if "sizes" in names:
            known["sizes"] = names["sizes"]
        for name in ("context", "cache"):  # whose attributes are in comments
            if name in names:
                known[name] = names[name]
        if hasattr(names.get("cache"), "length"):  # a KVCache, before it gets the T new keys
            known.setdefault("n_old", names["cache"].length)
        if "n_old" in known and "n_keys" not in names:  # all, or those in a full cache
            known["n_keys"] = min(known["n_old"] + known["T"], TINY["block_size"])
        if isinstance(names.get("cache"), torch.Tensor):
            known.setdefault("end", names["cache"].shape[-2])
        return known

    def check(self, node, sizes, names, returned):
        if node is None or node.lineno not in self.claims:
            return
        line = node.lineno
        if isinstance(node, ast.Return):
            values = list(returned) if isinstance(returned, tuple) else [returned]
        else:
            target = node.targets[0]
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            kept = [t for t in targets if not (isinstance(t, ast.Name) and t.id == "_")]
            values = [eval(ast.unparse(t), {}, dict(names)) for t in kept]
            if isinstance(values[0], (tuple, list, torch.nn.ModuleList)):
                (values,) = values  # several tensors under one name
        values = [v.weight if isinstance(v, torch.nn.Module) else v for v in values]
        claims = self.claims[line] * (len(values) if len(self.claims[line]) == 1 else 1)
        for i, (value, claim) in enumerate(zip(values, claims, strict=True)):
            expected = eval(claim, {**sizes, "i": i})
            shape = tuple(value.shape)
            if expected[:1] == (...,):  # any number of dimensions before the others
                shape = (..., *shape[len(shape) - len(expected) + 1 :])
            if shape != expected:
                self.wrong.append(f"line {line} claims {claim}, made {tuple(value.shape)}")
        self.checked.add(line)


def run_traced(path, run, vocab_size=VOCAB_SIZE) -> ShapeTracer:
    tracer = ShapeTracer(path, vocab_size)
    sys.settrace(tracer)
    try:
        run()
    finally:
        sys.settrace(None)
    return tracer


@pytest.mark.parametrize("name", SCRIPTS)
def test_shape_comments_of_a_script(name, corpus, tmp_path, monkeypatch):
    script = load(name)
    prompt, vocab_size = "The q", VOCAB_SIZE  # as long as the context
    if hasattr(script, "learn_merges"):
        prompt, vocab_size = "zzzzz", TINY["vocab_size"]  # five tokens, because "zz" is rare
    flags = [*tiny_flags(script, prompt=prompt), "--data", str(corpus)]
    if hasattr(script.Config, "conversations"):  # one that fills a window of five tokens, twice
        path = tmp_path / "conversations.jsonl"
        roles = [{"role": "user", "content": "T"}, {"role": "assistant", "content": "q"}]
        path.write_text(f"{json.dumps({'messages': roles})}\n" * 2, encoding="utf-8")
        flags += ["--conversations", str(path)]
        alphabet = tasks.alphabet(path.read_text(encoding="utf-8"), [])
        vocab_size = script.ChatTokenizer(alphabet).n_vocab
    if hasattr(script, "draw_pairs"):  # and the answers of its base, of which one is right
        base = tmp_path / "base"
        parent = load(PARENTS[name])
        parent.main([*tiny_flags(parent, out_dir=base), "--conversations", str(path)])
        right = iter([False, True, False] * 99)  # asks for the second answer, first and last
        monkeypatch.setattr(tasks, "is_right", lambda chat, answer: next(right))
        flags += ["--base", str(base)]
    sizes = tiny(script)

    def run():
        script.main(flags)
        if hasattr(script, "choose_token"):
            more = ["--temperature", "0.9", "--top_k", "9", "--top_p", "0.9"]
            script.main([*flags, "--sample_only", *more, "--repetition_penalty", "1.1"])
            script.main([*flags, "--sample_only", "--temperature", "0"])
            model = script.LanguageModel(sizes, vocab_size)
            generate(script, model, torch.zeros(2, 3).long(), 4, sizes)
        if hasattr(script, "Conversation"):
            tokenizer = OneToken()
            conversation = script.Conversation(model, tokenizer, sizes)
            list(conversation.answer("a"))
            list(conversation.answer("b"))  # several tokens after others
        if hasattr(script, "draw_pairs"):  # whose own loss is another
            model(torch.zeros(2, 3).long(), torch.zeros(2, 3).long())
        switches = [s for s in ("relu_squared", "fused_attention") if hasattr(sizes, s)]
        if switches:  # on for a GPU, so on in these runs
            off = [f"--no-{switch}" for switch in switches]
            script.main([*flags, "--out_dir", str(tmp_path / "off"), *off])
        if hasattr(script, "head_size_of"):
            script.main([*flags, "--out_dir", str(tmp_path / "long"), "--rope_factor", "8"])
        if hasattr(script, "orthogonalise"):  # a matrix that is taller than wide, too
            script.orthogonalise(torch.randn(6, 4))

    tracer = run_traced(script.__file__, run, vocab_size)
    assert tracer.wrong == []
    assert tracer.checked == set(tracer.claims), "a shape comment on a line that never ran"
    assert len(tracer.checked) >= 9


def test_shape_comments_of_the_helper(splits):
    size = (TINY["batch_size"], TINY["block_size"])
    tokens = splits[0].tolist()

    def run():
        data.split(tokens, TINY["block_size"])
        data.get_batch(splits[0], *size, "cpu")

    tracer = run_traced(data.__file__, run)
    assert tracer.wrong == []
    assert tracer.checked == set(tracer.claims)
    assert len(tracer.checked) >= 5


def test_shape_comments_of_the_batches(splits):
    size = (TINY["batch_size"], TINY["block_size"])

    def run():
        batches.get_spread_batch(splits[0], 1, 3, *size, "cpu")
        examples = batches.pad([([1, 2, 3], [-100, 2, 3]), ([4, 5], [4, 5])], size[1])
        batches.get_random_rows(examples, size[0])
        batches.get_spread_rows(examples, 1, 3, size[0], "cpu")

    tracer = run_traced(batches.__file__, run)
    assert tracer.wrong == []
    assert tracer.checked == set(tracer.claims)
    assert len(tracer.checked) >= 10


@pytest.mark.parametrize("claim", ["(3, T)", "(B, T + 1)", "(B,)"])
@pytest.mark.parametrize("lines", ["    y = x + x  # {}\n", "    # {}\n    y = x + x\n"])
def test_a_wrong_comment_is_found(tmp_path, lines, claim):
    path = tmp_path / "wrong.py"
    path.write_text(f"def f(x):\n{lines.format(claim)}    return y\n", encoding="utf-8")
    scope = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    tracer = run_traced(str(path), lambda: scope["f"](torch.from_numpy(np.zeros((2, 4)))))
    assert len(tracer.wrong) == 1
