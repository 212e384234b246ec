"""reinforce.py: what v12b_grpo.py gains, what each part of it is worth, and what luck would do.

--measure answers unseen sums, with three digits and with four, which no demonstration has: greedily
and --k times each. pass@k is the chance that k answers include a right one. Without it, each of the
--variants continues a fine-tuned model by --steps steps:

    grpo         as in v12b
    no_mean      the reward itself, without the mean of the group: right answers become more likely
    std          divided by the standard deviation of the group, as in the paper
    kl           with a penalty for leaving the fine-tuned model, of 0.1 nats per nat
    coin_toss    with random rewards, as a control

Run it:   python lab/reinforce.py --base out/NAME_OF_A_RUN --measure
          python lab/reinforce.py --base out/NAME_OF_A_RUN_OF_v12a --variants grpo,coin_toss
Writes:   tables, to standard output; with --picture FILE.png, the curves of the first variant.
"""

import copy
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import data
from data import setting, tasks
from part8_assistant import v12b_grpo
from support import batches, checkpoints

matplotlib.use("agg")  # a file, no window
from matplotlib import pyplot as plt

VARIANTS = ["grpo", "no_mean", "std", "kl", "coin_toss"]
KL_WEIGHT = 0.1


@dataclass
class Config(v12b_grpo.Config):
    """The settings of v12b_grpo.py, and what to do."""

    measure: bool = setting("only measure --base", False)
    variants: str = setting("which, separated by commas", ",".join(VARIANTS))
    steps: int = setting("steps of reinforcement", 100, least=1)
    n_sums: int = setting("sums in a measurement", 400, least=1)
    k: int = setting("answers to each of them", 8, least=2)
    picture: str = setting("PNG file to draw, none if empty", "")


def make_sums(n: int, digits: int) -> list:
    """n sums of numbers with so many digits, of which those with three are in no demonstration."""
    rng = random.Random(digits)
    sums = []
    while len(sums) < n:
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        if digits != 3 or tasks.is_for_test(f"{min(a, b)}+{max(a, b)}"):
            sums.append(tasks.ask(f"{a}+{b}", str(a + b)))
    return sums


