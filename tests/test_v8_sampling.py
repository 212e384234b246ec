"""v8_sampling.py: the cache, the filters beside those of transformers, prompts, stops, streams."""

import builtins
import dataclasses
import itertools
import math

import pytest
import torch
from conftest import TEXT, TINY, VOCAB_SIZE, tiny, tiny_flags
from torch.nn import functional as F
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import data
import v7_training as v7
import v8_sampling as v8

CHARACTERS = data.CharTokenizer(TEXT).characters
SIZES = {
    "tiny": {"block_size": 24},
    "one head": {"block_size": 24, "n_head": 1, "n_layer": 1},
    "twelve heads": {"block_size": 24, "n_head": 12, "n_embd": 96, "n_layer": 4},
}


def model_of(rung=v8, **changes):
    """A model in eval mode, with weights so large that its choices are far from even."""
    torch.manual_seed(3)
    model = rung.LanguageModel(tiny(rung, **changes), VOCAB_SIZE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def uncached(model, idx, max_new_tokens, **how):
    """The loop of v7, which reads the whole context for each token; choices as v8 makes them."""
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.block_size :])
        idx = torch.cat((idx, v8.choose_token(logits[:, -1], idx, **how)), dim=1)
    return idx


CHOICES = {
    "plain": {},
    "greedy": {"temperature": 0},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("length", [1, 7, 23, 24])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_cached_equals_uncached(size, choice, length, batch_size):
    """Up to block_size positions read: the last token is one that no step reads any more."""
    model = model_of(**SIZES[size])
    idx = torch.randint(VOCAB_SIZE, (batch_size, length))
    n = 24 + 1 - length
    torch.manual_seed(5)
    expected = uncached(model, idx, n, **CHOICES[choice])
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, n, **CHOICES[choice]), expected)


def test_the_text_is_that_of_v7():
    old, new = model_of(v7, block_size=24), model_of(v8, block_size=24)
    idx = torch.randint(VOCAB_SIZE, (3, 2))
    torch.manual_seed(5)
    expected = old.generate(idx, 23)
    torch.manual_seed(5)
    assert torch.equal(new.generate(idx, 23), expected)


def test_cached_logits_are_those_of_the_whole_context():
    model = model_of(block_size=24)
    idx = torch.randint(VOCAB_SIZE, (3, 24))
    expected, _ = model(idx)
    cache = torch.empty(2, 2, 3, 3, 24, 6)
    with torch.no_grad():
        first, _ = model(idx[:, :10], cache=cache[..., :10, :])
        torch.testing.assert_close(first, expected[:, :10])
        for end in range(11, 25):
            logits, _ = model(idx[:, end - 1 : end], cache=cache[..., :end, :])
            torch.testing.assert_close(logits[:, 0], expected[:, end - 1])


