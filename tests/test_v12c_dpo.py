"""v12c_dpo.py: pairs of a right and a wrong answer, the loss of a pair, and runs."""

import copy
import json
import math

import pytest
import torch
from conftest import refused, refused_input, shaken, tiny, tiny_flags
from torch.nn import functional as F

from data import tasks
from part8_assistant import v12a_sft as v12a
from part8_assistant import v12c_dpo as v12c
from support import batches

TOKENIZER = v12c.ChatTokenizer("abcd efgh")
LETTERS = [tasks.ask(letter, letter) for letter in "abcdefgh"]


def make_model(seed=1, **changes):
    torch.manual_seed(seed)
    return shaken(v12c.LanguageModel(tiny(v12c, **changes), TOKENIZER.n_vocab))


def make_preference(model, reference, beta):
    preference = v12c.Preference([model, reference])
    preference.beta = beta
    return preference


def examples_of(*replies, question="ab", block_size=14):
    """Pairs of answers, right ones first, as main() makes them."""
    chats = [tasks.ask(question, reply) for reply in replies]
    examples = batches.pad([v12c.encode(chat, TOKENIZER) for chat in chats], block_size)
    return examples.reshape(-1, 2, 2, block_size).swapaxes(1, 2)


# ---- the loss


def log_p(model, question, reply):
    """ln p of an answer, a token at a time."""
    tokens, targets = v12c.encode(tasks.ask(question, reply), TOKENIZER)
    total = 0.0
    for i in range(1, len(tokens)):
        if targets[i] != -100:
            logits, _ = model(torch.tensor([tokens[:i]]))
            total += F.log_softmax(logits[0, -1], dim=0)[tokens[i]].item()
    return total


