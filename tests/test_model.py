"""The models: no look at the future, the attention of PyTorch itself, sizes, losses, sampling."""

import importlib
import math

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, VOCAB_SIZE, tiny
from torch.nn import functional as F

import data
import v2_single_head
import v5_gpt


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, shape)


def build(rung, **changes):
    torch.manual_seed(1)
    return rung.LanguageModel(tiny(rung, **changes), VOCAB_SIZE)


def shaken(model):
    """The model with every parameter at a random value, so that no zero hides a mistake."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_forward_gives_logits_and_a_loss(rung):
    model = build(rung)
    idx, targets = random_tokens(3, 5), random_tokens(3, 5)
    logits, loss = model(idx)
    assert logits.shape == (3, 5, VOCAB_SIZE)
    assert logits.dtype == torch.float32
    assert loss is None
    logits, loss = model(idx, targets)
    assert logits.shape == (3, 5, VOCAB_SIZE)
    by_hand = -F.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss, by_hand)


def test_windows_shorter_than_block_size_work(rung):
    logits, _ = build(rung)(random_tokens(2, 1))
    assert logits.shape == (2, 1, VOCAB_SIZE)


def test_causality(rung):
    model = shaken(build(rung)).eval()
    idx = random_tokens(2, TINY["block_size"])
    logits, _ = model(idx)
    for t in range(TINY["block_size"]):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB_SIZE
        other, _ = model(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.equal(other[:, t], logits[:, t])


def test_attention_sees_all_of_the_past(attention_rung):
    model = shaken(build(attention_rung)).eval()
    idx = random_tokens(1, TINY["block_size"])
    logits, _ = model(idx)
    idx[:, 0] = (idx[:, 0] + 1) % VOCAB_SIZE
    other, _ = model(idx)
    assert (other != logits).any(-1).all()


def test_position_matters(attention_rung):
    model = shaken(build(attention_rung)).eval()
    logits, _ = model(torch.full((1, TINY["block_size"]), 3))
    assert not torch.allclose(logits[0, 0], logits[0, 1])


def test_the_loss_at_initialisation_is_near_that_of_a_guess(rung):
    model = build(rung)
    _, loss = model(random_tokens(64, 5), random_tokens(64, 5))
    assert abs(loss.item() - math.log(VOCAB_SIZE)) < 0.3


def test_the_bigram_starts_at_exactly_that_of_a_guess():
    rung = importlib.import_module("bigram")
    _, loss = build(rung)(random_tokens(4, 5), random_tokens(4, 5))
    assert loss.item() == pytest.approx(math.log(VOCAB_SIZE), abs=1e-6)


def test_full_size_has_the_parameters_of_the_design():
    cfg = v5_gpt.Config()
    with torch.device("meta"):
        model = v5_gpt.LanguageModel(cfg, 65)
    assert sum(p.numel() for p in model.parameters()) == 10_788_929
    sizes = (cfg.batch_size, cfg.block_size, cfg.n_embd, cfg.n_head, cfg.n_layer)
    assert sizes == (64, 256, 384, 6, 6)
    assert (cfg.max_iters, cfg.learning_rate, cfg.dropout) == (5000, 3e-4, 0.2)


def test_v5_starts_with_small_weights():
    model = build(v5_gpt, n_embd=96)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            assert not module.bias.any()


@pytest.mark.parametrize("head_size", [1, 7, 18])
def test_a_head_is_scaled_dot_product_attention(head_size):
    cfg = tiny(v2_single_head)
    head = shaken(v2_single_head.Head(cfg, head_size))
    x = torch.randn(2, 5, cfg.n_embd)
    expected = F.scaled_dot_product_attention(
        head.query(x), head.key(x), head.value(x), is_causal=True
    )
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("name", ["v3_multi_head", "v4_feedforward", "v5_gpt"])
def test_heads_are_those_of_torch(name):
    """The same weights in torch.nn.MultiheadAttention give the same output and gradient."""
    rung = importlib.import_module(name)
    cfg = tiny(rung)
    ours = shaken(rung.MultiHeadAttention(cfg))
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
    mask = torch.ones(5, 5).triu(1).bool()
    expected, _ = theirs(x_theirs, x_theirs, x_theirs, attn_mask=mask)
    actual = ours(x_ours)
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)


def test_feed_forward_works_on_each_position_alone():
    rung = importlib.import_module("v4_feedforward")
    part = shaken(rung.FeedForward(tiny(rung)))
    x = torch.randn(1, 5, 18)
    torch.testing.assert_close(part(x)[:, 2:3], part(x[:, 2:3]))
    assert part.expansion.weight.shape == (72, 18)


@pytest.mark.parametrize("name", ["v4_feedforward", "v5_gpt"])
def test_feed_forward_is_two_layers_around_a_relu(name):
    rung = importlib.import_module(name)
    part = shaken(rung.FeedForward(tiny(rung)))
    x = torch.randn(1, 5, 18)
    torch.testing.assert_close(part(x), part.projection(part.expansion(x).clamp(min=0)))


def test_a_block_adds_to_its_input():
    block = v5_gpt.Block(tiny(v5_gpt))
    torch.nn.init.zeros_(block.attention.projection.weight)
    torch.nn.init.zeros_(block.attention.projection.bias)
    torch.nn.init.zeros_(block.feed_forward.projection.weight)
    torch.nn.init.zeros_(block.feed_forward.projection.bias)
    x = torch.randn(2, 5, 18)
    assert torch.equal(block(x), x)


def test_a_block_norms_before_each_part():
    block = shaken(v5_gpt.Block(tiny(v5_gpt)))
    x = torch.randn(2, 5, 18)
    middle = x + block.attention(block.ln_1(x))
    torch.testing.assert_close(block(x), middle + block.feed_forward(block.ln_2(middle)))


def test_the_logits_are_of_the_last_layer_norm():
    model = shaken(build(v5_gpt)).eval()
    idx = random_tokens(2, 5)
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(5))
    torch.testing.assert_close(model(idx)[0], model.lm_head(model.ln_f(model.blocks(x))))


def test_dropout_works_in_training_only():
    model = shaken(build(v5_gpt, dropout=0.5))
    idx = random_tokens(2, 5)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_dropout_is_on_the_weights_and_after_each_projection():
    model = build(v5_gpt, dropout=0.5)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.5]
    in_a_block = ["attention.heads.0", "attention.heads.1", "attention.heads.2"]
    in_a_block += ["attention", "feed_forward"]
    expected = [f"blocks.{layer}.{part}.dropout" for layer in range(2) for part in in_a_block]
    assert names == expected

    dropped = []
    for name, module in model.named_modules():
        if name in expected:
            module.register_forward_hook(lambda _, args, __: dropped.append(args[0].shape))
    model(random_tokens(3, 5))
    assert dropped == [(3, 5, 5), (3, 5, 5), (3, 5, 5), (3, 5, 18), (3, 5, 18)] * 2


def test_generation_continues_a_prompt_of_any_length(rung):
    model = build(rung)
    for length in (1, TINY["block_size"], 3 * TINY["block_size"]):
        idx = random_tokens(2, length)
        out = model.generate(idx, 9)
        assert out.shape == (2, length + 9)
        assert out.dtype == torch.int64
        assert torch.equal(out[:, :length], idx)
        assert out.min() >= 0
        assert out.max() < VOCAB_SIZE


def test_generation_of_nothing_is_the_prompt(rung):
    idx = random_tokens(1, 4)
    assert torch.equal(build(rung).generate(idx, 0), idx)


def test_generation_uses_the_last_block_size_tokens(attention_rung):
    model = shaken(build(attention_rung)).eval()
    idx = random_tokens(64, 12)
    logits, _ = model(idx[:, -TINY["block_size"] :])
    torch.manual_seed(5)
    expected = torch.multinomial(F.softmax(logits[:, -1], dim=-1), num_samples=1)
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, 1)[:, -1:], expected)


def test_generation_follows_the_probabilities():
    rung = importlib.import_module("bigram")
    model = build(rung)
    with torch.no_grad():
        model.token_embedding.weight[0, 1:3] = torch.tensor([20.0, 20.0 + math.log(3)])
    drawn = model.generate(torch.zeros(4000, 1, dtype=torch.int64), 1)[:, 1]
    assert set(drawn.tolist()) == {1, 2}
    assert (drawn == 2).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_a_rung_overfits_one_small_batch(rung):
    """Two windows in which no token is there twice, so that even a table can know them by heart."""
    torch.manual_seed(3)
    model = rung.LanguageModel(tiny(rung, n_embd=36), VOCAB_SIZE)
    for parameter in model.parameters():  # from the rungs' own start, v2 attends to single places
        torch.nn.init.normal_(parameter, std=0.1)
    x, y = torch.arange(10).view(2, 5), random_tokens(2, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(800):
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_training_lowers_the_loss_and_returns_its_history(rung, splits):
    cfg = tiny(rung, max_iters=150, eval_interval=60, eval_iters=20)
    torch.manual_seed(cfg.seed)
    model = rung.LanguageModel(cfg, VOCAB_SIZE)
    history = rung.train(model, *splits, cfg)
    assert [step for step, _, _ in history] == [0, 60, 120, 150]
    _, train_before, val_before = history[0]
    _, train_after, val_after = history[-1]
    assert train_after < train_before - 0.3
    assert val_after < val_before - 0.3


def test_no_training_leaves_the_weights_alone(rung, splits):
    model = build(rung)
    before = [parameter.clone() for parameter in model.parameters()]
    rung.train(model, *splits, tiny(rung, max_iters=0))
    assert all(map(torch.equal, before, model.parameters()))


def test_training_is_on_the_training_split(rung):
    """Two texts without a common token: what is learned of one is no help with the other."""
    cfg = tiny(rung, max_iters=60, eval_interval=60, eval_iters=20)
    torch.manual_seed(1)
    model = rung.LanguageModel(cfg, 4)
    train_data, val_data = np.tile(np.uint16([0, 1]), 50), np.tile(np.uint16([2, 3]), 50)
    history = rung.train(model, train_data, val_data, cfg)
    _, train_loss, val_loss = history[-1]
    assert train_loss < history[0][1] - 0.3
    assert val_loss > train_loss + 0.3


def test_estimate_loss_is_a_mean_without_dropout_or_gradients(splits):
    cfg = tiny(v5_gpt, dropout=0.9, eval_iters=4)
    model = shaken(build(v5_gpt, dropout=0.9)).train()
    torch.manual_seed(11)
    estimate = v5_gpt.estimate_loss(model, splits[1], cfg)
    assert model.training
    assert all(p.grad is None for p in model.parameters())

    model.eval()
    torch.manual_seed(11)
    losses = []
    for _ in range(4):
        x, y = data.get_batch(splits[1], cfg.batch_size, cfg.block_size, "cpu")
        losses.append(model(x, y)[1].item())
    assert estimate == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_model_saves_weights_only(attention_rung):
    model = build(attention_rung)
    parameters = model.named_parameters(remove_duplicate=False)  # v9's head is its embedding
    assert set(model.state_dict()) == {name for name, _ in parameters}


def test_the_text_of_the_tests_has_the_tokens_of_the_tests():
    assert data.CharTokenizer(TEXT).n_vocab == VOCAB_SIZE
