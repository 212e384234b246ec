"""v7b_kv_cache.py: the cache, which must not change the text, and the dtype of the weights."""

import pytest
import torch
from conftest import TEXT, build, random_tokens, tiny, tiny_flags

import data
from part3_generation import v7a_sampling as v7a
from part3_generation import v7b_kv_cache as v7b
from support import hardware

CHARACTERS = data.CharTokenizer(TEXT).characters


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


def make_caches(model, batch_size):
    return model.make_caches(batch_size)


def texts(models, idx, n, seed=5):
    """What each of several models generates from the same random numbers."""
    out = []
    for model in models:
        torch.manual_seed(seed)
        out.append(model.generate(idx, n))
    return out


# ---- one cache


def test_a_cache_returns_all_it_was_given_in_order():
    cfg = tiny(v7b)
    cache = v7b.KVCache(cfg, 2, torch.empty(0))
    assert cache.length == 0
    keys, values = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    for begin, end in ((0, 2), (2, 3), (3, 5)):
        key, value = cache.append(keys[:, :, begin:end], values[:, :, begin:end])
        assert cache.length == end
        assert torch.equal(key, keys[:, :, :end])
        assert torch.equal(value, values[:, :, :end])


def test_a_cache_has_room_for_block_size_tokens_from_the_start():
    cache = v7b.KVCache(tiny(v7b), 2, torch.empty(0, dtype=torch.bfloat16))
    for tensor in (cache.keys, cache.values):
        assert tensor.shape == (2, 3, 5, 6)
        assert tensor.dtype == torch.bfloat16
    before = cache.keys.data_ptr()
    key, _ = cache.append(torch.zeros(2, 3, 5, 6), torch.zeros(2, 3, 5, 6))
    assert key.data_ptr() == before, "nothing is copied"


# ---- the same function


def test_without_caches_nothing_has_changed():
    old, new = make_pair()
    idx, targets = random_tokens(3, 24), random_tokens(3, 24)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("lengths", [[24], [1] * 24, [10, 1, 1, 12], [3, 4, 1, 9, 7], [1, 23]])
def test_tokens_may_come_to_the_cache_in_pieces_of_any_length(lengths):
    _, model = make_pair()
    idx = random_tokens(3, 24)
    expected, _ = model(idx)
    caches = make_caches(model, 3)
    begin = 0
    for length in lengths:
        logits, _ = model(idx[:, begin : begin + length], caches=caches)
        torch.testing.assert_close(logits, expected[:, begin : begin + length])
        begin += length
    assert [cache.length for cache in caches] == [24, 24]


