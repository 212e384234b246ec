"""docs/results.json and lab/results.py: every loss that a page states is one that was measured."""

import ast
import re
from collections import Counter
from decimal import Decimal

import pytest
from conftest import refused_input

from lab import results
from lab.ladder import PARENTS, ROOT, SCRIPTS, path_of, read
from lab.results import load_results, may_state, stated

# A loss is a decimal with two to four places: in prose from 0.5 to 11, in a table of any size. In
# prose, smaller ones are mostly settings, differences and shares, and no model here starts above
# ln(50,257) = 10.82. Any other figure that the file lists for a page must stand there, too.
PLACES = re.compile(r"\d+\.\d{2,4}")
SMALLEST, LARGEST = 0.5, 11

# A whole number or a decimal, and not a piece of something else: a name, a version, 2e-3.
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?!\w|[.,]\d)")

# What isn't read: code, whose numbers are settings (but what a program prints after "loss" is one),
# the targets of links, comments, tags, and the head of a table.
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"loss (\d+\.\d+)")
MARKUP = re.compile(r"`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|<[^<>\n]+>", re.DOTALL)

# What is read and isn't a loss: a number with a unit, and a version of Python.
UNITS = "GB|GiB|MB|GHz|ms|minutes|seconds|times|T|characters|radians"
OTHER = re.compile(rf"(?<![\w.,-])[\d.]+(?:%|\s+(?:{UNITS})\b)|Python 3\.\d+")

# Columns without losses, by their heads.
COLUMNS = {
    "beta 2": "a setting",
    "change": "says in words, with settings, what was changed",
    "difference": "follows from the losses beside it",
    "each run": "weights and gradients of the probes",
    "standard deviation of the scores at first": "no loss",
    "times v5": "a ratio of speeds",
    "times v7a": "a ratio of speeds",
}

# The rest, page by page.
WEIGHTS = "weights of attention"
SINGULAR_VALUES = "singular values of an update"
SETTINGS = "settings"
EXCEPTIONS = {
    "docs/probes.md": {
        "(weights of 0.90, 0.95 and 0.52)": WEIGHTS,
        "(0.99, 0.98, 0.96)": WEIGHTS,
        "(0.77, 0.94)": WEIGHTS,
        "(0.63, 0.84)": WEIGHTS,
    },
    "part2_training/v6c_recipe.py": {
        "beta2 is 0.99": SETTINGS,
        "default is 0.999, GPT-3's 0.95": SETTINGS,
    },
    "part6_speedrun/README.md": {
        "lift 0.002 to 0.86": SINGULAR_VALUES,
        "between 0.68 and 1.14": SINGULAR_VALUES,
        "a factor of 0.995 or 0.98": SETTINGS,
    },
    "part6_speedrun/v10a_muon.py": {
        "values 9.47 and 0.53": SINGULAR_VALUES,
        "its norm of 9.49": "the norm of a matrix",
        "has 0.998 and 0.056, which become 0.70 and 0.87": SINGULAR_VALUES,
    },
    "lab/web/exercises.md": {
        "without it, 0.70": WEIGHTS,
        "a maximum of 0.76": SINGULAR_VALUES,
        "between 0.68 and 1.13": SINGULAR_VALUES,
        "2.22 of Python": "characters in a token",
    },
}

ENTRIES = load_results()


def find_pages() -> dict[str, str]:
    """The text of every page, and the lesson of every script and module."""
    pages = {}
    for pattern in ("README.md", "docs/*.md", "part*/*.md", "lab/web/*.md", "lab/web/page.html"):
        for path in sorted(ROOT.glob(pattern)):
            pages[path.relative_to(ROOT).as_posix()] = read(path)
    modules = [ROOT / path_of(script) for script in SCRIPTS]
    for folder in ("data", "support", "lab"):
        modules += sorted(ROOT.glob(f"{folder}/**/*.py"))
    for path in modules:
        lesson = ast.get_docstring(ast.parse(read(path)))
        pages[path.relative_to(ROOT).as_posix()] = lesson or ""
    return pages


PAGES = find_pages()
LISTED = {page: stated(ENTRIES, page) for page in PAGES}
WITH_FIGURES = [page for page in PAGES if LISTED[page]]


def blank(match: re.Match) -> str:
    """Spaces in place of what was found, so that everything else stays where it is."""
    return re.sub(r"[^\n]", " ", match[0])


def keep_printed(fence: re.Match) -> str:
    """A block of code with nothing left but the losses that a program has printed."""
    kept = list(blank(fence))
    for loss in PRINTED.finditer(fence[0]):
        kept[slice(*loss.span(1))] = loss[1]
    return "".join(kept)


def blank_columns(text: str) -> str:
    """A text without the heads of its tables and without the columns that have no losses."""
    lines = []
    head = None
    for line in text.split("\n"):
        cells = line.split("|")
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = [cell.strip() for cell in cells]
            line = " " * len(line)
        else:
            for i, name in enumerate(head[: len(cells)]):
                if name in COLUMNS:
                    cells[i] = " " * len(cells[i])
            line = "|".join(cells)
        lines.append(line)
    return "\n".join(lines)


