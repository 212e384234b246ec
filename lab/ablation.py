"""ablation.py: what each idea of v5_gpt.py, v6c_recipe.py or v8c_gpt2.py is worth: leave it out.

Of v5's four ideas, three are left out in turn: the residual connections, LayerNorm, and the
initialisation (PyTorch's own takes its place). The fourth, dropout, is off by default on the CPU.
It matters to a model that is large for its text, so it is switched on twice: for the whole text and
for a small part of it. Of v6c's recipe, each ingredient is left out in turn, and then all of them.
Of v8c, each change to v8b is taken back in turn: GELU, the tied output layer, the smaller
projections, the biases that came and the one that went; --vocab_size trains on fewer tokens than
GPT-2's. With the same seed, all runs start from the same weights, except where the initialisation
or the output layer is another one.

Run it:   python lab/ablation.py
          python lab/ablation.py --script v6c_recipe
          python lab/ablation.py --script v8c_gpt2 --vocab_size 4096 --max_iters 500
          python lab/ablation.py --seeds 1 --n_layer 8 --variants "v5, no LayerNorm"
Writes:   lab/out/ablation.md, a table of losses: the mean over the seeds, and their range.
"""

import math
import platform
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import data
import v5_gpt
from data import setting
from data.flags import make_parser
from lab.common import load_corpus, train, whole_loss
from lab.ladder import load
from part2_training import v6b_fast, v6c_recipe
from part4_gpt2 import v8a_byte_pairs, v8b_gpt2_tokens

SMALL_TEXT = 100_000  # characters; v5's CPU defaults go through them 55 times
VARIANTS = {
    "v5_gpt": [
        "v5", "no residual connections", "no LayerNorm", "default initialisation", "dropout 0.2",
        "small text", "small text with dropout 0.2",
    ],
    "v6c_recipe": [
        "v6c", "no warm-up", "no decay", "no clipping", "weight decay 0.01", "decay everything",
        "beta2 0.999", "learning rate 2e-3", "v6b",
    ],
    "v8c_gpt2": [
        "v8c", "ReLU", "untied output layer", "projections as large as the rest",
        "no biases of queries, keys and values", "a bias in the output layer", "v8b",
    ],
}  # fmt: skip


@dataclass
class Config(v6c_recipe.Config):
    """The settings of the scripts, and what to train."""

    script: str = setting("the script whose ideas to leave out", "v5_gpt", choices=list(VARIANTS))
    variants: str = setting("what to train, separated by commas; by default, everything", "")
    seeds: int = setting("runs of each variant, with seeds from --seed on", 3, least=1)
    vocab_size: int = setting("v8a's tokens for v8c, at least 256; 0 is GPT-2's", 0, most=2**16)
    out: str = setting("folder for ablation.md", "lab/out")


# ---- v5's ideas


class BlockWithoutResiduals(v5_gpt.Block):
    """v5's block, but each part replaces x instead of adding to it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(self.norm_1(x))  # (B, T, n_embd)
        return self.feed_forward(self.norm_2(x))  # (B, T, n_embd)


def make_model(variant: str, script: Any, cfg: Any, vocab_size: int) -> nn.Module:
    """The model of a script, changed as the variant says."""
    model = script.LanguageModel(cfg, vocab_size)
    with torch.random.fork_rng():  # changing the model doesn't change the batches drawn later
        if variant == "no residual connections":
            remove_residuals(model, cfg)
        if variant == "no LayerNorm":
            remove_layer_norm(model)
        if variant == "default initialisation":
            initialise_by_default(model)
        if variant == "untied output layer":
            untie(model)
        if variant == "projections as large as the rest":
            enlarge_projections(model)
        if variant == "no biases of queries, keys and values":
            for block in model.blocks:
                block.attention.query_key_value.bias = None
        if variant == "a bias in the output layer":
            model.lm_head.bias = nn.Parameter(torch.zeros(vocab_size))  # (V,)
    return model


def remove_residuals(model: v5_gpt.LanguageModel, cfg: v5_gpt.Config) -> None:
    """Replace the blocks by blocks without residual connections, with the same weights."""
    for i, block in enumerate(model.blocks):
        changed = BlockWithoutResiduals(cfg)
        changed.load_state_dict(block.state_dict())
        model.blocks[i] = changed


def remove_layer_norm(model: v5_gpt.LanguageModel) -> None:
    """Leave out every LayerNorm."""
    for block in model.blocks:
        block.norm_1 = nn.Identity()
        block.norm_2 = nn.Identity()
    model.norm_f = nn.Identity()


def initialise_by_default(model: v5_gpt.LanguageModel) -> None:
    """Give all layers the weights that PyTorch starts them with."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()


