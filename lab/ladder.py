"""ladder.py: the course as a tree, with each script's parent and the size of the diff to it.

Run it:   python lab/ladder.py            prints the tree
          python lab/ladder.py --update   also brings the counts in README.md up to date
"""

import argparse
import ast
import difflib
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import data
from data.flags import Parser

ROOT = Path(__file__).resolve().parent.parent

# The folder of each part, and the part of each version.
FOLDERS = {
    1: "", 2: "part2_training", 3: "part3_generation", 4: "part4_gpt2", 5: "part5_modern",
    6: "part6_speedrun", 7: "part7_released", 8: "part8_assistant",
}  # fmt: skip
PART_OF_VERSION = {"v6": 2, "v7": 3, "v8": 4, "v9": 5, "v10": 6, "v11": 7, "v12": 8}

# The parent is the script that the lesson's diff is read against. Parents come before children.
PARENTS = {
    "bigram": None,
    "v2_single_head": "bigram",
    "v3_multi_head": "v2_single_head",
    "v4_feedforward": "v3_multi_head",
    "v5_gpt": "v4_feedforward",
    "v6a_fused_attention": "v5_gpt",
    "v6b_fast": "v6a_fused_attention",
    "v6c_recipe": "v6b_fast",
    "v6d_checkpoints": "v6c_recipe",
    "v7a_sampling": "v6d_checkpoints",
    "v7b_kv_cache": "v7a_sampling",
    "v8a_byte_pairs": "v7b_kv_cache",
    "v8b_gpt2_tokens": "v7b_kv_cache",
    "v8c_gpt2": "v8b_gpt2_tokens",
    "v8d_gpt2_weights": "v8c_gpt2",
    "v8e_distributed": "v8d_gpt2_weights",
    "v8f_gpt1": "v8c_gpt2",
    "v8g_epochs": "v8f_gpt1",
    "v9a_rmsnorm": "v7b_kv_cache",
    "v9b_rope": "v9a_rmsnorm",
    "v9c_swiglu": "v9b_rope",
    "v9d_gqa": "v9c_swiglu",
    "v10a_muon": "v9d_gqa",
    "v10b_tricks": "v10a_muon",
    "v10c_speedrun": "v10b_tricks",
    "v11a_llama": "v9d_gqa",
    "v11b_tokenizer": "v11a_llama",
    "v11c_llama_weights": "v11b_tokenizer",
    "v11d_chat": "v11c_llama_weights",
    "v12a_sft": "v9d_gqa",
    "v12b_grpo": "v12a_sft",
    "v12c_dpo": "v12a_sft",
}
SCRIPTS = list(PARENTS)
PAIRS = [(parent, child) for child, parent in PARENTS.items() if parent is not None]


def part_of(script: str) -> int:
    """The number of the part of the course that a script belongs to."""
    version = re.match(r"v\d+", script)
    return PART_OF_VERSION.get(version[0], 1) if version else 1


def path_of(script: str) -> Path:
    """The path of a script's file, seen from the root of the course."""
    return Path(FOLDERS[part_of(script)], f"{script}.py")


def load(script: str) -> ModuleType:
    """The module of a script."""
    return importlib.import_module(".".join(path_of(script).with_suffix("").parts))


def source(script: str) -> str:
    """The text of a script's file."""
    return read(ROOT / path_of(script))


def read(path: Path) -> str:
    """The text of a file, whatever its line endings; raises data.InputError if it isn't UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise data.InputError(f"{path.name}: not UTF-8 text; save it as UTF-8") from None


def write(texts: dict[Path, str]) -> None:
    """Replace the texts of several files, which keep their line endings.

    No file is replaced before all the new ones are complete, so a full disk harms none of them.
    """
    unfinished = {path: path.with_name(f"{path.name}.unfinished") for path in texts}
    try:
        for path, text in texts.items():
            content = path.read_bytes()
            only_crlf = b"\n" in content and content.count(b"\r\n") == content.count(b"\n")
            newline = "\r\n" if only_crlf else "\n"
            unfinished[path].write_text(text, encoding="utf-8", newline=newline)
            unfinished[path].chmod(path.stat().st_mode)
        for path in texts:
            unfinished[path].replace(path)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)


def split_docstring(script: str, text: str) -> tuple[str, str]:
    """Cut the text of a script below its module docstring: (docstring, code).

    Raises data.InputError, naming the script, if the text isn't Python or has no docstring.
    """
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise data.InputError(f"{script}.py: not valid Python ({error})") from None
    if ast.get_docstring(module) is None:
        raise data.InputError(f"{script}.py: has no docstring; every script begins with its lesson")
    end = module.body[0].end_lineno
    lines = text.splitlines(keepends=True)
    return "".join(lines[:end]), "".join(lines[end:])


def changed_lines(parent: str, child: str) -> int:
    """How many lines the diff from parent to child removes and adds, module docstrings left out."""
    _, before = split_docstring(parent, source(parent))
    _, after = split_docstring(child, source(child))
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
        lines.append("  " * depth[script] + f"{path_of(script).as_posix()}{count}")
    return "\n".join(lines)


def update_counts(readme: str) -> str:
    """The text of README.md with the changed lines in its table of the course up to date.

    Raises data.InputError if a script has no row in the table.
    """
    for parent, child in PAIRS:
        link = re.escape(f"[{child}.py]({path_of(child).as_posix()})")
        row = re.compile(rf"^(\| {link} \| \w+ \| [^|]+ \| )\d+ \|", re.MULTILINE)
        readme, count = row.subn(rf"\g<1>{changed_lines(parent, child)} |", readme)
        if count != 1:
            raise data.InputError(f"README.md: {child}.py needs one row in the table of the course")
    return readme


def main(argv: list[str] | None = None) -> None:
    """Print the tree; with --update in argv, also rewrite the counts in README.md."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="bring README.md up to date")
    with data.command_line():
        args = parser.parse_args(argv)
        if args.update:
            path = ROOT / "README.md"
            write({path: update_counts(read(path))})
        print(tree())


if __name__ == "__main__":
    main()
