"""v3_multi_head.py: n_head heads and a projection are torch.nn.MultiheadAttention."""

import pytest
import torch
from conftest import build, refused, shaken, tiny, tiny_flags

import v2_single_head as v2
import v3_multi_head as v3


@pytest.mark.parametrize("n_head", [1, 3, 18])
def test_the_heads_are_those_of_torch(n_head):
    """With the same weights, output and gradient are the same."""
    cfg = tiny(v3, n_head=n_head)
    ours = shaken(v3.MultiHeadAttention(cfg))
    theirs = torch.nn.MultiheadAttention(cfg.n_embd, cfg.n_head, batch_first=True)
    with torch.no_grad():
        stacked = [
            torch.cat([getattr(head, part).weight for head in ours.heads])
            for part in ("query", "key", "value")
        ]
        theirs.in_proj_weight.copy_(torch.cat(stacked))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(ours.projection.weight)
        theirs.out_proj.bias.copy_(ours.projection.bias)
    x = torch.randn(2, 5, cfg.n_embd)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    later = torch.ones(5, 5).triu(1).bool()
    expected, _ = theirs(x_theirs, x_theirs, x_theirs, attn_mask=later)
    actual = ours(x_ours)
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)


def test_the_projection_is_all_that_is_added_to_v2():
    """The heads together have as many weights as the single head."""
    before = sum(p.numel() for p in build(v2).parameters())
    after = sum(p.numel() for p in build(v3).parameters())
    assert after - before == 18 * 18 + 18


def test_numbers_of_heads_that_make_no_sense(capsys, corpus):
    flags = [*tiny_flags(v3), "--data", corpus]
    line = refused(v3, capsys, *flags, "--n_head", "7")
    assert "--n_embd 18: not a multiple of --n_head 7" in line
    for value in ("0", "-3", "many"):
        assert "--n_head" in refused(v3, capsys, *flags, "--n_head", value)
