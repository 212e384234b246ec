"""v2_single_head.py: one head of attention, causality, positions, a context that is cropped."""

import math

import pytest
import torch
from conftest import TINY, VOCAB_SIZE, build, random_tokens, refused, shaken, tiny, tiny_flags
from torch.nn import functional as F

import v2_single_head as v2


@pytest.mark.parametrize("head_size", [1, 7, 18])
def test_a_head_is_scaled_dot_product_attention(head_size):
    cfg = tiny(v2)
    head = shaken(v2.Head(cfg, head_size))
    for T in (1, 3, cfg.block_size):
        x = torch.randn(2, T, cfg.n_embd)
        expected = F.scaled_dot_product_attention(
            head.query(x), head.key(x), head.value(x), is_causal=True
        )
        torch.testing.assert_close(head(x), expected)


def test_scores_have_variance_1():
    """The reason for the square root: queries and keys of variance 1, and no other spread."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1000, 64)
    assert (query @ key.T).var().item() == pytest.approx(64, rel=0.1)
    assert (query @ key.T / 64**0.5).var().item() == pytest.approx(1, rel=0.1)


def test_no_position_sees_a_later_one():
    model = shaken(build(v2))
    idx = random_tokens(2, TINY["block_size"])
    logits, _ = model(idx)
    for t in range(TINY["block_size"]):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB_SIZE
        other, _ = model(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.equal(other[:, t], logits[:, t])


def test_every_position_sees_the_first():
    model = shaken(build(v2))
    idx = random_tokens(1, TINY["block_size"])
    logits, _ = model(idx)
    idx[:, 0] = (idx[:, 0] + 1) % VOCAB_SIZE
    other, _ = model(idx)
    assert (other != logits).any(-1).all()


def test_the_same_token_at_another_position_is_another_input():
    model = shaken(build(v2))
    logits, _ = model(torch.full((1, TINY["block_size"]), 3))
    assert not torch.allclose(logits[0, 0], logits[0, 1])


def test_a_window_may_be_shorter_than_block_size():
    logits, _ = build(v2)(random_tokens(2, 1))
    assert logits.shape == (2, 1, VOCAB_SIZE)


def test_the_first_loss_is_near_that_of_a_uniform_guess():
    _, loss = build(v2)(random_tokens(64, 5), random_tokens(64, 5))
    assert abs(loss.item() - math.log(VOCAB_SIZE)) < 0.3


def test_generation_sees_the_last_block_size_tokens():
    model = shaken(build(v2))
    idx = random_tokens(64, 12)
    logits, _ = model(idx[:, -TINY["block_size"] :])
    torch.manual_seed(5)
    expected = torch.multinomial(F.softmax(logits[:, -1], dim=-1), num_samples=1)
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, 1)[:, -1:], expected)


def test_the_mask_is_not_saved_with_the_weights():
    model = build(v2)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_it_overfits_one_small_batch():
    """Two windows without a repeated token, which even a small model can memorise."""
    torch.manual_seed(3)
    model = v2.LanguageModel(tiny(v2, n_embd=36), VOCAB_SIZE)
    for parameter in model.parameters():  # from its own start it attends to a single position
        torch.nn.init.normal_(parameter, std=0.1)
    x, y = torch.arange(10).view(2, 5), random_tokens(2, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("value", ["0", "-3", "2.5"])
def test_widths_that_make_no_sense(capsys, value):
    assert "--n_embd" in refused(v2, capsys, *tiny_flags(v2), "--n_embd", value)
