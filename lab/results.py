"""results.py: the losses, times and speeds that were measured, and the pages that state them.

docs/results.json has an entry for each run. It says what was run and with which command, seeds,
machine (those of docs/measurements.md) and threads, from which commit, and what came out. Then it
lists the pages that state it, with the figures as they write them. What isn't on record is null.

This prints the entries: all of them, or those of one page. Where the commit that was measured isn't
on record, the one with which the figures came onto the page stands in brackets.

Run it:   python lab/results.py
          python lab/results.py docs/probes.md
"""

import argparse
import json
import sys
from collections import Counter
from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import data
from data.flags import Parser
from lab.ladder import ROOT, read

RESULTS = ROOT / "docs" / "results.json"
FIELDS = [
    "what", "command", "seeds", "machine", "threads", "commit", "page_commit", "results", "pages",
]  # fmt: skip

Entry = dict[str, Any]


def load_results(path: Path = RESULTS) -> list[Entry]:
    """The entries of the file, numbers with the digits as written; InputError if one is damaged."""
    try:
        entries = json.loads(read(path), parse_float=Decimal, parse_int=Decimal)
    except json.JSONDecodeError as error:
        raise data.InputError(f"{path.name}, line {error.lineno}: {error.msg}") from None
    if not isinstance(entries, list):
        raise data.InputError(f"{path.name}: must be a list of entries")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or list(entry) != FIELDS:
            fields = ", ".join(FIELDS)
            raise data.InputError(f"{path.name}, entry {number}: must have these fields: {fields}")
    return entries


def numbers_of(entry: Entry) -> list[Decimal]:
    """All numbers that came out of a run, with the mean over the seeds where each has its own."""
    numbers = []
    for result in entry["results"].values():
        if not isinstance(result, dict):
            numbers.append(result)
            continue
        numbers += result.values()
        if list(result) == [str(seed) for seed in entry["seeds"] or []]:
            numbers.append(sum(result.values()) / len(result))
    return numbers


def may_state(entry: Entry) -> set[str]:
    """The figures that a page may give for a run: its numbers, rounded to any number of places.

    A 5 may be rounded either way: the number in the file was rounded before.
    """
    figures = set()
    for number in numbers_of(entry):
        for places in range(5):
            for rounding in (ROUND_HALF_UP, ROUND_HALF_DOWN):
                rounded = number.quantize(Decimal(1).scaleb(-places), rounding)
                figures.add(f"{rounded:,f}")
    return figures


def stated(entries: list[Entry], page: str) -> Counter[str]:
    """The figures that a page takes from the file, and how often it gives each of them."""
    return Counter(figure for entry in entries for figure in entry["pages"].get(page, "").split())


def show(result: Decimal | dict[str, Decimal]) -> str:
    """A result as text: a number, or several with their labels."""
    if not isinstance(result, dict):
        return f"{result:,f}"
    return ", ".join(f"{label}: {number:,f}" for label, number in result.items())


def table(entries: list[Entry]) -> str:
    """The entries as a table, a line each, with the longest column last."""
    rows = [["machine", "threads", "seeds", "commit", "what was run, and what came out"]]
    for entry in entries:
        seeds = " ".join(str(seed) for seed in entry["seeds"] or ["–"])
        entered = f"({entry['page_commit']})" if entry["page_commit"] else "–"
        results = "; ".join(f"{name} {show(value)}" for name, value in entry["results"].items())
        rows.append([
            entry["machine"] or "–",
            str(entry["threads"] or "–"),
            seeds,
            entry["commit"] or entered,
            f"{entry['what']}: {results}",
        ])  # fmt: skip
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def of_page(entries: list[Entry], page: str) -> list[Entry]:
    """The entries that a page states; InputError if there are none."""
    name = Path(page).as_posix()
    found = [entry for entry in entries if name in entry["pages"]]
    if not found:
        pages = "a page or script that does is README.md or part2_training/v6c_recipe.py"
        raise data.InputError(f"{page}: takes nothing from docs/{RESULTS.name}; {pages}")
    return found


def main(argv: list[str] | None = None) -> None:
    """Print the entries, or those of the page named in argv."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", help="a page or script, such as README.md or v5_gpt.py")
    with data.command_line():
        args = parser.parse_args(argv)
        entries = load_results()
        print(table(of_page(entries, args.page) if args.page else entries))


if __name__ == "__main__":
    main()
