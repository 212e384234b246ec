"""lab/reinforce.py: pass@k on unseen sums, and v12b without each of its parts."""

import re

import matplotlib.image
import pytest
import torch
from conftest import refused, tiny_flags

from data import tasks
from lab import reinforce
from part8_assistant import v12a_sft, v12b_grpo

SIZES = {"block_size": 40, "n_demonstrations": 40}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A tiny run of v12a on sums; an answer is right if it has an even number of characters."""
    monkeypatch.setattr(tasks, "TEST_QUESTIONS", 10)
    monkeypatch.setattr(tasks, "is_right", lambda chat, answer: len(answer) % 2 == 0)
    folder = tmp_path / "base"
    v12a_sft.main([*tiny_flags(v12a_sft, out_dir=folder, task="sums", **SIZES)])
    return folder


def flags_for(base, *more):
    flags = tiny_flags(v12b_grpo, base=base, **SIZES)
    return [*flags, *(str(flag) for flag in more)]


def test_the_variant_of_the_script_is_the_script(base, capsys):
    v12b_grpo.main(flags_for(base, "--max_iters", 5, "--eval_interval", 1))
    printed = re.findall(r"^step \d+: .* wrong ([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    more = ["--variants", "grpo", "--steps", 3, "--eval_interval", 1]
    reinforce.main(flags_for(base, *more))
    right = re.findall(r"right ([\d.]+)%", capsys.readouterr().out)
    assert len(printed) == len(right) == 4
    assert [1 - float(share) for share in printed] == pytest.approx([float(r) / 100 for r in right])


def test_the_variants_differ_and_leave_the_script_as_it_was(base, tmp_path, capsys):
    before = v12b_grpo.advantages_of, v12b_grpo.update, reinforce.batches.pad
    path = tmp_path / "picture.png"
    more = ["--steps", 3, "--eval_interval", 3, "--rl_learning_rate", 0.05, "--picture", path]
    more += ["--n_answers", 4, "--batch_size", 16]
    reinforce.main(flags_for(base, *more))
    assert (v12b_grpo.advantages_of, v12b_grpo.update, reinforce.batches.pad) == before
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(",")[0] for row in rows[::2]] == reinforce.VARIANTS
    assert len({row.split(": ")[1] for row in rows[::2]}) == 1, "all start from the same model"
    assert len({row.split(": ")[1] for row in rows[1::2]}) > 2
    assert matplotlib.image.imread(path).shape[0] > 300


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(reinforce.advantages_for("no_mean")(rewards), rewards)
    divided = reinforce.advantages_for("std")(rewards)
    torch.testing.assert_close(divided[0].std(correction=0), torch.tensor(1.0), rtol=1e-3, atol=0)
    assert not divided[1].any()
    torch.manual_seed(1)
    tossed = reinforce.advantages_for("coin_toss")(torch.ones(50, 4))
    assert tossed.any()
    assert reinforce.advantages_for("grpo") is v12b_grpo.advantages_of


def test_measured_sums_are_unseen():
    _, lessons, _ = tasks.load_conversations(v12b_grpo.Config())
    learned = {chat[0]["content"] for chat in lessons}
    sums = [chat[0]["content"] for chat in reinforce.make_sums(300, 3)]
    assert not learned & set(sums)
    assert {len(question) for question in sums} == {7}
    assert {len(chat[0]["content"]) for chat in reinforce.make_sums(20, 4)} == {9}


def test_a_measurement(base, capsys):
    reinforce.main(flags_for(base, "--measure", "--n_sums", 6, "--k", 3))
    three, four = capsys.readouterr().out.splitlines()
    assert re.match(r"3 digits: greedy [\d.]+% \([\d.]+ to [\d.]+\); pass@1 .*; pass@3 ", three)
    assert four.startswith("4 digits: ")


def test_intervals():
    low, high = reinforce.interval(0.97, 400)
    assert (low, high) == pytest.approx((0.948, 0.983), abs=1e-3)
    assert reinforce.interval(1.0, 400)[1] == pytest.approx(1)
    low, high = reinforce.interval_of_mean([0.0, 1.0] * 50)
    assert (low, high) == pytest.approx((0.5 - 0.0985, 0.5 + 0.0985), abs=1e-3)


def test_mistakes_are_named(base, capsys):
    assert "--base: missing" in refused(reinforce, capsys, "--measure")
    line = refused(reinforce, capsys, *flags_for(base, "--variants", "ppo"))
    assert line.startswith("error: --variants ppo: must be of grpo, ")
