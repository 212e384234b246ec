"""page.py: build docs/index.html, the course on one page, with models that respond to the reader.

For every script, the page shows the idea, the diff to its parent, its measurements, its loss curve
and what it writes. Models up to v5_gpt.py run in the page itself. It is one file that needs no
network.

Everything shown comes from runs of the scripts with their own defaults for a CPU. The results of
these runs are kept in out/page/ and in the page itself, so only those scripts are trained whose
code has changed since. --retrain trains all of them, which takes about an hour and a half on two
cores. Part 4 needs GPT-2's tokenizer, which tiktoken downloads once.

Run it:   python lab/page.py
          python lab/page.py --retrain
          python lab/page.py --retrain --scripts v4_feedforward,v5_gpt
Writes:   docs/index.html, and the curves of all scripts in one picture, docs/losses.png
"""

import hashlib
import html
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import data
from data import setting
from data.corpora import SHAKESPEARE
from lab.bench import names_in
from lab.compare import draw
from lab.ladder import PARENTS, ROOT, SCRIPTS, changed_lines, part_of, read, source
from lab.web import diffs, lessons, runs
from lab.web.curves import loss_curve
from lab.web.runs import LIVE, SAME_TRAINING, Result

HERE = Path(__file__).parent / "web"
ALL = ",".join(SCRIPTS)
PARTS = {
    1: ("The GPT", "From a lookup table to a GPT, one component at a time."),
    2: ("Training for real", "The same model, trained faster and better, and safe to stop."),
    3: ("Generating text", "How to choose the next character, and how to do it fast."),
    4: ("GPT-2", "Its tokens, its architecture, its released weights, and its large batches."),
    5: ("Since GPT-2", "What has changed in the architecture since."),
    6: ("The speedrun", "The lowest loss that two CPU cores reach in a few minutes."),
    7: ("Released models", "The settings, tokens and weights of Llama, SmolLM2 and Qwen3."),
    8: ("An assistant", "From completing a text to answering questions."),
}
# The strip "Is this text normal?": runs from the worst to the best, and what to see in each text.
STRIP = {
    "v5_gpt-0": "Before training. All 65 characters are about equally likely, even $ and 3.",
    "v5_gpt-10": "The first thing a model learns is which characters are common.",
    "v5_gpt-30": "Each letter fits the one before it: capitals come in runs, colons end lines.",
    "v5_gpt-100": "About as good as the bigram model. Short words are right now and then.",
    "v5_gpt-300": "Short words appear, such as it, to, you and my.",
    "v5_gpt-1000": "Many words are English, others only sound like it.",
    "v5_gpt": "A whole run. Names, colons and speeches; most words are English, no sentence is.",
    "v6c_recipe": "The same model, trained with a better recipe.",
    "v10a_muon": "Fewer invented words, and phrases that hold for a few words.",
    "v10c_speedrun": "A larger model with longer windows, and fewer steps.",
}
# Scripts whose curves are left out of the picture: those of v6a and v6b lie on v5's, and a loss of
# part 4 is per token of several characters.
NOT_DRAWN = [
    "v6a_fused_attention", "v6b_fast", "v8a_byte_pairs", "v8b_gpt2_tokens", "v8c_gpt2", "v8f_gpt1",
    "v8g_epochs",
]  # fmt: skip


@dataclass
class Config:
    """What to train, and where to write the page."""

    scripts: str = setting("scripts to train, separated by commas", ALL)
    data: str = setting("text to train on", "shakespeare")
    prompt: str = setting("text that the samples start with", "ROMEO:")
    max_iters: int = setting("training steps, 0 for each script's own", 0)
    retrain: bool = setting("train even if there are results", False)
    draft: bool = setting("train nothing, use the runs there are", False)
    device: str = setting("always cpu, whose defaults train quickly", "cpu")
    runs: str = setting("folder for the results of runs", "out/page")
    out: str = setting("file to write", "docs/index.html")


# The settings that are also the scripts' own. They only count if they aren't the default.
SHARED = ["data", "prompt", "max_iters"]


def checksum(script: str) -> str:
    """What the page says about the text of a script, to find out later if it has changed."""
    return hashlib.sha256(source(script).encode()).hexdigest()[:16]


