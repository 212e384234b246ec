"""v8a_byte_pairs.py: byte pairs learned and applied by hand, as the libraries do."""

import math
import random
import re

import pytest
import regex
import tiktoken
import torch
from conftest import TEXT, refused, tiny_flags
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import data
from part4_gpt2 import v8a_byte_pairs as v8a

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def python_text(n: int) -> str:
    return data.load_text("python")[:n]


def learned_slowly(text: str, vocab_size: int) -> list[tuple[int, int]]:
    """The same by the definition: count all pairs again for each new token."""
    words = [list(word.encode("utf-8")) for word in v8a.WORD.findall(text)]
    merges = []
    for new_id in range(256, vocab_size):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [v8a.merge(word, best, new_id) for word in words]
    return merges


# ---- learning


@pytest.mark.parametrize("text", [TEXT, "aaaa aaa aa", "Grüße, 世界! 🙂🙂", python_text(3000)])
def test_the_most_frequent_pair_is_merged_next(text):
    assert v8a.learn_merges(text, 330) == learned_slowly(text, 330)


def test_learning_ends_when_each_word_is_a_token():
    merges = v8a.learn_merges("the the the", 500)
    tokenizer = v8a.BytePairTokenizer(merges)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("the the")] == ["the", " the"]
    assert 256 < tokenizer.n_vocab < 270
    assert v8a.learn_merges("", 500) == []


def test_merging_goes_from_left_to_right():
    assert v8a.merge([1, 1, 1], (1, 1), 9) == [9, 1]
    assert v8a.merge([1, 2, 1, 2, 2, 1], (1, 2), 9) == [9, 9, 2, 1]
    assert v8a.merge([], (1, 2), 9) == []


def test_merges_are_those_of_the_library_in_order():
    """It takes bytes as the characters with these numbers, and gives ids in that order."""
    text = python_text(200_000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(v8a.WORD.pattern), "isolated")
    alphabet = [chr(i) for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    ids = tokenizer.get_vocab()
    assert [ids[character] for character in alphabet] == list(range(256))
    ours = v8a.BytePairTokenizer(v8a.learn_merges(text, 700))
    theirs = {i: token.encode("latin-1") for token, i in ids.items()}
    assert ours.tokens == [theirs[i] for i in range(700)]
    sample = python_text(220_000)[200_000:]
    assert ours.encode(sample) == tokenizer.encode(sample).ids


# ---- applying


def gpt2_encoding() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network
        pytest.skip(f"GPT-2's tokens aren't here ({error})")


def merges_of(encoding: tiktoken.Encoding) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """The merges behind an encoding, in our numbers, and what our numbers are called there.

    A token is made of the two tokens that merging with all earlier ones leaves of it.
    """
    ranks = encoding._mergeable_ranks
    our_ids = {bytes([i]): i for i in range(256)}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
            i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], math.inf))
            assert ranks[pairs[i]] < rank
            parts[i : i + 2] = [pairs[i]]
        merges.append((our_ids[parts[0]], our_ids[parts[1]]))
        our_ids[token] = 256 + len(merges) - 1
    return merges, {our_id: ranks[token] for token, our_id in our_ids.items()}


def test_with_its_merges_the_ids_are_those_of_gpt2(monkeypatch):
    encoding = gpt2_encoding()
    merges, names = merges_of(encoding)
    assert len(merges) == 50_000
    monkeypatch.setattr(v8a, "WORD", regex.compile(GPT2_WORDS))
    tokenizer = v8a.BytePairTokenizer(merges)
    lines = data.load_text("python").splitlines()[:9_990]
    lines += ["Grüße, 世界!", "🙂🙂 don't we'll", " \t\n  x ", "", "１２３ ½ ⅷ", "ﬁ é é"]
    for line in lines:
        ids = [names[i] for i in tokenizer.encode(line)]
        assert ids == encoding.encode_ordinary(line), line


@pytest.mark.parametrize(
    "text", ["", " ", "a  b\n\n c", "Grüße, 世界! 🙂🏽\u200d", "\0\ufffd\x7f", TEXT]
)
def test_any_text_comes_back(text):
    tokenizer = v8a.BytePairTokenizer(v8a.learn_merges(TEXT, 300))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.n_vocab for i in ids)


