"""v8_sampling.py: the cache, the filters compared with transformers, prompts, stops and streams."""

import builtins
import math

import data

import pytest
import torch
from conftest import TEXT, TINY, VOCAB_SIZE, random_tokens, refused, shaken, tiny, tiny_flags
from torch.nn import functional as F
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import v7_training as v7
import v8_sampling as v8


@pytest.fixture(autouse=True)
def quick_utilisation(monkeypatch):
    """Skip the matrix products that measure the machine; they take longer than a tiny run."""
    monkeypatch.setattr(v7, "repeat", lambda product, number: [1.0])
    monkeypatch.setattr(v8, "repeat", lambda product, number: [1.0])


def make_model(script=v8, **changes):
    """A model in eval mode, whose choices are far from even, with a context of 24 tokens."""
    torch.manual_seed(3)
    cfg = tiny(script, **{"block_size": 24} | changes)
    return shaken(script.LanguageModel(cfg, VOCAB_SIZE).eval())


# ---- the cache


def generate_uncached(model, idx, max_new_tokens, **how):
    """Generate as v7 does, reading the whole context for each token, but choose as v8 does."""
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.block_size :])
        idx = torch.cat((idx, v8.choose_token(logits[:, -1], idx, **how)), dim=1)
    return idx


@pytest.mark.parametrize(
    ("sizes", "how", "batch_size", "length"),
    [
        ({}, {}, 1, 1),
        ({"n_head": 1, "n_layer": 1}, {"temperature": 0}, 5, 7),
        ({"n_head": 12, "n_embd": 96, "n_layer": 4}, {}, 5, 23),
        ({}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3}, 5, 7),
        ({}, {}, 3, 24),
    ],
)
def test_cached_text_equals_uncached_text(sizes, how, batch_size, length):
    """Until the context is full; one more token can be chosen then, because nothing reads it."""
    model = make_model(**sizes)
    idx = random_tokens(batch_size, length)
    n = 24 + 1 - length
    torch.manual_seed(5)
    expected = generate_uncached(model, idx, n, **how)
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, n, **how), expected)


def test_the_text_is_that_of_v7():
    old, new = make_model(v7), make_model(v8)
    idx = random_tokens(3, 2)
    torch.manual_seed(5)
    expected = old.generate(idx, 23)
    torch.manual_seed(5)
    assert torch.equal(new.generate(idx, 23), expected)


def test_cached_logits_equal_those_of_the_whole_context():
    model = make_model()
    idx = random_tokens(3, 24)
    expected, _ = model(idx)
    cache = torch.empty(2, 2, 3, 3, 24, 6)
    with torch.no_grad():
        first, _ = model(idx[:, :10], cache=cache[..., :10, :])
        torch.testing.assert_close(first, expected[:, :10])
        for end in range(11, 25):
            logits, _ = model(idx[:, end - 1 : end], cache=cache[..., :end, :])
            torch.testing.assert_close(logits[:, 0], expected[:, end - 1])


@pytest.mark.parametrize(("block_size", "length"), [(1, 1), (2, 3), (5, 20), (8, 3)])
def test_a_full_cache_starts_again_from_the_last_half_of_the_context(block_size, length):
    model = make_model(block_size=block_size)
    idx = random_tokens(2, length)
    torch.manual_seed(5)
    actual = model.generate(idx, 30)
    torch.manual_seed(5)
    begin = max(0, length - block_size)  # the first token in view
    for _ in range(30):
        if idx.shape[1] - begin > block_size:
            begin = idx.shape[1] - max(1, block_size // 2)
        logits, _ = model(idx[:, begin:])
        idx = torch.cat((idx, v8.choose_token(logits[:, -1], idx)), dim=1)
    assert torch.equal(actual, idx)


def test_each_step_reads_one_token_and_uses_the_same_buffer(monkeypatch):
    model = make_model()
    lengths, places = [], set()
    real = model.forward

    def forward(idx, targets=None, cache=None):
        lengths.append(idx.shape[1])
        places.add(cache.data_ptr())
        return real(idx, targets, cache)

    monkeypatch.setattr(model, "forward", forward)
    model.generate(torch.zeros(2, 4, dtype=torch.int64), 40)
    assert lengths == [4] + [1] * 20 + [12] + [1] * 12 + [12] + [1] * 5
    assert len(places) == 1


def test_training_can_go_on_after_generation():
    model = make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    idx = torch.zeros(1, 2, dtype=torch.int64)
    out = model.generate(idx, 3)
    assert not out.is_inference()
    assert torch.is_grad_enabled()
    model(out[:, :-1], out[:, 1:])[1].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))
    stream = model.stream(idx, 3)
    next(stream)
    assert torch.is_grad_enabled(), "between two tokens too"