def ideas() -> dict[str, str]:
    """The idea of each script in a few words, from the table in README.md."""
    row = r"^\| \[(\w+)\.py\]\([\w/]*\1\.py\) \| [\w–]+ \| ([^|]+) \|"
    return dict(re.findall(row, read(ROOT / "README.md"), flags=re.MULTILINE))


def inline_code(text: str) -> str:
    """A cell of a Markdown table as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text.strip(), quote=False))


def known_words(text: str, vocabulary: set[str]) -> float:
    """The fraction of the words in text with three or more letters that are in vocabulary."""
    words = words_of(text)
    return sum(word in vocabulary for word in words) / max(1, len(words))


def words_of(text: str) -> list[str]:
    """The words of a text with three or more letters, in lower case."""
    return re.findall(r"[a-z]{3,}", text.lower())


def contents(results: dict[str, Result]) -> str:
    """The table of contents: a row for each script, with its idea, its diff and its loss."""
    known = ideas()
    rows = []
    part = 0
    for script in SCRIPTS:
        if part_of(script) != part:
            part = part_of(script)
            title, _ = PARTS[part]
            rows.append(
                f'<tr><th colspan="4" scope="rowgroup"><a href="#part-{part}">Part {part}: {title}'
                "</a></th></tr>"
            )
        parent = PARENTS[script]
        changed = changed_lines(parent, script) if parent else "–"
        loss = f"{results[script].loss_per_character:.2f}" if script in results else "–"
        rows.append(
            f'<tr><td><a href="#{script}">{script}.py</a></td><td>{inline_code(known[script])}</td>'
            f"<td>{changed}</td><td>{loss}</td></tr>"
        )
    head = "<tr><th>script</th><th>the idea</th><th>changed lines</th><th>loss</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def strip(results: dict[str, Result], vocabulary: set[str]) -> str:
    """The cards of "Is this text normal?", from the highest loss to the lowest."""
    cards = []
    for name, remark in STRIP.items():
        if name not in results:
            continue
        run = results[name]
        written = run.sample.removeprefix(run.settings["prompt"])
        share = known_words(written[: written.rindex(" ")], vocabulary)  # the last word is cut off
        cards.append(
            f"<li><h3>{run.loss_per_character:.2f} <small>{run.script}.py, {run.steps:,} steps"
            f"</small></h3><pre>{sample_of(run)}</pre><p>{remark} {share:.0%} of its words occur "
            "in the training text.</p></li>"
        )
    return f'<ol class="cards">{"".join(cards)}</ol>'


def sample_of(run: Result) -> str:
    """What a run wrote, as HTML, with the prompt marked."""
    prompt = run.settings["prompt"]
    written = run.sample.removeprefix(prompt).rstrip()
    return f"<b>{html.escape(prompt, quote=False)}</b>{html.escape(written, quote=False)}"


def measurements(run: Result, parent: str | None) -> str:
    """The row of measurements of a run as HTML."""
    values = {"loss": f"{run.loss_per_character:.3f}"}
    if run.characters_per_token > 1:
        values["loss per token"] = f"{run.val_loss:.3f}"
    values["parameters"] = f"{run.parameters:,}"
    values["training steps"] = f"{run.steps:,}"
    values["tokens per step"] = f"{run.tokens_per_step:,}"
    if parent:
        values["changed lines"] = str(changed_lines(parent, run.script))
    entries = [f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in values.items()]
    return f'<dl class="measured">{"".join(entries)}</dl>'


def section(script: str, results: dict[str, Result]) -> str:
    """Everything about a script, as HTML."""
    parent = PARENTS[script]
    lesson = lessons.lesson_of(script)
    parts = [
        f'<section class="script" id="{script}" data-source="{checksum(script)}">',
        f"<h3><code>{script}.py</code> {html.escape(lesson.title, quote=False)}</h3>",
    ]
    run = results.get(script)
    if run is not None:
        parts.append(measurements(run, parent))
    points = lessons.points_to_see(script, part_of(script))
    if points:
        points = f"<div><h4>What to look at</h4>{points}</div>"
    parts.append(f'<div class="lesson"><div>{lesson.idea}{notes(lesson)}</div>{points}</div>')
    is_open = " open" if script in LIVE and parent else ""
    if parent:
        summary = f"The diff from {parent}.py: {changed_lines(parent, script)} changed lines"
        code = diffs.side_by_side(parent, script)
    else:
        summary = "The whole script"
        code = diffs.listing(script)
    parts.append(f'<details class="code"{is_open}><summary>{summary}</summary>{code}</details>')
    if run is not None:
        parts.append(outcome(run, results.get(parent)))
    parts.append('<p class="back"><a href="#contents">Contents</a></p></section>')
    return "\n".join(parts)


def outcome(run: Result, parent: Result | None) -> str:
    """The loss curve of a run and what it wrote, side by side, as HTML."""
    caption = "Validation loss (solid) and training loss (dashed) in nats per character."
    if run.trained_as:
        caption += f" It trains exactly as {run.trained_as}.py does, so the curve is the same."
    return (
        f'<div class="outcome"><figure>{loss_curve(run, parent)}<figcaption>{caption}</figcaption>'
        f"</figure><figure><pre>{sample_of(run)}</pre><figcaption>What it writes after "
        f"<code>{html.escape(run.settings['prompt'], quote=False)}</code></figcaption></figure>"
        "</div>"
    )


def notes(lesson: lessons.Lesson) -> str:
    """The labelled lines of a docstring as HTML, but for the diff, which the page shows."""
    entries = []
    for label, text in lesson.notes.items():
        if label == "Diff":
            continue
        if label in ("Run it", "Next", "Probe"):
            body = f"<pre>{html.escape(text, quote=False)}</pre>"
            if label == "Probe":
                body += f"<p>{probe_links(text)}</p>"
        else:
            body = lessons.prose(text)
        entries.append(f"<dt>{label}</dt><dd>{body}</dd>")
    return f'<dl class="notes">{"".join(entries)}</dl>'


def probe_links(command: str) -> str:
    """Links to the results of the probes that a command runs, as HTML."""
    tasks = re.search(r"--task ([\w,]+)", command)[1].split(",")
    links = [f'<a href="#probe-{task}">{task}</a>' for task in tasks]
    return f"What it shows: {', '.join(links)}"


def course(results: dict[str, Result]) -> str:
    """The parts of the course, each with its scripts and its exercises, as HTML."""
    preface, by_part = lessons.exercises()
    result = []
    for part, (title, what) in PARTS.items():
        path = os.path.relpath(lessons.page_of(part), ROOT / "docs").replace(os.sep, "/")
        link = f'<a href="{path}">The page of this part</a> has more measurements, and the papers.'
        result.append(f'<section id="part-{part}"><h2>Part {part}: {title}</h2>')
        result.append(f"<p>{what} {link}</p>")
        result += [section(script, results) for script in SCRIPTS if part_of(script) == part]
        if part in by_part:
            result.append(f'<section class="exercises" id="exercises-{part}">')
            result.append(f"<h3>Exercises for part {part}</h3>")
            if part == min(by_part):
                result.append(preface)
            result.append(f"{by_part[part]}</section>")
        result.append("</section>")
    return "\n".join(result)


def machine(results: dict[str, Result]) -> str:
    """On what machines the runs were made, in words."""
    kinds = []
    for run in results.values():
        threads = "one thread" if run.threads == 1 else f"{run.threads} threads"
        kinds.append(f"{run.machine}, {threads}, PyTorch {run.pytorch}")
    return html.escape("; ".join(dict.fromkeys(kinds)), quote=False)


def live(results: dict[str, Result], changes: dict[str, Any], folder: Path, text: str) -> str:
    """The models that respond to the reader, as HTML, or a note if they haven't been trained."""
    if any(name not in results for name in LIVE):
        return '<section id="live"><p>The models haven\'t been trained yet.</p></section>'
    from lab.web.live import live_section  # here, because a draft can do without

    tokenizer = data.CharTokenizer(text)
    models = {name: runs.load_model(name, folder, changes) for name in LIVE}
    _, val_data = data.split(tokenizer.encode(text), 64)
    return live_section(models, tokenizer, val_data)


