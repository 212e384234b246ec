"""live.py: the part of the page in which the models of bigram.py to v5_gpt.py respond.

The page gets the weights, rounded to float16, and the forward passes in JavaScript. What a panel
says about its model is measured here, on the rounded weights and the whole validation text.
"""

import base64
import copy
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

FOLDER = Path(__file__).resolve().parent
PROMPT = "ROMEO:\nThe king is dead, and I must speak with the quee"
BATCH_SIZE = 32  # windows that are measured at a time


@dataclass
class HeadMeasures:
    """What a head attends to, averaged over all positions but the first of the windows."""

    label: str  # "head 1 of layer 2", or "head 1" if there is only one layer
    attention: dict[str, float]  # the share of the attention that each feature gets
    distance: float  # how many characters back the head looks, on average
    spread: float  # e to the mean entropy: over how many characters the attention is spread


@dataclass
class Measures:
    """What is measured of a model; even: what a feature gets if all characters get the same."""

    loss: float  # nats per character
    heads: list[HeadMeasures]
    even: dict[str, float]

    def excess(self, head: HeadMeasures, feature: str) -> float:
        """How much more attention a feature gets from a head than from even attention."""
        return head.attention[feature] - self.even[feature]

    def features(self, head: HeadMeasures) -> list[str]:
        """All features, those that stand out most against even attention first."""
        return sorted(head.attention, key=lambda name: self.excess(head, name), reverse=True)


# The features of the characters that are looked at. Each phrase completes "puts 0.5 of its
# attention on".
ITSELF = "the current character"
BACK = {
    1: "the character before",
    2: "the character two back",
    3: "the character three back",
}
SAME = "earlier copies of the current character"
KINDS = {
    "spaces and line breaks": str.isspace,
    "vowels": lambda character: character.lower() in set("aeiou"),
    "capitals": str.isupper,
}
SHORT = {  # for the captions below the maps
    ITSELF: "itself",
    BACK[1]: "1 back",
    BACK[2]: "2 back",
    BACK[3]: "3 back",
    SAME: "copies",
    "spaces and line breaks": "spaces",
    "vowels": "vowels",
    "capitals": "capitals",
}


# ---- Measuring


def rounded(model: nn.Module) -> nn.Module:
    """A copy of a model whose weights are rounded to float16 and kept in float32."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The attention heads of a model, layer by layer."""
    return [module for module in model.modules() if type(module).__name__ == "Head"]


def head_labels(model: nn.Module) -> list[str]:
    """What to call each head of a model."""
    n_layer = len(model.blocks) if hasattr(model, "blocks") else 1
    n_head = len(heads_of(model)) // n_layer
    if n_layer == 1:
        return [f"head {h}" for h in range(1, n_head + 1)]
    layers = range(1, n_layer + 1)
    return [f"head {h} of layer {layer}" for layer in layers for h in range(1, n_head + 1)]


