"""v12b_grpo.py: advantages, the loss of an answer, and reinforcement after fine-tuning."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import refused, shaken, tiny, tiny_flags
from torch.nn import functional as F

from data import tasks
from part8_assistant import v12a_sft as v12a
from part8_assistant import v12b_grpo as v12b
from support import answers, batches
from support.runs import UnsavedRun

TOKENIZER = v12b.ChatTokenizer("abcd efgh")
PHASES = {"sft_iters": 2, "max_iters": 5, "eval_interval": 2, "n_answers": 2}


def talk(question: str, answer: str) -> tasks.Conversation:
    return tasks.ask(question, answer)


def make_model(**changes):
    torch.manual_seed(1)
    return shaken(v12b.LanguageModel(tiny(v12b, **changes), TOKENIZER.n_vocab))


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    """A file of short conversations; an answer is right if its length is even, as many are."""
    monkeypatch.setattr(tasks, "is_right", lambda chat, answer: len(answer) % 2 == 0)
    path = tmp_path / "twice.jsonl"
    lines = [json.dumps({"messages": talk(a, a + a)}) for a in "abcdefgh" * 5]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(name, *flags):
    """Run main() in the folder name; return the weights, the step and the history at the end."""
    v12b.main([str(flag) for flag in (*flags, "--out_dir", name)])
    return torch.load(name / "latest.pt", weights_only=True)


def flags_of(jsonl, **changes):
    flags = tiny_flags(v12b, block_size=9, **{**PHASES, **changes})
    at = flags.index("--out_dir")
    return [*flags[:at], *flags[at + 2 :], "--conversations", jsonl]


# ---- advantages


def test_an_answer_is_compared_with_the_others_to_its_question():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    expected = [[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [0.0] * 4, [0.5, 0.5, -0.5, -0.5]]
    assert v12b.advantages_of(rewards).tolist() == expected
    torch.manual_seed(3)
    rewards = torch.rand(5, 7)
    assert v12b.advantages_of(rewards).sum(dim=1).abs().max() < 1e-6


def grpo_loss(monkeypatch, model, cfg, lessons, replies, step=9):
    """The loss of a step in which the model's answers are replies, and the prompts it got."""
    seen = {}

    def complete(model, prompts, end, cfg):
        seen["prompts"] = prompts
        return replies[: len(prompts)]

    def update(model, optimizer, loss, step, cfg):
        seen["loss"] = loss

    monkeypatch.setattr(answers, "complete", complete)
    monkeypatch.setattr(v12b, "update", update)
    v12b.grpo_step(model, None, lessons, TOKENIZER, step, cfg)
    return seen["loss"], seen["prompts"]


def test_the_loss_is_that_of_the_lesson_token_by_token(monkeypatch):
    cfg = tiny(v12b, block_size=14, batch_size=6, n_answers=3, dropout=0.5)
    model = make_model(block_size=14, dropout=0.5).train()
    ids, end = TOKENIZER.encode, TOKENIZER.end
    lessons = [talk("ab", "c"), talk("bcd", "c")]
    # Right, wrong, and one that was cut off; a special token in the middle stays what it is.
    replies = [
        [*ids("c"), end], [*ids("dd"), end], ids("abcabcab"),
        [TOKENIZER.user, *ids("c"), end], [end], [*ids("cc"), end],
    ]  # fmt: skip
    loss, prompts = grpo_loss(monkeypatch, model, cfg, lessons, replies)
    assert prompts == [prompts[0]] * 3 + [prompts[3]] * 3
    right = torch.tensor([[1.0, 0, 0], [1, 0, 0]])  # decoded, a special token has no text
    advantages = (right - right.mean(dim=1, keepdim=True)).flatten().tolist()
    model.eval()
    total, n = 0.0, 0
    for prompt, reply, advantage in zip(prompts, replies, advantages, strict=True):
        for i, token in enumerate(reply):
            logits, _ = model(torch.tensor([prompt + reply[:i]]))
            total -= advantage * F.log_softmax(logits[0, -1], dim=0)[token]
            n += 1
    assert n == sum(len(reply) for reply in replies)
    torch.testing.assert_close(loss, total / n)


def test_with_advantages_of_1_it_is_the_loss_of_fine_tuning(monkeypatch):
    cfg = tiny(v12b, block_size=14, batch_size=4, n_answers=2)
    model = make_model(block_size=14)
    lessons = [talk("ab", "cd")]
    replies = [[*TOKENIZER.encode("cd"), TOKENIZER.end]] * 4
    monkeypatch.setattr(v12b, "advantages_of", torch.ones_like)
    loss, _ = grpo_loss(monkeypatch, model, cfg, lessons, replies)
    examples = batches.pad([v12a.encode(lessons[0], TOKENIZER)], 14)
    x, y = torch.from_numpy(examples).unbind(1)
    torch.testing.assert_close(loss, model(x, y)[1])


