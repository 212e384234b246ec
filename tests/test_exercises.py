"""lab/web/exercises.md: its form, the lines that it says to change, and its commands."""

import importlib.util
import itertools
import re
import shlex
import sys

import pytest
from conftest import tiny_flags

import data
from data import tasks
from lab.ladder import ROOT, SCRIPTS, load, path_of, source

TEXT = (ROOT / "lab" / "web" / "exercises.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"`(\w+)\.py`")


def exercises() -> dict[str, dict[str, str]]:
    """The text below each ###, by the title of its part and its own."""
    parts = {}
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        part_title, _, body = part.partition("\n")
        sections = re.split(r"^### ", body, flags=re.MULTILINE)[1:]
        parts[part_title] = {}
        for section in sections:
            title, _, text = section.partition("\n")
            parts[part_title][title] = text
    return parts


def changes() -> list[tuple[str, str, str]]:
    """For each diff: the script that the text before it names last, and the lines - and +."""
    found = []
    for fence in FENCE.finditer(TEXT):
        if fence[1] != "diff":
            continue
        script = SCRIPT.findall(TEXT, 0, fence.start())[-1]
        lines = fence[2].splitlines(keepends=True)
        assert all(line[0] in "-+" for line in lines), fence[2]
        old = "".join(line[1:] for line in lines if line.startswith("-"))
        new = "".join(line[1:] for line in lines if line.startswith("+"))
        found.append((script, old, new))
    return found


def commands() -> list[str]:
    """Every line of the sh fences."""
    lines = []
    for fence in FENCE.finditer(TEXT):
        if fence[1] == "sh":
            lines += fence[2].splitlines()
    return lines


CHANGES = changes()
EXERCISES = exercises()


def test_each_part_has_three_to_seven_exercises():
    parts = [f"Part {n}" for n in (1, 2, 3, 4, 5, 6, 8)]
    assert [title.partition(":")[0] for title in EXERCISES] == parts
    for part in EXERCISES.values():
        assert 3 <= len(part) <= 7


def test_each_exercise_asks_before_it_answers():
    for part in EXERCISES.values():
        for title, text in part.items():
            fold = "\n<details>\n<summary>What happened</summary>\n\n"
            question, line, answer = text.partition(fold)
            assert line, title
            assert answer.rstrip().endswith("\n\n</details>"), title
            assert "?" in question, title
            assert FENCE.search(question), title
            assert re.search(r"\d", answer), title
            assert answer.count("details>") == 1, title


def test_every_fence_is_a_change_a_command_or_text():
    assert TEXT.count("```") == 2 * len(FENCE.findall(TEXT))
    assert {kind for kind, _ in FENCE.findall(TEXT)} <= {"diff", "sh", "text"}


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_changes_fit_their_scripts_and_run(change, corpus, tmp_path, monkeypatch):
    script, old, new = change
    assert script in SCRIPTS
    assert old.strip()
    assert source(script).count(old) == 1, f"{script}.py doesn't have exactly one of:\n{old}"
    path = tmp_path / f"{script}_changed.py"
    path.write_text(source(script).replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # where data looks for the script's name
    spec.loader.exec_module(module)
    flags = tiny_flags(module, data=corpus, prompt="The")
    if hasattr(module.Config, "conversations"):
        flags += ["--block_size", "40"]  # a whole conversation
    if hasattr(module.Config, "beta"):  # it starts from a run, whose answers some pairs are made of
        base, v12a = tmp_path / "base", load("v12a_sft")
        at = ["--out_dir", str(base), "--data", str(corpus), "--block_size", "40", "--task", "sums"]
        v12a.main([*tiny_flags(v12a), *at])
        right = itertools.cycle([False, True, False])
        monkeypatch.setattr(tasks, "is_right", lambda chat, answer: next(right))
        flags += ["--base", str(base)]
    module.main(flags)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_have_flags_that_exist(command):
    python, name, *flags = shlex.split(command)
    assert python == "python"
    [script] = [script for script in SCRIPTS if path_of(script).as_posix() == name]
    program = load(script)
    data.read_flags(program.Config, "", ["--device", "cpu", *flags])
