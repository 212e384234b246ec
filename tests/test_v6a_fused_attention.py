"""v6a_fused_attention.py computes what v5 does, without the scores of all pairs of positions."""

import pytest
import torch
from conftest import build, random_tokens, refused, shaken, tiny, tiny_flags
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import v5_gpt as v5
from part2_training import v6a_fused_attention as v6a

SIZES = {
    "tiny": {},
    "one head": {"n_head": 1, "n_layer": 1},
    "many heads": {"n_head": 12, "n_embd": 96, "n_layer": 11},  # block 10 sorts before block 2
}


def fused(state):
    """v5's weights, or their gradients, with the names and shapes that they have in v6a.

    The query weights of all heads, then the key weights, then the value weights make one matrix
    of (3 * n_embd, n_embd).
    """
    kept = {name: tensor for name, tensor in state.items() if ".heads." not in name}
    for attention in {name.split(".heads.")[0] for name in state if ".heads." in name}:
        heads = [name for name in state if name.startswith(f"{attention}.heads.")]
        parts = [n for part in ("query", "key", "value") for n in heads if f".{part}." in n]
        kept[f"{attention}.query_key_value.weight"] = torch.cat([state[name] for name in parts])
    return kept


def make_pair(**changes):
    """A v5 model and a v6a model with the same weights."""
    slow = shaken(build(v5, **changes))
    fast = build(v6a, **changes)
    fast.load_state_dict(fused(slow.state_dict()))
    return slow, fast


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", SIZES)
def test_logits_loss_and_gradients_are_those_of_v5(size):
    slow, fast = make_pair(**SIZES[size])
    x, y = random_tokens(2, 4, 5)
    expected, expected_loss = slow(x, y)
    logits, loss = fast(x, y)
    assert relative_error(logits, expected) < 1e-5
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    expected_loss.backward()
    loss.backward()
    actual = gradients(fast)
    for name, gradient in fused(gradients(slow)).items():
        assert relative_error(actual[name], gradient) < 1e-5, name


def test_samples_are_those_of_v5():
    """From a single token on, past the end of the window."""
    slow, fast = make_pair()
    prompt = random_tokens(2, 1)
    torch.manual_seed(3)
    expected = slow.generate(prompt, 12)
    torch.manual_seed(3)
    assert torch.equal(fast.generate(prompt, 12), expected)


class Shapes(TorchDispatchMode):
    """While it is active, it collects the shape of every tensor that PyTorch makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.seen.add(tuple(value.shape))
        return out


@pytest.mark.parametrize(
    ("script", "dropout", "expected"), [(v5, 0.0, True), (v6a, 0.0, False), (v6a, 0.5, True)]
)
def test_only_dropout_needs_a_tensor_of_all_pairs_of_positions(script, dropout, expected):
    model = build(script, dropout=dropout, block_size=7)
    with Shapes() as shapes:
        _, loss = model(*random_tokens(2, 2, 7))
        loss.backward()
    assert (2, 7, 18) in shapes.seen
    assert any(shape[-2:] == (7, 7) for shape in shapes.seen) == expected


class LikeCuda(torch.Tensor):
    """A tensor on the CPU that claims to be on a GPU."""

    is_cuda = True
    device = torch.device("cuda")


@pytest.mark.parametrize("kind", [torch.Tensor, LikeCuda])
def test_dropout_is_on_the_weights_and_after_the_projection_on_every_device(monkeypatch, kind):
    calls = []
    real = F.scaled_dot_product_attention

    def attend(query, key, value, **options):
        calls.append(options)
        return real(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    attention = v6a.MultiHeadAttention(tiny(v6a, dropout=0.5))
    dropped = []
    attention.dropout.register_forward_hook(lambda _, args, __: dropped.append(args[0].shape))
    x = torch.randn(4, 5, 18).as_subclass(kind)
    attention.train()(x)
    attention.eval()(x)
    assert calls == [
        {"dropout_p": 0.5, "is_causal": True},
        {"dropout_p": 0.0, "is_causal": True},
    ]
    assert dropped == [(4, 5, 18), (4, 5, 18)]


def test_numbers_of_heads_that_do_not_divide_the_width(capsys, corpus):
    line = refused(v6a, capsys, *tiny_flags(v6a), "--data", corpus, "--n_head", "7")
    assert "--n_embd 18: not a multiple of --n_head 7" in line
