"""The README and the lessons say what is so: commands that parse, counts that are true."""

import ast
import importlib
import re
import shlex

import pytest
import torch

import data
from lab.ladder import PAIRS, ROOT, RUNGS, changed_lines, source

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPARISON = (ROOT / "lab" / "compare.md").read_text(encoding="utf-8")
LESSONS = "\n".join(ast.get_docstring(ast.parse(source(rung))) for rung in RUNGS)
COMMAND = re.compile(r"^.*?\bpython ((?:lab/|v\d_)?\w+\.py[^\n`]*)", re.M)
COMMANDS = sorted(set(COMMAND.findall(README + "\n" + LESSONS)))


def small_model(name, vocab_size=65):
    """A rung's model with the defaults of the CPU and the characters of Shakespeare, no memory."""
    rung = importlib.import_module(name)
    cfg = data.read_flags(rung.Config, "", ["--device", "cpu"])
    with torch.device("meta"):
        return rung.LanguageModel(cfg, vocab_size)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_flags_that_exist(command):
    script, *flags = shlex.split(command.split("#")[0])
    rung = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if flags != ["--help"]:
        data.read_flags(rung.Config, "", ["--device", "cpu", *flags])


def test_there_are_commands_for_every_rung():
    assert {command.split(".py")[0] for command in COMMANDS} == {*RUNGS, "lab/bench", "lab/compare"}


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_every_diff_has_its_command(before, after):
    assert f"git diff --no-index {before}.py {after}.py" in README


@pytest.mark.parametrize("text", [README, COMPARISON], ids=["README", "compare.md"])
@pytest.mark.parametrize("name", RUNGS)
def test_the_comparison_counts_right(text, name):
    rows = re.findall(rf"^\| `{name}\.py` \| ([\d,]+) \|.*\| ([\d-]+) \|$", text, re.M)
    before = {after: before for before, after in PAIRS}
    changed = str(changed_lines(before[name], name)) if name in before else "-"
    parameters = sum(p.numel() for p in small_model(name).parameters())
    assert rows == [(f"{parameters:,}", changed)]


@pytest.mark.parametrize("name", RUNGS)
def test_the_ladder_counts_right(name):
    before = {after: before for before, after in PAIRS}
    cost = f"{len(source(name).splitlines())} lines"
    if name in before:
        cost = f"{changed_lines(before[name], name)} changed lines"
    vocab_size = 50_257 if name == "v9_gpt2" else 65  # of the tokenizer that it has by default
    parameters = sum(p.numel() for p in small_model(name, vocab_size).parameters())
    row = next(line for line in README.splitlines() if line.startswith(f"| [{name}.py]"))
    assert f"| {cost}, {parameters:,} parameters, " in row


def test_the_readme_has_the_comparison_as_it_was_written():
    table, *samples = COMPARISON.strip().split("\n\n`")
    assert table.splitlines()[-1] in README
    for sample in samples:
        assert sample in README


def test_losses_fall_from_rung_to_rung():
    """In the comparison as it was run for the README, on the whole validation split."""
    rows = re.findall(r"^\| `(\w+)\.py` \| [\d,]+ \| [\d.]+ \| ([\d.]+) \|", COMPARISON, re.M)
    losses = {name: float(loss) for name, loss in rows}
    assert list(losses) == RUNGS
    for before, after in PAIRS:
        if after == "v6_fast":  # the same function: what differs is the draw of the first weights
            assert abs(losses[after] - losses[before]) < 0.02
        elif after == "v8_sampling":  # it trains as the one before
            assert losses[after] == losses[before]
        elif after == "v9_gpt2":  # with 65 tokens, what GPT-2 has does not pay, nor cost much
            assert abs(losses[after] - losses[before]) < 0.04
        else:
            assert losses[after] < losses[before]
    assert losses["v5_gpt"] <= 1.70


def test_the_readme_has_the_bench_as_it_was_written():
    bench = (ROOT / "lab" / "bench.md").read_text(encoding="utf-8")
    rows = [line for line in bench.splitlines() if "`" in line]
    models = [*RUNGS[1:], "transformers"]
    writers = ["v7_training", "v8_sampling", "v9_gpt2", "transformers"]
    assert [row.split("`")[1] for row in rows] == models + 2 * writers
    for row in rows:
        assert row in README
