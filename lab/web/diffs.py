"""diffs.py: the difference between two scripts as HTML, side by side, with changed words marked.

The markup is one grid with two columns. On a narrow screen, the style sheet makes one column of it:
first the removed lines of a change, then the added ones.
"""

import ast
import difflib
import html
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the scripts are up there

from pygments.lexers import PythonLexer
from pygments.token import Token

from lab.ladder import source, split_docstring

CONTEXT = 3  # unchanged lines shown above and below a change
SIMILAR = 0.5  # lines at least this similar (0 to 1) are shown as one changed line
# Numbers such as 1e-3, words, spaces, and single other characters.
WORD = re.compile(r"\d[\w.]*e-\d+|\d[\w.]*|\w+|\s+|[^\w\s]")

# The class in the style sheet for each kind of token; the first that fits counts.
CLASSES = [
    (Token.Comment, "c"),
    (Token.Literal.String, "s"),
    (Token.Literal.Number, "n"),
    (Token.Keyword, "k"),
    (Token.Operator.Word, "k"),
    (Token.Name.Function, "f"),
    (Token.Name.Class, "f"),
    (Token.Name.Builtin, "b"),
    (Token.Name.Decorator, "b"),
]


@dataclass
class Line:
    """A line of a script: its number in the file, its text, and its highlighting.

    pieces: (class in the style sheet or "", text), which together are the text.
    """

    number: int
    text: str
    pieces: list[tuple[str, str]]


def class_of(kind: tuple) -> str:
    """The class in the style sheet for Pygments' kind of a token, or "" for plain text."""
    for known, name in CLASSES:
        if kind in known:
            return name
    return ""


def code_lines(script: str, text: str) -> list[Line]:
    """The lines of a script below its docstring, highlighted; text: that of its file."""
    docstring, code = split_docstring(script, text)
    first = docstring.count("\n") + 1
    lines = [Line(first, "", [])]
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(code):
        for i, part in enumerate(value.split("\n")):
            if i > 0:
                lines.append(Line(first + len(lines), "", []))
            if part:
                lines[-1].text += part
                lines[-1].pieces.append((class_of(kind), part))
    if not lines[-1].text:  # after the last newline
        lines.pop()
    return lines


def render(line: Line, marks: list[tuple[int, int]], tag: str) -> str:
    """A line in HTML, with the parts from begin to end in marks inside the element tag."""
    edges = sorted({edge for mark in marks for edge in mark})
    result, position = [], 0
    for name, text in line.pieces:
        cuts = [edge - position for edge in edges if 0 < edge - position < len(text)]
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            escaped = html.escape(text[begin:end], quote=False)
            if name:
                escaped = f'<span class="{name}">{escaped}</span>'
            start = position + begin
            if any(first <= start < last for first, last in marks):
                escaped = f"<{tag}>{escaped}</{tag}>"
            result.append(escaped)
        position += len(text)
    return "".join(result).replace(f"</{tag}><{tag}>", "")


def changed_words(old: str, new: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the words that two lines don't share begin and end, in each of them."""
    old_words, new_words = WORD.findall(old), WORD.findall(new)
    matcher = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False)
    old_marks, new_marks = [], []
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            continue
        if i1 < i2:
            old_marks.append((len("".join(old_words[:i1])), len("".join(old_words[:i2]))))
        if j1 < j2:
            new_marks.append((len("".join(new_words[:j1])), len("".join(new_words[:j2]))))
    return old_marks, new_marks


def similarity(old: str, new: str) -> float:
    """How similar two lines are, 0 to 1, apart from their indentation."""
    old_words, new_words = WORD.findall(old.strip()), WORD.findall(new.strip())
    matcher = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False)
    if matcher.quick_ratio() < SIMILAR:  # an upper bound, and much faster
        return 0.0
    return matcher.ratio()


def pair_lines(old: list[Line], new: list[Line]) -> list[tuple[Line | None, Line | None]]:
    """Put old and new lines of a change side by side, similar ones next to each other.

    Of all the ways that keep the order, this takes the one with the largest sum of similarities.
    """
    # best[i][j] is that sum for the lines old[i:] and new[j:].
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]
    scores = {}
    for i in reversed(range(len(old))):
        for j in reversed(range(len(new))):
            score = similarity(old[i].text, new[j].text)
            if score < SIMILAR:
                score = 0.0
            scores[i, j] = score
            best[i][j] = max(best[i + 1][j], best[i][j + 1], score + best[i + 1][j + 1])
    pairs = []
    i, j = 0, 0
    while i < len(old) or j < len(new):
        both_left = i < len(old) and j < len(new)
        if both_left and scores[i, j] > 0 and best[i][j] == scores[i, j] + best[i + 1][j + 1]:
            pairs.append((old[i], new[j]))
            i, j = i + 1, j + 1
        elif i < len(old) and (j == len(new) or best[i][j] == best[i + 1][j]):
            pairs.append((old[i], None))
            i += 1
        else:
            pairs.append((None, new[j]))
            j += 1
    return close_gaps(pairs)


