"""v7a_sampling.py: the filters compared with transformers, samples, prompts, streams."""

import io
import math
import sys

import pytest
import torch
from conftest import TEXT, build, random_tokens, refused, tiny, tiny_flags
from torch.nn import functional as F
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import data
from part2_training import v6d_checkpoints as v6d
from part3_generation import v7a_sampling as v7a

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


def used_tokens(logits):
    """Token ids for each row of logits, as a text so far."""
    generator = torch.Generator().manual_seed(4)
    return torch.randint(logits.shape[1], (len(logits), 12), generator=generator)


def assert_same_choices(actual, expected):
    assert torch.equal(actual, expected)
    sums = F.softmax(actual, dim=-1).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("kind", LOGITS)
def test_the_repetition_penalty_equals_that_of_transformers(kind):
    logits = LOGITS[kind].clone()
    idx = used_tokens(logits)
    for r in (0.5, 1.0, 1.3, 10.0):
        expected = RepetitionPenaltyLogitsProcessor(r)(idx, logits.clone())
        assert_same_choices(v7a.apply_repetition_penalty(logits, idx, r), expected)
    assert torch.equal(logits, LOGITS[kind]), "a filter must not change its input"


@pytest.mark.parametrize("kind", LOGITS)
def test_top_k_equals_that_of_transformers(kind):
    logits = LOGITS[kind].clone()
    for k in (1, 2, 40, 65, 10**6):
        expected = TopKLogitsWarper(k)(None, logits.clone())
        assert_same_choices(v7a.apply_top_k(logits, k), expected)
    assert torch.equal(logits, LOGITS[kind]), "a filter must not change its input"


@pytest.mark.parametrize("kind", LOGITS)
def test_top_p_equals_that_of_transformers(kind):
    logits = LOGITS[kind].clone()
    for p in (1e-9, 0.1, 0.9, 0.999, 1.0):
        expected = TopPLogitsWarper(p)(None, logits.clone())
        assert_same_choices(v7a.apply_top_p(logits, p), expected)
    assert torch.equal(logits, LOGITS[kind]), "a filter must not change its input"


def probabilities_drawn_from(logits, idx, **settings):
    """The probabilities that choose_token draws from."""
    seen = []
    real = torch.multinomial

    def multinomial(probabilities, num_samples):
        seen.append(probabilities)
        return real(probabilities, num_samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        token = v7a.choose_token(logits, idx, tiny(v7a, **settings))
    assert token.shape == (len(logits), 1)
    (probabilities,) = seen
    assert (probabilities.gather(1, token) > 0).all()
    return probabilities


def test_by_default_a_token_is_drawn_from_the_softmax():
    logits = LOGITS["random"]
    actual = probabilities_drawn_from(logits, used_tokens(logits))
    assert torch.equal(actual, F.softmax(logits, dim=-1))


@pytest.mark.parametrize("kind", LOGITS)
def test_the_temperature_equals_that_of_transformers(kind):
    logits = LOGITS[kind]
    for temperature in (1e-6, 0.5, 3.0, 1e9):
        actual = probabilities_drawn_from(logits, used_tokens(logits), temperature=temperature)
        expected = TemperatureLogitsWarper(temperature)(None, logits.clone())
        assert torch.equal(actual, F.softmax(expected, dim=-1))


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 5, 0.8), (5.0, 10**6, 0.3), (3.0, 4, 0.9), (1e-6, 65, 1.0)],
)
def test_the_four_steps_are_in_the_order_of_transformers(kind, temperature, top_k, top_p):
    logits = LOGITS[kind].clone()
    idx = used_tokens(logits)
    sizes = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    actual = probabilities_drawn_from(logits, idx, **sizes, repetition_penalty=1.2)
    scores = RepetitionPenaltyLogitsProcessor(1.2)(idx, logits.clone())
    scores = TemperatureLogitsWarper(temperature)(idx, scores)
    scores = TopKLogitsWarper(top_k)(idx, scores)
    scores = TopPLogitsWarper(top_p)(idx, scores)
    torch.testing.assert_close(actual, F.softmax(scores, dim=-1))
    assert torch.equal(logits, LOGITS[kind])


@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_a_step_that_is_off_is_left_out(monkeypatch, top_p):
    def fail(*_):
        raise AssertionError("is off, but was used")

    for name in ("apply_repetition_penalty", "apply_top_k", "apply_top_p"):
        monkeypatch.setattr(v7a, name, fail)
    logits = LOGITS["random"]
    settings = {"repetition_penalty": 1.0, "top_k": 0, "top_p": top_p}
    actual = probabilities_drawn_from(logits, used_tokens(logits), **settings)
    assert torch.equal(actual, F.softmax(logits, dim=-1))


