"""compare.py: train scripts on the same budget and put the results side by side.

Each script gets the same text, a model of the same size and the same number of training tokens:
max_iters batches of batch_size windows of block_size tokens. The learning rate and the rest of the
recipe have the script's own defaults, unless a flag sets them for all scripts. A script that
doesn't have a setting goes without it. Those of part 4 are left out unless --scripts names them:
their tokens are parts of words. Bits per byte compare them with the others, whose tokens are
characters.

Run it:   python lab/compare.py
          python lab/compare.py --scripts v4_feedforward,v5_gpt --data python --prompt "def "
          python lab/compare.py --scripts "" --logs out/my_run/log.jsonl
Writes:   lab/out/compare.md, a table of losses and times and samples, and compare.png, the curves.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import data
from data import setting
from data.flags import make_parser
from lab.common import bits_per_byte, generate, load_corpus, train, whole_loss
from lab.ladder import PARENTS, SCRIPTS, changed_lines, load, part_of
from part5_modern import v9d_gqa

matplotlib.use("agg")  # a file, no window
from matplotlib import pyplot as plt

# Those of part 4 have other tokens, and those of part 8 learn from conversations.
ON_CHARACTERS = ",".join(name for name in SCRIPTS if part_of(name) not in (4, 8))


@dataclass
class Config(v9d_gqa.Config):
    """The settings of v9d_gqa.py, and what to compare."""

    scripts: str = setting("scripts to train, separated by commas", ON_CHARACTERS)
    logs: str = setting("log.jsonl files to draw as well, separated by commas", "")
    out: str = setting("folder for compare.md and compare.png", "lab/out")


# The settings that are the same for all scripts. The others have each script's own defaults.
SHARED = [
    "batch_size", "block_size", "n_embd", "n_head", "n_kv_head", "n_layer", "dropout", "max_iters",
    "eval_interval", "seed", "device", "data", "prompt", "max_new_tokens", "dtype", "compile",
]


@dataclass
class Result:
    """How one script did: losses in nats, seconds of training including its loss estimates.

    bits: val_loss in bits per byte.
    """

    script: str
    parameters: int
    history: list[tuple[int, float, float]]
    val_loss: float
    bits: float
    seconds: float
    sample: str


def config_of(name: str, cfg: Config, given: dict[str, Any]) -> Any:
    """A script's Config with the shared settings and the given flags, as far as it has them."""
    shared = {key: getattr(cfg, key) for key in SHARED}
    script = load(name)
    return data.read_flags(script.Config, "", [], saved={**shared, **given})


def train_script(
    name: str, cfg: Any, tokenizer: Any, train_data: np.ndarray, val_data: np.ndarray
) -> Result:
    """Train one script and sample from it; val_loss is over the whole of val_data."""
    script = load(name)
    torch.manual_seed(cfg.seed)
    model = script.LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
    start = time.perf_counter()
    history = train(script, model, train_data, val_data, cfg)
    seconds = time.perf_counter() - start
    model.eval()
    start_text = cfg.prompt if cfg.prompt else "\n"
    prompt = torch.tensor([tokenizer.encode(start_text)], device=cfg.device)  # (1, T)
    sample = generate(script, model, prompt, cfg.max_new_tokens, cfg)  # (1, T + max_new_tokens)
    val_loss = whole_loss(model, val_data, cfg)
    return Result(
        script=name,
        parameters=sum(p.numel() for p in model.parameters()),
        history=history,
        val_loss=val_loss,
        bits=bits_per_byte(val_loss, tokenizer, val_data),
        seconds=seconds,
        sample=tokenizer.decode(sample[0].tolist()),
    )