def pattern_of(fragment: str) -> str:
    """A pattern that finds a piece of text, also where a line ends within it."""
    return r"\s+".join(re.escape(word) for word in fragment.split())


def without_code(text: str) -> str:
    """A text without code, links and comments; everything else stays where it is."""
    return MARKUP.sub(blank, FENCE.sub(keep_printed, text))


def losses_on(page: str, text: str) -> list[re.Match]:
    """Every loss in the text of a page, with its place."""
    for fragment in EXCEPTIONS.get(page, {}):
        text = re.sub(pattern_of(fragment), blank, text)
    text = OTHER.sub(blank, without_code(blank_columns(text)))
    losses = []
    for match in NUMBER.finditer(text):
        if not PLACES.fullmatch(match[0]):
            continue
        in_table = text.startswith("|", text.rfind("\n", 0, match.start()) + 1)
        if in_table or match[0] in LISTED[page] or SMALLEST <= float(match[0]) < LARGEST:
            losses.append(match)
    return losses


def problems(page: str, text: str) -> list[str]:
    """The figures that a page doesn't state as often as the file says."""
    losses = Counter(match[0] for match in losses_on(page, text))
    numbers = Counter(NUMBER.findall(without_code(text)))
    listed = LISTED[page]
    found = []
    for figure in sorted(losses.keys() | listed.keys()):
        if not losses[figure] <= listed[figure] <= numbers[figure]:
            times = f"{max(losses[figure], numbers[figure])} times"
            found.append(f"{figure}: {times} on {page}, {listed[figure]} times in results.json")
    return found


# ---- the pages


@pytest.mark.parametrize("page", PAGES)
def test_every_loss_on_a_page_is_in_the_file_and_the_other_way_round(page):
    assert problems(page, PAGES[page]) == []


def test_the_file_names_pages_that_exist():
    for entry in ENTRIES:
        assert entry["pages"].keys() <= PAGES.keys(), entry["what"]


@pytest.mark.parametrize("page", WITH_FIGURES)
def test_a_loss_that_is_changed_in_its_last_place_is_noticed(page):
    text = PAGES[page]
    sign = 1
    for match in losses_on(page, text):
        sign = -sign  # in turn down and up
        step = Decimal(sign).scaleb(-len(match[0].partition(".")[2]))
        changed = abs(Decimal(match[0]) + step)
        copy = f"{text[: match.start()]}{changed:f}{text[match.end() :]}"
        assert problems(page, copy), match[0]


@pytest.mark.parametrize("page", [*WITH_FIGURES, "docs/glossary.md", "lab/bench.py"])
def test_a_loss_that_is_made_up_is_noticed(page):
    made_up = [
        "It ends at 1.2345.",
        "| model | loss |\n|---|---:|\n| v0 | 0.1234 |",
        "```text\nstep 50: train loss 1.2345, val loss 2.50\n```",
    ]
    known = [f"It ends at {match[0]}, too." for match in losses_on(page, PAGES[page])]
    for addition in [*made_up, *known[:1]]:
        assert problems(page, f"{PAGES[page]}\n\n{addition}\n"), addition


def test_exceptions_are_on_their_pages_and_needed():
    for page, fragments in EXCEPTIONS.items():
        for fragment in fragments:
            assert len(re.findall(pattern_of(fragment), PAGES[page])) == 1, fragment
            assert any(float(number) >= SMALLEST for number in PLACES.findall(fragment)), fragment
    heads = {cell.strip() for text in PAGES.values() for cell in re.findall(r"[^|\n]+", text)}
    assert COLUMNS.keys() <= heads


def test_what_counts_as_a_loss():
    text = """
    # Loss 1.50
    It ends at 1.51 (1.52, 1.53 to 1.54), after `--minutes 3.85`, 1.55 minutes and 1.56
    seconds, with 1.57 GB and 1.58%, a rate of 0.02, 2e-3, v1.59, 1.2.3 and [Paper](1706.03762).
    Python 3.11 says 4,321.50 and 1,234.

    | model | loss | times v5 | memory |
    |---|---:|---:|---:|
    | `v1.60` | 0.0005 (1.61) | 25.92 | 1.62 GB |

    ```text
    step 0: train loss 1.63, 1.64 seconds
    ```
    """.replace("\n    ", "\n")
    found = [match[0] for match in losses_on("README.md", text)]
    assert found == ["1.50", "1.51", "1.52", "1.53", "1.54", "0.0005", "1.61", "1.63"]


# ---- the file


def test_pages_state_what_came_out():
    for entry in ENTRIES:
        for page, figures in entry["pages"].items():
            assert figures
            assert set(figures.split()) <= may_state(entry), (entry["what"], page)