def test_random_text_comes_back():
    random.seed(1)
    tokenizer = v8a.BytePairTokenizer(v8a.learn_merges(python_text(20_000), 400))
    possible = [*range(1, 0xD800), *range(0xE000, 0x11000)]  # without halves of characters
    for _ in range(300):
        text = "".join(chr(number) for number in random.choices(possible, k=20))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_part_of_a_character_is_shown_as_such():
    tokenizer = v8a.BytePairTokenizer([])
    assert tokenizer.decode(list("é".encode())[:1]) == "\ufffd"


# ---- runs


@pytest.fixture
def trained(corpus, tmp_path, capsys):
    """The folder of a run, and what it printed."""
    folder = tmp_path / "run"
    v8a.main([*tiny_flags(v8a, out_dir=folder, vocab_size=280), "--data", str(corpus)])
    return folder, capsys.readouterr()


def saved(folder, name="latest.pt"):
    return torch.load(folder / name, weights_only=True)


def test_a_run_shows_the_first_pairs_and_keeps_all_of_them(trained):
    folder, (_, err) = trained
    n_train = len(TEXT) * 9 // 10
    merges = v8a.learn_merges(TEXT[:n_train], 280)
    tokenizer = v8a.BytePairTokenizer(merges)
    shown = re.findall(r"^('.*') \+ ('.*') → ('.*')$", err, flags=re.MULTILINE)
    firsts = [repr(tokenizer.decode([first])) for first, _ in merges[:10]]
    seconds = [repr(tokenizer.decode([second])) for _, second in merges[:10]]
    wholes = [repr(tokenizer.decode([256 + i])) for i in range(10)]
    assert shown == list(zip(firsts, seconds, wholes, strict=True))
    for name in ("latest.pt", "best.pt"):
        assert saved(folder, name)["tokenizer_content"] == {"merges": merges}
        assert saved(folder, name)["tokenizer"] == "bpe"


def test_the_validation_split_is_not_looked_at(tmp_path, trained, capsys):
    folder, _ = trained
    n_train = len(TEXT) * 9 // 10
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:n_train] + "z" * (len(TEXT) - n_train), encoding="utf-8")
    flags = tiny_flags(v8a, out_dir=tmp_path / "other", vocab_size=280)
    v8a.main([*flags, "--data", str(other)])
    assert saved(tmp_path / "other")["tokenizer_content"] == saved(folder)["tokenizer_content"]


def test_the_loss_is_reported_in_bits_per_byte(trained):
    folder, (out, _) = trained
    n_train = len(TEXT) * 9 // 10
    tokenizer = v8a.BytePairTokenizer(saved(folder)["tokenizer_content"]["merges"])
    val_loss = min(loss for _, loss in saved(folder)["history"].values())
    n_tokens, n_bytes = len(tokenizer.encode(TEXT[n_train:])), len(TEXT[n_train:].encode("utf-8"))
    expected = val_loss / math.log(2) * n_tokens / n_bytes
    assert f"validation loss: {expected:.3f} bits per byte\n" in out


def test_a_run_can_be_sampled_from_without_its_text(trained, capsys):
    folder, (out, _) = trained
    v8a.main(["--sample_only", "--out_dir", str(folder)])
    assert out.endswith(capsys.readouterr().out)
    v8a.main(["--sample_only", "--out_dir", str(folder), "--prompt", "Ünder 世"])
    assert capsys.readouterr().out.startswith("Ünder 世")


def test_a_resumed_run_keeps_its_tokens(trained, corpus, capsys):
    folder, _ = trained
    before = saved(folder)["tokenizer_content"]
    v8a.main(["--resume", "--out_dir", str(folder), "--max_iters", "7"])
    assert saved(folder)["step"] == 7
    assert saved(folder)["tokenizer_content"] == before
    line = refused(v8a, capsys, "--resume", "--out_dir", folder, "--vocab_size", "300")
    assert line.startswith("error: --vocab_size 300: the checkpoint has 280, which can't be ")


def test_a_split_that_is_too_short_is_refused(tmp_path, capsys):
    """It has enough characters, but they are fewer tokens."""
    path = tmp_path / "short.txt"
    path.write_text("the " * 40, encoding="utf-8")
    line = refused(v8a, capsys, *tiny_flags(v8a, vocab_size=300), "--data", path)
    assert line.startswith("error: --block_size ")
    assert "use a longer text or less" in line


def test_a_split_that_is_too_short_leaves_no_folder_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("the " * 40, encoding="utf-8")
    flags = tiny_flags(v8a, vocab_size=300, out_dir="")
    refused(v8a, capsys, *flags, "--data", "short.txt")
    assert list((tmp_path / "out").iterdir()) == []
