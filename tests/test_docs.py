"""README.md, docs/ and the lessons: commands that parse, links that work, counts that are true."""

import ast
import importlib
import re
import shlex

import pytest
import torch

import data
from lab.ladder import PARENTS, ROOT, SCRIPTS, load, part_of, source, update_counts

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("part*/*.md")])]
DOCS = {path: path.read_text(encoding="utf-8") for path in PAGES}
LESSONS = {script: ast.get_docstring(ast.parse(source(script))) for script in SCRIPTS}
COMMAND = re.compile(r"^.*?\bpython ((?:\w+/)?\w+\.py[^\n`]*)", re.MULTILINE)
COMMANDS = sorted(set(COMMAND.findall("\n".join([*DOCS.values(), *LESSONS.values()]))))
SHORT = dict(re.findall(r"`\$(\w+)` stands for `([^`]+)`", "\n".join(DOCS.values())))
LINK = r"\[(\w+)\.py\]\([\w/]*\1\.py\)"
ROW = re.compile(  # script, parent, idea, changed lines, loss, minutes
    rf"^\| {LINK} \| ([\w–]+) \| ([^|]+) \| ([\d–]+) \| ([\d.]+|–)(?: \([\d.]+\))? \| [\d.]+ \|$",
    re.MULTILINE,
)
COURSE = {}
for script, _, idea, changed, loss in ROW.findall(README):
    COURSE[script] = (idea, changed, None if loss == "–" else float(loss))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_flags_that_exist(command):
    written_out = re.sub(r"\$(\w+)", lambda match: SHORT[match[1]], command.split("#")[0])
    name, *flags = shlex.split(written_out)
    program = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    without_settings = ("lab/ladder.py", "lab/positions.py", "lab/propagate.py", "lab/results.py")
    if name in without_settings or flags == ["--help"]:
        return
    data.read_flags(program.Config, "", ["--device", "cpu", *flags])


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", DOCS[page])
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_and_picture_is_linked():
    linked = set()
    for page, text in DOCS.items():
        for link in re.findall(r"\]\(([^)#]+)", text):
            linked.add((page.parent / link).resolve())
    folders = [ROOT / "docs", *ROOT.glob("part*/")]
    files = {path for folder in folders for path in folder.iterdir() if path.is_file()}
    readmes = {path for path in files if path.name == "README.md"}
    assert files - readmes <= linked
    assert all(path in linked or path.parent in linked for path in readmes)


def test_the_readme_is_for_the_first_five_minutes():
    assert len(README.splitlines()) <= 150


def test_the_course_is_in_one_table():
    assert list(COURSE) == SCRIPTS
    without_loss = [script for script, (*_, loss) in COURSE.items() if loss is None]
    assert without_loss == [script for script in SCRIPTS if part_of(script) == 8]
    for script, parent, *_ in ROW.findall(README):
        assert parent == (PARENTS[script].partition("_")[0] if PARENTS[script] else "–")
    for idea, _, _ in COURSE.values():
        assert len(idea.split()) < 10


def test_the_table_counts_the_lines_of_each_diff():
    assert COURSE["bigram"][1] == "–"
    assert update_counts(README) == README, "run python lab/ladder.py --update"


def test_lessons_name_the_loss_of_the_parent_where_it_falls():
    for script in ("v2_single_head", "v3_multi_head", "v4_feedforward", "v5_gpt", "v6c_recipe"):
        assert f"; {PARENTS[script]}.py reaches " in " ".join(LESSONS[script].split())


def test_the_losses_of_part_1_fall():
    part_1 = SCRIPTS[: SCRIPTS.index("v5_gpt") + 1]
    losses = [COURSE[script][2] for script in part_1]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("script", SCRIPTS[: SCRIPTS.index("v6d_checkpoints") + 1])
def test_lessons_expect_the_losses_of_the_table(script):
    lesson = " ".join(LESSONS[script].split())
    expected = float(re.search(r"Expect: a validation loss of about (\d\.\d+)", lesson)[1])
    assert expected == COURSE[script][2]
    parent = PARENTS[script]
    if parent and f"{parent}.py reaches" in lesson:
        reached = float(re.search(rf"; {parent}\.py reaches (\d\.\d+)\.", lesson)[1])
        assert reached == COURSE[parent][2]


def test_the_lesson_of_v5_has_the_measured_losses():
    """Those of lab/ablation.py, in the table of docs/measurements.md, rounded to two places."""
    page = DOCS[ROOT / "docs" / "measurements.md"]
    cells = re.findall(r"^\| (.+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| .+ \|$", page, re.MULTILINE)
    final = {name: f"{float(loss):.2f}" for name, _, loss in cells}
    first = {name: f"{float(loss):.2f}" for name, loss, _ in cells}
    lesson = " ".join(LESSONS["v5_gpt"].split())
    for sentence in (
        f"v5 ends at a loss of {final['v5']};",
        f"Without them: {final['no residual connections']}.",
        f"Without: {final['no LayerNorm']}.",
        f"near ln(V), at {first['v5']}.",
        f"starts at {first['default initialisation']} but, at this size, ends as low.",
        f"helps: {final['small text with dropout 0.2']} instead of {final['small text']}.",
        f"dropping 20% would give {final['dropout 0.2']}.",
    ):
        assert sentence in lesson
    assert final["default initialisation"] <= final["v5"]


def parameters(script: str, vocab_size: int = 65) -> int:
    """How many parameters a script's model has with the CPU defaults and Shakespeare."""
    module = load(script)
    cfg = data.read_flags(module.Config, "", ["--device", "cpu"])
    with torch.device("meta"):
        return sum(p.numel() for p in module.LanguageModel(cfg, vocab_size).parameters())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_pages_count_the_parameters_of_each_script(script):
    texts = [text for text in DOCS.values() if f"\n## {script}.py\n" in text]
    assert len(texts) == 1, "each script has its section in one page"
    section = texts[0].partition(f"\n## {script}.py\n")[2].partition("\n## ")[0]
    counts = re.findall(r"([\d,]+) parameters;", section)
    vocab_size = 50_257 if part_of(script) == 4 else 65
    if script == "v8a_byte_pairs":
        vocab_size = 1024
    if part_of(script) == 8:
        vocab_size = 65 + 11 + 3  # and the digits but 3, plus, equals, and three special tokens
    assert counts == [f"{parameters(script, vocab_size):,}"]


def test_the_output_in_the_readme_is_that_of_v5():
    assert f"\nmodel: {parameters('v5_gpt'):,} parameters, on cpu\n" in README


def test_headings_are_found_as_github_makes_them():
    assert anchors("# What v5's ideas are\n## A: b, c") == {"what-v5s-ideas-are", "a-b-c"}
