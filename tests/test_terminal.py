"""support/terminal.py: the prompt from a file, and text piece by piece, up to a stop."""

import io
import itertools
import os
import random
import sys
from dataclasses import dataclass

import pytest
import tiktoken
import torch
from conftest import TEXT, refused_input
from test_v11b_tokenizer import MAKERS, STORY

import data
from part4_gpt2.v8a_byte_pairs import BytePairTokenizer
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


class Decoder:
    """A tokenizer that notes how many tokens it is given at a time."""

    def __init__(self, tokenizer, end_of_text=()):
        self.decode_all = tokenizer.decode
        self.end_of_text = end_of_text
        self.lengths = []

    def decode(self, tokens):
        self.lengths.append(len(tokens))
        return self.decode_all(tokens)


def one_by_one(ids):
    """Token ids as LanguageModel.stream yields them."""
    return (torch.tensor([[token]]) for token in ids)


def stream(tokenizer, ids, prompt=(), end_of_text=()):
    """The pieces of text that decode_stream makes of token ids."""
    decoder = Decoder(tokenizer, end_of_text)
    return list(terminal.decode_stream(one_by_one(ids), decoder, list(prompt)))


def growing(tokenizer, ids):
    """The text that has been shown after each of the token ids, and how many were decoded for it.

    At the end comes all of the text.
    """
    decoder = Decoder(tokenizer)
    shown, texts, lengths = "", [], []

    def take():
        for i, token in enumerate(one_by_one(ids)):
            if i > 0:
                texts.append(shown)
                lengths.append(sum(decoder.lengths))
            decoder.lengths.clear()
            yield token

    for piece in terminal.decode_stream(take(), decoder, []):
        shown += piece
    return [*texts, shown], lengths


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2's own encoding."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs GPT-2's files")
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def single_bytes():
    """An encoding of tiktoken whose tokens are the 256 bytes."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    """A tokenizer of each kind that released models have."""
    return MAKERS[request.param]()


# Bytes that begin characters of one to four bytes, others that go on, and some that do neither.
BYTES = [*b"a \n\xc3\xa9\xe4\xb8\x96\xe0\xf0\x9f\x99\x82\xed\xa0\xc0\xff\xef\xbf\xbd"]


def test_any_bytes_stream_as_they_are_decoded_at_once(single_bytes):
    """Whether they are characters or not, and wherever the prompt ends."""
    draw = random.Random(1)
    for length in list(range(41)) * 15:
        ids = draw.choices(BYTES, k=length)
        n = draw.randrange(length + 1)
        while single_bytes.decode(ids[:n]).endswith("\ufffd"):
            n -= 1
        expected = single_bytes.decode(ids)
        begin = single_bytes.decode(ids[:n])
        assert begin + "".join(stream(single_bytes, ids[n:], ids[:n])) == expected, ids
        assert "".join(stream(single_bytes, ids)) == expected, ids


def test_any_tokens_of_gpt2_stream_as_they_are_decoded_at_once(gpt2):
    draw = random.Random(1)
    parts = [gpt2.encode_single_token(bytes([byte])) for byte in BYTES]
    parts += gpt2.encode(STORY)
    for length in (1, 2, 5, 10, 30, 200) * 10:
        ids = draw.choices(parts, k=length)
        assert "".join(stream(gpt2, ids)) == gpt2.decode(ids), ids


def test_characters_of_several_tokens_are_shown_whole(single_bytes):
    """Each as soon as its last byte is there, and never half of one."""
    texts, _ = growing(single_bytes, "é世🙂".encode())
    assert texts == ["", *["é"] * 3, *["é世"] * 4, "é世🙂"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hens 🙂".encode()[:-1], "hens \ufffd"),
        ("hens 世".encode()[:-2], "hens \ufffd"),
        (b"hens \xff\xff", "hens \ufffd\ufffd"),
        ("hens \ufffd".encode(), "hens \ufffd"),
        ("\ufffd\ufffd\ufffd\ufffd\ufffd".encode(), "\ufffd" * 5),
    ],
)
def test_the_end_of_a_text_may_be_no_character(single_bytes, content, expected):
    assert "".join(stream(single_bytes, content)) == expected


def test_bytes_that_are_no_characters_appear_while_they_come(single_bytes):
    """Only a few are held back, because they might be the start of a character."""
    texts, _ = growing(single_bytes, b"\xff" * 100)
    assert all(n - 8 < len(text) <= n for n, text in enumerate(texts, 1))
    assert texts[-1] == "\ufffd" * 100


@pytest.mark.parametrize("content", ["the fox 🙂 世界 ", "🙂", "\ufffd", "世a"])
def test_each_token_is_decoded_with_few_others(single_bytes, content):
    """The time for a text is linear in its length."""
    _, lengths = growing(single_bytes, content.encode() * 60)
    assert max(lengths) < 50


def test_bytes_that_are_no_characters_are_decoded_with_few_others_too(single_bytes):
    _, lengths = growing(single_bytes, b"\xff" * 300)
    assert max(lengths) < 100


def test_a_long_prompt_is_decoded_only_at_the_beginning(single_bytes):
    decoder = Decoder(single_bytes)
    prompt = list(b"fox " * 99)
    list(terminal.decode_stream(one_by_one(b" and hens"), decoder, prompt))
    assert sum(n >= len(prompt) for n in decoder.lengths) == 2
    assert sum(decoder.lengths) < 3 * len(prompt)


def test_streamed_text_is_the_text_decoded_at_once(tokenizer):
    """Of each kind of tokenizer, and wherever the prompt ends."""
    ids = tokenizer.encode(STORY).ids
    assert len(ids) > len(STORY), "some characters have several tokens"
    for n in range(len(ids) + 1):
        prompt = tokenizer.decode(ids[:n])
        if prompt.endswith("\ufffd"):
            continue
        assert prompt + "".join(stream(tokenizer, ids[n:], ids[:n])) == STORY


@pytest.mark.parametrize("text", ["世界", "🙂🙃🙂", "éé世🙂", "a🙂🙂a  🙂", "  fox", " fox hens "])
def test_characters_of_several_tokens_may_follow_one_another(tokenizer, text):
    ids = tokenizer.encode(text).ids
    texts, _ = growing(tokenizer, ids)
    expected = tokenizer.decode(ids)
    assert expected.strip() == text.strip(), "some drop a space of the text itself"
    assert texts[-1] == expected
    assert all(expected.startswith(shown) for shown in texts)


def test_text_appears_as_soon_as_its_characters_are_complete(tokenizer):
    prompt, ids = tokenizer.encode("The").ids, tokenizer.encode("The fox 🙂!").ids
    ids = ids[len(prompt) :]
    n_taken, shown = 0, ""

    def take():
        nonlocal n_taken
        for token in one_by_one(ids):
            n_taken += 1
            yield token

    for piece in terminal.decode_stream(take(), Decoder(tokenizer), prompt):
        shown += piece
        decoded = tokenizer.decode(prompt + ids[:n_taken])
        assert "The" + shown == decoded.rstrip("\ufffd")
    assert shown == " fox 🙂!"


def test_a_special_token_has_no_text_and_takes_none_away(tokenizer):
    """Not even the space after it, which a text loses at its beginning."""
    names = ("<|end|>", "</s>")
    (special,) = {tokenizer.token_to_id(name) for name in names} - {None}
    ids = tokenizer.encode("the fox jumps").ids
    for n in range(1, len(ids)):
        for i in (0, 1, 2):
            with_special = [*ids[:n], *[special] * i, *ids[n:]]
            assert tokenizer.decode(with_special) == "the fox jumps"
            assert "".join(stream(tokenizer, with_special)) == "the fox jumps"


@pytest.mark.parametrize("end_of_text", [[7], (7, 9), [9, 7]])
def test_a_stream_ends_at_a_token_that_ends_a_text(single_bytes, end_of_text):
    """Its own text isn't shown, and no more tokens are taken."""
    tokens = one_by_one(b"hens\xf0\x07 and \x09")
    decoder = Decoder(single_bytes, end_of_text)
    text = "".join(terminal.decode_stream(tokens, decoder, [7, 9]))
    assert text == "hens\ufffd"
    assert bytes(token.item() for token in tokens) == b" and \x09"


