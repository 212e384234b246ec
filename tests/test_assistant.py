"""lab/assistant.py: v12a with fewer demonstrations, from a base, and with the questions learned."""

import matplotlib.image
import pytest
from conftest import refused, tiny_flags

from lab import assistant
from part5_modern import v9d_gqa
from part8_assistant import v12a_sft

WORDS = " ".join(a + b + c for a in "bcdfg" for b in "aeiou" for c in "klmnp")


@pytest.fixture
def words(tmp_path):
    """A text with words for the test and for training."""
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


def flags_for(words, *more):
    """The flags of tiny runs."""
    flags = tiny_flags(v12a_sft, block_size=40, data=words, warmup_iters=1)
    return [*flags, *(str(flag) for flag in more)]


def rows_of(capsys) -> list[list[str]]:
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_numbers_of_demonstrations_are_compared_and_drawn(words, tmp_path, capsys):
    path = tmp_path / "picture.png"
    more = ["--counts", "20,1000", "--seeds", "1,2", "--picture", path]
    assistant.main(flags_for(words, *more))
    rows = rows_of(capsys)
    assert [row[:2] for row in rows] == [["20", "1"], ["1,000", "1"], ["20", "2"], ["1,000", "2"]]
    assert len({row[3] for row in rows}) == 4
    assert matplotlib.image.imread(path).shape[0] > 300


def test_a_run_is_that_of_the_script(words, capsys):
    v12a_sft.main(flags_for(words, "--seed", "5"))
    out = capsys.readouterr().out
    assistant.main(flags_for(words, "--counts", "40000", "--seeds", "5"))
    [row] = rows_of(capsys)
    assert f"step 3: train loss {row[2]}, val loss {row[3]}" in out


def test_a_base_and_random_weights_start_apart(words, tmp_path, capsys):
    v9d_gqa.main([*tiny_flags(v9d_gqa, out_dir=tmp_path / "base"), "--data", str(words)])
    capsys.readouterr()
    assistant.main(flags_for(words, "--compare", "base", "--base", tmp_path / "base"))
    rows = rows_of(capsys)
    assert [row[0] for row in rows] == ["random weights", "base"]
    assert rows[0][2] != rows[1][2]
    line = refused(assistant, capsys, *flags_for(words, "--compare", "base"))
    assert line.startswith("error: --compare base: needs a run of v9d; ")


def test_learning_the_questions_changes_what_is_learned_and_not_the_measure(words, capsys):
    assistant.main(flags_for(words, "--compare", "loss", "--max_iters", "0"))
    first, second = rows_of(capsys)
    assert first[1:] == second[1:], "before any step, both have the same loss of the answers"
    assistant.main(flags_for(words, "--compare", "loss"))
    first, second = rows_of(capsys)
    assert first[2] != second[2]


@pytest.mark.parametrize("flag", ["--counts", "--seeds"])
def test_lists_that_are_no_numbers_are_refused(words, capsys, flag):
    line = refused(assistant, capsys, *flags_for(words, flag, "1,many"))
    assert line == f"error: {flag} 1,many: not numbers; give some, separated by commas"