def test_answers_of_equal_worth_change_nothing(monkeypatch):
    cfg = tiny(v12b, block_size=14, batch_size=4, n_answers=2)
    model = make_model(block_size=14)
    replies = [[*TOKENIZER.encode(text), TOKENIZER.end] for text in ("a", "bb", "dd", "e")]
    loss, _ = grpo_loss(monkeypatch, model, cfg, [talk("ab", "c")], replies)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---- learning


def reinforce(monkeypatch, reward, steps=25):
    """The share of answers that begin with "a", before and after rewarding by reward(answer)."""
    cfg = tiny(
        v12b, block_size=9, batch_size=32, n_answers=8, sft_iters=0, rl_learning_rate=1e-2,
        temperature=1.0, weight_decay=0.0, max_iters=2 * steps,
    )  # fmt: skip
    torch.manual_seed(1)
    model = v12b.LanguageModel(cfg, TOKENIZER.n_vocab)
    optimizer = v12b.make_optimizer(model, cfg)
    lessons = [talk(letter, "") for letter in "bcdefgh"]
    monkeypatch.setattr(tasks, "is_right", lambda conversation, answer: reward(answer))

    def share():
        replies = v12b.answer(model, lessons * 8, TOKENIZER, cfg)
        return sum(reply.startswith("a") for reply in replies) / len(replies)

    before = share()
    for step in range(steps):
        v12b.grpo_step(model, optimizer, lessons, TOKENIZER, step, cfg)
    return before, share()


def test_what_is_rewarded_becomes_more_likely(monkeypatch):
    before, after = reinforce(monkeypatch, lambda answer: answer.startswith("a"))
    assert before < 0.3
    assert after > 0.8
    before, after = reinforce(monkeypatch, lambda answer: not answer.startswith("a"))
    assert after < before


def test_what_is_always_rewarded_is_not_learned(monkeypatch):
    before, after = reinforce(monkeypatch, lambda answer: True)
    assert before == after


def test_fine_tuning_is_that_of_v12a(jsonl, tmp_path, capsys):
    tuned = run(tmp_path / "v12b", *flags_of(jsonl, sft_iters=4, max_iters=4))
    flags = tiny_flags(v12a, block_size=9, max_iters=4, out_dir=tmp_path / "v12a")
    v12a.main([*flags, "--conversations", str(jsonl)])
    other = torch.load(tmp_path / "v12a" / "latest.pt", weights_only=True)
    assert all(torch.equal(tuned["model"][name], other["model"][name]) for name in other["model"])


def test_the_learning_rate_has_two_phases():
    cfg = tiny(v12b, sft_iters=200, warmup_iters=100, max_iters=300)
    tuning = tiny(v12a, warmup_iters=100, max_iters=200)
    for step in (0, 50, 100, 150, 199):
        assert v12b.learning_rate_at(step, cfg) == v12a.learning_rate_at(step, tuning)
    rates = [v12b.learning_rate_at(step, cfg) / cfg.rl_learning_rate for step in (200, 250, 299)]
    assert rates == pytest.approx([1.0, 0.5, 0.01])


# ---- runs


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_goes_on_to_the_bit_in_both_phases(jsonl, tmp_path, monkeypatch, capsys, stop):
    flags = [*flags_of(jsonl), "--dropout", "0.1"]
    whole = run(tmp_path / "whole", *flags)
    stops = v12b.runs.Run.stop_requested
    steps = iter(range(100))
    monkeypatch.setattr(v12b.runs.Run, "stop_requested", lambda run: next(steps) >= stop)
    monkeypatch.setattr(v12b.runs.Run, "__exit__", lambda run, *_: run.lock.release())
    part = run(tmp_path / "part", *flags)
    assert part["step"] == stop
    monkeypatch.setattr(v12b.runs.Run, "stop_requested", stops)
    resumed = run(tmp_path / "part", "--resume")
    assert (resumed["step"], resumed["history"]) == (5, whole["history"])
    weights = whole["model"]
    assert all(torch.equal(weights[name], resumed["model"][name]) for name in weights)


