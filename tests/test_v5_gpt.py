"""v5_gpt.py: the block, LayerNorm, dropout, initialisation, and the size of the whole."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, VOCAB_SIZE, build, random_tokens, refused, shaken, tiny, tiny_flags

import data
import v5_gpt as v5


def test_full_size_has_the_parameters_of_the_design():
    cfg = v5.Config()
    with torch.device("meta"):
        model = v5.LanguageModel(cfg, 65)
    assert sum(p.numel() for p in model.parameters()) == 10_788_929
    sizes = (cfg.batch_size, cfg.block_size, cfg.n_embd, cfg.n_head, cfg.n_layer)
    assert sizes == (64, 256, 384, 6, 6)
    assert (cfg.max_iters, cfg.learning_rate, cfg.dropout) == (5000, 3e-4, 0.2)


def test_a_block_adds_to_its_input():
    block = v5.Block(tiny(v5))
    for projection in (block.attention.projection, block.feed_forward.projection):
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    x = torch.randn(2, 5, 18)
    assert torch.equal(block(x), x)


def test_a_block_normalises_before_each_part():
    block = shaken(v5.Block(tiny(v5)))
    x = torch.randn(2, 5, 18)
    middle = x + block.attention(block.norm_1(x))
    torch.testing.assert_close(block(x), middle + block.feed_forward(block.norm_2(middle)))


def test_the_logits_come_from_normalised_vectors():
    model = shaken(build(v5)).eval()
    idx = random_tokens(2, 5)
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(5))
    torch.testing.assert_close(model(idx)[0], model.lm_head(model.norm_f(model.blocks(x))))


def test_no_position_sees_a_later_one():
    model = shaken(build(v5)).eval()
    idx = random_tokens(2, TINY["block_size"])
    logits, _ = model(idx)
    for t in range(TINY["block_size"]):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB_SIZE
        other, _ = model(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.equal(other[:, t], logits[:, t])


def test_weights_start_small():
    model = build(v5, n_embd=96)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            is_norm = ".norm_" in f".{name}" and name.endswith("weight")
            assert (parameter == float(is_norm)).all(), name


def test_the_first_loss_is_near_that_of_a_uniform_guess():
    _, loss = build(v5)(random_tokens(64, 5), random_tokens(64, 5))
    assert abs(loss.item() - math.log(VOCAB_SIZE)) < 0.02


def test_dropout_is_on_in_training_only():
    model = shaken(build(v5, dropout=0.5))
    idx = random_tokens(2, 5)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_dropout_is_on_the_weights_and_after_each_projection():
    model = build(v5, dropout=0.5)
    dropped = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda _, args, __: dropped.append(args[0].shape))
    model(random_tokens(3, 5))
    in_a_block = [(3, 5, 5), (3, 5, 5), (3, 5, 5), (3, 5, 18), (3, 5, 18)]
    assert dropped == in_a_block * 2


def test_estimate_loss_has_no_dropout(splits):
    cfg = tiny(v5, dropout=0.9, eval_iters=4)
    model = shaken(build(v5, dropout=0.9)).train()
    torch.manual_seed(11)
    estimate = v5.estimate_loss(model, splits[1], cfg)
    assert model.training

    model.eval()
    torch.manual_seed(11)
    losses = []
    for _ in range(4):
        x, y = data.get_batch(splits[1], cfg.batch_size, cfg.block_size, "cpu")
        losses.append(model(x, y)[1].item())
    assert estimate == pytest.approx(np.mean(losses), rel=1e-5)


def test_training_lowers_the_loss(splits):
    cfg = tiny(v5, max_iters=100, eval_interval=100, eval_iters=20)
    history = v5.train(build(v5), *splits, cfg)
    assert history[100][0] < history[0][0] - 0.3


@pytest.mark.parametrize("value", ["-0.1", "1", "nan", "half"])
def test_dropouts_that_make_no_sense(capsys, value):
    assert "--dropout" in refused(v5, capsys, *tiny_flags(v5), "--dropout", value)


@pytest.mark.parametrize("value", ["0", "-3", "1001"])
def test_numbers_of_blocks_that_make_no_sense(capsys, value):
    assert "--n_layer" in refused(v5, capsys, *tiny_flags(v5), "--n_layer", value)