def attention_weights(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The attention weights of a head, float (B, T, T), for its input x, float (B, T, n_embd)."""
    T = x.shape[1]
    scores = head.query(x) @ head.key(x).transpose(1, 2) / head.head_size**0.5  # (B, T, T)
    scores = scores.masked_fill(head.mask[:T, :T], -math.inf)  # (B, T, T)
    return F.softmax(scores, dim=-1)  # (B, T, T)


def find_features(idx: torch.Tensor, characters: list[str]) -> dict[str, torch.Tensor]:
    """For each feature, whether position j has it when position i looks, bool (B, T, T).

    idx: token ids, int64 (B, T).
    """
    B, T = idx.shape
    positions = torch.arange(T)  # (T,)
    distance = positions[:, None] - positions  # (T, T)
    everywhere = torch.ones(B, T, T, dtype=torch.bool)  # (B, T, T)
    features = {ITSELF: (distance == 0) & everywhere}
    for steps, phrase in BACK.items():
        features[phrase] = (distance == steps) & everywhere
    features[SAME] = (idx[:, :, None] == idx[:, None]) & (distance > 0)
    for phrase, belongs in KINDS.items():
        of_kind = torch.tensor([belongs(character) for character in characters])  # (V,)
        features[phrase] = of_kind[idx][:, None] & everywhere
    return features


def mean_attention(weights: torch.Tensor, feature: torch.Tensor) -> float:
    """The mean share that a feature gets, without the first position, which has no choice.

    weights: float (B, T, T) or (T, T). feature: bool (B, T, T).
    """
    return (weights * feature).sum(dim=-1)[:, 1:].mean().item()


@torch.no_grad()
def measure(
    model: nn.Module, val_data: np.ndarray, characters: list[str], block_size: int
) -> Measures:
    """The Measures of a model on all whole windows of the validation text."""
    n_windows = (len(val_data) - 1) // block_size
    tokens = torch.from_numpy(val_data[: n_windows * block_size + 1].astype(np.int64))
    x = tokens[:-1].view(n_windows, block_size)  # (n_windows, T)
    y = tokens[1:].view(n_windows, block_size)  # (n_windows, T)
    heads = heads_of(model)
    inputs = {}  # the input of each head in the last forward pass, (B, T, n_embd)

    def keep_input(head: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        inputs[head] = arguments[0]

    hooks = [head.register_forward_pre_hook(keep_input) for head in heads]
    names = list(find_features(x[:1], characters))
    loss = 0.0
    even = dict.fromkeys(names, 0.0)
    attention = [dict.fromkeys(names, 0.0) for _ in heads]
    distances = [0.0 for _ in heads]
    entropies = [0.0 for _ in heads]

    positions = torch.arange(block_size)  # (T,)
    distance = positions[:, None] - positions  # (T, T)
    even_weights = torch.ones(block_size, block_size).tril()  # (T, T)
    even_weights = even_weights / even_weights.sum(dim=-1, keepdim=True)  # (T, T)
    for windows, targets in zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True):
        share = len(windows) / n_windows
        logits, _ = model(windows)  # (B, T, V)
        loss += share * F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        features = find_features(windows, characters)  # (B, T, T) each
        for name in names:
            even[name] += share * mean_attention(even_weights, features[name])
        for h, head in enumerate(heads):
            weights = attention_weights(head, inputs[head])  # (B, T, T)
            for name in names:
                attention[h][name] += share * mean_attention(weights, features[name])
            distances[h] += share * (weights * distance).sum(dim=-1)[:, 1:].mean().item()
            entropy = torch.special.entr(weights).sum(dim=-1)  # (B, T), in nats
            entropies[h] += share * entropy[:, 1:].mean().item()
    for hook in hooks:
        hook.remove()

    found = []
    for h, label in enumerate(head_labels(model)):
        spread = math.exp(entropies[h])
        found.append(HeadMeasures(label, attention[h], distances[h], spread))
    return Measures(loss, found, even)


# ---- Saying what to look for


def spoken(character: str) -> str:
    """A character as a reader would name it."""
    return {"\n": "a line break", " ": "a space"}.get(character, f"‘{character}’")


def puts(measures: Measures, head: HeadMeasures, feature: str) -> str:
    """What a head does with a feature."""
    share = head.attention[feature]
    return f"puts {share:.2f} of its attention on {feature}"


def look_for_bigram(model: nn.Module, characters: list[str]) -> str:
    """What to look for in the bigram model: its surest row."""
    table = F.softmax(model.token_embedding.weight, dim=-1)  # (V, V)
    current, following = divmod(table.argmax().item(), len(characters))
    p = table[current, following].item()
    return (
        "only the last character of the prompt counts, so nothing else that you change moves the "
        f"bars. The surest row of the table is that of {spoken(characters[current])}, with "
        f"probability {p:.2f} for {spoken(characters[following])}."
    )


def look_for_one_head(measures: Measures) -> str:
    """What to look for in the model with a single head: where it looks."""
    [head] = measures.heads
    first, second = measures.features(head)[:2]
    return (
        f"one head has to do everything. On average over the validation "
        f"text, the head {puts(measures, head, first)} and {head.attention[second]:.2f} on "
        f"{second}; evenly spread attention would put {measures.even[first]:.2f} and "
        f"{measures.even[second]:.2f} there."
    )


def most_distinct(measures: Measures) -> list[tuple[HeadMeasures, str]]:
    """The heads with the features that stand out most in each, the most distinct head first."""
    pairs = [(head, measures.features(head)[0]) for head in measures.heads]
    return sorted(pairs, key=lambda pair: measures.excess(*pair), reverse=True)


def look_for_heads(measures: Measures) -> str:
    """What to look for in a model with several heads: what sets them apart."""
    head, feature = most_distinct(measures)[0]
    others = [other for other in measures.heads if other is not head]
    widest = max(others, key=lambda other: other.spread)
    even = measures.even[feature]
    return (
        f"what sets the heads apart. On average over the validation text, {head.label} "
        f"{puts(measures, head, feature)} (evenly spread attention would put {even:.2f} there). "
        f"Its attention is spread over {head.spread:.1f} characters, that of {widest.label} over "
        f"{widest.spread:.1f}."
    )


def look_for_layers(measures: Measures, n_layer: int) -> str:
    """What to look for in a model with several layers: how far back each of them looks."""
    n_head = len(measures.heads) // n_layer
    parts = []
    for layer in range(n_layer):
        heads = measures.heads[layer * n_head : (layer + 1) * n_head]
        distance = sum(head.distance for head in heads) / n_head
        parts.append(f"{distance:.1f} characters in layer {layer + 1}")
    head, feature = most_distinct(measures)[0]
    even = measures.even[feature]
    return (
        "how far back each layer looks. On average over the validation text, attention "
        f"reaches back {', '.join(parts)}; {head.label} {puts(measures, head, feature)} (evenly "
        f"spread attention would put {even:.2f} there)."
    )


def look_for(model: nn.Module, measures: Measures, characters: list[str]) -> str:
    """The sentence of a panel: what to look for, with figures measured on these weights."""
    if not measures.heads:
        return look_for_bigram(model, characters)
    if len(measures.heads) == 1:
        return look_for_one_head(measures)
    if hasattr(model, "blocks"):
        return look_for_layers(measures, len(model.blocks))
    return look_for_heads(measures)


# ---- Writing HTML


def pack(models: dict[str, nn.Module], characters: list[str], block_size: int) -> str:
    """The weights of all models as JSON that is safe inside a <script> element."""
    packed = {}
    for name, model in models.items():
        packed[name] = {}
        for key, parameter in model.state_dict().items():
            values = parameter.numpy().astype("<f2").tobytes()  # float16, little-endian
            text = base64.b64encode(values).decode("ascii")
            packed[name][key] = {"shape": list(parameter.shape), "float16": text}
    content = {"characters": characters, "block_size": block_size, "models": packed}
    return json.dumps(content).replace("<", "\\u003c")


def caption(measures: Measures, head: HeadMeasures) -> str:
    """The text below the map of a head: the feature that stands out most, and its share."""
    feature = measures.features(head)[0]
    return f"{SHORT[feature]} {head.attention[feature]:.2f}"


def head_html(name: str, h: int, measures: Measures, short: str) -> str:
    """The map of a head, as the label of a radio button."""
    head = measures.heads[h]
    checked = " checked" if head is most_distinct(measures)[0][0] else ""
    return (
        f'<label class="live-head">'
        f'<input type="radio" name="live-head-{name}" value="{h}"{checked} '
        f'data-label="{head.label}">'
        '<span class="live-map"><canvas width="1" height="1"></canvas>'
        '<span class="live-marker"></span></span>'
        f'<span class="live-head-name">{short}</span> '
        f'<span class="live-finding">{escape(caption(measures, head))}</span></label>'
    )


def attention_html(name: str, measures: Measures, n_layer: int) -> str:
    """The attention maps of a model, layer by layer, and the row of characters below them."""
    n_head = len(measures.heads) // n_layer
    rows = []
    for layer in range(n_layer):
        heads = []
        for h in range(n_head):
            short = f"layer {layer + 1}, head {h + 1}" if n_layer > 1 else f"head {h + 1}"
            heads.append(head_html(name, layer * n_head + h, measures, short))
        rows.append(f'<div class="live-layer">{"".join(heads)}</div>')
    return f"""
<fieldset class="live-heads"><legend>Attention: choose a head</legend>
{"".join(rows)}
</fieldset>
<div>
<h4>What the chosen character attends to</h4>
{strip_html(name, "attention", "what the chosen character attends to")}
</div>"""


def strip_html(name: str, kind: str, what: str) -> str:
    """The prompt as a row of characters, one of which can be chosen, and a line about that one."""
    return (
        f'<div class="live-strip" data-strip="{kind}" role="slider" tabindex="0" '
        f'aria-label="{name}.py, {what}. Arrow keys choose a character."></div>'
        '<p class="live-readout"></p>'
    )


def panel_html(name: str, model: nn.Module, measures: Measures, characters: list[str]) -> str:
    """The panel of a model."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    attention = ""
    if measures.heads:
        n_layer = len(model.blocks) if hasattr(model, "blocks") else 1
        attention = attention_html(name, measures, n_layer)
    return f"""
<article class="live-panel" data-model="{name}" aria-labelledby="live-{name}">
<header><h3 id="live-{name}"><a href="#{name}">{name}.py</a></h3>
<p class="live-facts">{n_parameters:,} parameters; validation loss {measures.loss:.2f} nats</p>
</header>
<p class="live-look"><strong>Look for this:</strong>
{escape(look_for(model, measures, characters), quote=False)}</p>
<div class="live-parts" hidden>
<div>
<h4>Surprise</h4>
{strip_html(name, "surprise", "how surprising the chosen character was")}
</div>{attention}
</div>
</article>"""


def answers_html(names: list[str]) -> str:
    """The bars of all models side by side, so that one look compares them."""
    answers = []
    for name in names:
        answers.append(f"""
<div data-model="{name}">
<h4 id="live-bars-{name}"><a href="#live-{name}">{name}.py</a></h4>
<p class="live-mean"></p>
<ol class="live-bars" aria-labelledby="live-bars-{name}"></ol>
</div>""")
    return f"""
<div class="live-answers" hidden>
<h3>The next character</h3>{"".join(answers)}
</div>"""


def controls_html(names: list[str], prompt: str) -> str:
    """The prompt, the temperature and the button that continues the text."""
    options = [f"<option>{name}</option>" for name in names[:-1]]
    options.append(f"<option selected>{names[-1]}</option>")
    # The parser drops the first line break of a textarea, so there has to be one.
    return f"""
<div class="live-controls" hidden>
<div>
<label for="live-prompt">Prompt</label>
<textarea id="live-prompt" rows="3" spellcheck="false" autocomplete="off" autocapitalize="off"
 aria-describedby="live-view live-message">
{escape(prompt)}</textarea>
<p class="live-view" id="live-view"></p>
</div>
<div>
<label for="live-temperature">Temperature
<output id="live-temperature-value" for="live-temperature">1.00</output></label>
<input type="range" id="live-temperature" min="0.1" max="2" step="0.05" value="1">
<p class="live-hint">for the bars and the continuation</p>
</div>
<div>
<label for="live-writer">Let a model write</label>
<select id="live-writer">{"".join(options)}</select>
<button type="button" id="live-write">Continue the text</button>
</div>
<p class="live-message" id="live-message" role="alert"></p>
</div>"""


def introduction_html(block_size: int) -> str:
    """What this part of the page is."""
    return f"""
<p>Here are the models of the first five scripts, trained with the CPU defaults, their weights
rounded to float16. Type a prompt, and each of them responds at once with the ten characters that it
thinks likeliest to come next, and their probabilities. ␣ is a space, ↵ a line break. The models see
the last {block_size} characters. They run in this page; nothing is sent anywhere.</p>"""


def legend_html() -> str:
    """What the panels show and how to use them."""
    return """
<ul>
<li><strong>Surprise:</strong> the deeper the colour of a character, the less the model expected it
after those before it: −ln&nbsp;<var>p</var>, in nats. The mean, above the bars, is the model’s loss
on the prompt.</li>
<li><strong>Attention:</strong> in each map, the row is the character that looks and the column the
one that it looks at; the deeper the colour, the more attention. (Colours grow with the square root
of the weight, or the small ones couldn’t be seen.) Below each map is the feature that stands out
most in this head, compared with attention spread evenly, and how much of the attention it gets, on
average over the validation text. Choose a head, then a character, by pointing at it, by a tap or
with the arrow keys, to see what that character attends to.</li>
</ul>"""


def choose_prompt(tokenizer: Any, val_data: np.ndarray, block_size: int) -> str:
    """The first prompt: PROMPT, or validation text if the corpus lacks a character of it."""
    if set(PROMPT) <= set(tokenizer.characters):
        return PROMPT
    return tokenizer.decode(val_data[:block_size].tolist())


def live_section(models: dict[str, nn.Module], tokenizer: Any, val_data: np.ndarray) -> str:
    """The live part of the page: HTML with its style, scripts and weights.

    models: by the names of their scripts, bigram among them, in eval mode and on the CPU.
    """
    characters = tokenizer.characters
    models = {name: rounded(model) for name, model in models.items()}
    # The bigram model has no block_size: it can read any length.
    [block_size] = {model.block_size for model in models.values() if hasattr(model, "block_size")}
    panels = []
    for name, model in models.items():
        measures = measure(model, val_data, characters, block_size)
        panels.append(panel_html(name, model, measures, characters))
    prompt = choose_prompt(tokenizer, val_data, block_size)
    style = (FOLDER / "live.css").read_text(encoding="utf-8")
    models_js = (FOLDER / "models.js").read_text(encoding="utf-8")
    live_js = (FOLDER / "live.js").read_text(encoding="utf-8")
    return f"""<section class="live" id="live" aria-labelledby="live-title">
<style>
{style}</style>
<h2 id="live-title">The first five models, live</h2>
{introduction_html(block_size)}
<noscript><p><strong>This part needs JavaScript.</strong> Without it, the prompt, the bars, the
colours and the attention maps are missing; what was measured of each model is below.</p>
</noscript>
{controls_html(list(models), prompt)}
{answers_html(list(models))}
{legend_html()}
{"".join(panels)}
<script type="application/json" id="live-weights">{pack(models, characters, block_size)}</script>
<script>
(() => {{
{models_js}
{live_js}
}})();
</script>
</section>
"""