@pytest.mark.parametrize("kind", LOGITS)
def test_extreme_settings_still_give_probabilities(kind):
    logits = LOGITS[kind] / 1e3
    extremes = [(1e-6, 1e-9, 0.01), (1e9, 1.0, 100.0), (1e-6, 1.0, 100.0), (1.0, 1.0, 0.01)]
    for temperature, top_p, penalty in extremes:
        settings = {"temperature": temperature, "top_p": top_p, "repetition_penalty": penalty}
        sums = probabilities_drawn_from(logits, used_tokens(logits), **settings).sum(-1)
        torch.testing.assert_close(sums, torch.ones(len(logits)))


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-7])
def test_temperature_0_takes_the_most_likely_token_and_draws_nothing(temperature):
    logits = LOGITS["random"]
    before = torch.get_rng_state()
    token = v7a.choose_token(logits, used_tokens(logits), tiny(v7a, temperature=temperature))
    assert torch.equal(token, logits.argmax(1, keepdim=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_overflow_are_refused(temperature, value):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    cfg = tiny(v7a, temperature=temperature)
    with pytest.raises(data.InputError, match="logits are not finite"):
        v7a.choose_token(logits, torch.zeros(2, 1, dtype=torch.long), cfg)


def test_the_repetition_penalty_works_at_temperature_0():
    logits = LOGITS["random"]
    most_likely = logits.argmax(1, keepdim=True)
    cfg = tiny(v7a, temperature=0.0, repetition_penalty=100.0)
    assert not (v7a.choose_token(logits, most_likely, cfg) == most_likely).any()


# ---- the model


def decisive(model):
    """The model with random weights that make each choice uneven, and depend on the whole text."""
    for name, parameter in model.named_parameters():
        mean = float(parameter.ndim == 1 and name.endswith("weight"))  # those of LayerNorm
        std = 0.5 if parameter.ndim == 2 else 0.1
        torch.nn.init.normal_(parameter, mean, std)
    return model


def generate(model, idx, n, **settings):
    """idx, int64 (B, T), and n tokens after it."""
    return torch.cat([idx, *model.stream(idx, n, tiny(v7a, **settings))], dim=1)


def test_by_default_the_text_is_that_of_v6d():
    old, new = decisive(build(v6d)), build(v7a)
    new.load_state_dict(old.state_dict())
    idx = random_tokens(3, 8)
    torch.manual_seed(5)
    expected = old.generate(idx, 20)
    torch.manual_seed(5)
    assert torch.equal(generate(new, idx, 20), expected)


def test_tokens_are_chosen_as_the_settings_of_each_call_say():
    model = decisive(build(v7a))
    idx = random_tokens(2, 3)
    texts = []
    for penalty in (100.0, 1.0):
        expected = idx
        for _ in range(9):
            logits, _ = model(expected[:, -5:])
            penalised = RepetitionPenaltyLogitsProcessor(penalty)(expected, logits[:, -1])
            expected = torch.cat((expected, penalised.argmax(1, keepdim=True)), dim=1)
        actual = generate(model, idx, 9, temperature=0.0, repetition_penalty=penalty)
        assert torch.equal(actual, expected)
        texts.append(expected)
    assert not torch.equal(*texts)


def test_gradients_are_off_for_a_token_and_on_again_between_two():
    model = build(v7a)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for _ in model.stream(random_tokens(1, 2), 3, tiny(v7a)):
        assert torch.is_grad_enabled()
    out = generate(model, random_tokens(1, 2), 3)
    assert seen == [False] * 6
    model(out[:, :-1], out[:, 1:])[1].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- the command line


@pytest.fixture(scope="module")
def run_of_v6d(tmp_path_factory):
    """The folder of a run of v6d, with better weights to sample from. Don't write to it."""
    folder = tmp_path_factory.mktemp("v6d")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    flags = tiny_flags(v6d, out_dir=folder / "out", max_new_tokens=60)
    v6d.main([*flags, "--data", str(folder / "corpus.txt")])
    state = torch.load(folder / "out" / "best.pt", weights_only=True)
    state["model"] = decisive(build(v6d)).state_dict()
    torch.save(state, folder / "out" / "best.pt")
    return folder / "out"


@pytest.fixture
def sampling(run_of_v6d):
    """Flags to sample from the checkpoint of v6d."""
    return ["--sample_only", "--out_dir", str(run_of_v6d), "--device", "cpu"]


def output(capsys, *flags, script=v7a):
    capsys.readouterr()
    script.main([str(flag) for flag in flags])
    return capsys.readouterr().out


def samples(capsys, *flags):
    return output(capsys, *flags).removesuffix("\n").split("\n---\n")


def test_a_checkpoint_of_v6d_gives_the_text_of_v6d(sampling, capsys):
    text = output(capsys, *sampling, "--prompt", "The ")
    assert text == output(capsys, *sampling, "--prompt", "The ", script=v6d)
    assert text.startswith("The ")
    assert len(text) == 4 + 60 + 1


def test_a_checkpoint_keeps_how_to_sample_until_a_flag_says_otherwise(corpus, tmp_path, capsys):
    greedy = ["--data", corpus, "--temperature", "0", "--num_samples", "2"]
    v7a.main([*map(str, greedy), *tiny_flags(v7a, out_dir=tmp_path, max_new_tokens=30)])
    again = ["--sample_only", "--out_dir", tmp_path]
    first, second = samples(capsys, *again)
    assert first == second
    first, second = samples(capsys, *again, "--temperature", "1")
    assert first != second


def test_the_text_depends_on_the_seed_alone(sampling, capsys):
    first, second, other = (output(capsys, *sampling, "--seed", seed) for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_greedy_text_is_the_same_for_every_seed(sampling, capsys):
    greedy = [["--temperature", "0"], ["--top_k", "1"], ["--top_p", "1e-9"]]
    texts = [output(capsys, *sampling, *how, "--seed", seed) for how in greedy for seed in (1, 2)]
    assert len(set(texts)) == 1


def test_samples_are_printed_one_after_the_other(sampling, capsys):
    texts = samples(capsys, *sampling, "--num_samples", 3, "--prompt", "The ", "--seed", 4)
    assert len(texts) == len(set(texts)) == 3
    assert all(text.startswith("The ") and len(text) == 4 + 60 for text in texts)
    assert texts[0] + "\n" == output(capsys, *sampling, "--prompt", "The ", "--seed", 4)


def test_each_sample_stops_at_its_own_place(sampling, capsys, monkeypatch):
    """Each is what stands before the stop, of the tokens chosen for it; then the next begins."""
    chosen = []
    real = v7a.choose_token

    def choose(logits, idx, cfg):
        token = real(logits, idx, cfg)
        if idx.shape[1] == 1:  # the prompt alone: a new sample
            chosen.append("")
        chosen[-1] += tokenizer.decode(token[0].tolist())
        return token

    tokenizer = data.CharTokenizer(TEXT)
    monkeypatch.setattr(v7a, "choose_token", choose)
    flags = ["--num_samples", 4, "--max_new_tokens", 5000, "--stop", "o"]
    texts = samples(capsys, *sampling, *flags)
    assert [text + "o" for text in texts] == ["\n" + text for text in chosen]
    assert len({len(text) for text in texts}) > 1
    assert not any("o" in text for text in texts)


def test_without_a_prompt_the_text_starts_with_a_newline(sampling, capsys):
    text = output(capsys, *sampling, "--prompt", "")
    assert text.startswith("\n")
    assert len(text) == 1 + 60 + 1
    assert text == output(capsys, *sampling, "--prompt", "\n")


def test_a_prompt_can_come_from_a_file(sampling, capsys, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffThe quick\r\nbrown fox".encode())
    text = output(capsys, *sampling, "--prompt_file", path)
    assert text.startswith("The quick\nbrown fox")
    assert text == output(capsys, *sampling, "--prompt", "The quick\nbrown fox")


def test_a_checkpoint_keeps_the_prompt_and_not_the_name_of_its_file(corpus, tmp_path, capsys):
    path = tmp_path / "prompt.txt"
    path.write_text("The fox", encoding="utf-8")
    flags = tiny_flags(v7a, out_dir=tmp_path / "run", temperature=0, prompt="dog")
    expected = output(capsys, *flags, "--data", corpus, "--prompt_file", path)
    path.unlink()
    again = ["--sample_only", "--out_dir", tmp_path / "run"]
    text = output(capsys, *again)
    assert text.startswith("The fox")
    assert expected.endswith("\n" + text)
    assert output(capsys, *again, "--prompt", "hen").startswith("hen")


def test_unknown_characters_in_a_prompt_file_are_refused(sampling, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("Zebra", encoding="utf-8")
    line = refused(v7a, capsys, *sampling, "--prompt_file", tmp_path / "prompt.txt")
    assert line.startswith("error: --prompt_file: the model's alphabet has no 'Z'")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "-0.1"), ("temperature", "nan"), ("temperature", "inf"),
        ("top_k", "-1"), ("top_p", "-0.1"), ("top_p", "1.01"), ("top_p", "nan"),
        ("repetition_penalty", "-1"), ("repetition_penalty", "101"), ("repetition_penalty", "0"),
        ("repetition_penalty", "0.009"), ("num_samples", "0"),
        ("prompt", "Zebra"), ("stop", "Zebra"), ("prompt_file", "missing.txt"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(sampling, capsys, name, value):
    line = refused(v7a, capsys, *sampling, f"--{name}={value}")
    assert line.startswith(f"error: --{name}")


class Screen(io.StringIO):
    """A standard output whose text can be seen once it is flushed."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def test_each_character_is_shown_before_the_next_is_chosen(sampling, monkeypatch):
    screen, shown = Screen(), []
    real = v7a.choose_token

    def choose(*args):
        shown.append(screen.seen)
        return real(*args)

    monkeypatch.setattr(v7a, "choose_token", choose)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        v7a.main([*sampling, "--prompt", "The ", "--max_new_tokens", "9"])
    text = screen.getvalue()
    assert shown == [text[: 4 + n] for n in range(9)]


def test_a_sample_may_have_no_new_tokens(sampling, capsys):
    flags = ["--prompt", "The", "--max_new_tokens", "0", "--num_samples", "2"]
    assert output(capsys, *sampling, *flags) == "The\n---\nThe\n"
