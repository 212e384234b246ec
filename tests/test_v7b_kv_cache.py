"""v7b_kv_cache.py: the cache, which must not change the text."""

import pytest
import torch
from conftest import build, random_tokens, tiny, tiny_flags

from part3_generation import v7a_sampling as v7a
from part3_generation import v7b_kv_cache as v7b
from support import hardware


def decisive(model):
    """The model with random weights that make each choice uneven, and depend on the whole text."""
    for name, parameter in model.named_parameters():
        mean = float(parameter.ndim == 1 and name.endswith("weight"))  # those of LayerNorm
        std = 0.5 if parameter.ndim == 2 else 0.1
        torch.nn.init.normal_(parameter, mean, std)
    return model


def make_pair(**changes):
    """Models of v7a and v7b with the same weights."""
    sizes = {"block_size": 24} | changes
    old, new = decisive(build(v7a, **sizes)).eval(), build(v7b, **sizes).eval()
    new.load_state_dict(old.state_dict())
    return old, new


def texts(models, idx, n, seed=5, **settings):
    """What each of several models generates from the same random numbers."""
    cfg = tiny(v7b, **{"block_size": 24} | settings)
    out = []
    for model in models:
        torch.manual_seed(seed)
        out.append(torch.cat([idx, *model.stream(idx, n, cfg)], dim=1))
    return out


# ---- one cache


def test_a_cache_returns_all_it_was_given_in_order():
    cache = v7b.KVCache(tiny(v7b), 2, torch.device("cpu"))
    assert cache.length == 0
    keys, values = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    for begin, end in ((0, 2), (2, 3), (3, 5)):
        key, value = cache.append(keys[:, :, begin:end], values[:, :, begin:end])
        assert cache.length == end
        assert torch.equal(key, keys[:, :, :end])
        assert torch.equal(value, values[:, :, :end])


def test_a_cache_has_room_for_block_size_tokens_from_the_start():
    cache = v7b.KVCache(tiny(v7b), 2, torch.device("cpu"))
    for tensor in (cache.keys, cache.values):
        assert tensor.shape == (2, 3, 5, 6)
        assert tensor.dtype == torch.float32
    before = cache.keys.data_ptr(), cache.values.data_ptr()
    key, value = cache.append(torch.zeros(2, 3, 5, 6), torch.zeros(2, 3, 5, 6))
    assert (key.data_ptr(), value.data_ptr()) == before, "nothing is copied"


def test_a_cache_is_on_the_device_that_it_was_given():
    cache = v7b.KVCache(tiny(v7b), 2, torch.device("meta"))
    assert (cache.keys.device.type, cache.values.device.type) == ("meta", "meta")


# ---- the same function


def test_without_caches_nothing_has_changed():
    old, new = make_pair()
    idx, targets = random_tokens(3, 24), random_tokens(3, 24)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("length", [1, 2, 10, 23, 24])
def test_tokens_may_come_to_the_cache_one_by_one_after_a_text_of_any_length(length):
    _, model = make_pair()
    idx = random_tokens(3, 24)
    expected, _ = model(idx)
    caches = [v7b.KVCache(tiny(v7b, block_size=24), 3, idx.device) for _ in model.blocks]
    begin = 0
    for piece in idx.split([length] + [1] * (24 - length), dim=1):
        logits, _ = model(piece, caches=caches)
        end = begin + piece.shape[1]
        torch.testing.assert_close(logits, expected[:, begin:end])
        begin = end
    assert [cache.length for cache in caches] == [24, 24]


def test_the_loss_through_empty_caches_is_the_same():
    _, model = make_pair()
    idx, targets = random_tokens(3, 24), random_tokens(3, 24)
    caches = [v7b.KVCache(tiny(v7b, block_size=24), 3, idx.device) for _ in model.blocks]
    _, loss = model(idx, targets, caches)
    torch.testing.assert_close(loss, model(idx, targets)[1])