def test_settings_for_samples_change_nothing_in_training(jsonl, tmp_path, capsys):
    one = run(tmp_path / "one", *flags_of(jsonl))
    other = run(tmp_path / "other", *flags_of(jsonl), "--temperature", 2)
    assert one["history"] == other["history"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_a_base_takes_the_place_of_fine_tuning(jsonl, tmp_path, capsys):
    v12a.main(
        [*tiny_flags(v12a, block_size=9, out_dir=tmp_path / "base"), "--conversations", str(jsonl)]
    )
    base = torch.load(tmp_path / "base" / "best.pt", weights_only=True)
    start = run(tmp_path / "start", *flags_of(jsonl, max_iters=2), "--base", tmp_path / "base")
    assert start["step"] == 2
    assert all(torch.equal(start["model"][name], base["model"][name]) for name in base["model"])
    end = run(tmp_path / "end", *flags_of(jsonl), "--base", tmp_path / "base")
    assert sorted(end["history"]) == [2, 4, 5]
    assert end["optimizer"][0]["step"] == 3


def test_the_best_weights_are_those_with_the_fewest_wrong_answers(
    jsonl, tmp_path, monkeypatch, capsys
):
    wrong = iter([0.5, 0.25, 0.75, 1.0])
    monkeypatch.setattr(tasks, "share_wrong", lambda test, replies: next(wrong))
    run(tmp_path / "run", *flags_of(jsonl))
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["step"] == 2
    assert "wrong 0.2500" in capsys.readouterr().out


def test_estimates_repeat_their_random_numbers(jsonl, capsys):
    cfg = tiny(v12b, block_size=9, temperature=1.0)
    model = make_model(block_size=9)
    asked = [talk(letter, "") for letter in "abcdefgh"]
    first = v12b.answer(model, asked, TOKENIZER, cfg)
    assert first == v12b.answer(model, asked, TOKENIZER, cfg)
    assert len(set(first)) > 4
    assert first != v12b.answer(model, asked, TOKENIZER, replace(cfg, seed=2))


def test_more_answers_than_a_batch_holds_are_those_to_one_question(monkeypatch):
    cfg = tiny(v12b, block_size=14, batch_size=2, n_answers=4)
    replies = [[*TOKENIZER.encode(text), TOKENIZER.end] for text in ("c", "bb", "dd", "e")]
    _, prompts = grpo_loss(monkeypatch, make_model(block_size=14), cfg, [talk("ab", "c")], replies)
    assert len(prompts) == 4


def test_a_loss_that_is_not_finite_ends_the_run(jsonl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(v12b, "estimate_loss", lambda *args: math.nan)
    line = refused(v12b, capsys, *flags_of(jsonl), "--out_dir", tmp_path / "run")
    assert line == "error: the loss is not finite; try a smaller --learning_rate"


def test_one_answer_to_a_question_is_refused(capsys):
    line = refused(v12b, capsys, "--n_answers", "1")
    assert line.startswith("error: --n_answers 1: must be at least 2")


def test_shares_and_styles():
    asked = [talk("1+1", "2"), talk("1+2", "3"), talk("2+2", "4")]
    replies = ["2", "1+2=4 4", "2+2=4 4"]
    assert tasks.share_wrong(asked, replies) == pytest.approx(1 / 3)
    assert tasks.describe_style(replies) == "worked out 66.7%, 5.0 characters"


def test_the_log_has_the_speed_of_training_and_of_sampling(jsonl, tmp_path, capsys):
    run(tmp_path / "run", *flags_of(jsonl))
    lines = re.findall(r"^step .*", capsys.readouterr().out, re.MULTILINE)
    assert re.search(r"wrong [\d.]+, [\d,]+ tokens/s, sampling [\d,]+ tokens/s$", lines[-1])


def test_the_speed_of_sampling_is_that_since_the_last_call(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(answers.time, "perf_counter", lambda: next(clock))
    answers.sampling_speed()
    cfg = tiny(v12b, block_size=9)
    replies = answers.complete(make_model(block_size=9), [[1, 2, 3]] * 400, -1, cfg)
    assert [len(reply) for reply in replies] == [6] * 400
    assert answers.sampling_speed() == ", sampling 1,200 tokens/s"
    assert answers.sampling_speed() == ""


def test_a_run_needs_no_folder(monkeypatch, capsys):
    cfg = tiny(v12b, block_size=9, **PHASES, temperature=1.0)
    lessons = [talk(letter, letter) for letter in "abcdefgh"]
    examples = batches.pad([v12b.encode(c, TOKENIZER) for c in lessons], 9)
    history = v12b.train(
        make_model(block_size=9), examples, lessons, lessons, TOKENIZER, cfg, UnsavedRun()
    )
    assert sorted(history) == [0, 2, 4, 5]
