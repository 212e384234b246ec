"""Questions whose answers can be checked: on the words of a text, and sums.

    spell king       k i n g
    reverse king     gnik
    sort king        gikn
    vowels king      i
    347+586          933, or worked out from the units up: 7+6=13 4+8+1=13 3+5+1=9 933

A conversation is a list of messages, in the form in which files of them are passed around:

    [{"role": "user", "content": "sort king"}, {"role": "assistant", "content": "gikn"}]

A word is either for training or for the test, in all four tasks and with every seed: which of them
follows from the word alone. A sum and the same sum with its numbers swapped are on the same side.
"""

import math
import random
import re
import zlib
from pathlib import Path
from typing import Any

from data.conversations import Conversation, read_conversations
from data.corpora import load_text
from data.flags import InputError

TEST_SHARE = 10  # one word in ten, and one sum in ten, is for the test
TEST_QUESTIONS = 400  # for each task, if there are so many


def spell(word: str) -> str:
    """The letters of a word, with spaces between them."""
    return " ".join(word)


def reverse(word: str) -> str:
    """A word from its end to its beginning."""
    return word[::-1]


def sort(word: str) -> str:
    """The letters of a word in the order of the alphabet."""
    return "".join(sorted(word))


def vowels(word: str) -> str:
    """The vowels of a word, as often as they occur and in their order."""
    return "".join(letter for letter in word if letter in "aeiou")


WORD_TASKS = {"spell": spell, "reverse": reverse, "sort": sort, "vowels": vowels}
# What the questions and answers are written with. A text may lack some of it.
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +="


def is_for_test(key: str) -> bool:
    """Whether a word or a sum is for the test. It depends on nothing but its characters."""
    return zlib.crc32(key.encode("utf-8")) % TEST_SHARE == 0