def other_settings(changes: dict[str, Any]) -> str:
    """A warning that a page wasn't built with the defaults, as HTML, or "" if it was."""
    if not changes:
        return ""
    flags = html.escape(" ".join(f"--{name} {value}" for name, value in changes.items()))
    return (
        f"<p><strong>This page was built with <code>{flags}</code>. What it says about losses and "
        "texts is about runs without these flags.</strong></p>"
    )


def build(results: dict[str, Result], live_part: str, text: str, changes: dict[str, Any]) -> str:
    """The whole page. text: the corpus that the scripts were trained on."""
    vocabulary = set(words_of(text[: len(text) * 9 // 10]))
    nav = "".join(f'<li><a href="#part-{part}">Part {part}</a></li>' for part in PARTS)
    template = Template(read(HERE / "page.html"))
    return template.substitute(
        style=read(HERE / "page.css"),
        navigation=nav,
        changes=other_settings(changes),
        minutes=runs.SPEEDRUN_MINUTES,
        steps=f"{runs.SPEEDRUN['max_iters']:,}",
        contents=contents(results),
        live=live_part,
        strip=strip(results, vocabulary),
        course=course(results),
        probes=lessons.probes_section(),
        machine=machine(results),
        runs=runs.pack_results(list(results.values())),
    )


def changes_in(cfg: Config) -> dict[str, Any]:
    """The settings in SHARED that differ from their defaults."""
    changes = {}
    for name in SHARED:
        value = getattr(cfg, name)
        if value != getattr(Config, name):
            changes[name] = value
    return changes


def load_corpus(cfg: Config) -> str:
    """The text to train on; raises data.InputError if it doesn't fit the prompt."""
    text = data.load_text(cfg.data)
    if cfg.data == "shakespeare" and not SHAKESPEARE.exists():
        # The scripts can do with another text, but what the page says is about this one.
        raise data.InputError("--data shakespeare: the text isn't there; save it as said above")
    if not cfg.prompt:
        raise data.InputError("--prompt: empty; give the samples a text to start with")
    data.CharTokenizer(text).encode(cfg.prompt)  # refuses a prompt that can't occur
    return text


def links_from(folder: Path, page: str) -> str:
    """The page with its links to files in docs/ changed so that they work from folder."""
    docs = ROOT / "docs"
    if folder.resolve() == docs:
        return page
    return re.sub(r'href="(?=[\w./]+\.\w+)', f'href="{docs.as_uri()}/', page)


def write_page(page: str, path: Path) -> None:
    """Write the page to path, all at once: the old one has results of runs that would be lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(page, encoding="utf-8", newline="\n")
    unfinished.replace(path)


def draw_losses(results: dict[str, Result], path: Path) -> None:
    """Draw the loss curves of all scripts that differ in their training, in one picture."""
    histories = {}
    for script in SCRIPTS:
        if script in results and script not in SAME_TRAINING and script not in NOT_DRAWN:
            run = results[script]
            histories[f"{script}  {run.val_loss:.2f}"] = run.history
    if histories:
        draw(histories, path, "validation loss (whole split)")


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, and write the page. argv: the flags."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv, saved={"device": "cpu"}, fixed=["device"])
        chosen = names_in("scripts", cfg.scripts, SCRIPTS)
        scripts = [script for script in SCRIPTS if script in chosen]  # in the order of the course
        changes = changes_in(cfg)
        text = load_corpus(cfg)
        folder, out = ROOT / cfg.runs, ROOT / cfg.out
        jobs = runs.jobs_for(SCRIPTS, changes)
        if out.exists():
            runs.unpack_page(read(out), jobs, folder)
        if not cfg.draft:
            runs.run_all(scripts, changes, folder, cfg.retrain)
        results = {job.name: runs.load_result(job, folder) for job in jobs}
        missing = [name for name, result in results.items() if result is None]
        if missing and not cfg.draft:
            print(f"notice: no page yet, not trained: {', '.join(missing)}", file=sys.stderr)
            return
        results = {name: result for name, result in results.items() if result is not None}
        page = build(results, live(results, changes, folder, text), text, changes)
        page = links_from(out.parent, page)
        try:
            write_page(page, out)
            draw_losses(results, out.with_name("losses.png"))
        except OSError as error:
            raise data.InputError(f"--out {cfg.out}: can't write there ({error})") from None
        print(f"wrote {cfg.out}, {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
