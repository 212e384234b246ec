"""The course as a tree: each script's parent, and how many lines a script changes in it."""

import ast
import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The parent is the script whose diff a learner reads. Parents come before their children.
PARENTS = {
    "bigram": None,
    "v2_single_head": "bigram",
    "v3_multi_head": "v2_single_head",
    "v4_feedforward": "v3_multi_head",
    "v5_gpt": "v4_feedforward",
    "v6_fast": "v5_gpt",
    "v7_training": "v6_fast",
    "v8_sampling": "v7_training",
    "v9_gpt2": "v8_sampling",
}
SCRIPTS = list(PARENTS)
PAIRS = [(parent, child) for child, parent in PARENTS.items() if parent is not None]


def source(script: str) -> str:
    """The text of a script's file."""
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def split_docstring(text: str) -> tuple[str, str]:
    """Cut the text of a script below its module docstring: (docstring, code)."""
    lines = text.splitlines(keepends=True)
    docstring = ast.parse(text).body[0]
    return "".join(lines[: docstring.end_lineno]), "".join(lines[docstring.end_lineno :])


def changed_lines(parent: str, child: str) -> int:
    """How many lines the diff from parent to child removes and adds, module docstrings left out."""
    _, before = split_docstring(source(parent))
    _, after = split_docstring(source(child))
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    body = list(diff)[2:]  # below the two lines that name the files
    return sum(line.startswith(("+", "-")) for line in body)
