"""v6c_recipe.py: weight decay, the learning rate's schedule, and clipping."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import build, refused, tiny, tiny_flags
from torch.optim import optimizer as hooks

import data
from part2_training import v6c_recipe as v6c


@pytest.fixture
def steps():
    """The learning rates and gradients of each step of a test, and the weights after it."""
    records = []

    def before(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        records.append(
            {
                "rates": {group["lr"] for group in optimizer.param_groups},
                "gradients": {id(p): p.grad.clone() for p in parameters},
            }
        )

    def after(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        records[-1]["after"] = {id(p): p.detach().clone() for p in parameters}

    handles = [
        hooks.register_optimizer_step_pre_hook(before),
        hooks.register_optimizer_step_post_hook(after),
    ]
    yield records
    for handle in handles:
        handle.remove()


# ---- the optimizer


def test_weight_decay_is_on_matrices_and_embeddings_only():
    model = build(v6c)
    decayed, others = v6c.make_optimizer(model, tiny(v6c, weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight")
        assert "norm_" not in names[id(parameter)]
    for parameter in others["params"]:
        assert "norm_" in names[id(parameter)] or names[id(parameter)].endswith("bias")


def test_adam_averages_over_10_and_100_steps():
    groups = v6c.make_optimizer(build(v6c), tiny(v6c)).param_groups
    assert [group["betas"] for group in groups] == [(0.9, 0.99)] * 2


@pytest.fixture
def fixed_estimates(monkeypatch):
    """Loss estimates that draw no batches, so that the first batch is that of the first step."""
    monkeypatch.setattr(v6c, "estimate_loss", lambda *_: 1.0)


def first_gradient(model, tokens, cfg):
    """Compute the gradient of the first batch after torch.manual_seed(5); return its norm."""
    torch.manual_seed(5)
    x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, "cpu")
    _, loss = model(x, y)
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()


def test_a_step_follows_the_recipe(splits, steps, fixed_estimates):
    """By hand: half the learning rate, a gradient rescaled to norm 1, AdamW, and weight decay."""
    rate = 0.01
    cfg = tiny(v6c, max_iters=4, warmup_iters=2, learning_rate=2 * rate, weight_decay=0.5)
    model = build(v6c)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    by_hand = copy.deepcopy(model)
    norm = first_gradient(by_hand, splits[0], cfg)
    assert norm > 10
    torch.manual_seed(5)
    v6c.train(model, *splits, cfg)
    for name, parameter in model.named_parameters():
        start = by_hand.get_parameter(name)
        gradient = start.grad / norm
        torch.testing.assert_close(steps[0]["gradients"][id(parameter)], gradient, msg=name)
        # At the first step, Adam's averages are the gradient and its square.
        moved = gradient / (gradient.abs() + 1e-8)
        decay = 0.5 if parameter.ndim == 2 else 0.0
        expected = start.detach() * (1 - rate * decay) - rate * moved
        torch.testing.assert_close(steps[0]["after"][id(parameter)], expected, msg=name)


def test_a_gradient_with_a_small_norm_is_left_alone(steps, fixed_estimates):
    """The text is a single character, which the model expects from the start."""
    tokens = np.zeros(100, dtype=np.uint16)
    cfg = tiny(v6c, max_iters=1)
    model = build(v6c)
    with torch.no_grad():
        model.lm_head.bias[0] = 7.0
    by_hand = copy.deepcopy(model)
    assert 0.01 < first_gradient(by_hand, tokens, cfg) < 0.9
    torch.manual_seed(5)
    v6c.train(model, tokens, tokens, cfg)
    for name, parameter in model.named_parameters():
        gradient = by_hand.get_parameter(name).grad
        assert torch.equal(steps[0]["gradients"][id(parameter)], gradient), name


def test_the_gradient_of_a_step_is_that_of_its_own_batch_alone(splits, steps, fixed_estimates):
    """With steps so small that all batches meet the same weights."""
    cfg = tiny(v6c, learning_rate=1e-9, warmup_iters=0)
    model = build(v6c)
    by_hand = copy.deepcopy(model)
    torch.manual_seed(5)
    v6c.train(model, *splits, cfg)
    torch.manual_seed(5)
    for step in steps:
        x, y = data.get_batch(splits[0], cfg.batch_size, cfg.block_size, "cpu")
        by_hand.zero_grad()
        _, loss = by_hand(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), max_norm=1.0)
        for name, parameter in model.named_parameters():
            expected = by_hand.get_parameter(name).grad
            torch.testing.assert_close(step["gradients"][id(parameter)], expected, msg=name)
    assert len(steps) == 3


# ---- the learning rate


def test_the_learning_rate_warms_up_and_then_falls_along_a_cosine_to_0():
    cfg = tiny(v6c, learning_rate=0.01, warmup_iters=10, max_iters=110)
    rates = [v6c.learning_rate_at(step, cfg) for step in range(111)]
    assert rates[:11] == pytest.approx([0.001 * n for n in range(1, 11)] + [0.01])
    assert rates[35] == pytest.approx(0.01 * (1 + math.sqrt(0.5)) / 2)
    assert rates[60] == pytest.approx(0.005)
    assert rates[85] == pytest.approx(0.01 * (1 - math.sqrt(0.5)) / 2)
    assert rates[110] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("warmup_iters", "max_iters"), [(0, 5), (2, 5), (5, 5), (9, 5), (0, 1), (0, 0)]
)
def test_the_learning_rate_stays_in_range_however_long_the_warm_up(warmup_iters, max_iters):
    cfg = tiny(v6c, learning_rate=0.01, warmup_iters=warmup_iters, max_iters=max_iters)
    rates = [v6c.learning_rate_at(step, cfg) for step in range(max_iters + 1)]
    assert all(0 < rate <= 0.01 for rate in rates[:max_iters])
    assert 0 <= rates[max_iters] <= 0.01


def notices_of_training(splits, capsys, **changes):
    """The lines of a run's notices; nothing is computed."""
    v6c.train(build(v6c), *splits, tiny(v6c, eval_interval=10_000, **changes))
    out, err = capsys.readouterr()
    assert "notice" not in out
    return [line for line in err.splitlines() if "notice" in line]


