"""positions.py: what context is worth: the loss at each position of a window.

The first position of a window sees one character and the last one sees them all, so the loss falls
along the window for as long as more context helps. The windows lie side by side, so that each
target of the validation split is counted once; their mean is the loss of the whole split. It is
computed in float32, with the best weights of each run.

Run it:   python lab/positions.py out/my_run
          python lab/positions.py out/my_run out/another --picture positions.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import matplotlib
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data.flags import Parser
from lab.ladder import SCRIPTS, load
from support import checkpoints

matplotlib.use("agg")  # a file, no window
from matplotlib import pyplot as plt


@torch.no_grad()
def losses_by_position(
    model: nn.Module, tokens: np.ndarray, block_size: int, batch_size: int = 8
) -> np.ndarray:
    """The mean loss in nats at each position of the whole windows of tokens: (block_size,)."""
    model.eval()
    n_windows = (len(tokens) - 1) // block_size
    starts = np.arange(n_windows) * block_size  # (n_windows,)
    total = torch.zeros(block_size, dtype=torch.float64)  # (block_size,)
    for i in tqdm(range(0, n_windows, batch_size), desc="windows", delay=1, leave=False):
        x, y = data.get_windows(tokens, starts[i : i + batch_size], block_size, "cpu")  # (B, T)
        logits, _ = model(x)  # (B, T, V)
        losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")  # (B, T)
        total += losses.sum(dim=0)  # (block_size,)
    return (total / n_windows).numpy()


def measure(folder: str) -> tuple[str, np.ndarray]:
    """A description of the run in a folder, and its losses by position; InputError if it has none.

    The model must predict characters, because other losses can't be compared with these.
    """
    saved = checkpoints.read_checkpoint(Path(folder, "best.pt"))
    if saved["tokenizer"] != "char" or saved["script"] not in SCRIPTS:
        raise data.InputError(f"{folder}: not a run of a script of this course on characters")
    script = load(saved["script"])
    config = {**saved["config"], "device": "cpu"}
    cfg = data.read_flags(script.Config, "", [], config)
    tokenizer = data.CharTokenizer(saved["characters"])
    model = script.LanguageModel(cfg, tokenizer.n_vocab)
    checkpoints.load_weights(model, saved)
    ids = tokenizer.encode(data.load_text(cfg.data), "--data")
    _, val_data = data.split(ids, cfg.block_size, cfg.data)
    n_parameters = sum(p.numel() for p in model.parameters())
    label = f"{saved['script']}.py, {n_parameters:,} parameters, step {saved['step']}"
    return label, losses_by_position(model, val_data, cfg.block_size)


def table(losses: np.ndarray) -> str:
    """The mean losses at the positions 1, 2, 3 to 4, 5 to 8 and so on, a line each."""
    lines = []
    begin = 0
    while begin < len(losses):
        end = min(max(2 * begin, 1), len(losses))
        place = f"{begin + 1}" if end == begin + 1 else f"{begin + 1} to {end}"
        lines.append(f"    positions {place:<12}{losses[begin:end].mean():.4f}")
        begin = end
    return "\n".join(lines)


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """Draw losses against positions, which are on a logarithmic scale."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for label, losses in curves.items():
        axes.plot(np.arange(1, len(losses) + 1), losses, label=label, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the window: characters that the model sees")
    axes.set_ylabel("loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise data.InputError(f"--picture {path}: can't write it ({error})") from None
    finally:
        plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Print the losses of the runs in argv, and draw them."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, such as out/my_run")
    parser.add_argument("--picture", type=Path, help="file for a picture, such as positions.png")
    with data.command_line():
        args = parser.parse_args(argv)
        curves = {}
        for folder in args.runs:
            label, losses = measure(folder)
            curves[label] = losses
            print(f"{folder}: {label}\n    whole split     {losses.mean():.4f}\n{table(losses)}")
        if args.picture:
            draw(curves, args.picture)


if __name__ == "__main__":
    main()