def table(results: list[Result], cfg: Config) -> str:
    """The results in Markdown: how they were made, a row for each script, then the samples."""
    tokens = cfg.max_iters * cfg.batch_size * cfg.block_size
    on_gpu = cfg.device.startswith("cuda")
    machine = torch.cuda.get_device_name(cfg.device) if on_gpu else platform.machine()
    settings = ", ".join(f"{key} {getattr(cfg, key)!r}" for key in SHARED)
    lines = [
        f"Each script trained on {tokens:,} tokens ({settings}) with PyTorch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, on {cfg.device} ({machine}). Losses in nats per "
        "token; the training loss is the last estimate, the validation loss that of the whole "
        "split, of which bits per byte are another form that other tokens don't change. Seconds "
        "and tokens/s are those of training, including the loss estimates. Changed lines are those "
        "of the diff to the parent, module docstrings left out.",
        "",
        "| script | parameters | training loss | validation loss | bits per byte | seconds | "
        "tokens/s | changed lines |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        parent = PARENTS[result.script]
        changed = changed_lines(parent, result.script) if parent else "-"
        lines.append(
            f"| `{result.script}.py` | {result.parameters:,} | {result.history[-1][1]:.4f} | "
            f"{result.val_loss:.4f} | {result.bits:.3f} | {result.seconds:.0f} | "
            f"{tokens / result.seconds:,.0f} | {changed} |"
        )
    for result in results:
        lines += ["", f"`{result.script}.py`:", "", "```text", result.sample.strip("\n"), "```"]
    return "\n".join(lines) + "\n"


def read_log(name: str) -> list[tuple[int, float, float]]:
    """Read a log.jsonl of v6d_checkpoints.py or later as (step, train loss, validation loss).

    Raises data.InputError if the file isn't one.
    """
    try:
        entries = map(json.loads, Path(name).read_text(encoding="utf-8").splitlines())
        history = [(int(e["step"]), float(e["train_loss"]), float(e["val_loss"])) for e in entries]
        if not np.isfinite(history).all():
            raise ValueError("a loss in it isn't finite")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise data.InputError(f"--logs {name}: not a log.jsonl ({error})") from None
    if not history:
        raise data.InputError(f"--logs {name}: empty; wait for the first loss estimate")
    return history


def draw(
    histories: dict[str, list[tuple[int, float, float]]], path: Path, title: str
) -> None:
    """Draw the loss curves: validation loss solid, training loss dashed. title: the legend's."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    colors = plt.colormaps["turbo"](np.linspace(0.05, 0.95, len(histories)))
    for (label, history), color in zip(histories.items(), colors, strict=True):
        steps, train_losses, val_losses = zip(*history, strict=True)
        axes.plot(steps, val_losses, color=color, label=label)
        axes.plot(steps, train_losses, color=color, linestyle="--", linewidth=0.7, alpha=0.6)
    # All curves start near ln(V); to show where they differ, the axis starts after that.
    later = [loss for h in histories.values() for _, *losses in h[1:] for loss in losses]
    if later:
        axes.set_ylim(min(later) - 0.05, max(later) + 0.05)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Validation loss (solid) and training loss (dashed)")
    axes.grid(alpha=0.3)
    figure.legend(title=title, loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train the scripts named in argv's flags; write the table and the picture after each one."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        given = vars(make_parser(Config, "").parse_args(argv))
        if cfg.resume or cfg.sample_only:
            raise data.InputError("--resume, --sample_only: not for comparing")
        names = [name.strip() for name in cfg.scripts.split(",") if name.strip()]
        unknown = [name for name in names if name not in SCRIPTS]
        if unknown:
            listed = ", ".join(SCRIPTS)
            raise data.InputError(f"--scripts: {', '.join(unknown)} unknown; there are {listed}")
        logs = [name.strip() for name in cfg.logs.split(",") if name.strip()]
        histories = {name: read_log(name) for name in logs}
        if not names and not logs:
            raise data.InputError("--scripts and --logs: both empty; say what to compare")
        text = data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text)
        splits = data.split(tokenizer.encode(text), cfg.block_size)
        # Find mistakes now, not after the first scripts have been trained.
        tokenizer.encode(cfg.prompt)
        configs = {name: config_of(name, cfg, given) for name in names}
        for name in names:
            load(name).LanguageModel(configs[name], tokenizer.n_vocab)
        markdown, picture = Path(cfg.out) / "compare.md", Path(cfg.out) / "compare.png"
        try:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            for path in (markdown, picture):
                path.open("ab").close()
        except OSError as error:
            raise data.InputError(f"--out {cfg.out}: can't write there ({error})") from None
        results = []
        for name in tqdm(names, desc="scripts"):
            tqdm.write(f"{name}.py")
            corpus = (tokenizer, *splits)
            if part_of(name) == 4:  # other tokens
                corpus = load_corpus(load(name), configs[name])
            result = train_script(name, configs[name], *corpus)
            results.append(result)
            markdown.write_text(table(results, cfg), encoding="utf-8")
            histories[f"{name}  {result.val_loss:.2f}"] = result.history
            draw(histories, picture, "validation loss (whole split)")
        if not names:
            draw(histories, picture, "log")
        print(table(results, cfg))


if __name__ == "__main__":
    main()