def interval(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share that was found in n independent trials (Wilson 1927)."""
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


def interval_of_mean(values: list[float]) -> tuple[float, float]:
    """The 95% interval of a mean of independent values."""
    x = torch.tensor(values)
    half = 1.96 * x.std().item() / math.sqrt(len(values))
    return x.mean().item() - half, x.mean().item() + half


def measure(model: torch.nn.Module, tokenizer: data.CharTokenizer, cfg: Config) -> list[str]:
    """Lines of a table: greedy accuracy, pass@1 and pass@k, with intervals, and style."""
    lines = []
    for digits in (3, 4):
        sums = make_sums(cfg.n_sums, digits)
        # A longer answer than any demonstration needs more room; positions are relative.
        own = replace(cfg, temperature=1.0, block_size=64)
        greedy = 1 - tasks.share_wrong(
            sums, v12b_grpo.answer(model, sums, tokenizer, replace(own, temperature=0.0))
        )
        asked = [chat for chat in sums for _ in range(cfg.k)]
        replies = v12b_grpo.answer(model, asked, tokenizer, own)
        right = [tasks.is_right(c, r) for c, r in zip(asked, replies, strict=True)]
        groups = torch.tensor(right).view(-1, cfg.k).float()  # (n_sums, k)
        shares = groups.mean(dim=1).tolist()
        found = groups.amax(dim=1).mean().item()
        parts = [
            f"{digits} digits: greedy {in_percent(greedy, interval(greedy, len(sums)))}",
            f"pass@1 {in_percent(sum(shares) / len(shares), interval_of_mean(shares))}",
            f"pass@{cfg.k} {in_percent(found, interval(found, len(sums)))}",
            tasks.describe_style(replies),
            by_style(replies, right),
        ]
        lines.append("; ".join(parts))
    return lines


def by_style(replies: list[str], right: list[bool]) -> str:
    """How often answers of each style are right, as text."""
    parts = []
    for name, is_worked_out in (("worked out", True), ("at once", False)):
        pairs = zip(replies, right, strict=True)
        of_style = [is_right for reply, is_right in pairs if ("=" in reply) == is_worked_out]
        share = f"{100 * sum(of_style) / len(of_style):.1f}%" if of_style else "none"
        parts.append(f"right {name} {share}")
    return ", ".join(parts)


def in_percent(share: float, limits: tuple[float, float]) -> str:
    """A share with its interval, as text."""
    low, high = limits
    return f"{100 * share:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def advantages_for(variant: str) -> Callable:
    """The function that takes the place of v12b's advantages_of."""
    original = v12b_grpo.advantages_of

    def no_mean(rewards: torch.Tensor) -> torch.Tensor:
        return rewards

    def std(rewards: torch.Tensor) -> torch.Tensor:
        spread = rewards.std(dim=1, keepdim=True, correction=0)  # (n_questions, 1)
        return original(rewards) / (spread + 1e-4)

    def coin_toss(rewards: torch.Tensor) -> torch.Tensor:
        return original(torch.randint(2, rewards.shape).float())

    return {"no_mean": no_mean, "std": std, "coin_toss": coin_toss}.get(variant, original)


def penalised_update(reference: torch.nn.Module, examples: list) -> Callable:
    """v12b's update, with KL_WEIGHT times the mean KL divergence from reference at the answers.

    examples: a list whose last item is what the step learns from, int64 (N, 2, T).
    """
    original = v12b_grpo.update

    def update(model, optimizer, loss, step, cfg):
        x, y = torch.from_numpy(examples[-1]).to(cfg.device).unbind(1)
        log_p = F.log_softmax(model(x)[0], dim=-1)  # (B, T, V)
        with torch.no_grad():
            log_q = F.log_softmax(reference(x)[0], dim=-1)  # (B, T, V)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # (B, T)
        penalty = divergence[y != -100].mean()  # ()
        original(model, optimizer, loss + KL_WEIGHT * penalty, step, cfg)

    return update


def reinforce(
    variant: str,
    model: torch.nn.Module,
    lessons: list,
    test: list,
    tokenizer: data.CharTokenizer,
    cfg: Config,
) -> list[tuple[int, float, float, float]]:
    """Continue a fine-tuned model; return (step, right, worked out, characters) of estimates."""
    own = replace(cfg, temperature=1.0, max_iters=cfg.sft_iters + cfg.steps)
    optimizer = v12b_grpo.make_optimizer(model, own)
    originals = v12b_grpo.advantages_of, v12b_grpo.update, batches.pad
    v12b_grpo.advantages_of = advantages_for(variant)
    if variant == "kl":
        examples = []

        def pad(encoded, block_size):
            examples.append(originals[2](encoded, block_size))
            return examples[-1]

        v12b_grpo.update = penalised_update(copy.deepcopy(model).eval(), examples)
        batches.pad = pad
    curve = []
    try:
        for step in range(cfg.steps + 1):
            if step % cfg.eval_interval == 0 or step == cfg.steps:
                replies = v12b_grpo.answer(model, test, tokenizer, own)
                worked_out = sum("=" in reply for reply in replies) / len(replies)
                length = sum(map(len, replies)) / len(replies)
                curve.append((step, 1 - tasks.share_wrong(test, replies), worked_out, length))
            if step < cfg.steps:
                at = own.sft_iters + step  # as v12b counts
                v12b_grpo.grpo_step(model, optimizer, lessons, tokenizer, at, own)
    finally:
        v12b_grpo.advantages_of, v12b_grpo.update, batches.pad = originals
    return curve


def draw(curve: list[tuple[int, float, float, float]], path: str) -> None:
    """Draw the accuracy, the share worked out and the mean length over the steps, as a PNG file."""
    steps, right, worked_out, length = zip(*curve, strict=True)
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, [100 * share for share in right], label="right answers", color="#1f77b4")
    axes.plot(steps, [100 * share for share in worked_out], label="worked out", color="#2ca02c")
    axes.set(xlabel="steps of reinforcement", ylabel="% of answers to unseen sums", ylim=(0, 101))
    right_axes = axes.twinx()
    right_axes.plot(steps, length, label="length (right axis)", color="#d62728", linestyle="--")
    right_axes.set(ylabel="characters in an answer", ylim=(0, None))
    figure.legend(loc="lower right", bbox_to_anchor=(0.88, 0.15))
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def load_model(base: dict, cfg: Config) -> tuple[torch.nn.Module, data.CharTokenizer]:
    """The model of a checkpoint, and its tokenizer."""
    tokenizer = v12b_grpo.ChatTokenizer(base["characters"])
    model = v12b_grpo.LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
    checkpoints.load_weights(model, base)
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    """Measure a model, or continue it in several ways. argv: the flags."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        if not cfg.base:
            raise data.InputError("--base: missing; name the folder of a run of v12a or v12b")
        base = checkpoints.read_checkpoint(Path(cfg.base) / "best.pt")
        cfg = replace(cfg, **{name: base["config"][name] for name in v12b_grpo.SIZES})
        cfg = replace(cfg, dtype=v12b_grpo.choose_dtype(cfg))
        if cfg.measure:
            print("\n".join(measure(*load_model(base, cfg), cfg)))
            return
        _, lessons, test = tasks.load_conversations(cfg)
        for i, variant in enumerate(cfg.variants.split(",")):
            if variant not in VARIANTS:
                raise data.InputError(f"--variants {variant}: must be of {', '.join(VARIANTS)}")
            model, tokenizer = load_model(base, cfg)
            curve = reinforce(variant, model, lessons, test, tokenizer, cfg)
            for step, right, worked_out, length in curve:
                shares = f"right {100 * right:.1f}%, worked out {100 * worked_out:.1f}%"
                print(f"{variant}, step {step}: {shares}, {length:.1f} characters")
            if cfg.picture and i == 0:
                draw(curve, cfg.picture)


if __name__ == "__main__":
    main()
