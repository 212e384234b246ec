"""ablation.py: what each of v5_gpt.py's four ideas is worth, by training without it.

Three of them are left out in turn: the residual connections, LayerNorm, and the initialisation
(PyTorch's own takes its place). The fourth, dropout, is off by default on the CPU. It matters to a
model that is large for its text, so it is switched on twice: for the whole text and for a small
part of it. With the same seed, all runs start from the same weights, except with the default
initialisation.

Run it:   python lab/ablation.py
          python lab/ablation.py --seeds 1 --n_layer 8 --variants "v5, no LayerNorm"
Writes:   lab/out/ablation.md, a table of losses: the mean over the seeds, and their range.
"""

import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import v5_gpt
from data import setting
from lab.evaluate import whole_loss

SMALL_TEXT = 100_000  # characters; v5's CPU defaults go through them 55 times
VARIANTS = ["v5", "no residual connections", "no LayerNorm", "default initialisation"]
VARIANTS += ["dropout 0.2", "small text", "small text with dropout 0.2"]


@dataclass
class Config(v5_gpt.Config):
    """The settings of v5_gpt.py, and what to train."""

    variants: str = setting("what to train, separated by commas", ",".join(VARIANTS))
    seeds: int = setting("runs of each variant, with seeds from --seed on", 3, least=1)
    out: str = setting("folder for ablation.md", "lab/out")


class BlockWithoutResiduals(v5_gpt.Block):
    """v5's block, but each part replaces x instead of adding to it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(self.ln_1(x))  # (B, T, n_embd)
        return self.feed_forward(self.ln_2(x))  # (B, T, n_embd)


def make_model(variant: str, cfg: Config, vocab_size: int) -> v5_gpt.LanguageModel:
    """v5's model, changed as the variant says."""
    model = v5_gpt.LanguageModel(cfg, vocab_size)
    with torch.random.fork_rng():  # changing the model doesn't change the batches drawn later
        if variant == "no residual connections":
            remove_residuals(model, cfg)
        if variant == "no LayerNorm":
            remove_layer_norm(model)
        if variant == "default initialisation":
            initialise_by_default(model)
    return model


def remove_residuals(model: v5_gpt.LanguageModel, cfg: Config) -> None:
    """Replace the blocks by blocks without residual connections, with the same weights."""
    for i, block in enumerate(model.blocks):
        changed = BlockWithoutResiduals(cfg)
        changed.load_state_dict(block.state_dict())
        model.blocks[i] = changed


def remove_layer_norm(model: v5_gpt.LanguageModel) -> None:
    """Leave out every LayerNorm."""
    for block in model.blocks:
        block.ln_1 = nn.Identity()
        block.ln_2 = nn.Identity()
    model.ln_f = nn.Identity()


def initialise_by_default(model: v5_gpt.LanguageModel) -> None:
    """Give all layers the weights that PyTorch starts them with."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()


def run(
    variant: str, cfg: Config, vocab_size: int, train_data: np.ndarray, val_data: np.ndarray
) -> tuple[float, float, float]:
    """Train a variant; return its first loss, last training loss, and loss on all of val_data."""
    if "dropout 0.2" in variant:
        cfg = replace(cfg, dropout=0.2)
    if "small text" in variant:
        train_data = train_data[:SMALL_TEXT]
    torch.manual_seed(cfg.seed)
    model = make_model(variant, cfg, vocab_size).to(cfg.device)
    history = v5_gpt.train(model, train_data, val_data, cfg)
    _, first_loss, _ = history[0]
    _, train_loss, _ = history[-1]
    return first_loss, train_loss, whole_loss(model, val_data, cfg)


def table(results: dict[str, list[tuple[float, float, float]]], cfg: Config) -> str:
    """The results in Markdown: how they were made, then a row for each variant."""
    lines = [
        f"v5_gpt.py with batch_size {cfg.batch_size}, block_size {cfg.block_size}, n_embd "
        f"{cfg.n_embd}, n_head {cfg.n_head}, n_layer {cfg.n_layer}, learning_rate "
        f"{cfg.learning_rate:g}, {cfg.max_iters} steps, on {cfg.device} ({platform.machine()}), "
        f"PyTorch {torch.__version__}. Losses in nats, the mean of {cfg.seeds} seeds from "
        f"{cfg.seed} on; the validation loss is that of the whole split. The small text is "
        f"{SMALL_TEXT:,} characters.",
        "",
        "| variant | first loss | training loss | validation loss | lowest to highest |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant, runs in results.items():
        first_losses, train_losses, val_losses = zip(*runs, strict=True)
        lines.append(
            f"| {variant} | {mean(first_losses):.2f} | {mean(train_losses):.3f} | "
            f"{mean(val_losses):.3f} | {min(val_losses):.3f} to {max(val_losses):.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Train the variants named in argv's flags; print the table and write it to a file."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        variants = [name.strip() for name in cfg.variants.split(",") if name.strip()]
        if not variants:
            raise data.InputError("--variants: empty; say what to train")
        for name in variants:
            if name not in VARIANTS:
                raise data.InputError(f"--variants {name!r}: choose from {', '.join(VARIANTS)}")
        text = data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text)
        train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size)
        make_model("v5", cfg, tokenizer.n_vocab)  # finds sizes that don't fit
        path = Path(cfg.out) / "ablation.md"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()  # finds out now whether the table can be written later
        except OSError as error:
            raise data.InputError(f"--out {cfg.out}: can't write there ({error})") from None

        results = {}
        with tqdm(total=cfg.seeds * len(variants), desc="runs") as bar:
            for seed in range(cfg.seed, cfg.seed + cfg.seeds):
                seeded = replace(cfg, seed=seed)
                for variant in variants:
                    tqdm.write(f"{variant}, seed {seed}")
                    losses = run(variant, seeded, tokenizer.n_vocab, train_data, val_data)
                    results.setdefault(variant, []).append(losses)
                    path.write_text(table(results, cfg), encoding="utf-8")
                    bar.update()
        print(table(results, cfg))


if __name__ == "__main__":
    main()
