"""lab/page.py and lab/web/: runs that are kept, diffs and curves, and the page as committed."""

import dataclasses
import re

import pytest
import torch
from conftest import TEXT, VOCAB_SIZE, tiny

from lab import page
from lab.common import train
from lab.ladder import PAIRS, PARENTS, ROOT, SCRIPTS, changed_lines, load, read, source
from lab.web import curves, diffs, lessons, runs

INDEX = ROOT / "docs" / "index.html"
REBUILD = "docs/index.html is out of date; run `python lab/page.py`"
OLD = '''"""old.py: a script."""

import math

x = 1 < 2
total = count_all(x, "a & b")
'''
NEW = '''"""new.py: a script."""

import math

x = 1 < 3
total = count_all(x, "a & c")
print(total)
'''


@pytest.fixture(scope="module")
def index() -> str:
    """The text of the page as committed."""
    return read(INDEX)


def test_a_diff_marks_the_changed_words():
    diff = diffs.diff_of("old", OLD, "new", NEW)
    assert '<del><span class="n">2</span></del>' in diff
    assert '<ins><span class="n">3</span></ins>' in diff
    assert diff.count('<div class="o">') == 2
    assert diff.count('<div class="w">') == 3
    assert "<del>a" not in diff  # only the word that differs
    assert "script" not in diff  # the docstring is left out


def test_a_diff_escapes_html():
    diff = diffs.diff_of("old", OLD, "new", NEW)
    assert "&lt;" in diff
    assert "&amp;" in diff
    assert not re.search(r"<(?!/?(div|i|span|del|ins|details|summary|pre|code)\b)", diff)
    assert "<b>" not in diffs.diff_of("old", OLD, "new", NEW.replace("print", "'<b>'; print"))


def test_a_diff_folds_what_is_unchanged():
    lines = "".join(f"x_{i} = {i}\n" for i in range(40))
    diff = diffs.diff_of("old", OLD + lines + "y = 1\n", "new", OLD + lines + "y = 2\n")
    [summary] = re.findall(r"<summary>(.*?)</summary>", diff)
    assert summary == f"{4 + 40 + 1 - diffs.CONTEXT} unchanged lines"
    assert "x_39" in diff


@pytest.mark.parametrize("parent, child", [PAIRS[1], PAIRS[3], ("v9c_swiglu", "v9d_gqa")])
def test_a_diff_has_all_lines_of_both_scripts(parent, child):
    diff = diffs.side_by_side(parent, child)
    n_changed = len(re.findall(r'<div class="[ow]">', diff))
    assert n_changed == changed_lines(parent, child)
    n_folded = sum(int(n) for n in re.findall(r"<summary>(\d+) unchanged", diff))
    n_shown = len(re.findall(r'<div class="(?:w|e)">', diff))
    assert n_folded + n_shown == len(diffs.code_lines(child, source(child)))


def result(name: str, losses: list[float], **changes) -> runs.Result:
    """A made-up run of a script with these losses."""
    values = {
        "name": name, "script": name, "fingerprint": "", "settings": {"prompt": "a"},
        "parameters": 1, "history": [(100 * i, loss, loss) for i, loss in enumerate(losses)],
        "val_loss": losses[-1], "characters_per_token": 1.0, "tokens_per_step": 10,
        "seconds": 2.0, "sample": "a b", "machine": "", "threads": 1, "pytorch": "",
    }
    return runs.Result(**{**values, **changes})


def test_a_curve_has_the_losses_of_both_and_labels():
    parent, run = result("v4_feedforward", [4, 3, 2.5]), result("v5_gpt", [4, 2.5, 2])
    curve = curves.loss_curve(run, parent)
    assert "v4_feedforward 2.50" in curve
    assert "v5_gpt 2.00" in curve
    assert "training step" in curve
    assert curve.count("<polyline") == 3
    heights = [float(y) for y in re.findall(r'<text class="\w+" x="[\d.]+" y="([\d.]+)"', curve)]
    assert all(b - a >= curves.LABEL_HEIGHT for a, b in zip(heights, heights[1:], strict=False))
    assert max(heights) < curves.HEIGHT


def test_a_curve_of_tokens_is_per_character():
    parent = result("v7b_kv_cache", [4, 3, 2.5])
    run = result("v8b_gpt2_tokens", [10, 6, 5], characters_per_token=2.5)
    curve = curves.loss_curve(run, parent)
    assert "v8b_gpt2_tokens 2.00" in curve
    assert "millions of characters" in curve


def test_a_run_is_kept_until_the_script_changes(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT, encoding="utf-8")
    changes = {"data": str(corpus), "prompt": "The ", "max_iters": 2, "block_size": 8}
    folder = tmp_path / "runs"
    first = runs.run_all(["bigram"], changes, folder)["bigram"]
    assert [step for step, *_ in first.history] == [0, 2]
    assert first.sample.startswith("The ")
    assert len(first.sample) == 4 + runs.SAMPLE_LENGTH
    model = runs.load_model("bigram", folder, changes)
    assert sum(p.numel() for p in model.parameters()) == first.parameters

    trained = []
    monkeypatch.setattr(runs, "run_in_process", lambda job, folder: trained.append(job.name))
    assert runs.run_all(["bigram"], changes, folder)["bigram"] == first
    assert trained == []
    code = source("bigram")
    talk = code.replace("a lookup table", "a table").replace("  # (B, T)", "  # (batch, time)")
    monkeypatch.setattr(runs, "source", lambda script: talk)
    runs.run_all(["bigram"], changes, folder)
    assert trained == []  # only the docstring and comments have changed
    monkeypatch.setattr(runs, "source", lambda script: code + "\nx = 1\n")
    runs.run_all(["bigram"], changes, folder)
    assert trained == ["bigram"]