@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_past_the_context_the_last_half_is_read_again(block_size, length):
    """As it is documented: a full cache starts afresh from the last half of the window."""
    model = model_of(block_size=block_size)
    idx = torch.randint(VOCAB_SIZE, (2, length))
    torch.manual_seed(5)
    actual = model.generate(idx, 30)
    torch.manual_seed(5)
    begin = max(0, length - block_size)  # where the tokens in view begin
    for _ in range(30):
        if idx.shape[1] - begin > block_size:
            begin = idx.shape[1] - max(1, block_size // 2)
        logits, _ = model(idx[:, begin:])
        idx = torch.cat((idx, v8.choose_token(logits[:, -1], idx)), dim=1)
    assert torch.equal(actual, idx)


def test_a_step_reads_one_token(monkeypatch):
    model = model_of(block_size=24)
    read = []
    real = model.forward

    def forward(idx, *args, **kwargs):
        read.append(idx.shape[1])
        return real(idx, *args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    model.generate(torch.zeros(1, 4, dtype=torch.int64), 40)
    assert read == [4] + [1] * 20 + [12] + [1] * 12 + [12] + [1] * 5


def test_the_buffers_are_made_once(monkeypatch):
    model = model_of(block_size=24)
    places = set()
    real = model.forward

    def forward(idx, targets=None, cache=None):
        places.add(cache.data_ptr())
        return real(idx, targets, cache)

    monkeypatch.setattr(model, "forward", forward)
    model.generate(torch.zeros(2, 4, dtype=torch.int64), 40)
    assert len(places) == 1


def test_generation_leaves_training_as_it_was():
    """Tokens that can be kept, gradients that flow, weights that did not change."""
    model = model_of()
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


def test_the_order_of_weights_in_memory_changes_no_result():
    model = model_of(block_size=24)
    idx = torch.randint(VOCAB_SIZE, (2, 3))
    expected, before = model.generate(idx, 20, temperature=0), model(idx)[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    v8.lay_out_for_rows(model)
    assert model.blocks[0].feed_forward.expansion.weight.stride() == (1, 4 * TINY["n_embd"])
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
    torch.testing.assert_close(model(idx)[0], before)
    assert torch.equal(model.generate(idx, 20, temperature=0), expected)


def some_logits() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    few = torch.tensor([-3.0, 0.0, 0.0, 2.0, 2.0])
    return {
        "random": torch.randn(7, 65) * 3,
        "large vocabulary": torch.randn(2, 50257),
        "ties": few[torch.randint(5, (7, 65))],
        "equal": torch.zeros(2, 65),
        "extreme": torch.randn(7, 65) * 1e4,
        "enormous": torch.randn(3, 65) * 1e30,
        "one is possible": torch.full((2, 65), -math.inf).index_fill(1, torch.tensor([7]), 1.0),
        "some are not": torch.randn(3, 65).masked_fill(torch.rand(3, 65) < 0.4, -math.inf),
        "one token": torch.zeros(3, 1),
    }


LOGITS = some_logits()


def assert_probabilities(logits):
    sums = F.softmax(logits, dim=-1).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_the_repetition_penalty_is_that_of_transformers(kind, penalty):
    logits = LOGITS[kind]
    idx = torch.randint(logits.shape[1], (len(logits), 12))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone())
    actual = v8.apply_repetition_penalty(logits, idx, penalty)
    assert torch.equal(actual, expected)
    assert_probabilities(actual)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("temperature", [1e-6, 0.5, 1.0, 3.0])
def test_the_temperature_is_that_of_transformers(kind, temperature):
    expected = TemperatureLogitsWarper(temperature)(None, LOGITS[kind])
    actual = v8.apply_temperature(LOGITS[kind], temperature)
    assert torch.equal(actual, expected)
    assert_probabilities(actual)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("top_k", [1, 2, 40, 65, 66, 10**6])
def test_top_k_is_that_of_transformers(kind, top_k):
    expected = TopKLogitsWarper(top_k)(None, LOGITS[kind])
    actual = v8.apply_top_k(LOGITS[kind], top_k)
    assert torch.equal(actual, expected)
    assert_probabilities(actual)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_is_that_of_transformers(kind, top_p):
    expected = TopPLogitsWarper(top_p)(None, LOGITS[kind])
    actual = v8.apply_top_p(LOGITS[kind], top_p)
    assert torch.equal(actual, expected)
    assert_probabilities(actual)


@pytest.mark.parametrize("kind", LOGITS)
def test_filters_leave_their_input_alone(kind):
    logits, idx = LOGITS[kind].clone(), torch.zeros(len(LOGITS[kind]), 1, dtype=torch.int64)
    v8.apply_repetition_penalty(logits, idx, 2.0)
    v8.apply_temperature(logits, 0.5)
    v8.apply_top_k(logits, 3)
    v8.apply_top_p(logits, 0.5)
    v8.choose_token(logits, idx, 0.5, 3, 0.5, 2.0)
    assert torch.equal(logits, LOGITS[kind])


def drawn_from(monkeypatch, logits, idx, **how):
    """The probabilities that choose_token draws from, and what it drew."""
    seen = []
    real = torch.multinomial

    def multinomial(probabilities, num_samples):
        seen.append(probabilities)
        return real(probabilities, num_samples)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    token = v8.choose_token(logits, idx, **how)
    monkeypatch.undo()
    return seen[0], token


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("temperature", [1e-6, 0.7, 5.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 0.8), (10**6, 0.3), (65536, 1.0)])
def test_the_steps_are_in_the_order_of_transformers(monkeypatch, kind, temperature, top_k, top_p):
    logits = LOGITS[kind]
    idx = torch.randint(logits.shape[1], (len(logits), 6))
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1.2)
    probabilities, token = drawn_from(monkeypatch, logits, idx, **how)
    scores = RepetitionPenaltyLogitsProcessor(1.2)(idx, logits.clone())
    scores = TemperatureLogitsWarper(temperature)(idx, scores)
    scores = TopKLogitsWarper(top_k)(idx, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(idx, scores)
    torch.testing.assert_close(probabilities, F.softmax(scores, dim=-1))
    assert token.shape == (len(logits), 1)
    assert (probabilities.gather(1, token) > 0).all()


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("temperature", [1e-6, 1e9])
@pytest.mark.parametrize("top_p", [1e-9, 1.0])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_edges_of_all_settings_give_probabilities(monkeypatch, kind, temperature, top_p, penalty):
    idx = torch.zeros(len(LOGITS[kind]), 1, dtype=torch.int64)
    how = dict(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    probabilities, _ = drawn_from(monkeypatch, LOGITS[kind] / 1e3, idx, **how)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(idx)))


def test_no_settings_are_the_softmax(monkeypatch):
    probabilities, _ = drawn_from(monkeypatch, LOGITS["random"], torch.zeros(7, 3).long())
    assert torch.equal(probabilities, F.softmax(LOGITS["random"], dim=-1))


