"""lessons.py: the texts of the page as HTML, from docstrings, Markdown and exercises.md."""

import ast
import base64
import html
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the scripts are up there

from markdown_it import MarkdownIt

from lab.ladder import FOLDERS, ROOT, read, source


def color_diff(code: str, language: str, _: str) -> str:
    """The inside of a code block as HTML, with the added and removed lines of a diff coloured."""
    if language != "diff":
        return ""  # then markdown-it only escapes it
    lines = []
    for line in code.splitlines():
        kind = {"+": "added", "-": "removed"}.get(line[:1], "")
        lines.append(f'<span class="{kind}">{html.escape(line, quote=False)}</span>')
    return "\n".join(lines)


MARKDOWN = MarkdownIt("commonmark", {"highlight": color_diff}).enable("table")
# Words of a docstring that are code: files, flags, calls, and names with an underscore or a dot.
CODE = re.compile(
    r"(?<![\w.])(--?[a-z][\w-]+|[\w/]+\.(?:py|md|json|pt)|\w+\(\)|[a-z]\w*_\w+|[A-Z]\w+\.\w+)"
)
LABEL = re.compile(r"^(New here|Run it|Probe|Expect|Diff|Next): +(.*)$")


@dataclass
class Lesson:
    """A docstring: its title, its paragraphs as HTML, and its labelled lines, such as "Run it"."""

    title: str
    idea: str
    notes: dict[str, str]


def lesson_of(script: str) -> Lesson:
    """The lesson of a script, from its docstring."""
    docstring = ast.get_docstring(ast.parse(source(script)))
    first, _, rest = docstring.partition("\n")
    title = first.partition(": ")[2].rstrip(".")
    body, notes = [], {}
    label = None
    for line in rest.splitlines():
        labelled = LABEL.match(line)
        if labelled:
            label = labelled[1]
            notes[label] = labelled[2]
        elif label and line.startswith(" "):
            notes[label] += "\n" + line.strip()
        else:
            label = None
            body.append(line)
    return Lesson(title, paragraphs("\n".join(body)), notes)


def paragraphs(text: str) -> str:
    """The plain text of a docstring as HTML: paragraphs, lists, and indented code or formulas."""
    result = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if not block.strip():
            continue
        if lines[0].startswith("    "):
            result.append(f"<pre>{html.escape(textwrap.dedent(block), quote=False)}</pre>")
        elif lines[0].startswith("- "):
            items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
            listed = "".join(f"<li>{prose(item)}</li>" for item in items)
            result.append(f"<ul>{listed}</ul>")
        else:
            result.append(f"<p>{prose(block)}</p>")
    return "\n".join(result)


def prose(text: str) -> str:
    """A piece of a docstring as HTML, with names from the code in <code>."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return CODE.sub(r"<code>\1</code>", escaped)


def markdown(text: str) -> str:
    """Markdown as HTML; links to the probes lead to the section of this page."""
    return re.sub(r'href="(\.\./docs/)?probes\.md#', 'href="#probe-', MARKDOWN.render(text))


def points_to_see(script: str, part: int) -> str:
    """What the page of a part says about what to look at in a script, as HTML, or ""."""
    page = page_of(part)
    [_, section] = re.split(rf"^## {script}\.py$", read(page), flags=re.MULTILINE)
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    found = re.search(
        r"^\*\*What to look at[^*]*\*\*(.*?)(?=^\*\*|^```|^\||^#|^!|\Z)", section,
        flags=re.MULTILINE | re.DOTALL,
    )
    return links_from_docs(markdown(found[1].strip()), page.parent) if found else ""


def page_of(part: int) -> Path:
    """The page of a part of the course, in Markdown."""
    return ROOT / "docs" / "part1.md" if part == 1 else ROOT / FOLDERS[part] / "README.md"


def links_from_docs(text: str, folder: Path) -> str:
    """HTML with its links to files, seen from folder, changed so that they work from docs/."""

    def link(match: re.Match) -> str:
        """A link to the same file, seen from docs/."""
        path = os.path.relpath(folder / match[1], ROOT / "docs")
        return f'href="{path.replace(os.sep, "/")}"'

    return re.sub(r'href="(?!#|https?:)([^"]+)"', link, text)


def probes_section() -> str:
    """docs/probes.md as HTML, with its picture inside, its headings one level down, and anchors."""
    text = read(ROOT / "docs" / "probes.md")
    _, _, text = text.partition("\n")  # the page has a heading of its own
    picture = base64.b64encode((ROOT / "docs" / "probes.png").read_bytes()).decode("ascii")
    text = text.replace("(probes.png)", f"(data:image/png;base64,{picture})")
    text = re.sub(r"<!--.*?-->", "", text)

    def heading(match: re.Match) -> str:
        """A heading with the anchor that the links of the other pages name."""
        anchor = match[1].lower().replace(" ", "-")
        return f'<h3 id="probe-{anchor}">{match[1]}</h3>'

    body = re.sub(r"<h2>(.*?)</h2>", heading, markdown(text))
    return re.sub(r"<table>(.*?)</table>", r'<div class="wide"><table>\1</table></div>', body,
                  flags=re.DOTALL)


def exercises() -> tuple[str, dict[int, str]]:
    """The exercises as HTML: what comes before the first part, and those of each part."""
    path = Path(__file__).parent / "exercises.md"
    if not path.exists():
        return "", {}
    first, *parts = re.split(r"^## Part (\d+).*$", read(path), flags=re.MULTILINE)
    by_part = {}
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        items = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
        by_part[int(number)] = "\n".join(exercise(item) for item in items)
    return markdown(re.sub(r"^# .*$", "", first, flags=re.MULTILINE)), by_part


def exercise(text: str) -> str:
    """An exercise as HTML; text: its title, its task, and its answer in a details element."""
    title, _, body = text.partition("\n")
    return f"<h4>{html.escape(title, quote=False)}</h4>{markdown(body)}"