@pytest.fixture
def empty_steps(monkeypatch, fixed_estimates):
    """Training steps that do nothing."""
    monkeypatch.setattr(v6c, "train_step", lambda *_: None)


@pytest.mark.parametrize(("warmup_iters", "max_iters"), [(100, 3600), (100, 200), (0, 0), (0, 9)])
def test_a_warm_up_that_fits_is_not_worth_a_notice(
    splits, capsys, empty_steps, warmup_iters, max_iters
):
    sizes = {"warmup_iters": warmup_iters, "max_iters": max_iters}
    assert notices_of_training(splits, capsys, **sizes) == []


@pytest.mark.parametrize(("warmup_iters", "max_iters"), [(100, 199), (100, 9), (2, 3)])
def test_a_warm_up_that_takes_most_of_a_run_is_noticed(
    splits, capsys, empty_steps, warmup_iters, max_iters
):
    sizes = {"warmup_iters": warmup_iters, "max_iters": max_iters}
    why = f"more than half of the {max_iters} steps; give a smaller number"
    expected = [f"notice: --warmup_iters {warmup_iters}: {why}"]
    assert notices_of_training(splits, capsys, **sizes) == expected


@pytest.mark.parametrize("warmup_iters", [0, 10, 11, 30])
def test_training_follows_the_schedule(splits, steps, warmup_iters):
    cfg = tiny(
        v6c, max_iters=20, eval_interval=20, learning_rate=0.01, warmup_iters=warmup_iters
    )
    v6c.train(build(v6c), *splits, cfg)
    assert [step["rates"] for step in steps] == [{v6c.learning_rate_at(n, cfg)} for n in range(20)]


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", "-0.1"), ("weight_decay", "nan"), ("warmup_iters", "-1")]
)
def test_settings_that_make_no_sense(capsys, name, value):
    assert f"--{name}" in refused(v6c, capsys, *tiny_flags(v6c), f"--{name}", value)


def test_a_run_with_the_recipe_ends_with_a_sample(corpus, capsys):
    v6c.main([*tiny_flags(v6c), "--data", str(corpus), "--prompt", "The "])
    out, err = capsys.readouterr()
    lines = out.split("\n", maxsplit=3)
    assert [line.split(":")[0] for line in lines[:3]] == ["step 0", "step 2", "step 3"]
    assert lines[3].startswith("The ")
    assert len(lines[3]) == 4 + 7 + 1
    assert "\nnotice: --warmup_iters 100: more than half of the 3 steps;" in err
