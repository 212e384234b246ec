"""assistant.py: what v12a_sft.py learns from fewer demonstrations, from a base, with another loss.

Each run trains v12a as its own command does, for --max_iters steps, and answers the unseen
questions of the test. The loss is that of the answers alone, also where questions are learned too.

Run it:   python lab/assistant.py
          python lab/assistant.py --compare loss
          python lab/assistant.py --compare base --base out/NAME_OF_A_RUN_OF_v9d
Writes:   a table, to standard output; with --picture FILE.png, the accuracies of --compare
          demonstrations as a picture.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import data
from data import setting, tasks
from part8_assistant import v12a_sft
from support import batches, checkpoints

matplotlib.use("agg")  # a file, no window
from matplotlib import pyplot as plt

COMPARISONS = ["demonstrations", "base", "loss"]


@dataclass
class Config(v12a_sft.Config):
    """The settings of v12a_sft.py, and what to compare."""

    compare: str = setting("what differs between runs", "demonstrations", choices=COMPARISONS)
    counts: str = setting("numbers of demonstrations", "1000,4000,16000,40000")
    seeds: str = setting("seeds, separated by commas", "1337")
    picture: str = setting("PNG file to draw, none if empty", "")


@dataclass
class Variant:
    """A run: its name, its settings, and whether questions are learned as well."""

    name: str
    cfg: Config
    learns_questions: bool = False


@dataclass
class Result:
    """The losses of the answers, in nats, and the percentages of right answers by task."""

    name: str
    seed: int
    train_loss: float
    val_loss: float
    shares: dict[str, float]

    @property
    def mean(self) -> float:
        """The percentage of right answers, all tasks counting the same."""
        return sum(self.shares.values()) / len(self.shares)


def variants_of(cfg: Config) -> list[Variant]:
    """The runs of a comparison for one seed; raises data.InputError if it lacks a setting."""
    if cfg.compare == "loss":
        return [
            Variant("answers", cfg),
            Variant("questions and answers", cfg, learns_questions=True),
        ]
    if cfg.compare == "base":
        if not cfg.base:
            raise data.InputError("--compare base: needs a run of v9d; name its folder with --base")
        return [Variant("random weights", replace(cfg, base="")), Variant("base", cfg)]
    variants = []
    for count in numbers("counts", cfg.counts):
        variants.append(Variant(f"{count:,}", replace(cfg, n_demonstrations=count)))
    return variants


def numbers(flag: str, text: str) -> list[int]:
    """The whole numbers in a list with commas; raises data.InputError, naming flag, for others."""
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in found):
        raise data.InputError(f"--{flag} {text}: not numbers; give some, separated by commas")
    return [int(part) for part in found]


def run(variant: Variant) -> Result:
    """Train one variant, and let it answer."""
    cfg = replace(variant.cfg, dtype=v12a_sft.choose_dtype(variant.cfg))
    torch.manual_seed(cfg.seed)
    text, lessons, test = tasks.load_conversations(cfg)
    tokenizer = v12a_sft.ChatTokenizer(tasks.alphabet(text, lessons + test))
    model = v12a_sft.LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
    if cfg.base:
        checkpoints.load_base(model, tokenizer, cfg, v12a_sft.SIZES)
    encoded = [v12a_sft.encode(lesson, tokenizer) for lesson in lessons]
    train_data = batches.pad(encoded, cfg.block_size)  # (N, 2, T)
    learned = train_data
    if variant.learns_questions:
        learned = batches.pad([(tokens, tokens) for tokens, _ in encoded], cfg.block_size)
    optimizer = v12a_sft.make_optimizer(model, cfg)
    for step in range(cfg.max_iters):
        v12a_sft.train_step(model, optimizer, learned, step, cfg)

    val_data = batches.pad([v12a_sft.encode(chat, tokenizer) for chat in test], cfg.block_size)
    return Result(
        name=variant.name,
        seed=cfg.seed,
        train_loss=v12a_sft.estimate_loss(model, train_data, cfg),
        val_loss=v12a_sft.estimate_loss(model, val_data, cfg),
        shares=tasks.count_right(test, v12a_sft.answer(model, test, tokenizer, cfg)),
    )


def row(result: Result) -> str:
    """A result as a row of a Markdown table."""
    shares = " | ".join(f"{share:.1f}" for share in result.shares.values())
    losses = f"{result.train_loss:.4f} | {result.val_loss:.4f}"
    return f"| {result.name} | {result.seed} | {losses} | {shares} | {result.mean:.1f} |"


def draw(results: list[Result], path: Path) -> None:
    """Draw the accuracy of each task against the number of demonstrations, means over the seeds."""
    names = list(dict.fromkeys(result.name for result in results))
    counts = [int(name.replace(",", "")) for name in names]
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for task in results[0].shares:
        means = []
        for name in names:
            shares = [result.shares[task] for result in results if result.name == name]
            means.append(sum(shares) / len(shares))
        axes.plot(counts, means, marker="o", label=task)
    axes.set_xscale("log")
    axes.set_xticks(counts, names)
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.set_xlabel("demonstrations")
    axes.set_ylabel("right answers to unseen questions, %")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Make the runs of a comparison. argv: the flags, by default those of the command line."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        results = []
        for seed in numbers("seeds", cfg.seeds):
            for variant in variants_of(replace(cfg, seed=seed)):
                result = run(variant)
                if not results:
                    names = " | ".join(result.shares)
                    print(f"| {cfg.compare} | seed | train loss | val loss | {names} | mean |")
                    print("|---|" + "---:|" * (len(result.shares) + 4))
                print(row(result))
                results.append(result)
        if cfg.picture:
            draw(results, Path(cfg.picture))


if __name__ == "__main__":
    main()