def test_a_page_may_round_and_average():
    entry = {"seeds": [1, 2], "results": {"loss": {"1": Decimal("1.605"), "2": Decimal("1.6")}}}
    figures = may_state(entry)
    assert {"1.605", "1.61", "1.60", "1.600", "1.6025", "1.602", "1.603"} <= figures
    assert not {"1.59", "1.62", "1.604", "1.606"} & figures
    entry = {"seeds": None, "results": {"tokens/s": Decimal("44834")}}
    assert "44,834" in may_state(entry)
    entry = {"seeds": [1], "results": {"loss": {"lowest": Decimal(1), "highest": Decimal(2)}}}
    assert "1.5000" not in may_state(entry)


def test_entries_are_complete():
    machines = re.findall(r"^\| ([A-Z]) \|", PAGES["docs/measurements.md"], re.MULTILINE)
    assert machines
    for entry in ENTRIES:
        assert entry["what"]
        assert entry["command"] is None or entry["command"].startswith(("python ", "torchrun "))
        assert entry["seeds"] is None or entry["seeds"]
        assert entry["machine"] in (None, *machines)
        assert entry["threads"] in (None, 1, 2)
        for commit in (entry["commit"], entry["page_commit"]):
            assert commit is None or re.fullmatch(r"[0-9a-f]{7,40}", commit)
        assert entry["results"]
        assert entry["pages"]
    runs = [(entry["what"], entry["machine"]) for entry in ENTRIES]
    assert len(set(runs)) == len(runs), "two entries for the same run"


def test_entries_are_sorted_by_the_page_that_they_name_first():
    order = list(dict.fromkeys(next(iter(entry["pages"])) for entry in ENTRIES))
    homes = [next(iter(entry["pages"])) for entry in ENTRIES]
    assert homes == sorted(homes, key=order.index)


def has(page: str, figure: str, script: str) -> bool:
    """Whether the page takes the figure from a run that names the script."""
    name = re.compile(rf"\b{script.partition('_')[0]}(_|\b)")
    for entry in ENTRIES:
        if figure in entry["pages"].get(page, "").split() and name.search(entry["what"]):
            return True
    return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_and_the_lesson_have_the_losses_of_the_right_script(script):
    row = rf"^\| \[{script}\.py\].* ([\d.]+|–)(?: \([\d.]+\))? \| [\d.]+ \|$"
    [loss] = re.findall(row, PAGES["README.md"], re.M)
    assert loss == "–" or has("README.md", loss, script)
    page = path_of(script).as_posix()
    lesson = " ".join(PAGES[page].split())
    for loss in re.findall(r"Expect: (?:a validation loss of about )?(\d\.\d+)", lesson):
        assert has(page, loss, script)
    for other, loss in re.findall(r"(\w+)\.py reaches (\d\.\d+)", lesson):
        assert other in PARENTS
        assert has(page, loss, other)


# ---- the program


def test_the_program_prints_all_entries_or_those_of_a_page(capsys):
    results.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(ENTRIES)
    results.main(["v5_gpt.py"])
    lines = capsys.readouterr().out.splitlines()
    own = [entry for entry in ENTRIES if "v5_gpt.py" in entry["pages"]]
    assert len(lines) == 1 + len(own)
    assert lines[0].split()[:4] == ["machine", "threads", "seeds", "commit"]
    assert all(entry["what"] in line for entry, line in zip(own, lines[1:], strict=True))


def test_a_table_has_the_digits_of_the_file():
    entry = dict.fromkeys(results.FIELDS) | {"what": "v0", "seeds": [1, 2], "pages": {}}
    entry["results"] = {"tokens/s": Decimal("44834"), "loss": {"1": Decimal("1.50")}}
    [_, row] = results.table([entry]).splitlines()
    assert row.split(maxsplit=5) == ["–", "–", "1", "2", "–", "v0: tokens/s 44,834; loss 1: 1.50"]
    entry |= {"machine": "A", "threads": 2, "page_commit": "abcdef0"}
    [_, row] = results.table([entry]).splitlines()
    assert row.split()[:5] == ["A", "2", "1", "2", "(abcdef0)"]
    entry |= {"commit": "0123456"}
    assert " 0123456 " in results.table([entry])


def test_mistakes_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        results.main(["docs/nothing.md"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: docs/nothing.md: ")
    path = tmp_path / "results.json"
    path.write_text('[\n{"what": }\n]', encoding="utf-8")
    assert refused_input(load_results, path).startswith("results.json, line 2: ")
    path.write_text('{"what": "v0"}', encoding="utf-8")
    assert refused_input(load_results, path) == "results.json: must be a list of entries"
    path.write_text('[{"what": "v0"}]', encoding="utf-8")
    assert refused_input(load_results, path).startswith("results.json, entry 1: must have ")
    with pytest.raises(SystemExit) as stop:
        results.main(["--help"])
    assert stop.value.code == 0
    assert "docs/results.json" in capsys.readouterr().out