def test_without_such_a_token_it_ends_with_the_last(single_bytes):
    assert "".join(stream(single_bytes, b"hens\x07fox", end_of_text=[8])) == "hens\x07fox"
    assert "".join(stream(single_bytes, b"hens\x07fox")) == "hens\x07fox"


# ---- stops


def test_without_a_stop_each_piece_is_shown_at_once():
    pieces = iter("abc")
    text = terminal.end_before("", pieces)
    assert next(text) == "a"
    assert list(pieces) == ["b", "c"], "those after the first are not asked for"
    assert "".join(terminal.end_before("", iter("one two"))) == "one two"


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
    """However many characters a piece has; what was shown is never taken back."""
    for n in (1, 2, 3, len(text) + 1):
        pieces = (text[i : i + n] for i in range(0, len(text), n))
        assert "".join(terminal.end_before(stop, pieces)) == expected


def test_a_stop_may_lie_inside_a_piece_or_across_two():
    pieces = ["one. ", "two; th", "ree"]
    for stop, expected in (("; t", "one. two"), ("thr", "one. two; "), ("or", "one. two; three")):
        assert "".join(terminal.end_before(stop, iter(pieces))) == expected


def test_only_what_may_be_the_start_of_the_stop_is_held_back():
    pieces = terminal.end_before("stop", iter("x" * 20))
    shown = itertools.accumulate(len(piece) for piece in pieces)
    assert list(shown) == [max(0, n - 3) for n in range(1, 21)] + [20]