def test_the_layout_of_weights_in_memory_changes_no_result():
    model = make_model()
    idx = random_tokens(2, 3)
    expected, before = model.generate(idx, 20, temperature=0), model(idx)[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    v8.lay_out_for_rows(model)
    assert model.blocks[0].feed_forward.expansion.weight.stride() == (1, 4 * TINY["n_embd"])
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
    torch.testing.assert_close(model(idx)[0], before)
    assert torch.equal(model.generate(idx, 20, temperature=0), expected)


def test_text_is_generated_in_float32(monkeypatch):
    monkeypatch.setattr(v8, "choose_dtype", lambda cfg: "bfloat16")
    model = make_model()
    seen = []
    model.blocks[0].feed_forward.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    idx = torch.zeros(1, 3, dtype=torch.int64)
    model(idx)
    model.generate(idx, 2)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


# ---- the choice of a token


def make_logits() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    few = torch.tensor([-3.0, 0.0, 0.0, 2.0, 2.0])
    return {
        "random": torch.randn(7, 65) * 3,
        "large vocabulary": torch.randn(2, 50257),
        "ties": few[torch.randint(5, (7, 65))],
        "equal": torch.zeros(2, 65),
        "enormous": torch.randn(3, 65) * 1e30,
        "one possible": torch.full((2, 65), -math.inf).index_fill(1, torch.tensor([7]), 1.0),
        "some impossible": torch.randn(3, 65).masked_fill(torch.rand(3, 65) < 0.4, -math.inf),
        "one token": torch.zeros(3, 1),
    }


LOGITS = make_logits()


def assert_same_choices(actual, expected):
    assert torch.equal(actual, expected)
    sums = F.softmax(actual, dim=-1).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("kind", LOGITS)
def test_each_filter_equals_that_of_transformers(kind):
    logits = LOGITS[kind].clone()
    idx = torch.randint(logits.shape[1], (len(logits), 12))
    for penalty in (0.5, 1.3, 10.0):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone())
        assert_same_choices(v8.apply_repetition_penalty(logits, idx, penalty), expected)
    for temperature in (1e-6, 0.5, 3.0):
        expected = TemperatureLogitsWarper(temperature)(None, logits.clone())
        assert_same_choices(v8.apply_temperature(logits, temperature), expected)
    for top_k in (1, 2, 40, 65, 10**6):
        expected = TopKLogitsWarper(top_k)(None, logits.clone())
        assert_same_choices(v8.apply_top_k(logits, top_k), expected)
    for top_p in (1e-9, 0.1, 0.9, 0.999, 1.0):
        expected = TopPLogitsWarper(top_p)(None, logits.clone())
        assert_same_choices(v8.apply_top_p(logits, top_p), expected)
    v8.choose_token(logits, idx, 0.5, 3, 0.5, 2.0)
    assert torch.equal(logits, LOGITS[kind]), "filters must not change their input"