def test_the_loss_is_that_of_the_lesson():
    model, reference = make_model(1, block_size=14), make_model(2, block_size=14)
    pairs = [("cd", "d"), ("abcdabcd", "ef"), ("h", "")]
    x, y = torch.from_numpy(examples_of(*pairs[0], *pairs[1], *pairs[2])).unbind(1)
    assert x.shape == y.shape == (3, 2, 14)
    preference = make_preference(model, reference, beta=0.3)
    found, loss = preference(x, y)
    gains = [[log_p(model, "ab", r) - log_p(reference, "ab", r) for r in pair] for pair in pairs]
    losses = [math.log(1 + math.exp(-0.3 * (right - wrong))) for right, wrong in gains]
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-4)
    expected = torch.tensor(gains)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(preference.gains, expected.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_it_begins_at_the_logarithm_of_2_and_the_reference_stays():
    model = make_model(block_size=14)
    reference = copy.deepcopy(model).requires_grad_(False)
    preference = make_preference(model, reference, beta=0.5)
    x, y = torch.from_numpy(examples_of("cd", "d", "c", "ef")).unbind(1)
    _, loss = preference(x, y)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert model.lm_head.weight.grad.any()


def test_training_prefers_the_first_of_two():
    cfg = tiny(v12c, block_size=14, batch_size=4, learning_rate=1e-3, warmup_iters=0, max_iters=30)
    model = make_model(block_size=14)
    reference = copy.deepcopy(model).requires_grad_(False)
    preference = make_preference(model, reference, beta=0.5)
    optimizer = v12c.make_optimizer(model, cfg)
    pairs = examples_of("cd", "d", "c", "ef", "gg", "h")
    before = v12c.estimate_loss(preference, pairs, cfg)
    for step in range(10):
        v12c.train_step(preference, optimizer, pairs, step, cfg)
    assert v12c.estimate_loss(preference, pairs, cfg) < before
    right, wrong = preference.gains.tolist()
    assert right > wrong


def test_there_is_no_dropout():
    model = make_model(block_size=14, dropout=0.5)
    preference = make_preference(model, copy.deepcopy(model), beta=0.5).train()
    x, y = torch.from_numpy(examples_of("cd", "d", "c", "ef")).unbind(1)
    assert not preference(x, y)[0].any()


def test_estimates_repeat_their_random_numbers():
    cfg = tiny(v12c, block_size=9, temperature=1.0)
    model = make_model(block_size=9)
    first = v12c.answer(model, LETTERS, TOKENIZER, cfg)
    assert first == v12c.answer(model, LETTERS, TOKENIZER, cfg)
    assert len(set(first)) > 4


# ---- pairs


def test_a_pair_is_a_right_and_a_wrong_answer_to_the_same_question(monkeypatch):
    lessons = [tasks.ask(letter, letter) for letter in "abcde"]
    drawn = ["a", "x", "y", "d", "e", "x", "b", "z", "d", "y"]
    monkeypatch.setattr(v12c, "answer", lambda *args: drawn)
    pairs = v12c.draw_pairs(
        None, [*lessons, tasks.ask("f", "f")], TOKENIZER, tiny(v12c, n_questions=5)
    )
    expected = [("a", "a"), ("a", "x"), ("b", "b"), ("b", "x"), ("e", "e"), ("e", "y")]
    assert pairs == [tasks.ask(question, reply) for question, reply in expected]


def test_a_base_without_pairs_is_refused(monkeypatch):
    monkeypatch.setattr(
        v12c, "answer", lambda model, chats, *_: [chat[-1]["content"] for chat in chats]
    )
    line = refused_input(v12c.draw_pairs, None, LETTERS, TOKENIZER, tiny(v12c, base="out/x"))
    why = "no question got a right and a wrong answer; name another run"
    assert line == f"--base out/x: {why}"


# ---- runs


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Flags for a tiny run from a base, in which an answer is right if it is long."""
    path = tmp_path / "letters.jsonl"
    lines = [json.dumps({"messages": chat}) for chat in LETTERS * 3]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    conversations = ["--conversations", str(path)]
    base = tmp_path / "base"
    v12a.main([*tiny_flags(v12a, block_size=12, out_dir=base), *conversations])
    monkeypatch.setattr(tasks, "is_right", lambda chat, answer: len(answer) > 3)
    tiny_ones = tiny_flags(v12c, block_size=12, max_iters=4, learning_rate=1e-3)
    at = tiny_ones.index("--out_dir")
    return [*tiny_ones[:at], *tiny_ones[at + 2 :], *conversations, "--base", str(base)]


def run(folder, *flags):
    v12c.main([*flags, "--out_dir", str(folder)])
    return torch.load(folder / "latest.pt", weights_only=True)


def test_a_run_goes_on_to_the_bit(flags, tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole", *flags)
    stops, rounds = v12c.runs.Run.stop_requested, iter(range(100))
    monkeypatch.setattr(v12c.runs.Run, "stop_requested", lambda run: next(rounds) >= 1)
    monkeypatch.setattr(v12c.runs.Run, "__exit__", lambda run, *_: run.lock.release())
    assert run(tmp_path / "part", *flags)["step"] == 1
    monkeypatch.setattr(v12c.runs.Run, "stop_requested", stops)
    resumed = run(tmp_path / "part", "--resume")
    assert (resumed["step"], resumed["history"]) == (4, whole["history"])
    weights = whole["model"]
    assert all(torch.equal(weights[name], resumed["model"][name]) for name in weights)
    assert "gains: right 0.00, wrong 0.00" in capsys.readouterr().out


def test_it_starts_from_the_base_and_leaves_it(flags, tmp_path, capsys):
    base = torch.load(tmp_path / "base" / "best.pt", weights_only=True)["model"]
    best = v12c.checkpoints.read_checkpoint(tmp_path / "base" / "best.pt")
    start = run(tmp_path / "start", *flags, "--max_iters", "0")
    assert all(torch.equal(start["model"][name], base[name]) for name in base)
    end = run(tmp_path / "end", *flags)
    assert not torch.equal(end["model"]["lm_head.weight"], base["lm_head.weight"])
    again = v12c.checkpoints.read_checkpoint(tmp_path / "base" / "best.pt")
    assert all(torch.equal(again["model"][name], best["model"][name]) for name in base)


def test_settings_for_samples_change_nothing_in_training(flags, tmp_path, capsys):
    one = run(tmp_path / "one", *flags)
    other = run(tmp_path / "other", *flags, "--temperature", "2")
    assert one["history"] == other["history"]


def test_without_a_base_it_says_how_to_make_one(capsys):
    line = refused(v12c, capsys, *tiny_flags(v12c, block_size=40))
    assert line.startswith("error: --base: missing; name a run of v12a_sft.py --task sums")


def test_a_run_can_be_sampled_without_its_base(flags, tmp_path, capsys):
    run(tmp_path / "run", *flags)
    for file in (tmp_path / "base").iterdir():
        file.unlink()
    capsys.readouterr()
    v12c.main(["--sample_only", "--out_dir", str(tmp_path / "run"), "--ask", "a"])
    assert capsys.readouterr().out.startswith("user: a\nassistant: ")
