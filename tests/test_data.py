"""data/__init__.py: the tokenizer, the split and batches."""

import numpy as np
import pytest
import torch

import data


def test_tokenizer_round_trip():
    text = "Grüße, 世界!\n\tþ🙂"
    tokenizer = data.CharTokenizer(text)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.n_vocab == len(set(text))
    assert sorted(set(tokens)) == list(range(tokenizer.n_vocab))
    assert all(type(token) is int for token in tokens)


def test_tokenizer_names_what_it_lacks():
    with pytest.raises(data.InputError, match="'x', 'é'"):
        data.CharTokenizer("abc").encode("axbé")


def test_a_text_without_newlines_can_still_start_a_sample():
    assert data.CharTokenizer("abc").encode("\n") == [0]


def test_the_split_is_nine_to_one_and_in_order():
    train, val = data.split(list(range(1000)), block_size=8)
    assert train.dtype == val.dtype == np.uint16
    assert train.tolist() == list(range(900))
    assert val.tolist() == list(range(900, 1000))


def test_the_least_text_is_just_enough():
    train, val = data.split([0] * 81, block_size=8)
    assert min(len(train), len(val)) == 9
    data.get_batch(val, 4, 8, "cpu")
    with pytest.raises(data.InputError, match="80 tokens .* --block_size 8, .* 81"):
        data.split([0] * 80, block_size=8)


def test_too_many_distinct_characters_are_refused():
    with pytest.raises(data.InputError, match="65,536"):
        data.CharTokenizer("".join(map(chr, range(2**16 + 1))))


def test_targets_are_inputs_shifted_by_one():
    tokens = np.arange(50_000, dtype=np.uint16)
    x, y = data.get_batch(tokens, 16, 8, "cpu")
    assert x.shape == y.shape == (16, 8)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, x[:, :1] + torch.arange(8))


def test_batches_reach_the_first_and_the_last_window_and_no_further():
    tokens = np.arange(12, dtype=np.uint16)
    x, y = data.get_batch(tokens, 2000, 8, "cpu")
    assert x[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert y.max().item() == 11


def test_batches_come_from_a_memory_map_too(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(300, dtype=np.uint16).tofile(path)
    x, y = data.get_batch(np.memmap(path, dtype=np.uint16, mode="r"), 4, 8, "cpu")
    assert torch.equal(y, x + 1)


def test_the_seed_decides_the_batches():
    tokens = np.arange(50_000, dtype=np.uint16)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(data.get_batch(tokens, 4, 8, "cpu")[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_text_that_is_too_short_is_named():
    with pytest.raises(data.InputError, match="^--data my.txt: 50 tokens are too few"):
        data.split(list(range(50)), 5, "my.txt")
