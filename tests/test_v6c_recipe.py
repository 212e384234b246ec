"""v6c_recipe.py: weight decay, the learning rate's schedule, clipping, and exact loss estimates."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from conftest import TEXT, build, refused, shaken, tiny, tiny_flags
from torch.optim import optimizer as hooks

import data
from part2_training import v6c_recipe as v6c
from support import hardware

TOKENS = np.array(data.CharTokenizer(TEXT).encode(TEXT), dtype=np.uint16)


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
        assert "ln_" not in names[id(parameter)]
    for parameter in others["params"]:
        assert "ln_" in names[id(parameter)] or names[id(parameter)].endswith("bias")


def test_adam_averages_over_10_and_100_steps():
    groups = v6c.make_optimizer(build(v6c), tiny(v6c)).param_groups
    assert [group["betas"] for group in groups] == [(0.9, 0.99)] * 2


def first_gradient(model, tokens, cfg):
    """Compute the gradient of the first batch after torch.manual_seed(5); return its norm."""
    torch.manual_seed(5)
    _, loss = model(*v6c.get_batch(tokens, cfg))
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()


def test_a_step_follows_the_recipe(splits, steps):
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


def test_a_gradient_with_a_small_norm_is_left_alone(steps):
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


@pytest.mark.parametrize(("warmup_iters", "max_iters"), [(100, 3600), (100, 200), (0, 0), (0, 9)])
def test_a_warm_up_that_fits_stays_as_it_is(warmup_iters, max_iters, capsys):
    cfg = tiny(v6c, warmup_iters=warmup_iters, max_iters=max_iters)
    assert v6c.shorten_warmup(cfg) == cfg
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("warmup_iters", "max_iters", "expected"), [(100, 199, 19), (100, 9, 0), (2, 3, 0)]
)
def test_a_warm_up_that_takes_most_of_a_run_is_shortened(
    warmup_iters, max_iters, expected, capsys
):
    cfg = tiny(v6c, warmup_iters=warmup_iters, max_iters=max_iters)
    shortened = v6c.shorten_warmup(cfg)
    assert shortened == tiny(v6c, warmup_iters=expected, max_iters=max_iters)
    assert cfg.warmup_iters == warmup_iters
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"notice: .*\n", err)
    assert f"a warm-up of {warmup_iters} steps" in err
    assert f"a run of {max_iters}, so --warmup_iters is {expected}" in err


@pytest.mark.parametrize(("warmup_iters", "expected"), [(10, 10), (11, 2)])
def test_training_follows_the_schedule(splits, steps, warmup_iters, expected):
    changes = dict(max_iters=20, eval_interval=20, learning_rate=0.01)
    v6c.train(build(v6c), *splits, tiny(v6c, warmup_iters=warmup_iters, **changes))
    cfg = tiny(v6c, warmup_iters=expected, **changes)
    assert [step["rates"] for step in steps] == [{v6c.learning_rate_at(n, cfg)} for n in range(20)]


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", "-0.1"), ("weight_decay", "nan"), ("warmup_iters", "-1")]
)
def test_settings_that_make_no_sense(capsys, name, value):
    assert f"--{name}" in refused(v6c, capsys, *tiny_flags(v6c), f"--{name}", value)


# ---- loss estimates


def naive_loss(model, tokens, starts):
    """The mean loss of the windows that begin at starts, one at a time, without dropout."""
    model.eval()
    losses = []
    for start in starts:
        window = torch.from_numpy(tokens[start : start + 6].astype(np.int64))[None]
        with torch.no_grad():
            _, loss = model(window[:, :-1], window[:, 1:])
        losses.append(loss.item())
    model.train()
    return np.mean(losses)


@pytest.mark.parametrize("n_tokens", [6, 10, 11, 20, 21, 100, len(TOKENS)])
@pytest.mark.parametrize("batch_size", [1, 6, 1000])
def test_a_loss_estimate_covers_every_window_of_a_small_split(n_tokens, batch_size):
    """152 windows at most; they don't fill the last batch of 6."""
    tokens = TOKENS[:n_tokens]
    cfg = tiny(v6c, batch_size=batch_size, eval_iters=1000, dropout=0.5)
    model = shaken(build(v6c, dropout=0.5))
    expected = naive_loss(model, tokens, range(0, n_tokens - 5, 5))
    assert v6c.estimate_loss(model, tokens, cfg) == pytest.approx(expected, rel=1e-5)
    assert model.training


@pytest.mark.parametrize(
    ("n_windows", "eval_iters", "expected"),
    [
        (12, 3, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (12, 2, [0, 1, 3, 4, 6, 7, 9, 10]),
        (12, 1, [0, 3, 6, 9]),
        (9, 1, [0, 2, 4, 6]),
        (9, 2, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_a_loss_estimate_of_a_large_split_takes_windows_that_are_evenly_spread(
    n_windows, eval_iters, expected
):
    """eval_iters batches of 4 windows."""
    tokens = TOKENS[: 5 * n_windows + 1]
    model = shaken(build(v6c))
    estimate = v6c.estimate_loss(model, tokens, tiny(v6c, eval_iters=eval_iters))
    starts = [5 * window for window in expected]
    assert estimate == pytest.approx(naive_loss(model, tokens, starts), rel=1e-5)


def test_a_loss_estimate_leaves_the_random_numbers_alone():
    model = shaken(build(v6c, dropout=0.5))
    estimates = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        estimates.append(v6c.estimate_loss(model, TOKENS, tiny(v6c, dropout=0.5)))
        assert torch.equal(torch.get_rng_state(), before)
    assert estimates[0] == estimates[1]


def test_loss_estimates_run_in_the_chosen_dtype(monkeypatch):
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    model = build(v6c)
    used = set()
    model.lm_head.register_forward_hook(lambda *args: used.add(args[-1].dtype))
    v6c.estimate_loss(model, TOKENS, tiny(v6c, dtype="bfloat16"))
    assert used == {torch.bfloat16}


def test_a_run_ends_with_its_validation_loss_in_three_units(corpus, capsys):
    v6c.main([*tiny_flags(v6c), "--data", str(corpus), "--prompt", "The "])
    lines = capsys.readouterr().out.splitlines()
    found = re.fullmatch(
        r"validation loss (\d\.\d{4}) nats per character, "
        r"(\d\.\d{3}) bits, perplexity (\d+\.\d\d)",
        lines[3],
    )
    loss, bits, perplexity = map(float, found.groups())
    assert f"val loss {loss:.4f}, " in lines[2]
    assert lines[2].startswith("step 3: ")
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(loss / math.log(2), abs=1e-3)
    assert lines[4].startswith("The ")


def test_an_enormous_loss_has_a_perplexity_too():
    assert v6c.in_units(1e6).startswith("1000000.0000 nats per character, ")