@pytest.mark.parametrize("temperature", [0, 1e-60, 1e-46, 1e-38, 1e-7])
def test_temperature_0_takes_the_likeliest_without_a_draw(temperature):
    logits, idx = LOGITS["random"], torch.zeros(7, 1).long()
    before = torch.get_rng_state()
    assert torch.equal(v8.choose_token(logits, idx, temperature), logits.argmax(1, True))
    assert torch.equal(torch.get_rng_state(), before)


def test_temperatures_near_0_take_the_likeliest_as_well():
    logits, idx = LOGITS["random"], torch.zeros(7, 1).long()
    near = v8.choose_token(logits, idx, temperature=1e-6)
    assert torch.equal(near, logits.argmax(1, True))
    top = logits.argmax(1, True)
    other = v8.choose_token(logits, top, temperature=0, repetition_penalty=100.0)
    assert not (other == top).any()


class Bytes:
    """A tokenizer of single bytes, of which a character takes up to four."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def pieces(text, stop="", tokenizer=None):
    return list(v8.text_of(iter(text.encode("utf-8")), tokenizer or Bytes(), stop))


def test_text_comes_a_character_at_a_time():
    text = "naïve 世界 🙂 end"
    assert [piece for piece in pieces(text) if piece] == list(text)


def test_bytes_that_are_no_text():
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
def test_a_stop_ends_the_text_before_it(text, stop, expected):
    made = pieces(text, stop)
    assert "".join(made) == expected
    for n in range(len(made)):  # what was shown is never taken back
        assert expected.startswith("".join(made[:n]))


def test_a_stop_may_be_a_part_of_a_token():
    words = ["one. ", "two; th", "ree"]

    class Words:
        def decode(self, tokens):
            return "".join(words[token] for token in tokens)

    assert "".join(v8.text_of(iter(range(3)), Words(), "; t")) == "one. two"
    shown = list(v8.text_of(iter(range(3)), Words(), "other"))
    assert shown == ["one. ", "two; th", "ree", ""]


def flags(corpus, **changes):
    return [*tiny_flags(v8, max_new_tokens=60, **changes), "--data", str(corpus)]


@pytest.fixture
def trained(corpus, tmp_path, capsys):
    """Flags to sample from the checkpoint of a short run of v7, and from nothing else."""
    v7_flags = [*tiny_flags(v7, out_dir=tmp_path / "out"), "--data", str(corpus)]
    v7.main(v7_flags)
    capsys.readouterr()
    return [*flags(corpus, out_dir=tmp_path / "out"), "--resume", "--sample_only"]


def output(capsys, *arguments):
    v8.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_checkpoint_of_v7_gives_the_text_of_v7(trained, capsys):
    v7.main([flag for flag in trained if flag != "--resume"] + ["--max_new_tokens", "4"])
    expected = capsys.readouterr().out
    assert output(capsys, *trained, "--max_new_tokens", "4") == expected
    assert len(expected) == 1 + 4 + 1


def test_a_checkpoint_of_v8_can_be_sampled_from_and_resumed(corpus, tmp_path, capsys):
    mine = flags(corpus, out_dir=tmp_path / "mine")
    output(capsys, *mine)
    assert len(output(capsys, *mine, "--sample_only", "--prompt", "The ")) == 4 + 60 + 1
    assert "step 6:" in output(capsys, *mine, "--resume", "--max_iters", "6")


def test_samples_are_printed_one_after_the_other(trained, capsys):
    out = output(capsys, *trained, "--num_samples", "3", "--prompt", "The ", "--seed", "4")
    samples = out.removesuffix("\n").split("\n---\n")
    assert len(samples) == len(set(samples)) == 3
    assert all(len(sample) == 4 + 60 and sample.startswith("The ") for sample in samples)
    cfg, tokenizer = data.read_flags(v8.Config, "", trained), data.CharTokenizer(TEXT)
    torch.manual_seed(4)  # then what draws in main() before the first token
    state = v8.load_checkpoint(cfg)
    model = v8.LanguageModel(cfg, len(CHARACTERS)).eval()
    model.load_state_dict(state["model"])
    idx = torch.tensor([tokenizer.encode("The ")]).repeat(3, 1)
    assert samples == [tokenizer.decode(row) for row in model.generate(idx, 60).tolist()]


def test_samples_stop_each_at_its_own_place(trained, capsys):
    plain = output(capsys, *trained, "--num_samples", "4", "--max_new_tokens", "200")
    whole = plain.removesuffix("\n").split("\n---\n")
    assert all("o" in sample for sample in whole)
    out = output(capsys, *trained, "--num_samples", "4", "--max_new_tokens", "200", "--stop", "o")
    stopped = out.removesuffix("\n").split("\n---\n")
    assert stopped == [sample.partition("o")[0] for sample in whole]


def test_generation_ends_when_all_samples_have(trained, capsys, monkeypatch):
    steps = []
    real = v8.choose_token
    monkeypatch.setattr(v8, "choose_token", lambda *a, **k: steps.append(1) or real(*a, **k))
    out = output(capsys, *trained, "--num_samples", "4", "--max_new_tokens", "5000", "--stop", "o")
    assert len(steps) == max(len(s) for s in out.removesuffix("\n").split("\n---\n")) < 5000


def test_flags_reach_the_choice(trained, capsys, monkeypatch):
    seen = []
    real = v8.choose_token
    monkeypatch.setattr(v8, "choose_token", lambda *a, **k: seen.append(k) or real(*a, **k))
    values = {"temperature": 0.7, "top_k": 7, "top_p": 0.8, "repetition_penalty": 1.2}
    output(capsys, *trained, *(f"--{name}={value}" for name, value in values.items()))
    assert seen == [values] * 60


def test_greedy_is_the_same_for_every_seed(trained, capsys):
    outputs = {output(capsys, *trained, "--temperature", "0", "--seed", seed) for seed in range(3)}
    assert len(outputs) == 1
    outputs = {output(capsys, *trained, "--top_k", "1", "--seed", seed) for seed in range(3)}
    assert len(outputs) == 1


def test_a_prompt_from_a_file(trained, capsys, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffThe quick\r\nbrown fox".encode())
    out = output(capsys, *trained, "--prompt_file", path)
    assert out == output(capsys, *trained, "--prompt", "The quick\nbrown fox")
    assert out.startswith("The quick\nbrown fox")


def test_a_prompt_file_is_never_a_corpus_by_name(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("python", "shakespeare"):
        (tmp_path / name).write_text("The fox", encoding="utf-8")
        assert output(capsys, *trained, "--prompt_file", name).startswith("The fox")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "-0.1"), ("temperature", "nan"), ("temperature", "inf"),
        ("top_p", "0"), ("top_p", "-1"), ("top_p", "1.01"), ("top_p", "nan"),
        ("top_k", "0"), ("top_k", "-5"), ("top_k", "1.5"),
        ("repetition_penalty", "0"), ("repetition_penalty", "-1"), ("repetition_penalty", "inf"),
        ("num_samples", "0"), ("num_samples", "two"), ("num_samples", "1025"),
        ("stop", "Zebra"), ("prompt_file", "ZEBRA"),
        ("prompt_file", "missing.txt"), ("prompt_file", "FOLDER"), ("prompt_file", "BINARY"),
        ("prompt_file", "EMPTY"),
    ],
)  # fmt: skip
def test_bad_values_end_in_one_line(trained, capsys, tmp_path, name, value):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "zebra").write_text("Zebra", encoding="utf-8")
    places = {name.upper(): tmp_path / name for name in ("binary", "empty", "zebra")}
    places["FOLDER"] = tmp_path
    value = str(places.get(value, value))
    with pytest.raises(SystemExit) as stop:
        v8.main([*trained, f"--{name}={value}"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.count("\n") == 1
    assert "error: " in err
    assert f"--{name}" in err
    assert "Traceback" not in err


def test_no_checkpoint(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        v8.main([*flags(corpus, out_dir=tmp_path / "none"), "--resume", "--sample_only"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert "train first" in err
    assert err.count("\n") == 1


def test_each_character_is_on_the_terminal_before_the_next_is_chosen(trained, monkeypatch):
    steps, shown = [], []
    real = v8.choose_token
    monkeypatch.setattr(v8, "choose_token", lambda *a, **k: steps.append(1) or real(*a, **k))

    def note(text="", end="\n", flush=False, file=None):
        if file is None:
            shown.append((text, end, flush, len(steps)))

    monkeypatch.setattr(builtins, "print", note)
    v8.main([*trained, "--prompt", "The ", "--max_new_tokens", "9"])
    monkeypatch.undo()
    assert shown[0] == ("The ", "", True, 0)
    assert [made for _, _, _, made in shown[1:10]] == list(range(1, 10))
    assert all(len(text) == 1 and not end and flush for text, end, flush, _ in shown[1:10])


def test_text_is_made_in_float32(monkeypatch):
    monkeypatch.setattr(v8, "choose_dtype", lambda cfg: "bfloat16")
    model = model_of(block_size=24)
    seen = []
    model.blocks[0].feed_forward.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    idx = torch.zeros(1, 3, dtype=torch.int64)
    model(idx)
    model.generate(idx, 2)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_v8_adds_only_how_to_sample():
    old = {field.name: field.default for field in dataclasses.fields(v7.Config)}
    new = {field.name: field.default for field in dataclasses.fields(v8.Config)}
    assert dict(itertools.islice(new.items(), len(old))) == old
