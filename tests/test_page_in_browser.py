"""docs/index.html in a real browser: the models in JavaScript, the panels, the keyboard, the width.

Skipped without Chromium or Playwright's Python package.
"""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
from lab.ladder import ROOT, load

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright isn't installed")

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FOUND = [shutil.which(name) for name in BROWSERS if shutil.which(name)]
if not FOUND:
    pytest.skip("Chromium isn't installed", allow_module_level=True)

PAGE = ROOT / "docs" / "index.html"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]
MODELS = ["bigram", "v2_single_head", "v3_multi_head", "v4_feedforward", "v5_gpt"]
PROMPTS = [
    "R",
    "\n",
    "ROMEO:",
    "ROMEO:\nThe king is dead",
    "To be, or not to be: that is the question",
    "zzzzzzzzzz",
    "\n\n\n\n",
    "3 $ & - ' ; ? !",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll",  # 64 characters
    "Of a prompt that is longer than that, the models only see what comes last.\nLike this one.",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=FOUND[0], args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, **options):
    """The page in a new tab, which records its requests and what it writes to the console."""
    page = browser.new_context(**options).new_page()
    page.requests = []
    page.complaints = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(PAGE.as_uri())
    return page


@pytest.fixture(scope="module")
def shared_page(browser):
    page = open_page(browser, viewport={"width": 1280, "height": 900})
    yield page
    assert page.complaints == []
    assert page.requests == [PAGE.as_uri()]


@pytest.fixture
def page(shared_page):
    """The page in its initial state; opening it anew for each test would take longer."""
    shared_page.evaluate(
        """() => {
            for (const id of ["live-temperature", "live-prompt"]) {
                const field = document.getElementById(id);
                field.value = field.defaultValue;
                field.dispatchEvent(new Event("input"));
            }
        }"""
    )
    return shared_page


@pytest.fixture(scope="module")
def packed():
    """The weights in the page, as its JSON."""
    html = PAGE.read_text(encoding="utf-8")
    [content] = re.findall(r'<script type="application/json" id="live-weights">(.*?)</script', html)
    return json.loads(content)


@pytest.fixture(scope="module")
def models(packed):
    """PyTorch's models with the weights in the page."""
    models = {}
    for name in MODELS:
        script = load(name)
        cfg = data.read_flags(script.Config, "", ["--device", "cpu"])
        model = script.LanguageModel(cfg, len(packed["characters"]))
        weights = {}
        for key, parameter in packed["models"][name].items():
            values = np.frombuffer(base64.b64decode(parameter["float16"]), dtype="<f2")
            values = values.astype(np.float32).reshape(parameter["shape"])
            weights[key] = torch.from_numpy(values)
        model.load_state_dict(weights)
        models[name] = model.eval()
    return models


@torch.no_grad()
def logits_of(model, packed, text: str) -> torch.Tensor:
    """PyTorch's logits at each of the last block_size characters of a text, float (T, V)."""
    ids = [packed["characters"].index(character) for character in text]
    idx = torch.tensor([ids[-packed["block_size"]:]])  # (1, T)
    logits, _ = model(idx)  # (1, T, V)
    return logits[0]


def bars(page) -> dict[str, tuple[list[str], list[float]]]:
    """For each model, the characters and the probabilities of its bars."""
    found = page.locator(".live-answers > [data-model]").evaluate_all(
        """columns => columns.map((column) => [
            column.dataset.model,
            [...column.querySelectorAll(".live-symbol")].map((node) => node.textContent),
            [...column.querySelectorAll(".live-fill")].map((node) => node.style.width),
        ])"""
    )
    return {
        name: (symbols, [float(width.removesuffix("%")) / 100 for width in widths])
        for name, symbols, widths in found
    }


def focused(page) -> str:
    """The id of the element that has the focus, or its data-strip, or its name."""
    return page.evaluate(
        """() => {
            const element = document.activeElement;
            return element.id || element.dataset.strip || element.name || element.tagName;
        }"""
    )


# ---- The models


def test_the_page_has_the_five_models(packed):
    assert list(packed["models"]) == MODELS