# ---- v8c's changes to v8b


def untie(model: nn.Module) -> None:
    """Give the output layer weights of its own, drawn like those of the token embedding."""
    weight = torch.empty_like(model.token_embedding.weight)  # (V, n_embd)
    model.lm_head.weight = nn.Parameter(nn.init.normal_(weight, std=0.02))


def enlarge_projections(model: nn.Module) -> None:
    """Give the projections the standard deviation of the other matrices."""
    for name, parameter in model.named_parameters():
        if name.endswith("projection.weight"):
            parameter.data *= math.sqrt(2 * len(model.blocks))


def relu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """ReLU, called as v8c calls GELU."""
    return functional.relu(x)


# ---- v6c's recipe


def constant_after_warmup(step: int, cfg: v6c_recipe.Config) -> float:
    """v6c's learning rate, but it stays at its peak."""
    return cfg.learning_rate * min(1, (step + 1) / max(1, cfg.warmup_iters))


def decay_everything(model: nn.Module, cfg: v6c_recipe.Config) -> torch.optim.AdamW:
    """v6c's optimizer, but biases and the weights of LayerNorm decay, too."""
    return torch.optim.AdamW(
        model.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True,
        weight_decay=cfg.weight_decay,
    )


def with_usual_beta2(model: nn.Module, cfg: v6c_recipe.Config) -> torch.optim.AdamW:
    """v6c's optimizer with PyTorch's beta2."""
    optimizer = v6c_make_optimizer(model, cfg)
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.999)
    return optimizer


v6c_make_optimizer = v6c_recipe.make_optimizer
# For variants that other settings or weights don't make: the function to replace, and by what.
REPLACEMENTS: dict[str, tuple[Any, str, Callable]] = {
    "no decay": (v6c_recipe, "learning_rate_at", constant_after_warmup),
    "no clipping": (nn.utils, "clip_grad_norm_", lambda *_, **__: None),
    "decay everything": (v6c_recipe, "make_optimizer", decay_everything),
    "beta2 0.999": (v6c_recipe, "make_optimizer", with_usual_beta2),
    "ReLU": (functional, "gelu", relu),
}
CHANGED_SETTINGS = {
    "no warm-up": {"warmup_iters": 0},
    "weight decay 0.01": {"weight_decay": 0.01},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "dropout 0.2": {"dropout": 0.2},
    "small text with dropout 0.2": {"dropout": 0.2},
}


# ---- both


def settings_of(script: Any, given: dict[str, Any], seed: int) -> Any:
    """A script's own defaults, with the flags that were given, as far as it has them."""
    return data.read_flags(script.Config, "", [], saved={**given, "seed": seed})


def run(
    variant: str, script: Any, cfg: Any, vocab_size: int, train_data: np.ndarray,
    val_data: np.ndarray,
) -> tuple[float, float, float]:
    """Train a variant; return its first loss, last training loss, and loss on all of val_data."""
    cfg = replace(cfg, **CHANGED_SETTINGS.get(variant, {}))
    if "small text" in variant:
        train_data = train_data[:SMALL_TEXT]
    torch.manual_seed(cfg.seed)
    model = make_model(variant, script, cfg, vocab_size).to(cfg.device)
    with ExitStack() as stack:
        if variant in REPLACEMENTS:
            stack.enter_context(patch.object(*REPLACEMENTS[variant]))
        history = train(script, model, train_data, val_data, cfg)
        val_loss = whole_loss(model, val_data, cfg)
    _, first_loss, _ = history[0]
    _, train_loss, _ = history[-1]
    return first_loss, train_loss, val_loss


