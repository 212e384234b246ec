"""lab/web/live.py: what the page measures of the heads, and how it packs the weights."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, build, shaken

import bigram
import data
import v2_single_head
import v3_multi_head
import v4_feedforward
import v5_gpt
from data import corpora
from lab.web import live

SCRIPTS = [bigram, v2_single_head, v3_multi_head, v4_feedforward, v5_gpt]


@pytest.fixture(scope="module")
def tokenizer():
    return data.CharTokenizer(TEXT)


@pytest.fixture(scope="module")
def val_data(tokenizer):
    return np.array(tokenizer.encode(TEXT)[:200], dtype=np.uint16)


def measure(model, val_data, tokenizer):
    return live.measure(model.eval(), val_data, tokenizer.characters, TINY["block_size"])


# ---- Measuring


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.__name__)
def test_measured_weights_are_those_that_the_head_uses(script):
    model = shaken(build(script)).eval()
    for head in live.heads_of(model):
        x = torch.randn(2, TINY["block_size"], TINY["n_embd"])  # (B, T, n_embd)
        weights = live.attention_weights(head, x)  # (B, T, T)
        torch.testing.assert_close(weights @ head.value(x), head(x))


def test_features_of_a_short_text():
    idx = torch.tensor([[0, 1, 0, 2]])  # "a", " ", "a", "B"
    features = live.find_features(idx, ["a", " ", "B"])
    last = {name: feature[0, 3].tolist() for name, feature in features.items()}
    assert last[live.ITSELF] == [False, False, False, True]
    assert last[live.BACK[1]] == [False, False, True, False]
    assert last[live.BACK[2]] == [False, True, False, False]
    assert last["spaces and line breaks"] == [False, True, False, False]
    assert last["vowels"] == [True, False, True, False]
    assert last["capitals"] == [False, False, False, True]
    assert features[live.SAME][0, 2].tolist() == [True, False, False, False]


def test_a_head_that_only_looks_at_the_character_before(monkeypatch, val_data, tokenizer):
    def look_back(head, x):
        T = x.shape[1]
        weights = torch.eye(T).roll(-1, dims=1)  # (T, T): position i looks at i - 1
        weights[0] = torch.eye(T)[0]
        return weights.expand(len(x), T, T)

    monkeypatch.setattr(live, "attention_weights", look_back)
    measures = measure(build(v2_single_head), val_data, tokenizer)
    [head] = measures.heads
    assert measures.features(head)[0] == live.BACK[1]
    assert head.attention[live.BACK[1]] == pytest.approx(1)
    assert head.attention[live.ITSELF] == pytest.approx(0)
    assert head.distance == pytest.approx(1)
    assert head.spread == pytest.approx(1)


def test_a_head_without_preferences_is_even(val_data, tokenizer):
    model = build(v2_single_head)
    torch.nn.init.zeros_(model.attention.query.weight)
    measures = measure(model, val_data, tokenizer)
    [head] = measures.heads
    assert head.attention == pytest.approx(measures.even)
    positions = range(2, TINY["block_size"] + 1)  # how many characters each position sees
    entropy = sum(math.log(n) for n in positions) / len(positions)
    assert head.spread == pytest.approx(math.exp(entropy))


def test_the_loss_is_that_of_the_whole_split(val_data, tokenizer):
    assert measure(build(bigram), val_data, tokenizer).loss == pytest.approx(
        math.log(tokenizer.n_vocab)
    )


def test_heads_are_named_by_their_layer():
    assert live.head_labels(build(bigram)) == []
    assert live.head_labels(build(v2_single_head)) == ["head 1"]
    assert live.head_labels(build(v3_multi_head)) == ["head 1", "head 2", "head 3"]
    assert live.head_labels(build(v5_gpt))[3] == "head 1 of layer 2"


# ---- The page


def test_weights_are_rounded_and_packed_without_further_loss(tokenizer):
    model = live.rounded(shaken(build(v5_gpt)))
    text = live.pack({"v5_gpt": model}, ["<", "\n"], TINY["block_size"])
    assert "<" not in text  # or the corpus could end the <script> element
    content = json.loads(text)
    assert content["characters"] == ["<", "\n"]
    for name, parameter in model.named_parameters():
        packed = content["models"]["v5_gpt"][name]
        values = np.frombuffer(base64.b64decode(packed["float16"]), dtype="<f2")
        values = values.astype(np.float32).reshape(packed["shape"])
        np.testing.assert_array_equal(values, parameter.detach().numpy())


def test_the_section_works_for_any_corpus(val_data, tokenizer):
    models = {script.__name__: shaken(build(script)).eval() for script in SCRIPTS}
    before = models["v5_gpt"].lm_head.weight.clone()
    html = live.live_section(models, tokenizer, val_data)
    assert html.count("<article") == len(SCRIPTS)
    assert html.count("<canvas") == 1 + 3 + 3 + 2 * 3
    assert html.count(" checked ") == 4  # one head for each model that has some
    torch.testing.assert_close(models["v5_gpt"].lm_head.weight, before)  # a copy is rounded


@pytest.mark.skipif(not corpora.SHAKESPEARE.exists(), reason="Tiny Shakespeare isn't there")
def test_the_prompt_of_the_page_is_spelled_by_its_corpus():
    tokenizer = data.CharTokenizer(data.load_text("shakespeare"))
    assert live.choose_prompt(tokenizer, np.array([]), 64) == live.PROMPT
    assert len(live.PROMPT) <= 64


def test_every_feature_has_a_caption():
    assert set(live.SHORT) == {live.ITSELF, live.SAME, *live.BACK.values(), *live.KINDS}


def test_javascript_can_be_inlined_and_loads_nothing():
    for name in ("models.js", "live.js"):
        text = (live.FOLDER / name).read_text(encoding="utf-8")
        assert "</script" not in text
        assert not re.search(r"https?://", text)
        assert max(len(line) for line in text.splitlines()) <= 100
