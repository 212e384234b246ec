"""data/tasks.py: questions with answers that can be checked, and no test question in training."""

import random
import re
from types import SimpleNamespace

import pytest
from conftest import refused_input

from data import tasks
from data.conversations import read_conversations

WORDS = [a + b + c for a in "bcdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
TEXT = " ".join(WORDS)


def make(task="words", n=10**6, seed=1):
    if task == "sums":
        return tasks.make_sums(n, seed)
    return tasks.make_words(TEXT, n, seed)


def questions(conversations) -> list[str]:
    return [conversation[0]["content"] for conversation in conversations]


def words_in(conversations) -> set[str]:
    return {question.split()[1] for question in questions(conversations)}


def numbers_in(question: str) -> tuple[int, ...]:
    return tuple(sorted(int(number) for number in question.split("+")))


def test_the_answers():
    assert tasks.spell("king") == "k i n g"
    assert tasks.reverse("king") == "gnik"
    assert tasks.sort("letter") == "eelrtt"
    assert tasks.vowels("juliet") == "uie"
    assert tasks.work_out(347, 586) == "7+6=13 4+8+1=13 3+5+1=9 933"
    assert tasks.work_out(900, 105) == "0+5=5 0+0=0 9+1=10 1005"


def test_every_step_of_a_sum_that_is_worked_out_is_true():
    rng = random.Random(1)
    for _ in range(300):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        *steps, total = tasks.work_out(a, b).split()
        assert int(total) == a + b
        for step in steps:
            left, right = step.split("=")
            assert sum(int(number) for number in left.split("+")) == int(right)
        digits = [step[-1] for step in steps[:-1]] + [steps[-1].split("=")[1][::-1]]
        assert "".join(digits)[::-1] == total


def test_the_words_of_a_text():
    found = tasks.find_words("The KING's brow, my thy; incomprehensible king: 3rd a an Oft")
    assert found == ["brow", "king", "oft", "the"]


@pytest.mark.parametrize("seed", [1, 2])
def test_no_word_of_the_test_is_in_a_demonstration_of_any_task(seed):
    train, test = make(seed=seed)
    other_train, _ = make(seed=3)
    assert len(train) == len(set(questions(train)))
    assert words_in(train) | words_in(test) == set(WORDS)
    for demonstrations in (train, other_train):  # of another run, too
        assert not words_in(demonstrations) & words_in(test)
    assert 0.03 < len(words_in(test)) / len(WORDS) < 0.2
    assert {question.split()[0] for question in questions(test)} == set(tasks.WORD_TASKS)


def test_a_sum_and_its_mirror_image_are_on_the_same_side():
    train, test = make(task="sums", n=3000)
    others, _ = make(task="sums", n=3000, seed=2)
    test_sums = {numbers_in(question) for question in questions(test)}
    assert len(test) == tasks.TEST_QUESTIONS
    assert not test_sums & {numbers_in(question) for question in questions(train + others)}
    rng = random.Random(0)
    pairs = [tasks.draw_sum(rng, for_test=True) for _ in range(200)]
    assert {a < b for a, b in pairs} == {True, False}


def test_half_of_the_sums_are_worked_out():
    train, _ = make(task="sums", n=2000)
    answers = [conversation[1]["content"] for conversation in train]
    share = sum("=" in answer for answer in answers) / len(answers)
    assert 0.45 < share < 0.55
    assert all(tasks.is_right(conversation, conversation[1]["content"]) for conversation in train)


@pytest.mark.parametrize("task", ["words", "sums"])
def test_the_seed_decides(task):
    assert make(task=task, n=50) == make(task=task, n=50)
    assert make(task=task, n=50) != make(task=task, n=50, seed=2)
    assert [len(part) for part in make(task=task, n=50)][0] == 50


def test_all_characters_are_in_the_alphabet():
    for task in ("words", "sums"):
        for part in make(task=task, n=500):
            text = "".join(message["content"] for c in part for message in c)
            assert set(text) <= set(tasks.CHARACTERS)


def test_characters_that_a_file_writes_as_codes_count():
    alphabet = tasks.alphabet("x?", [tasks.ask("\u00e9", "!")])
    assert alphabet == "".join(sorted(set(tasks.CHARACTERS) | set("?\u00e9!")))


def test_the_checker():
    sort, total = tasks.ask("sort king", "gikn"), tasks.ask("347+586", "933")
    assert tasks.is_right(sort, "gikn")
    for wrong in ("", "gikn ", "gink", "the answer is gikn"):
        assert not tasks.is_right(sort, wrong)
    for right in ("933", "7+6=13 4+8+1=13 3+5+1=9 933", "=933"):
        assert tasks.is_right(total, right)
    for wrong in ("", "9333", "933 1", "1933", "no"):
        assert not tasks.is_right(total, wrong)


def test_the_shares_of_right_answers():
    asked = [tasks.ask("sort ba", "ab"), tasks.ask("sort ca", "ac"), tasks.ask("1+2", "3")]
    asked += [tasks.ask("hello", "hi")]
    line = tasks.describe(asked, ["ab", "ca", "3", "hi"])
    assert line == "right answers: sort 50.0%, sums 100.0%, others 100.0%"


def test_answers_are_printed_with_what_is_wrong(capsys):
    asked = tasks.pick([tasks.ask("sort ba", "ab"), tasks.ask("sort ca", "ac")], "")
    tasks.print_answers(asked, ["ab", "ca"])
    assert capsys.readouterr().out == (
        "user: sort ba\nassistant: ab\nuser: sort ca\nassistant: ca  (wrong: it is ac)\n"
    )
    tasks.print_answers(tasks.pick(asked, "who are you"), ["a"])
    assert capsys.readouterr().out == "user: who are you\nassistant: a\n"


def test_some_of_each_task_are_picked():
    _, test = make()
    picked = questions(tasks.pick(test, ""))
    assert [question.split()[0] for question in picked] == [
        task for task in tasks.WORD_TASKS for _ in range(2)
    ]


@pytest.mark.parametrize("text", ["", "thy my 123", "king"])
def test_a_text_without_enough_words_is_refused(text):
    assert refused_input(tasks.make_words, text, 9, 1).startswith("--data: too few words ")


LINE = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def test_conversations_of_a_file(tmp_path):
    turns = ["a", "b", "c é", "d"]
    messages = ", ".join(
        f'{{"role": "{("user", "assistant")[i % 2]}", "content": "{text}", "id": {i}}}'
        for i, text in enumerate(turns)
    )
    text = LINE * 8 + "\n" + f'{{"messages": [{messages}], "source": "x"}}'
    conversations = read_conversations(text, "x.jsonl")
    assert len(conversations) == 9
    assert conversations[0] == tasks.ask("a", "b")
    assert [message["content"] for message in conversations[-1]] == turns
    assert all(message.keys() == {"role", "content"} for message in conversations[-1])
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8"))
    settings = SimpleNamespace(conversations=str(path))
    loaded = tasks.load_conversations(settings)
    assert loaded == (text, conversations[:-1], conversations[-1:])
    settings.conversations = "none.jsonl"
    message = refused_input(tasks.load_conversations, settings)
    assert message.startswith("--conversations none.jsonl: ")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[]", "has no list of messages"),
        ('{"messages": []}', "has no list of messages"),
        ('{"messages": ["a"]}', "message 1 has no text as its content"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text as its content"),
        (LINE.replace('"b"', "null"), "message 2 has no text as its content"),
        (LINE.replace('"b"', '""'), "message 2 is empty"),
        (LINE.replace("assistant", "user"), "message 2 has the role 'user' instead of 'assistant'"),
        (LINE.replace("user", "system"), "message 1 has the role 'system' instead of 'user'"),
        ('{"messages": [{"content": "a"}]}', "message 1 has the role None instead of 'user'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ends with a question"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_can_be_wrong_in_a_file_is_named_with_its_line(line, why):
    message = refused_input(read_conversations, f"{LINE}\n{line}", "x.jsonl")
    assert message.startswith(f"--conversations x.jsonl, line 3: {why}")
    assert re.search(r"; \w+", message), "it says what to do"


def test_one_conversation_is_too_few():
    assert refused_input(read_conversations, LINE, "x.jsonl").startswith(
        "--conversations x.jsonl: needs at least two conversations"
    )