def table(results: dict[str, list[tuple[float, float, float]]], name: str, cfg: Any) -> str:
    """The results in Markdown: how they were made, then a row for each variant."""
    lines = [
        f"{name}.py with batch_size {cfg.batch_size}, block_size {cfg.block_size}, n_embd "
        f"{cfg.n_embd}, n_head {cfg.n_head}, n_layer {cfg.n_layer}, learning_rate "
        f"{cfg.learning_rate:g}, {cfg.max_iters} steps, on {cfg.device} ({platform.machine()}), "
        f"PyTorch {torch.__version__}. Losses in nats, the mean of the seeds from {cfg.seed} on; "
        f"the validation loss is that of the whole split. A small text has {SMALL_TEXT:,} "
        "characters.",
        "",
        "| variant | seeds | first loss | training loss | validation loss | lowest to highest |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for variant, runs in results.items():
        first_losses, train_losses, val_losses = zip(*runs, strict=True)
        lines.append(
            f"| {variant} | {len(runs)} | {mean(first_losses):.2f} | {mean(train_losses):.3f} | "
            f"{mean(val_losses):.3f} | {min(val_losses):.3f} to {max(val_losses):.3f} |"
        )
    return "\n".join(lines) + "\n"


def corpus_of(script: Any, cfg: Any, vocab_size: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The tokenizer, and the tokens for training and for validation.

    vocab_size: how many of v8a's tokens take the place of the script's; 0 is none.
    """
    if vocab_size == 0:
        return load_corpus(script, cfg)
    settings = data.read_flags(v8a_byte_pairs.Config, "", [], saved={"vocab_size": vocab_size})
    return load_corpus(v8a_byte_pairs, replace(settings, data=cfg.data))


def names_of_variants(cfg: Config) -> list[str]:
    """The variants to train; raises data.InputError for one that isn't known."""
    known = VARIANTS[cfg.script]
    named = [name.strip() for name in cfg.variants.split(",") if name.strip()]
    variants = list(dict.fromkeys(named)) or known
    for name in variants:
        if name not in known:
            raise data.InputError(f"--variants {name!r}: choose from {', '.join(known)}")
    return variants


def main(argv: list[str] | None = None) -> None:
    """Train the variants named in argv's flags; print the table and write it to a file."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        given = vars(make_parser(Config, "").parse_args(argv))
        variants = names_of_variants(cfg)
        script = load(cfg.script)
        settings = settings_of(script, given, cfg.seed)
        tokenizer, train_data, val_data = corpus_of(script, settings, cfg.vocab_size)
        make_model("", script, settings, tokenizer.n_vocab)  # finds sizes that don't fit
        path = Path(cfg.out) / "ablation.md"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()  # finds out now whether the table can be written later
        except OSError as error:
            raise data.InputError(f"--out {cfg.out}: can't write there ({error})") from None

        results = {}
        with tqdm(total=cfg.seeds * len(variants), desc="runs") as bar:
            for seed in range(cfg.seed, cfg.seed + cfg.seeds):
                for variant in variants:
                    tqdm.write(f"{variant}, seed {seed}")
                    trained = {"v6b": v6b_fast, "v8b": v8b_gpt2_tokens}.get(variant, script)
                    seeded = settings_of(trained, given, seed)
                    losses = run(
                        variant, trained, seeded, tokenizer.n_vocab, train_data, val_data
                    )
                    results.setdefault(variant, []).append(losses)
                    written = table(results, cfg.script, settings)
                    path.write_text(written, encoding="utf-8")
                    bar.update()
        print(written)


if __name__ == "__main__":
    main()
