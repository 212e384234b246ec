"""propagate.py: carry a change in one script into all of its descendants.

Whatever a lesson doesn't touch is the same in parent and child, so an edit to a script belongs in
every script below it in the tree of lab/ladder.py. This program takes the difference between the
last commit and the working tree in one script and merges it into each of its children
(git merge-file), then does the same from each child to its own children. Module docstrings are
left out: each script has its own.

Nothing is written unless every merge succeeds. On a conflict, the program names the file and the
lines. Leave that script out with --skip, edit it by hand, and run this program on it in turn.
Commit before you edit the same lines again: the difference is taken from the last commit.

Run it:   python lab/propagate.py v2_single_head.py
          python lab/propagate.py part2_training/v6b_fast.py --skip v8b_gpt2_tokens
"""

import argparse
import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import data
from data.flags import Parser
from lab.ladder import PARENTS, ROOT, path_of, read, split_docstring, write


def committed(root: Path, script: str) -> str:
    """The text of a script in the last commit; raises data.InputError if it isn't there."""
    command = ["git", "show", f"HEAD:./{path_of(script).as_posix()}"]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        why = f"no committed version to compare with ({done.stderr})"
        raise data.InputError(f"{path_of(script)}: {why}")
    return done.stdout.replace("\r\n", "\n")


def merge(current: str, before: str, after: str) -> tuple[str, list[tuple[int, int]]]:
    """Apply the change from before to after to current: (the merged text, its conflicts).

    A conflict is the first and the last line, counted from 1, of the place in current.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, text in {"current": current, "before": before, "after": after}.items():
            path = Path(folder, name)
            path.write_text(text, encoding="utf-8", newline="\n")
            paths.append(str(path))
        command = ["git", "merge-file", "--stdout", *paths]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode > 127:  # up to 127 it is the number of conflicts
        raise data.InputError(f"git merge-file failed: {done.stderr}")
    if done.returncode > 0:
        return done.stdout, conflicting_lines(current, done.stdout)
    return done.stdout, []


def conflicting_lines(current: str, merged: str) -> list[tuple[int, int]]:
    """The first and last line in current of each conflict that git marked in merged."""
    ours = []  # the lines of merged, with current's side of each conflict
    conflicts = []  # where in ours: (first, one past the last)
    side = "both"
    for line in merged.splitlines():
        if line.startswith("<<<<<<< "):
            side, first = "ours", len(ours)
        elif line == "=======" and side == "ours":
            side = "theirs"
            conflicts.append((first, len(ours)))
        elif line.startswith(">>>>>>> "):
            side = "both"
        elif side != "theirs":
            ours.append(line)

    lines = current.splitlines()
    numbers = line_numbers(ours, lines)
    numbers.append(len(lines))  # for a conflict at the very end
    return [(numbers[first], numbers[max(first, last - 1)]) for first, last in conflicts]


def line_numbers(ours: list[str], lines: list[str]) -> list[int]:
    """For each line of ours, the number of the line it came from, or of the last one before it."""
    numbers = [1] * len(ours)
    matcher = difflib.SequenceMatcher(None, ours, lines, autojunk=False)
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            numbers[block.a + i] = block.b + i + 1
        for i in range(block.a + block.size, len(ours)):
            numbers[i] = block.b + block.size
    return numbers


def propagate(
    root: Path, parents: dict[str, str | None], script: str, skip: list[str]
) -> dict[str, str]:
    """Merge the change in script into its descendants; return the new text of each that changes.

    parents maps each script to its parent. The scripts in skip, and those below them, are left
    out. Raises data.InputError, naming the file and the lines, if a merge has a conflict.
    """
    before = {script: committed(root, script)}
    after = {script: read(root / path_of(script))}
    for child, parent in parents.items():  # parents come before their children
        if parent not in after or child in skip:
            continue
        before[child] = read(root / path_of(child))
        docstring, code = split_docstring(child, before[child])
        _, parent_before = split_docstring(parent, before[parent])
        _, parent_after = split_docstring(parent, after[parent])
        merged, conflicts = merge(code, parent_before, parent_after)
        if conflicts:
            above = docstring.count("\n")
            lines = ", ".join(f"{above + first}-{above + last}" for first, last in conflicts)
            raise data.InputError(
                f"{path_of(child)}, lines {lines}: in conflict with the change in {parent}.py; "
                f"nothing was written. Use --skip {child}, edit it by hand, then run this on it"
            )
        after[child] = docstring + merged
    del after[script]
    return {child: text for child, text in after.items() if text != before[child]}


def count_changes(old: str, new: str) -> str:
    """How many lines were added and removed, as in "+2 -1 lines"."""
    diff = list(difflib.ndiff(old.splitlines(), new.splitlines()))
    added = sum(line.startswith("+ ") for line in diff)
    removed = sum(line.startswith("- ") for line in diff)
    return f"+{added} -{removed} lines"


def script_name(typed: str) -> str:
    """The name of a script in the tree, from its name or its path; data.InputError for others."""
    path = Path(typed)
    name = path.name.removesuffix(".py")
    is_elsewhere = path.parent != Path() and path.parent.resolve() != (ROOT / path_of(name)).parent
    if name not in PARENTS or is_elsewhere:
        raise data.InputError(f"{typed}: not a script here; give its name ({', '.join(PARENTS)})")
    return name


def main(argv: list[str] | None = None) -> None:
    """Carry the change in the script named in argv into its descendants; say what changed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="the script that was edited")
    parser.add_argument(
        "--skip", action="append", default=[], help="leave out this script and those below it"
    )
    with data.command_line():
        args = parser.parse_args(argv)
        script = script_name(args.script)
        skip = [script_name(name) for name in args.skip]
        if committed(ROOT, script) == read(ROOT / path_of(script)):
            why = "the same as in the last commit; edit it first"
            raise data.InputError(f"{path_of(script)}: {why}")
        changed = propagate(ROOT, PARENTS, script, skip)
        paths = {child: ROOT / path_of(child) for child in changed}
        counts = {child: count_changes(read(paths[child]), changed[child]) for child in changed}
        write({paths[child]: changed[child] for child in changed})
        for child, count in counts.items():
            print(f"{path_of(child)}: {count}")
        if not changed:
            print("no descendant needed a change")


if __name__ == "__main__":
    main()