@pytest.mark.parametrize("script", runs.SAME_TRAINING)
def test_scripts_that_train_like_another_one(script, splits):
    histories, defaults = [], []
    for name in (script, runs.SAME_TRAINING[script]):
        module = load(name)
        torch.manual_seed(1)
        model = module.LanguageModel(tiny(module), VOCAB_SIZE)
        histories.append(train(module, model, *splits, tiny(module)))
        defaults.append({f.name: f.metadata["cpu"] for f in dataclasses.fields(module.Config)})
    assert histories[0] == histories[1]
    for name in defaults[0].keys() & defaults[1].keys():
        assert defaults[0][name] == defaults[1][name]


def test_an_interrupted_run_is_not_kept(tmp_path):
    (tmp_path / "bigram.pt").write_bytes(b"")
    (tmp_path / "bigram.unfinished").write_text("{", encoding="utf-8")
    [job] = runs.jobs_for(["bigram"], {})
    assert runs.load_result(job, tmp_path) is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scripts", "v4_feedforward,v99"], "--scripts: v99 unknown"),
        (["--prompt", "é"], "--prompt"),
        (["--prompt", ""], "--prompt"),
        (["--device", "cuda"], "--device"),
        (["--data", "nowhere.txt"], "--data nowhere.txt"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, corpus, capsys, flags, said):
    common = ["--data", str(corpus), "--prompt", "The ", "--runs", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stop:
        page.main([*common, "--out", str(tmp_path / "index.html"), *flags])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_lesson_is_read_from_the_docstring():
    lesson = lessons.lesson_of("v2_single_head")
    assert lesson.title == "self-attention with a single head"
    assert list(lesson.notes) == ["New here", "Run it", "Probe", "Expect", "Diff"]
    assert "<pre>attention = softmax(" in lesson.idea
    assert "New here" not in lesson.idea


def test_an_exercise_hides_its_answer():
    task = "Without the mask\n\nLeave it out.\n\n"
    answer = "<details>\n<summary>What happened</summary>\n\nThe loss is `0.04`.\n\n</details>\n"
    shown, hidden = lessons.exercise(task + answer).split("<details>")
    assert "<h4>Without the mask</h4>" in shown
    assert "Leave it out." in shown
    assert "<p>The loss is <code>0.04</code>.</p>" in hidden


def test_known_words():
    assert page.known_words("The kingg, is king. of", {"the", "king"}) == pytest.approx(2 / 3)


def test_links_lead_to_docs_from_any_folder(tmp_path):
    links = '<a href="measurements.md#machines"> <a href="../data/__init__.py"> <a href="#live">'
    assert page.links_from(ROOT / "docs", links) == links
    moved = page.links_from(tmp_path, links)
    docs = (ROOT / "docs").as_uri()
    assert re.findall('href="([^"]+)"', moved) == [
        f"{docs}/measurements.md#machines", f"{docs}/../data/__init__.py", "#live"
    ]
    icon = '<link href="data:,"><a href="https://arxiv.org/abs/1.html">'
    assert page.links_from(tmp_path, icon) == icon


def test_a_damaged_page_has_no_runs(tmp_path):
    broken = '<script type="application/json" id="runs">[{"name</script>'
    runs.unpack_page(broken, runs.jobs_for(SCRIPTS, {}), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- The page as committed


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_shows_the_scripts_as_they_are(index, script):
    section = f'<section class="script" id="{script}" data-source="{page.checksum(script)}">'
    assert section in index, REBUILD
    parent = PARENTS[script]
    if parent is not None:  # then the parent's section shows that it is current, too
        assert f"The diff from {parent}.py: {changed_lines(parent, script)} changed" in index


def test_the_page_shows_the_runs_of_the_scripts_as_they_are(index):
    made = {values["name"]: values["fingerprint"] for values in runs.json_in(index, "runs")}
    jobs = {job.name: runs.fingerprint(job) for job in runs.jobs_for(SCRIPTS, {})}
    assert made == jobs, REBUILD


def test_the_page_shows_the_texts_as_they_are(index):
    for script in SCRIPTS:
        assert lessons.points_to_see(script, page.part_of(script)) in index, REBUILD
    _, exercises = lessons.exercises()
    for part in exercises.values():
        assert part in index, REBUILD
    assert lessons.probes_section() in index, REBUILD
    for name in ("page.css", "live.css", "models.js", "live.js"):
        assert read(page.HERE / name) in index, REBUILD


def test_a_rebuild_finds_the_runs_in_the_page(index, tmp_path):
    jobs = runs.jobs_for(SCRIPTS, {})
    runs.unpack_page(index, jobs, tmp_path)
    for job in jobs:
        assert runs.load_result(job, tmp_path) is not None, job.name
    for name in runs.LIVE:
        runs.load_model(name, tmp_path, {})


def test_the_page_is_complete_and_needs_no_network(index):
    assert len(index.encode()) < 5e6
    loaded = re.findall(r'(?:src|<link[^>]*href)="([^"]*)"', index)
    assert len(loaded) > 0
    for address in loaded:
        assert address.startswith("data:")
    styles = "".join(re.findall(r"<style>(.*?)</style>", index, flags=re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles


def test_the_links_of_the_page_lead_somewhere(index):
    anchors = re.findall(r'\bid="([^"]+)"', index)
    assert len(anchors) == len(set(anchors))
    for link in re.findall(r'<a [^>]*href="([^"]+)"', index):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / "docs" / link.partition("#")[0]).exists(), link