@pytest.mark.parametrize("stop", ["🙂", "va?", "?”\n\n  🙂 世", " 12345", "said:  “Ça va?”"])
def test_no_token_is_asked_for_after_the_stop(tokenizer, stop):
    """Also if the stop is in several tokens, or in the midst of one."""
    prompt, ids = tokenizer.encode("Zoë").ids, tokenizer.encode(STORY).ids
    tokens = one_by_one(ids[len(prompt) :])
    pieces = terminal.decode_stream(tokens, Decoder(tokenizer), prompt)
    text = "".join(terminal.end_before(stop, pieces))
    assert "Zoë" + text == STORY[: STORY.index(stop)]
    n_left = len(list(tokens))
    assert tokenizer.decode(ids[: len(ids) - n_left]).endswith(stop)


# ---- printing


class Words:
    """A tokenizer whose tokens are the given strings; the last ends a text."""

    def __init__(self, words):
        self.words = words
        self.end_of_text = [len(words) - 1]

    def encode(self, text):
        return [self.words.index(text)]

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)


class Screen(io.StringIO):
    """A standard output whose text can be seen once it is flushed."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def test_each_piece_is_shown_before_the_next_token_is_asked_for(monkeypatch):
    screen, shown = Screen(), []

    def tokens():
        for i in range(1, 4):
            shown.append(screen.seen)
            yield torch.tensor([[i]])

    words = Words(["So ", "one, ", "two, ", "three", "<end>"])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        terminal.print_text("So ", tokens(), words, "")
    assert shown == ["So ", "So one, ", "So one, two, "]
    assert screen.getvalue() == "So one, two, three\n"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (", t", "two, one\n"), ("o", "two, \n"), ("four", "two, one, three\n"),
        ("e, thre", "two, on\n"),
    ],
)
def test_the_printed_text_ends_before_the_stop(capsys, stop, expected):
    """A stop in the prompt doesn't count. A newline ends the text either way."""
    words = Words(["two, ", "one, ", "three", "<end>"])
    terminal.print_text("two, ", one_by_one([1, 2]), words, stop)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("stop", ["", "one, four"])
def test_the_printed_text_ends_where_the_model_ends_it(capsys, stop):
    """What was held back, because it might be the start of the stop, is shown."""
    words = Words(["two, ", "one, ", "three", "<end>"])
    tokens = one_by_one([1, 3, 2])
    terminal.print_text("two, ", tokens, words, stop)
    assert capsys.readouterr().out == "two, one, \n"
    assert next(tokens).item() == 2


def test_the_text_after_a_prompt_goes_on_with_it(capsys):
    """A tokenizer like Llama 2's drops a space only at the beginning of the whole text."""
    tokenizer = MAKERS["sentencepiece"]()
    decoder = Decoder(tokenizer)
    decoder.encode = lambda text: tokenizer.encode(text).ids
    n_prompt = len(decoder.encode("the fox"))
    tokens = one_by_one(decoder.encode("the fox jumps")[n_prompt:])
    terminal.print_text("the fox", tokens, decoder, "")
    assert capsys.readouterr().out == "the fox jumps\n"


def test_a_prompt_without_tokens_is_printed_alone(capsys):
    terminal.print_text("The", iter([]), TOKENIZER, "fox")
    assert capsys.readouterr().out == "The\n"


# ---- pairs of tokens


@pytest.mark.parametrize(("encoding", "arrow"), [("utf-8", "→"), ("cp1252", "->"), ("ascii", "->")])
def test_pairs_can_be_printed_on_any_console(monkeypatch, encoding, arrow):
    tokenizer = BytePairTokenizer([(116, 104), (256, 101)])
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding, errors="strict"))
    terminal.print_pairs([(116, 104), (256, 101)], tokenizer)
    sys.stderr.flush()
    lines = written.getvalue().decode(encoding).splitlines()
    assert lines == [f"'t' + 'h' {arrow} 'th'", f"'th' + 'e' {arrow} 'the'"]
