"""support/terminal.py: the prompt from a file, and text piece by piece, up to a stop."""

import io
import itertools
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import TEXT, refused_input

import data
from support import terminal

TOKENIZER = data.CharTokenizer(TEXT)


# ---- the prompt


@dataclass
class Config:
    prompt: str = ""
    prompt_file: str = ""
    stop: str = ""


def read_prompt_file(**settings):
    return terminal.read_prompt_file(Config(**settings), TOKENIZER)


def refused_prompt_file(**settings):
    return refused_input(terminal.read_prompt_file, Config(**settings), TOKENIZER)


@pytest.fixture
def prompt_file(tmp_path):
    """A file with a byte order mark and the line endings of Windows."""
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffThe quick\r\nbrown fox".encode())
    return path


def test_without_a_file_the_settings_stay():
    for prompt in ("", "The fox"):
        assert read_prompt_file(prompt=prompt, stop="dog.") == Config(prompt, stop="dog.")


def test_the_text_of_a_file_takes_the_place_of_the_prompt(prompt_file):
    """Only the text stays in the settings, which a checkpoint keeps."""
    for prompt in ("", "dog", "Zoë"):
        cfg = read_prompt_file(prompt=prompt, prompt_file=str(prompt_file), stop="dog.")
        assert cfg == Config("The quick\nbrown fox", stop="dog.")


@pytest.mark.parametrize("name", ["python", "shakespeare"])
def test_the_file_may_have_the_name_of_a_corpus(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("The fox", encoding="utf-8")
    assert read_prompt_file(prompt_file=name) == Config("The fox")


def test_unknown_characters_are_refused_with_the_flag_that_has_them(prompt_file):
    unknown = ": the model's alphabet has no 'Z', 'ë'"
    assert refused_prompt_file(stop="Zoë").startswith(f"--stop{unknown}")
    message = refused_prompt_file(stop="Zoë", prompt_file=str(prompt_file))
    assert message.startswith(f"--stop{unknown}")
    prompt_file.write_text("Zoë", encoding="utf-8")
    message = refused_prompt_file(prompt="The fox", prompt_file=str(prompt_file))
    assert message.startswith(f"--prompt_file{unknown}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"", "empty"), (b"The\0fox", "binary"), (b"\xff", "not UTF-8")],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, reason):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    message = refused_prompt_file(prompt="The fox", prompt_file=str(path))
    assert message.startswith(f"--prompt_file {path}: ")
    assert reason.lower() in message.lower()


# ---- from tokens to text


class Words:
    """A tokenizer whose tokens are the given strings."""

    def __init__(self, words):
        self.words = words

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)


def pieces(words, stop=""):
    """What stream_text yields for tokens that stand for these strings."""
    tokens = (torch.tensor([[i]]) for i in range(len(words)))
    return list(terminal.stream_text(tokens, Words(words), stop))


def test_without_a_stop_each_token_is_shown_at_once():
    tokens = iter([torch.tensor([[i]]) for i in range(3)])
    text = terminal.stream_text(tokens, Words("abc"), "")
    assert next(text) == "a"
    assert len(list(tokens)) == 2, "those after the first are not asked for"
    assert "".join(pieces("one two")) == "one two"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", "\n\n", "one"),
        ("one two", "\n\n", "one two"),
        ("one\n", "\n\n", "one\n"),
        ("aaab", "aab", "a"),
        ("abababc", "ababc", "ab"),
        ("END", "END", ""),
        ("so ENENDX", "END", "so EN"),
        ("one, two, three", ", ", "one"),
        ("one, two", ",", "one"),
        ("x世界y", "世界", "x"),
        ("x", "x" * 50, "x"),
        ("", "stop", ""),
    ],
)
def test_the_text_ends_before_the_stop(text, stop, expected):
    """However many characters a token has; what was shown is never taken back."""
    for n in (1, 2, 3, len(text) + 1):
        words = [text[i : i + n] for i in range(0, len(text), n)]
        assert "".join(pieces(words, stop)) == expected


def test_a_stop_may_lie_inside_a_token_or_across_two():
    words = ["one. ", "two; th", "ree"]
    assert "".join(pieces(words, "; t")) == "one. two"
    assert "".join(pieces(words, "thr")) == "one. two; "
    assert "".join(pieces(words, "other")) == "one. two; three"


def test_only_what_may_be_the_start_of_the_stop_is_held_back():
    shown = itertools.accumulate(len(piece) for piece in pieces("x" * 20, "stop"))
    assert list(shown) == [max(0, n - 3) for n in range(1, 21)] + [20]


def test_no_token_is_asked_for_after_the_stop():
    tokens = iter([torch.tensor([[i]]) for i in range(9)])
    assert "".join(terminal.stream_text(tokens, Words("one; two;"), "; ")) == "one"
    assert next(tokens).item() == 5


# ---- printing


class Screen(io.StringIO):
    """A standard output whose text can be seen once it is flushed."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def test_each_piece_is_shown_before_the_next_token_is_asked_for(monkeypatch):
    screen, shown = Screen(), []

    def tokens():
        for i in range(3):
            shown.append(screen.seen)
            yield torch.tensor([[i]])

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        terminal.print_text("So ", tokens(), Words(["one, ", "two, ", "three"]), "")
    assert shown == ["So ", "So one, ", "So one, two, "]
    assert screen.getvalue() == "So one, two, three\n"


@pytest.mark.parametrize(
    ("stop", "expected"), [(", t", "two, one\n"), ("o", "two, \n"), ("four", "two, one, three\n")]
)
def test_the_printed_text_ends_before_the_stop(capsys, stop, expected):
    """A stop in the prompt doesn't count. A newline ends the text either way."""
    tokens = (torch.tensor([[i]]) for i in range(2))
    terminal.print_text("two, ", tokens, Words(["one, ", "three"]), stop)
    assert capsys.readouterr().out == expected


def test_a_prompt_without_tokens_is_printed_alone(capsys):
    terminal.print_text("The", iter([]), TOKENIZER, "fox")
    assert capsys.readouterr().out == "The\n"