def test_a_long_prompt_is_among_the_ten(packed):
    lengths = [len(prompt) for prompt in PROMPTS]
    assert len(PROMPTS) == 10
    assert min(lengths) == 1
    assert max(lengths) > packed["block_size"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_pytorch(shared_page, models, packed, name):
    for prompt in PROMPTS:
        # As text: Playwright is slow to bring over many numbers.
        text = shared_page.evaluate(
            "args => JSON.stringify(course.logits(...args))", [name, prompt]
        )
        logits = torch.tensor(json.loads(text))  # (T, V)
        expected = logits_of(models[name], packed, prompt)  # (T, V)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


# ---- What the learner sees without a click


def test_all_panels_respond_at_once(page, models, packed):
    prompt = page.locator("#live-prompt").input_value()
    found = bars(page)
    assert list(found) == MODELS
    for name, (characters, widths) in found.items():
        probabilities = F.softmax(logits_of(models[name], packed, prompt)[-1], dim=-1)  # (V,)
        expected = probabilities.topk(10)
        assert widths == pytest.approx(expected.values.tolist(), abs=1e-4)
        symbols = [packed["characters"][i] for i in expected.indices.tolist()]
        assert characters == [{" ": "␣", "\n": "↵"}.get(c, c) for c in symbols]
        panel = page.locator(f'.live-panel[data-model="{name}"]')
        assert re.search(r"\d\.\d\d", panel.locator(".live-look").text_content())
        mean = F.cross_entropy(
            logits_of(models[name], packed, prompt)[:-1],
            torch.tensor([packed["characters"].index(c) for c in prompt[1:]]),
        ).item()
        answer = page.locator(f'.live-answers [data-model="{name}"]')
        shown = re.search(r"[\d.]+", answer.locator(".live-mean").inner_text())
        assert float(shown[0]) == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize(
    ("name", "n_maps"),
    [("bigram", 0), ("v2_single_head", 1), ("v3_multi_head", 4), ("v4_feedforward", 4),
     ("v5_gpt", 12)],
)
def test_each_head_has_a_map_that_sees_no_future(page, name, n_maps):
    maps = page.locator(f'[data-model="{name}"] canvas').evaluate_all(
        """canvases => JSON.stringify(canvases.map((canvas) => {
            const T = canvas.width;
            const pixels = canvas.getContext("2d").getImageData(0, 0, T, T).data;
            return Array.from({ length: T * T }, (_, i) => pixels[4 * i + 3]);
        }))"""
    )
    maps = json.loads(maps)
    assert len(maps) == n_maps
    T = len(page.locator("#live-prompt").input_value())
    for pixels in maps:
        opacity = np.array(pixels).reshape(T, T) / 255
        assert (np.triu(opacity, k=1) == 0).all()
        # Opacity is the square root of the weight, and the weights of a row add up to 1.
        np.testing.assert_allclose((opacity**2).sum(axis=1), 1, atol=0.1)


def test_answers_are_right_after_each_edit(page, models, packed):
    """Characters before an edit aren't computed again."""
    prompts = ["ROMEO:", "ROMEO:\n", "ROMEO:\nThe king", "JULIET:\nThe king", "JULIET:"]
    prompts += [PROMPTS[-1], PROMPTS[-1] + "x", "T"]
    for prompt in prompts:
        page.locator("#live-prompt").fill(prompt)
        for name, (_, widths) in bars(page).items():
            logits = logits_of(models[name], packed, prompt)[-1]  # (V,)
            expected = F.softmax(logits, dim=-1).topk(10).values
            assert widths == pytest.approx(expected.tolist(), abs=1e-4)


# ---- The controls


def test_the_slider_divides_the_logits(page, models, packed):
    prompt = page.locator("#live-prompt").input_value()
    page.locator("#live-temperature").fill("0.5")
    for name, (_, widths) in bars(page).items():
        logits = logits_of(models[name], packed, prompt)[-1]  # (V,)
        expected = F.softmax(logits / 0.5, dim=-1).topk(10).values
        assert widths == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("character", ["€", "é", "𝄞"])
def test_an_unknown_character_gets_a_message(page, character):
    message = page.locator("#live-message")
    before = page.locator("[data-model]").evaluate_all("nodes => nodes.map((n) => n.innerHTML)")
    page.locator("#live-prompt").fill(f"ROMEO:{character}")
    assert f"‘{character}’" in message.inner_text()
    assert page.locator("#live-prompt").get_attribute("aria-invalid") == "true"
    after = page.locator("[data-model]").evaluate_all("nodes => nodes.map((n) => n.innerHTML)")
    assert after == before
    page.locator("#live-prompt").fill("ROMEO:")
    assert message.inner_text() == ""


def test_many_unknown_characters_do_not_fill_the_screen(page):
    message = page.locator("#live-message")
    page.locator("#live-prompt").fill("".join(chr(0x4E00 + i) for i in range(1000)))
    assert "and 995 more" in message.inner_text()
    assert page.locator(".live-controls").bounding_box()["height"] < 300
    page.locator("#live-prompt").fill("a\u200bb")
    assert "U+200B" in message.inner_text()  # by itself, it would look like nothing


def test_shortcuts_of_the_browser_work_in_a_strip(page):
    prevented = page.locator("[data-strip=surprise]").first.evaluate(
        """strip => [true, false].map((altKey) => !strip.dispatchEvent(
            new KeyboardEvent("keydown", { key: "ArrowLeft", altKey, cancelable: true })))"""
    )
    assert prevented == [False, True]


def test_an_empty_prompt_gets_a_message(page):
    page.locator("#live-prompt").fill("")
    assert "at least one character" in page.locator("#live-message").inner_text()
    assert len(bars(page)["v5_gpt"][0]) == 10


def test_a_long_prompt_is_cut_and_the_page_says_so(page, packed):
    page.locator("#live-prompt").fill(PROMPTS[-1])
    assert str(packed["block_size"]) in page.locator("#live-view").inner_text()
    strip = page.locator('[data-model="bigram"] .live-cell')
    assert strip.count() == packed["block_size"]


def test_a_model_continues_the_text_until_it_is_stopped(page):
    prompt = page.locator("#live-prompt").input_value()
    button = page.locator("#live-write")
    button.click()
    page.wait_for_function("n => document.getElementById('live-prompt').value.length > n + 3",
                           arg=len(prompt))
    assert button.inner_text() == "Stop"
    button.click()
    assert button.inner_text() == "Continue the text"
    text = page.locator("#live-prompt").input_value()
    assert text.startswith(prompt)
    page.wait_for_timeout(200)
    assert page.locator("#live-prompt").input_value() == text
    assert page.locator("#live-message").inner_text() == ""


def test_the_pointer_chooses_a_character(page):
    panel = page.locator('.live-panel[data-model="v5_gpt"]')
    panel.locator("[data-strip=attention] .live-cell").nth(4).hover()
    assert panel.locator("[data-strip=attention] .live-chosen").inner_text() == "O"
    assert "‘O’" in panel.locator("[data-strip=attention] + .live-readout").inner_text()
    # The surprise is that of the same character, in all panels.
    bigram = page.locator('[data-model="bigram"] .live-readout').text_content()
    assert bigram.startswith("‘O’ had probability")


# ---- The keyboard


def test_the_controls_work_by_keyboard(page):
    prompt = page.locator("#live-prompt")
    prompt.focus()
    page.keyboard.press("Control+End")
    page.keyboard.type("n")
    text = prompt.input_value()
    assert page.locator('[data-model="bigram"] .live-chosen').text_content() == "n"
    page.keyboard.press("Tab")
    assert focused(page) == "live-temperature"
    before = bars(page)
    page.keyboard.press("ArrowLeft")
    assert page.locator("#live-temperature-value").inner_text() == "0.95"
    assert bars(page) != before
    page.keyboard.press("Tab")
    assert focused(page) == "live-writer"
    page.keyboard.press("Tab")
    assert focused(page) == "live-write"
    page.keyboard.press("Enter")
    page.wait_for_function("n => document.getElementById('live-prompt').value.length > n",
                           arg=len(text))
    page.keyboard.press("Enter")
    assert page.locator("#live-write").inner_text() == "Continue the text"


def test_characters_and_heads_are_chosen_by_keyboard(page):
    panel = page.locator('.live-panel[data-model="v4_feedforward"]')
    strip = panel.locator("[data-strip=surprise]")
    strip.focus()
    page.keyboard.press("Home")
    assert strip.get_attribute("aria-valuenow") == "1"
    assert "first character" in strip.get_attribute("aria-valuetext")
    page.keyboard.press("ArrowRight")
    assert strip.get_attribute("aria-valuenow") == "2"
    page.keyboard.press("End")
    assert strip.get_attribute("aria-valuenow") == strip.get_attribute("aria-valuemax")
    page.keyboard.press("Tab")
    assert focused(page) == "live-head-v4_feedforward"
    before = panel.locator("[data-strip=attention]").get_attribute("aria-valuetext")
    page.keyboard.press("ArrowRight")
    assert panel.locator("[data-strip=attention]").get_attribute("aria-valuetext") != before
    page.keyboard.press("Tab")
    assert focused(page) == "attention"


def test_the_focus_can_be_seen(page):
    page.locator("#live-prompt").focus()
    for _ in range(8):  # the controls, and the first elements of the panels
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", focused(page)
        page.keyboard.press("Tab")


# ---- The page as a whole


@pytest.mark.parametrize(("width", "in_a_row"), [(1280, 5), (390, 2)])
def test_the_answers_stand_side_by_side(page, width, in_a_row):
    page.set_viewport_size({"width": width, "height": 900})
    tops = page.locator(".live-answers > [data-model]").evaluate_all(
        "columns => columns.map((column) => column.getBoundingClientRect().top)"
    )
    page.set_viewport_size({"width": 1280, "height": 900})
    assert len(tops) == len(MODELS)
    assert tops.count(tops[0]) == in_a_row


def test_the_name_above_the_bars_leads_to_the_panel(page):
    page.locator('.live-answers a[href="#live-v4_feedforward"]').click()
    title = page.locator("#live-v4_feedforward").bounding_box()
    controls = page.locator(".live-controls").bounding_box()
    assert controls["y"] + controls["height"] <= title["y"] < 900  # they don't cover it


def test_a_phone_does_not_scroll_sideways(browser):
    page = open_page(browser, viewport={"width": 390, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    for scheme in ["light", "dark"]:
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.complaints == []
    page.context.close()


def test_without_javascript_the_page_says_what_is_missing(browser):
    page = open_page(browser, java_script_enabled=False)
    assert page.locator(".live noscript").inner_text().startswith("This part needs JavaScript.")
    assert not page.locator(".live-controls").is_visible()
    assert page.locator(".live-look").first.is_visible()
    page.context.close()
