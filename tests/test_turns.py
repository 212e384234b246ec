"""lab/turns.py: what a turn measures, and the table."""

import re

import pytest
from conftest import refused
from test_v11d_chat import make_folder

from lab import turns


def test_the_table_of_a_conversation(tmp_path, capsys):
    make_folder(tmp_path)
    flags = ["--init_from", str(tmp_path), "--turns", "3", "--rounds", "2"]
    turns.main([*flags, "--max_new_tokens", "4", "--question", "fox"])
    head, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"float32, PyTorch \S+, \d threads: [\d.]+ tokens per second .*", head)
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == ["1", "2", "3"]
    lengths = [int(row[1]) for row in cells]
    assert lengths == sorted(set(lengths))
    assert [int(row[4]) for row in cells] == lengths
    read = [int(row[2]) for row in cells]
    assert read[0] == lengths[0]
    assert max(read[1:]) < lengths[0]


def test_a_turn_is_measured_from_the_message_to_the_token(monkeypatch):
    """On a clock that goes on by two seconds whenever it is read."""
    now = iter(range(0, 100, 2))
    monkeypatch.setattr(turns.time, "process_time", lambda: next(now))

    class Token(int):
        def item(self):
            return int(self)

    class Conversation:
        def __init__(self, tokens):
            self.ids, self.messages, self.tokens = [1, 2], [], tokens

        def answer(self, question):
            next(now)  # what takes time
            self.ids = [1, 2, 3, 4, 5]
            yield from map(Token, self.tokens)

    class Tokenizer:
        decode = staticmethod(str)

    kept, anew = Conversation([7, 8, 9]), Conversation([7])
    turn, seconds = turns.take_turn(kept, anew, Tokenizer, "fox")
    assert turn == turns.Turn(5, 3, 4, 4)
    assert seconds == 2
    assert kept.messages == anew.messages == [{"role": "assistant", "content": "[7, 8, 9]"}]
    with pytest.raises(turns.data.InputError, match="differ"):
        turns.take_turn(kept, Conversation([6]), Tokenizer, "fox")


def test_the_table_has_the_medians():
    rounds = [[turns.Turn(1200, 30, kept, 2 * kept)] for kept in (0.5, 0.25, 2.0)]
    assert turns.table(rounds).splitlines()[-1] == "| 1 | 1,200 | 30 | 0.50 | 1,200 | 1.00 |"


def test_a_model_is_needed(capsys):
    assert refused(turns, capsys).startswith("error: --init_from: name an instruct model")