def close_gaps(
    pairs: list[tuple[Line | None, Line | None]],
) -> list[tuple[Line | None, Line | None]]:
    """Move lines that have no partner next to each other where that saves rows."""
    closed = []
    old_alone, new_alone = [], []
    for old, new in [*pairs, (Line(0, "", []), Line(0, "", []))]:  # the last is only an end mark
        if new is None:
            old_alone.append(old)
        elif old is None:
            new_alone.append(new)
        else:
            for k in range(max(len(old_alone), len(new_alone))):
                left = old_alone[k] if k < len(old_alone) else None
                right = new_alone[k] if k < len(new_alone) else None
                closed.append((left, right))
            old_alone, new_alone = [], []
            closed.append((old, new))
    return closed[:-1]


def cell(line: Line | None, side: str, code: str) -> str:
    """One cell of the grid: the line's number and its code; side: its classes."""
    if line is None:
        return f'<div class="{side} gap"></div>'
    return f'<div class="{side}"><i>{line.number}</i>{code}</div>'


def change(old: list[Line], new: list[Line]) -> str:
    """The HTML of lines that were replaced by others, or removed or added."""
    cells = []
    for left, right in pair_lines(old, new):
        left_marks, right_marks = [], []
        both = left is not None and right is not None
        if both and similarity(left.text, right.text) >= SIMILAR:
            left_marks, right_marks = changed_words(left.text, right.text)
        left_code = render(left, left_marks, "del") if left is not None else ""
        right_code = render(right, right_marks, "ins") if right is not None else ""
        cells.append(cell(left, "o", left_code) + cell(right, "w", right_code))
    return '<div class="hunk">' + "\n".join(cells) + "</div>"


def unchanged(old: list[Line], new: list[Line]) -> str:
    """The HTML of lines that are the same in both scripts."""
    cells = []
    for left, right in zip(old, new, strict=True):
        code = render(right, [], "ins")
        cells.append(cell(left, "e o", code) + cell(right, "e", code))
    return '<div class="hunk">' + "\n".join(cells) + "</div>"


def folded(lines: list[Line], place: str) -> str:
    """The HTML of a long unchanged stretch, folded; place: where in the script it ends."""
    code = "\n".join(html.escape(line.text, quote=False) for line in lines)
    where = f", up to <code>{html.escape(place)}</code>" if place else ""
    summary = f"{len(lines)} unchanged lines{where}"
    return f"<details><summary>{summary}</summary><pre>{code}</pre></details>"


def places(text: str) -> dict[int, str]:
    """For each line number inside a function or class, its name, such as "Head.forward"."""
    names = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                for number in range(child.lineno, child.end_lineno + 1):
                    names[number] = prefix + child.name
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(text), "")
    return names


def side_by_side(parent: str, child: str) -> str:
    """The diff from a script to another one in HTML, module docstrings left out."""
    return diff_of(parent, source(parent), child, source(child))


def diff_of(parent: str, old_text: str, child: str, new_text: str) -> str:
    """The diff between two texts of scripts in HTML; parent and child name them in messages."""
    old, new = code_lines(parent, old_text), code_lines(child, new_text)
    names = places(new_text)
    # The same matcher as in lab/ladder.py, so that the diff has as many lines as it counts.
    matcher = difflib.SequenceMatcher(
        None, [line.text for line in old], [line.text for line in new]
    )
    parts = []
    opcodes = matcher.get_opcodes()
    for n, (kind, i1, i2, j1, j2) in enumerate(opcodes):
        if kind != "equal":
            parts.append(change(old[i1:i2], new[j1:j2]))
            continue
        above = CONTEXT if n > 0 else 0
        below = CONTEXT if n < len(opcodes) - 1 else 0
        n_folded = j2 - j1 - above - below
        if n_folded < 3:  # the line that says what is folded takes about as much space
            parts.append(unchanged(old[i1:i2], new[j1:j2]))
            continue
        if above > 0:
            parts.append(unchanged(old[i1 : i1 + above], new[j1 : j1 + above]))
        place = names.get(new[j2 - below].number, "") if below > 0 else ""
        parts.append(folded(new[j1 + above : j2 - below], place))
        if below > 0:
            parts.append(unchanged(old[i2 - below : i2], new[j2 - below : j2]))
    return '<div class="diff">' + "\n".join(parts) + "</div>"


def listing(script: str) -> str:
    """The code of a whole script in HTML, without its docstring."""
    lines = code_lines(script, source(script))
    cells = [cell(line, "e", render(line, [], "ins")) for line in lines]
    return '<div class="diff whole"><div class="hunk">' + "\n".join(cells) + "</div></div>"