@pytest.mark.parametrize(
    ("sizes", "sampling", "batch_size", "length"),
    [
        ({}, {}, 1, 1),
        ({"n_head": 1, "n_layer": 1}, {"temperature": 0.0}, 5, 7),
        ({"n_head": 12, "n_embd": 96, "n_layer": 4}, {}, 5, 23),
        ({}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3}, 5, 7),
        ({}, {"temperature": 0.0, "repetition_penalty": 1.3}, 2, 1),
        ({}, {}, 3, 24),
        ({"block_size": 1}, {}, 2, 1),
    ],
)
def test_the_text_is_that_of_v7a_while_it_fits(sizes, sampling, batch_size, length):
    """The last token may be the one after block_size: it is chosen, but never processed."""
    pair = make_pair(**sizes)
    n = pair[0].block_size + 1 - length
    expected, actual = texts(pair, random_tokens(batch_size, length), n, **sizes, **sampling)
    assert torch.equal(actual, expected)
    assert actual.shape == (batch_size, length + n)


def test_each_step_processes_one_token(monkeypatch):
    """Until the caches are full; then 12 of 24 tokens are processed again."""
    _, model = make_pair()
    lengths = []
    real = model.forward

    def forward(idx, targets=None, caches=None):
        lengths.append(idx.shape[1])
        return real(idx, targets, caches)

    monkeypatch.setattr(model, "forward", forward)
    texts([model], random_tokens(2, 4), 40)
    assert lengths == [4] + [1] * 20 + [12] + [1] * 12 + [12] + [1] * 5


def test_of_a_text_longer_than_the_caches_the_end_is_processed():
    _, model = make_pair()
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    idx = random_tokens(2, 30)
    (out,) = texts([model], idx, 3)
    for context, expected in zip(seen, (idx[:, -24:], out[:, 19:31], out[:, 31:32]), strict=True):
        assert torch.equal(context, expected)


@pytest.mark.parametrize(
    ("block_size", "length"), [(1, 1), (1, 3), (2, 1), (2, 3), (5, 5), (5, 20), (8, 3)]
)
def test_full_caches_start_again_with_the_last_half_of_the_text(block_size, length):
    """Half of an odd block_size is rounded up."""
    _, model = make_pair(block_size=block_size)
    idx = random_tokens(2, length)
    (actual,) = texts([model], idx, 30, block_size=block_size)
    torch.manual_seed(5)
    begin = max(0, length - block_size)  # the first token in view
    for _ in range(30):
        if idx.shape[1] - begin > block_size:
            begin = idx.shape[1] - {1: 1, 2: 1, 5: 3, 8: 4}[block_size]
        logits, _ = model(idx[:, begin:])
        idx = torch.cat((idx, v7b.choose_token(logits[:, -1], idx, tiny(v7b))), dim=1)
    assert torch.equal(actual, idx)


def test_gradients_are_off_for_a_token_and_on_again_between_two():
    _, model = make_pair()
    before = [parameter.clone() for parameter in model.parameters()]
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for _ in model.stream(random_tokens(1, 2), 3, tiny(v7b, block_size=24)):
        assert torch.is_grad_enabled()
    (out,) = texts([model], random_tokens(1, 2), 3)
    assert seen == [False] * 6
    model.train()
    model(out[:, :-1], out[:, 1:])[1].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


# ---- main


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_v7a_gives_the_text_of_v7a(corpus, tmp_path, capsys, monkeypatch, dtype):
    """Whatever the dtype of matmuls: it is that of training, and tokens are chosen in float32."""
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    flags = tiny_flags(v7a, out_dir=tmp_path, block_size=24)
    v7a.main([*flags, "--data", str(corpus)])
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    state["model"] = decisive(build(v7a, block_size=24)).state_dict()
    torch.save(state, tmp_path / "best.pt")
    capsys.readouterr()
    sampling = ["--sample_only", "--out_dir", str(tmp_path), "--max_new_tokens", "21"]
    sampling += ["--prompt", "The ", "--num_samples", "2"]
    v7a.main([*sampling, "--dtype", "float32"])
    expected = capsys.readouterr().out
    v7b.main([*sampling, "--dtype", dtype])
    assert capsys.readouterr().out == expected
    assert len(expected) == 2 * (4 + 21 + 1) + 4