def probabilities_drawn_from(logits, idx, **how):
    """The probabilities that choose_token draws from."""
    seen = []
    real = torch.multinomial

    def multinomial(probabilities, num_samples):
        seen.append(probabilities)
        return real(probabilities, num_samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        token = v8.choose_token(logits, idx, **how)
    assert token.shape == (len(logits), 1)
    assert (seen[0].gather(1, token) > 0).all()
    return seen[0]


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 5, 0.8), (5.0, 10**6, 0.3), (1e-6, 65536, 1.0)]
)
def test_the_filters_are_in_the_order_of_transformers(kind, temperature, top_k, top_p):
    logits = LOGITS[kind]
    idx = torch.randint(logits.shape[1], (len(logits), 6))
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1.2)
    actual = probabilities_drawn_from(logits, idx, **how)
    scores = RepetitionPenaltyLogitsProcessor(1.2)(idx, logits.clone())
    scores = TemperatureLogitsWarper(temperature)(idx, scores)
    scores = TopKLogitsWarper(top_k)(idx, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(idx, scores)
    torch.testing.assert_close(actual, F.softmax(scores, dim=-1))


def test_extreme_settings_still_give_probabilities():
    for temperature, top_p, penalty in ((1e-6, 1e-9, 0.01), (1e9, 1.0, 100.0), (1e-6, 1.0, 100.0)):
        how = dict(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
        for kind, logits in LOGITS.items():
            idx = torch.zeros(len(logits), 1, dtype=torch.int64)
            sums = probabilities_drawn_from(logits / 1e3, idx, **how).sum(-1)
            torch.testing.assert_close(sums, torch.ones(len(idx)), msg=kind)


def test_by_default_a_choice_is_drawn_from_the_softmax():
    actual = probabilities_drawn_from(LOGITS["random"], torch.zeros(7, 3).long())
    assert torch.equal(actual, F.softmax(LOGITS["random"], dim=-1))


@pytest.mark.parametrize("temperature", [0, 1e-46, 1e-7])
def test_temperature_0_takes_the_likeliest_token_and_draws_nothing(temperature):
    logits, idx = LOGITS["random"], torch.zeros(7, 1).long()
    before = torch.get_rng_state()
    assert torch.equal(v8.choose_token(logits, idx, temperature), logits.argmax(1, True))
    assert torch.equal(torch.get_rng_state(), before)


def test_temperatures_just_above_0_take_the_likeliest_token_too():
    logits, idx = LOGITS["random"], torch.zeros(7, 1).long()
    token = v8.choose_token(logits, idx, temperature=1e-6)
    assert torch.equal(token, logits.argmax(1, True))


def test_the_repetition_penalty_works_at_temperature_0():
    likeliest = LOGITS["random"].argmax(1, True)
    how = {"temperature": 0, "repetition_penalty": 100.0}
    assert not (v8.choose_token(LOGITS["random"], likeliest, **how) == likeliest).any()


# ---- from tokens to text


class Bytes:
    """A tokenizer of single bytes; a character takes up to four of them."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def pieces(text, stop=""):
    return list(v8.text_of(iter(text.encode("utf-8")), Bytes(), stop))


def test_text_comes_one_character_at_a_time():
    text = "naïve 世界 🙂 end"
    assert [piece for piece in pieces(text) if piece] == list(text)


def test_bytes_that_are_not_text_become_question_marks():
    tokens = [*"a世".encode(), 0xFF, 0xFE, *b"b", *"世".encode()[:2]]
    expected = bytes(tokens).decode("utf-8", errors="replace")
    assert "".join(v8.text_of(iter(tokens), Bytes(), "")) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", "\n\n", "one"),
        ("one two", "\n\n", "one two"),
        ("one\n", "\n\n", "one\n"),
        ("aaab", "aab", "a"),
        ("abababc", "ababc", "ab"),
        ("END", "END", ""),
        ("so ENENDX", "END", "so EN"),
        ("x世界y", "世界", "x"),
        ("x", "x" * 50, "x"),
        ("ab\ufffd", "\ufffd", "ab"),
        ("ab\ufffdc", "\ufffd", "ab"),
        ("", "stop", ""),
    ],
)
def test_text_ends_before_the_stop(text, stop, expected):
    made = pieces(text, stop)
    assert "".join(made) == expected
    for n in range(len(made)):  # nothing that was shown is taken back
        assert expected.startswith("".join(made[:n]))


def test_a_stop_may_be_part_of_a_token():
    words = ["one. ", "two; th", "ree"]

    class Words:
        def decode(self, tokens):
            return "".join(words[token] for token in tokens)

    assert "".join(v8.text_of(iter(range(3)), Words(), "; t")) == "one. two"
    shown = list(v8.text_of(iter(range(3)), Words(), "other"))
    assert shown == ["one. ", "two; th", "ree", ""]


# ---- the command line


@pytest.fixture(scope="module")
def sampling(tmp_path_factory):
    """Flags to sample from the checkpoint of a short run of v7."""
    folder = tmp_path_factory.mktemp("v7")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    more = ["--data", str(folder / "corpus.txt"), "--out_dir", str(folder / "out")]
    v7.main([*tiny_flags(v7), *more])
    return [*tiny_flags(v8, max_new_tokens=60), *more, "--sample_only"]


def output(capsys, *flags):
    v8.main([str(flag) for flag in flags])
    return capsys.readouterr().out


def test_a_checkpoint_of_v7_gives_the_text_of_v7(sampling, capsys):
    sampling = [*sampling, "--max_new_tokens", "4"]
    v7.main(sampling)
    expected = capsys.readouterr().out
    assert output(capsys, *sampling) == expected
    assert len(expected) == 1 + 4 + 1


def test_by_default_the_checkpoint_of_v7_is_sampled():
    assert v8.Config.out_dir == v7.Config.out_dir


def test_a_checkpoint_of_v8_can_be_sampled_and_resumed(corpus, tmp_path, capsys):
    mine = [*tiny_flags(v8, out_dir=tmp_path / "mine"), "--data", str(corpus)]
    output(capsys, *mine)
    assert len(output(capsys, *mine, "--sample_only", "--prompt", "The ")) == 4 + 7 + 1
    assert "step 6:" in output(capsys, *mine, "--resume", "--max_iters", "6")


def test_samples_are_printed_one_after_the_other(sampling, capsys):
    flags = [*sampling, "--num_samples", "3", "--prompt", "The ", "--seed", "4"]
    samples = output(capsys, *flags).removesuffix("\n").split("\n---\n")
    assert len(samples) == len(set(samples)) == 3
    assert all(len(sample) == 4 + 60 and sample.startswith("The ") for sample in samples)
    cfg, tokenizer = data.read_flags(v8.Config, "", flags), data.CharTokenizer(TEXT)
    torch.manual_seed(4)  # as main() does, and then it makes a model before it draws a token
    state = v8.load_checkpoint(cfg)
    model = v8.LanguageModel(cfg, VOCAB_SIZE).eval()
    model.load_state_dict(state["model"])
    idx = torch.tensor([tokenizer.encode("The ")]).repeat(3, 1)
    assert samples == [tokenizer.decode(row) for row in model.generate(idx, 60).tolist()]


def test_each_sample_stops_at_its_own_place(sampling, capsys):
    flags = [*sampling, "--num_samples", "4", "--max_new_tokens", "200"]
    whole = output(capsys, *flags).removesuffix("\n").split("\n---\n")
    assert all("o" in sample for sample in whole)
    stopped = output(capsys, *flags, "--stop", "o").removesuffix("\n").split("\n---\n")
    assert stopped == [sample.partition("o")[0] for sample in whole]


def test_generation_ends_when_all_samples_have_ended(sampling, capsys, monkeypatch):
    steps = []
    real = v8.choose_token
    monkeypatch.setattr(v8, "choose_token", lambda *a, **k: steps.append(1) or real(*a, **k))
    flags = [*sampling, "--num_samples", "4", "--max_new_tokens", "5000", "--stop", "o"]
    samples = output(capsys, *flags).removesuffix("\n").split("\n---\n")
    assert len(steps) == max(map(len, samples)) < 5000


def test_flags_decide_the_choice(sampling, capsys, monkeypatch):
    seen = []
    real = v8.choose_token
    monkeypatch.setattr(v8, "choose_token", lambda *a, **k: seen.append(k) or real(*a, **k))
    values = {"temperature": 0.7, "top_k": 7, "top_p": 0.8, "repetition_penalty": 1.2}
    output(capsys, *sampling, *(f"--{name}={value}" for name, value in values.items()))
    assert seen == [values] * 60


def test_greedy_text_is_the_same_for_every_seed(sampling, capsys):
    greedy = [["--temperature", "0"], ["--top_k", "1"]]
    outputs = [output(capsys, *sampling, *g, "--seed", seed) for g in greedy for seed in (1, 2)]
    assert len(set(outputs)) == 1
    assert output(capsys, *sampling, "--seed", 1) != output(capsys, *sampling, "--seed", 2)


def test_a_prompt_can_come_from_a_file(sampling, capsys, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffThe quick\r\nbrown fox".encode())
    out = output(capsys, *sampling, "--prompt_file", path)
    assert out == output(capsys, *sampling, "--prompt", "The quick\nbrown fox")
    assert out.startswith("The quick\nbrown fox")


def test_a_prompt_file_may_have_the_name_of_a_corpus(sampling, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("python", "shakespeare"):
        (tmp_path / name).write_text("The fox", encoding="utf-8")
        assert output(capsys, *sampling, "--prompt_file", name).startswith("The fox")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "-0.1"), ("temperature", "nan"), ("top_p", "0"), ("top_p", "1.01"),
        ("top_k", "0"), ("repetition_penalty", "0"), ("repetition_penalty", "101"),
        ("num_samples", "0"), ("num_samples", "1025"), ("stop", "Zebra"),
        ("prompt_file", "missing.txt"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(sampling, capsys, name, value):
    assert f"--{name}" in refused(v8, capsys, *sampling, f"--{name}={value}")


def test_unknown_characters_in_a_prompt_file_are_refused(sampling, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("Zebra", encoding="utf-8")
    line = refused(v8, capsys, *sampling, "--prompt_file", tmp_path / "prompt.txt")
    assert "--prompt_file: the corpus has no 'Z'" in line


def test_each_character_is_shown_before_the_next_is_chosen(sampling, monkeypatch):
    steps, shown = [], []
    real = v8.choose_token
    monkeypatch.setattr(v8, "choose_token", lambda *a, **k: steps.append(1) or real(*a, **k))

    def note(text="", end="\n", flush=False, file=None):
        if file is None:
            shown.append((text, end, flush, len(steps)))

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "print", note)
        v8.main([*sampling, "--prompt", "The ", "--max_new_tokens", "9"])
    assert shown[0] == ("The ", "", True, 0)
    assert [made for _, _, _, made in shown[1:10]] == list(range(1, 10))
    assert all(len(text) == 1 and not end and flush for text, end, flush, _ in shown[1:10])
