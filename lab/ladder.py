"""ladder.py: the course as a tree, with each script's parent and the size of the diff to it.

Run it:   python lab/ladder.py            prints the tree
          python lab/ladder.py --update   also brings the counts in README.md up to date
"""

import argparse
import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The parent is the script that the lesson's diff is read against. Parents come before children.
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


def tree() -> str:
    """The tree as text: a line for each script, indented below its parent."""
    lines = []
    depth = {None: -1}
    for script, parent in PARENTS.items():
        depth[script] = depth[parent] + 1
        count = f"  {changed_lines(parent, script)} changed lines" if parent else ""
        lines.append("  " * depth[script] + f"{script}.py{count}")
    return "\n".join(lines)


def update_counts(readme: str) -> str:
    """The text of README.md with the changed lines in its table of the course up to date."""
    for parent, child in PAIRS:
        row = re.compile(rf"^(\| \[{child}\.py\]\({child}\.py\) \| [^|]+ \| )\d+ \|", re.MULTILINE)
        readme = row.sub(rf"\g<1>{changed_lines(parent, child)} |", readme)
    return readme


def main(argv: list[str] | None = None) -> None:
    """Print the tree; with --update in argv, also rewrite the counts in README.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="bring README.md up to date")
    args = parser.parse_args(argv)
    print(tree())
    if args.update:
        path = ROOT / "README.md"
        path.write_text(update_counts(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