def find_words(text: str) -> list[str]:
    """The distinct words of a text that have 3 to 10 letters and a vowel, in lower case, sorted."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return sorted(word for word in words if 3 <= len(word) <= 10 and vowels(word))


def work_out(a: int, b: int) -> str:
    """Add two numbers of three digits column by column, from the units up; then the sum."""
    steps = []
    carry = 0
    for place in (1, 10, 100):
        first, second = a // place % 10, b // place % 10
        carried = "+1" if carry else ""
        column = first + second + carry
        steps.append(f"{first}+{second}{carried}={column}")
        carry = column // 10
    return " ".join([*steps, str(a + b)])


def ask(question: str, answer: str) -> Conversation:
    """A conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_words(text: str, n: int, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations about the words of a text: n for training, and TEST_QUESTIONS for each task."""
    words = find_words(text)
    rng = random.Random(seed)
    train, test = [], []
    for task, solve in WORD_TASKS.items():
        rng.shuffle(words)
        conversations = [ask(f"{task} {word}", solve(word)) for word in words if is_for_test(word)]
        test += conversations[:TEST_QUESTIONS]
        train += [ask(f"{task} {word}", solve(word)) for word in words if not is_for_test(word)]
    if not train or not test:
        raise InputError("--data: too few words for questions about them; use a longer text")
    rng.shuffle(train)
    return train[:n], test


def draw_sum(rng: random.Random, for_test: bool) -> tuple[int, int]:
    """Draw two numbers of three digits whose sum is for the test, or one that is for training."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if is_for_test(f"{min(a, b)}+{max(a, b)}") == for_test:
            return a, b


def make_sums(n: int, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations about sums: n for training, half of them worked out, and TEST_QUESTIONS."""
    rng = random.Random(seed)
    train, test = [], []
    for _ in range(n):
        a, b = draw_sum(rng, for_test=False)
        is_worked_out = rng.random() < 0.5
        train.append(ask(f"{a}+{b}", work_out(a, b) if is_worked_out else str(a + b)))
    for _ in range(TEST_QUESTIONS):
        a, b = draw_sum(rng, for_test=True)
        test.append(ask(f"{a}+{b}", str(a + b)))
    return train, test


def load_conversations(cfg: Any) -> tuple[str, list[Conversation], list[Conversation]]:
    """A text, and conversations for training and for the test, as the settings ask for them.

    The text is the corpus whose words are asked about or, with --conversations, that file, whose
    last tenth is for the test.
    """
    if cfg.conversations:
        text = load_text(Path(cfg.conversations), "--conversations")
        conversations = read_conversations(text, cfg.conversations)
        n_test = math.ceil(len(conversations) / TEST_SHARE)
        return text, conversations[:-n_test], conversations[-n_test:]
    text = load_text(cfg.data)
    if cfg.task == "sums":
        train, test = make_sums(cfg.n_demonstrations, cfg.seed)
    else:
        train, test = make_words(text, cfg.n_demonstrations, cfg.seed)
    return text, train, test


def alphabet(text: str, conversations: list[Conversation]) -> str:
    """The characters of a text, of all messages, and those that the tasks need, in order."""
    characters = set(text) | set(CHARACTERS)
    for conversation in conversations:
        for message in conversation:
            characters.update(message["content"])
    return "".join(sorted(characters))


def task_of(question: str) -> str:
    """The task that a question belongs to: that of its first word, "sums", or "others"."""
    if re.fullmatch(r"\d+\+\d+", question):
        return "sums"
    first_word = question.split(" ")[0]
    return first_word if first_word in WORD_TASKS else "others"


def is_right(conversation: Conversation, answer: str) -> bool:
    """Whether an answer to a conversation is as good as the one at its end.

    For a sum, the last number of the answer counts; otherwise the whole answer.
    """
    question, expected = conversation[-2]["content"], conversation[-1]["content"]
    if task_of(question) != "sums":
        return answer == expected
    numbers = re.findall(r"\d+", answer)
    return len(numbers) > 0 and numbers[-1] == re.findall(r"\d+", expected)[-1]


def count_right(conversations: list[Conversation], answers: list[str]) -> dict[str, float]:
    """The percentage of right answers for each task."""
    results = {}
    for conversation, answer in zip(conversations, answers, strict=True):
        task = task_of(conversation[-2]["content"])
        results.setdefault(task, []).append(is_right(conversation, answer))
    return {task: 100 * sum(right) / len(right) for task, right in results.items()}


def describe(conversations: list[Conversation], answers: list[str]) -> str:
    """The percentage of right answers for each task, as a line of text."""
    shares = count_right(conversations, answers)
    return "right answers: " + ", ".join(f"{task} {share:.1f}%" for task, share in shares.items())


def pick(conversations: list[Conversation], question: str) -> list[Conversation]:
    """A question with an unknown answer or, if it is "", about eight of the conversations."""
    if question:
        return [ask(question, "")]
    by_task = {}
    for conversation in conversations:
        by_task.setdefault(task_of(conversation[-2]["content"]), []).append(conversation)
    n = max(2, 8 // len(by_task))
    picked = []
    for conversations_of_task in by_task.values():
        picked += conversations_of_task[:n]
    return picked


def print_answers(conversations: list[Conversation], answers: list[str]) -> None:
    """Print the last question of each conversation and an answer; say which answers are wrong."""
    for conversation, answer in zip(conversations, answers, strict=True):
        question, expected = conversation[-2]["content"], conversation[-1]["content"]
        is_wrong = expected != "" and not is_right(conversation, answer)
        remark = f"  (wrong: it is {expected})" if is_wrong else ""
        print(f"user: {question}\nassistant: {answer}{remark}")


def share_wrong(conversations: list[Conversation], answers: list[str]) -> float:
    """The share of wrong answers, 0 to 1."""
    pairs = zip(conversations, answers, strict=True)
    return sum(not is_right(conversation, answer) for conversation, answer in pairs) / len(answers)


def describe_style(answers: list[str]) -> str:
    """How many answers are worked out, with "=" in them, and how long answers are, as text."""
    worked_out = sum("=" in answer for answer in answers) / len(answers)
    length = sum(len(answer) for answer in answers) / len(answers)
    return f"worked out {100 * worked_out:.1f}%, {length:.1f} characters"