@pytest.mark.parametrize(
    ("changes", "batch_size", "length"),
    [
        ({}, 1, 1),
        ({"temperature": 0.0, "n_head": 1, "n_layer": 1}, 5, 7),
        ({"n_head": 12, "n_embd": 96, "n_layer": 4}, 5, 23),
        ({"temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3}, 5, 7),
        ({"temperature": 0.0, "repetition_penalty": 1.3}, 2, 1),
        ({}, 3, 24),
        ({"block_size": 1}, 2, 1),
    ],
)
def test_the_text_is_that_of_v7a_while_it_fits(changes, batch_size, length):
    """The last token may be the one after block_size: it is chosen, but never processed."""
    pair = make_pair(**changes)
    n = pair[0].block_size + 1 - length
    expected, actual = texts(pair, random_tokens(batch_size, length), n)
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
    model.generate(random_tokens(2, 4), 40)
    assert lengths == [4] + [1] * 20 + [12] + [1] * 12 + [12] + [1] * 5


@pytest.mark.parametrize(
    ("block_size", "length"), [(1, 1), (1, 3), (2, 1), (2, 3), (5, 5), (5, 20), (8, 3)]
)
def test_full_caches_start_again_with_the_last_half_of_the_text(block_size, length):
    """Half of an odd block_size is rounded up."""
    _, model = make_pair(block_size=block_size)
    idx = random_tokens(2, length)
    (actual,) = texts([model], idx, 30)
    torch.manual_seed(5)
    begin = max(0, length - block_size)  # the first token in view
    for _ in range(30):
        if idx.shape[1] - begin > block_size:
            begin = idx.shape[1] - {1: 1, 2: 1, 5: 3, 8: 4}[block_size]
        logits, _ = model(idx[:, begin:])
        idx = torch.cat((idx, v7b.choose_token(logits[:, -1], idx, model.cfg)), dim=1)
    assert torch.equal(actual, idx)


def test_gradients_are_off_for_a_token_and_on_again_between_two():
    _, model = make_pair()
    before = [parameter.clone() for parameter in model.parameters()]
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for _ in model.stream(random_tokens(1, 2), 3):
        assert torch.is_grad_enabled()
    out = model.generate(random_tokens(1, 2), 3)
    assert seen == [False] * 6
    model.train()
    model(out[:, :-1], out[:, 1:])[1].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


# ---- main


def test_a_checkpoint_of_v7a_gives_the_text_of_v7a(corpus, tmp_path, capsys):
    flags = tiny_flags(v7a, out_dir=tmp_path, block_size=24)
    v7a.main([*flags, "--data", str(corpus)])
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    state["model"] = decisive(build(v7a, block_size=24)).state_dict()
    torch.save(state, tmp_path / "best.pt")
    capsys.readouterr()
    sampling = ["--sample_only", "--out_dir", str(tmp_path), "--max_new_tokens", "21"]
    sampling += ["--prompt", "The ", "--num_samples", "2", "--dtype", "float32"]
    v7a.main(sampling)
    expected = capsys.readouterr().out
    v7b.main(sampling)
    assert capsys.readouterr().out == expected
    assert len(expected) == 2 * (4 + 21 + 1) + 4


@pytest.mark.parametrize(
    ("n_embd", "dtype", "supported", "expected"),
    [
        (128, "auto", True, torch.bfloat16),
        (18, "bfloat16", True, torch.bfloat16),
        (18, "auto", True, torch.float32),
        (128, "float32", True, torch.float32),
        (128, "auto", False, torch.float32),
    ],
)
def test_weights_have_the_dtype_of_the_matmuls_while_sampling(
    corpus, capsys, monkeypatch, n_embd, dtype, supported, expected
):
    """But a token is chosen in float32, and what is trained and saved is float32, too."""
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: supported)
    weights, logits, trained = set(), set(), set()
    real_stream, real_choose, real_train = v7b.LanguageModel.stream, v7b.choose_token, v7b.train

    def stream(model, *args):
        weights.update(parameter.dtype for parameter in model.parameters())
        return real_stream(model, *args)

    def choose_token(*args):
        logits.add(args[0].dtype)
        return real_choose(*args)

    def train(model, *args):
        trained.update(parameter.dtype for parameter in model.parameters())
        return real_train(model, *args)

    monkeypatch.setattr(v7b.LanguageModel, "stream", stream)
    monkeypatch.setattr(v7b, "choose_token", choose_token)
    monkeypatch.setattr(v7b, "train", train)
    sizes = {"n_embd": n_embd, "n_head": 2, "n_layer": 1, "dtype": dtype}
    flags = [*tiny_flags(v7b, max_iters=1, max_new_tokens=30, **sizes), "--data", str(corpus)]
    v7b.main([*flags, "--prompt", "The "])
    assert (weights, logits, trained) == ({expected}, {torch.float32}, {torch.float32})
    sample = capsys.readouterr().out.partition("\nvalidation loss ")[2].partition("\n")[2]
    assert sample.startswith("The ")
    assert len(sample) == 4 + 30 + 1
    assert set(sample) <= set(CHARACTERS)


def test_generation_in_bfloat16_is_close_to_that_in_float32():
    _, model = make_pair()
    idx = random_tokens(3, 24)
    expected, _ = model(idx)
    model.bfloat16()
    caches = model.make_caches(3)
    with torch.no_grad():
        pieces = [model(piece, caches=caches)[0] for piece in idx.split([9, 1, 1, 13], dim=1)]
    logits = torch.cat(pieces, dim=1)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
