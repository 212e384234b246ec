"""probes.py: for each component, a small task that shows what the component is for.

The tasks are windows of random symbols, and a model learns one within seconds on a CPU. Each task
is given to models with a component and to models without it. Most of those without it have a floor:
a loss that no choice of their weights can get below. docs/probes.md has the arguments; in short:

- look_back: the target is the previous symbol. A table sees only the current one, which says
  nothing about it, so guessing among 16 is the best it can do: ln 16.
- xor: the target is a XOR b. The logits of a single head are sums f(a) + g(b) over a positive
  number. XOR would need sums whose signs contradict each other: (ln 2) / 2.
- add: the target is (a + b) mod 5. By the same argument, one of the 25 answers must be wrong, which
  costs at least ln 2 there: (ln 2) / 25.
- two_hops: a sequence repeats itself, and the target is the next symbol. Finding what followed the
  current symbol last time takes two steps, and so two layers. No floor is known for one layer.
- order: the target is the first of two symbols. Without positions, a head sees a set: ln 2.
- depth: look_back with 12 layers, without residual connections or LayerNorm. There is no floor, but
  a model that ignores its input scores ln 16.
- length: look_back beyond the positions of training. Untrained positions can't tell which symbol is
  the previous one. What is left is how often each symbol has occurred.

Run it:   python lab/probes.py
          python lab/probes.py --task xor,add --rungs v3_multi_head,v4_feedforward
Writes:   lab/out/probes.md, tables of the results, and probes.png, a picture of them. If probes.md
          exists, only what is between its two marks is replaced.
"""

import copy
import math
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import v5_gpt
from data import setting
from lab.ablation import remove_layer_norm, remove_residuals
from lab.bench import names_in
from lab.ladder import load, read, write

SOLVED = 0.99  # the accuracy from which on a run counts as solved
IGNORED = -100  # cross_entropy leaves out targets with this value, so they aren't scored
N_SYMBOLS = 16  # in the tasks with longer windows
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TASK_NAMES = ["look_back", "xor", "add", "two_hops", "order", "depth", "length"]
RUNGS = ["bigram", "v2_single_head", "v3_multi_head", "v4_feedforward", "v5_gpt"]
RUNGS += ["v7b_kv_cache", "v9b_rope"]


@dataclass
class Config:
    """What to train, and how often."""

    task: str = setting("tasks, separated by commas", ",".join(TASK_NAMES))
    rungs: str = setting("scripts to train, separated by commas", ",".join(RUNGS))
    seeds: int = setting("runs of each model, with seeds from --seed on", 5, least=1)
    seed: int = setting("random seed", 1337)
    max_iters: int = setting("training steps; 0: as many as the task needs", 0)
    processes: int = setting("runs at the same time; 0: one for each core", 0, below=999)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    out: str = setting("folder for probes.md and probes.png", "lab/out")


# ---- The tasks: each function returns windows and their targets, int64 (B, T) each


def look_back(n_windows: int, length: int, n_scored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The target at each of the last n_scored positions is the symbol before."""
    x = torch.randint(N_SYMBOLS, (n_windows, length))  # (B, T)
    y = x.roll(1, dims=1)  # (B, T)
    y[:, :-n_scored] = IGNORED
    return x, y


def ask(a: torch.Tensor, b: torch.Tensor, answer: torch.Tensor, question_mark: int) -> tuple:
    """Windows "a b ?" from a and b, int64 (B,) each; only the target at "?", the answer, counts."""
    x = torch.stack((a, b, torch.full_like(a, question_mark)), dim=1)  # (B, 3)
    y = torch.full_like(x, IGNORED)  # (B, 3)
    y[:, 2] = answer
    return x, y


def xor() -> tuple[torch.Tensor, torch.Tensor]:
    """All 4 windows of two bits and "?", whose target is a XOR b."""
    a, b = torch.cartesian_prod(torch.arange(2), torch.arange(2)).unbind(1)  # (4,) each
    return ask(a, b, a ^ b, question_mark=2)


def add() -> tuple[torch.Tensor, torch.Tensor]:
    """All 25 windows of two numbers below 5 and "?", whose target is (a + b) mod 5."""
    a, b = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)  # (25,) each
    return ask(a, b, (a + b) % 5, question_mark=5)


def order() -> tuple[torch.Tensor, torch.Tensor]:
    """All 56 windows of two different symbols out of 8 and "?", whose target is the first one."""
    a, b = torch.cartesian_prod(torch.arange(8), torch.arange(8)).unbind(1)  # (64,) each
    different = a != b  # (64,)
    return ask(a[different], b[different], a[different], question_mark=8)


def two_hops(n_windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of 32 symbols that repeat themselves with a random period from 5 to 16.

    The symbols of a period all differ. From the second period on, the target is the next symbol.
    """
    periods = torch.randint(5, N_SYMBOLS + 1, (n_windows, 1))  # (B, 1)
    shuffled = torch.rand(n_windows, N_SYMBOLS).argsort(dim=1)  # (B, N_SYMBOLS)
    positions = torch.arange(33)  # (T + 1,)
    sequence = shuffled.gather(1, positions % periods)  # (B, T + 1)
    x, y = sequence[:, :-1], sequence[:, 1:].clone()  # (B, T) each
    y[positions[:-1] < periods] = IGNORED
    return x, y


@dataclass
class Task:
    """A task and how to train on it."""

    title: str
    vocab_size: int
    block_size: int
    draw: Callable[[], tuple]  # the windows of a training step
    tests: dict[str, Callable[[], tuple]]  # what to measure the loss on, by name
    steps: int
    learning_rate: float


DRAW_SHORT = partial(look_back, 32, 16, n_scored=15)
TEST_SHORT = partial(look_back, 1000, 16, n_scored=15)
LENGTHS = [64, 128, 256]
TASKS = {
    "look_back": Task("the previous symbol", 16, 16, DRAW_SHORT, {"": TEST_SHORT}, 500, 3e-3),
    "xor": Task("a XOR b", 3, 3, xor, {"": xor}, 1000, 3e-3),
    "add": Task("(a + b) mod 5", 6, 3, add, {"": add}, 2000, 3e-3),
    "two_hops": Task(
        title="the next symbol of a sequence that repeats itself",
        vocab_size=16,
        block_size=32,
        draw=partial(two_hops, 32),
        tests={"": partial(two_hops, 1000)},
        steps=1000,
        learning_rate=3e-3,
    ),
    "order": Task("the first of two symbols", 9, 3, order, {"": order}, 500, 3e-3),
    "depth": Task("the previous symbol", 16, 16, DRAW_SHORT, {"": TEST_SHORT}, 500, 1e-3),
    "length": Task(
        title="the previous symbol, after training on 64 symbols",
        vocab_size=16,
        block_size=256,
        draw=partial(look_back, 16, 64, n_scored=63),
        tests={f"{n} symbols": partial(look_back, 200, n, n_scored=32) for n in LENGTHS},
        steps=400,
        learning_rate=3e-3,
    ),
}


# ---- The models


def entropy_of_draws(n: int) -> float:
    """The expected entropy, in nats, of the frequencies of 16 symbols in n random draws."""
    share = 1 / N_SYMBOLS
    entropy = 0.0
    for k in range(1, n + 1):  # a symbol occurs k times
        probability = math.comb(n, k) * share**k * (1 - share) ** (n - k)
        entropy -= N_SYMBOLS * probability * (k / n) * math.log(k / n)
    return entropy


def floor_beyond(block_size: int, length: int) -> float:
    """The floor of look_back's last 32 targets, for a model that was trained on block_size symbols.

    The symbol before position t is at one of the untrained positions, block_size to t - 1.
    """
    return mean(entropy_of_draws(t - block_size) for t in range(length - 32, length))


@dataclass
class Cell:
    """A model to train on a task: a script with some settings, perhaps without a component.

    floors has the loss that no such model can get below, for each test of the task. Where nothing
    is proven, it has None.
    """

    task: str
    script: str
    what: str = ""
    settings: dict[str, int] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    floors: tuple[float | None, ...] = (None,)

    def label(self) -> str:
        """What the model is, in words."""
        parts = [f"`{self.script}`"]
        if self.what:
            parts.append(self.what)
        if self.without:
            parts.append("without " + " and ".join(self.without))
        return ", ".join(parts)


ONE_LAYER = {"n_embd": 64}
DEEP = {"n_layer": 12}
POSITIONS, RESIDUALS, NORMS = "positions", "residuals", "norms"
UNTRAINED = (None, floor_beyond(64, 128), floor_beyond(64, 256))
NO_FLOORS = (None, None, None)
CELLS = [
    Cell("look_back", "bigram", floors=(math.log(16),)),
    Cell("look_back", "v2_single_head"),
    Cell("xor", "v2_single_head", floors=(math.log(2) / 2,)),
    Cell("xor", "v3_multi_head", "2 heads", {"n_head": 2}),
    Cell("xor", "v4_feedforward", "1 head"),
    Cell("add", "v3_multi_head", "1 head", floors=(math.log(2) / 25,)),
    Cell("add", "v3_multi_head", "4 heads", {"n_head": 4}),
    Cell("add", "v4_feedforward", "1 head"),
    Cell("two_hops", "v4_feedforward", "2 heads", {"n_head": 2}),
    Cell("two_hops", "v4_feedforward", "4 heads, 64 wide", {"n_head": 4, "n_embd": 64}),
    Cell("two_hops", "v5_gpt", "1 layer", {"n_head": 2}),
    Cell("two_hops", "v5_gpt", "2 layers", {"n_head": 2, "n_layer": 2}),
    Cell("order", "v2_single_head", without=(POSITIONS,), floors=(math.log(2),)),
    Cell("order", "v2_single_head"),
    Cell("order", "v5_gpt", "2 layers", {"n_layer": 2}, without=(POSITIONS,)),
    Cell("depth", "v5_gpt", "12 layers", DEEP),
    Cell("depth", "v5_gpt", "12 layers", DEEP, without=(NORMS,)),
    Cell("depth", "v5_gpt", "12 layers", DEEP, without=(RESIDUALS,)),
    Cell("depth", "v5_gpt", "12 layers", DEEP, without=(RESIDUALS, NORMS)),
    Cell("length", "v7b_kv_cache", "1 layer", ONE_LAYER, floors=UNTRAINED),
    Cell("length", "v9b_rope", "1 layer", ONE_LAYER, floors=NO_FLOORS),
    Cell("length", "v9b_rope", "2 layers", {"n_embd": 64, "n_layer": 2}, floors=NO_FLOORS),
]


def make_model(cell: Cell, device: str) -> nn.Module:
    """The model of a cell; 32 wide, with 1 head and 1 layer, unless its settings say otherwise."""
    task = TASKS[cell.task]
    sizes = {"block_size": task.block_size, "n_embd": 32, "n_head": 1, "n_layer": 1, "dropout": 0.0}
    script = load(cell.script)
    cfg = data.read_flags(script.Config, "", ["--device", device], saved=sizes | cell.settings)
    model = script.LanguageModel(cfg, task.vocab_size)
    if POSITIONS in cell.without:
        nn.init.zeros_(model.position_embedding.weight)
        model.position_embedding.weight.requires_grad = False
    if RESIDUALS in cell.without:
        remove_residuals(model, cfg)
    if NORMS in cell.without:
        remove_layer_norm(model)
    return model.to(device)


# ---- Training and testing


@dataclass
class Run:
    """What came of training a cell with one seed: losses in nats, one for each test of the task."""

    cell: int
    seed: int
    losses: list[float]
    accuracies: list[float]
    measures: dict[str, float]
    maps: list[np.ndarray]


def train(model: nn.Module, task: Task, steps: int, device: str) -> None:
    """Train the model, with AdamW and a constant learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate)
    for _ in range(steps):
        x, y = task.draw()  # (B, T) each
        _, loss = model(x.to(device), y.to(device))  # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def test(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """The mean loss in nats and the accuracy at the scored targets of windows, int64 (B, T)."""
    logits, loss = model(x, y)  # (B, T, V) and ()
    scored = y != IGNORED  # (B, T)
    right = logits.argmax(dim=-1)[scored] == y[scored]  # (number of scored targets,)
    return loss.item(), right.float().mean().item()


def draw_test(windows: Callable[[], tuple], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of a test, int64 (B, T), and their targets: the same for every model."""
    with torch.random.fork_rng(devices=[]):  # the training draws what it would have drawn
        torch.manual_seed(0)
        x, y = windows()  # (B, T) each
    return x.to(device), y.to(device)


def run(index: int, seed: int, max_iters: int, device: str) -> Run:
    """Train the model of CELLS[index] and test it; max_iters 0 stands for the task's own number."""
    cell = CELLS[index]
    task = TASKS[cell.task]
    torch.manual_seed(seed)
    model = make_model(cell, device)
    tests = [draw_test(windows, device) for windows in task.tests.values()]
    measures, maps = {}, []
    if cell.task == "depth":
        measures = measure_start(model, *tests[0])
    train(model, task, max_iters if max_iters > 0 else task.steps, device)
    model.eval()
    results = [test(model, x, y) for x, y in tests]
    if cell.task == "two_hops" and cell.script == "v5_gpt":
        measures, maps = measure_attention(model, *tests[0])
    losses, accuracies = zip(*results, strict=True)
    return Run(index, seed, list(losses), list(accuracies), measures, maps)


def measure_start(
    model: v5_gpt.LanguageModel, x: torch.Tensor, y: torch.Tensor
) -> dict[str, float]:
    """How far the previous symbol gets through the layers of a new model, and the gradient back.

    x, y: windows and their targets, int64 (B, T) each.
    """
    _, loss = model(x, y)  # ()
    loss.backward()
    gradient = model.token_embedding.weight.grad.norm().item()
    model.zero_grad()
    changed = x.clone()  # (B, T)
    changed[:, -2] = (x[:, -2] + 1) % N_SYMBOLS
    # float32 can't show how small some of the numbers are. MPS has no float64, but the CPU has.
    exact = copy.deepcopy(model).cpu().double()
    before = last_vectors(exact, x.cpu())  # (B, T, n_embd)
    after = last_vectors(exact, changed.cpu())  # (B, T, n_embd)
    change = (after - before)[:, -1].norm() / before[:, -1].norm()  # ()
    return {
        "change of the last vector with the previous symbol, before training": change.item(),
        "gradient norm of the token embeddings, before training": gradient,
    }


@torch.no_grad()
def last_vectors(model: v5_gpt.LanguageModel, idx: torch.Tensor) -> torch.Tensor:
    """What comes out of the last block of v5, float (B, T, n_embd), for idx, int64 (B, T)."""
    positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
    x = model.token_embedding(idx) + model.position_embedding(positions)  # (B, T, n_embd)
    return model.blocks(x)  # (B, T, n_embd)


def attention_weights(model: v5_gpt.LanguageModel, idx: torch.Tensor) -> list[torch.Tensor]:
    """The attention weights of each layer of a model, float (n_head, B, T, T), for idx (B, T)."""
    T = idx.shape[1]
    positions = torch.arange(T, device=idx.device)  # (T,)
    x = model.token_embedding(idx) + model.position_embedding(positions)  # (B, T, n_embd)
    layers = []
    for block in model.blocks:
        normed = block.norm_1(x)  # (B, T, n_embd)
        heads = []
        for head in block.attention.heads:
            query, key = head.query(normed), head.key(normed)  # (B, T, head_size) each
            scores = query @ key.transpose(1, 2) / head.head_size**0.5  # (B, T, T)
            scores = scores.masked_fill(head.mask[:T, :T], -math.inf)  # (B, T, T)
            heads.append(F.softmax(scores, dim=-1))  # (B, T, T)
        layers.append(torch.stack(heads))  # (n_head, B, T, T)
        x = block(x)  # (B, T, n_embd)
    return layers


@torch.no_grad()
def measure_attention(
    model: v5_gpt.LanguageModel, x: torch.Tensor, y: torch.Tensor
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Look for a previous-token head in the first layer and an induction head in the last.

    The score of a previous-token head is its mean weight on the position before, in the first
    period; that of an induction head is its mean weight on all positions that follow an earlier
    occurrence of the current symbol, from the second period on. Some models look three positions
    back instead, and three positions after the occurrence, so this is measured, too. x, y: windows
    of two_hops and their targets, int64 (B, T) each.

    Returns the scores of the best heads, and for a window with a period of 9, the attention weights
    of the best previous-token head and the best induction head, float (T, T) each.
    """
    scored = y != IGNORED  # (B, T)
    layers = attention_weights(model, x)  # (n_head, B, T, T) each
    first, last = layers[0], layers[-1]  # (n_head, B, T, T) each
    periods = (~scored).sum(dim=1)  # (B,)
    example = (periods == 9).nonzero()[0, 0]  # ()
    measures, maps = {}, []
    for distance, word in ((1, "next"), (3, "third")):
        weight_back = first.diagonal(offset=-distance, dim1=2, dim2=3)  # (n_head, B, T - distance)
        back = weight_back[:, ~scored[:, distance:]].mean(dim=1)  # (n_head,)
        symbol_before = x.roll(distance, dims=1)  # (B, T)
        symbol_before[:, :distance] = -1  # nothing comes before the window
        follows = x[:, :, None] == symbol_before[:, None, :]  # (B, T, T)
        weight_after = (last * follows).sum(dim=3)  # (n_head, B, T)
        after = weight_after[:, scored].mean(dim=1)  # (n_head,)
        measures[f"layer 1: weight {distance} back"] = back.max().item()
        name = f"last layer: weight on the {word} position after an earlier occurrence"
        measures[name] = after.max().item()
        if distance == 1:
            maps = [first[back.argmax(), example], last[after.argmax(), example]]  # (T, T) each
    return measures, [weights.cpu().numpy() for weights in maps]


# ---- All runs


def start_process() -> None:
    """Prepare a process for runs: one thread, and Ctrl-C is for the main process alone."""
    torch.set_num_threads(1)  # with the tensors this small, a second thread only costs time
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_all(cells: list[int], cfg: Config) -> list[Run]:
    """Train each of the cells with each seed, in several processes; sorted by cell and seed."""
    todo = [(i, seed) for i in cells for seed in range(cfg.seed, cfg.seed + cfg.seeds)]
    n_processes = cfg.processes if cfg.processes > 0 else os.cpu_count()
    # Fork would be faster, but Windows doesn't have it, and PyTorch's threads don't survive it.
    context = multiprocessing.get_context("spawn")
    runs = []
    with ProcessPoolExecutor(min(n_processes, len(todo)), context, start_process) as pool:
        try:
            futures = [pool.submit(run, i, seed, cfg.max_iters, cfg.device) for i, seed in todo]
            for future in tqdm(as_completed(futures), total=len(todo), desc="runs"):
                runs.append(future.result())
        except BrokenProcessPool:
            why = "a process was killed, probably for lack of memory"
            raise data.InputError(f"{why}; try --processes 1") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return sorted(runs, key=lambda r: (r.cell, r.seed))


# ---- The results


def rows_of(runs: list[Run]) -> list[tuple[Cell, int, list[Run]]]:
    """The rows of the table: a cell, the number of one of its task's tests, and the cell's runs."""
    rows = []
    for index in dict.fromkeys(r.cell for r in runs):
        cell = CELLS[index]
        of_cell = [r for r in runs if r.cell == index]
        for i in range(len(TASKS[cell.task].tests)):
            rows.append((cell, i, of_cell))
    return rows


def label_of(cell: Cell, i: int) -> str:
    """A cell in words, and the name of its task's test number i if there are several."""
    name = list(TASKS[cell.task].tests)[i]
    return f"{cell.label()}, {name}" if name else cell.label()


def table(runs: list[Run], cfg: Config) -> str:
    """The results in Markdown: how they were made, a row for each cell and test, the measures."""
    on_gpu = cfg.device.startswith("cuda")
    machine = torch.cuda.get_device_name(cfg.device) if on_gpu else platform.machine()
    lines = [
        f"Seeds {cfg.seed} to {cfg.seed + cfg.seeds - 1}, PyTorch {torch.__version__}, on "
        f"{cfg.device} ({machine}). Losses in nats; the mean and the lowest of the runs. A run has "
        f"solved its task if at least {SOLVED:.0%} of its answers are right.",
        "",
        "| task | model | floor | mean loss | best loss | accuracy | solved |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for cell, i, of_cell in rows_of(runs):
        losses = [r.losses[i] for r in of_cell]
        accuracies = [r.accuracies[i] for r in of_cell]
        n_solved = sum(accuracy >= SOLVED for accuracy in accuracies)
        floor = "–" if cell.floors[i] is None else f"{cell.floors[i]:.4f}"
        lines.append(
            f"| {cell.task} | {label_of(cell, i)} | {floor} | {mean(losses):.4f} | "
            f"{min(losses):.4f} | {mean(accuracies):.1%} | {n_solved} of {len(of_cell)} |"
        )
    lines += measures_table(runs)
    return "\n".join(lines) + "\n"


def measures_table(runs: list[Run]) -> list[str]:
    """The lines of a table of what was measured inside the models; none if nothing was."""
    lines = []
    for index in dict.fromkeys(r.cell for r in runs):
        of_cell = [r for r in runs if r.cell == index]
        for name in of_cell[0].measures:
            values = [r.measures[name] for r in of_cell]
            each = ", ".join(f"{value:.2g}" for value in values)
            lines.append(f"| {CELLS[index].task} | {CELLS[index].label()} | {name} | {each} |")
    if lines:
        lines = ["", "| task | model | measured | each run |", "|---|---|---|---|", *lines]
    return lines


def draw(runs: list[Run], path: Path) -> None:
    """Draw the losses of all runs, the floors, and the attention maps of the best run with maps."""
    import matplotlib  # here, because the results can be read without a picture

    matplotlib.use("agg")  # a file, no window
    from matplotlib import pyplot as plt

    rows = rows_of(runs)
    tasks = list(dict.fromkeys(cell.task for cell, _, _ in rows))
    n_rows = [sum(cell.task == task for cell, _, _ in rows) for task in tasks]
    with_maps = [r for r in runs if r.maps]
    heights = [0.8 + 0.25 * n for n in n_rows]
    map_height = 4.5 if with_maps else 0
    figure = plt.figure(figsize=(10, sum(heights) + map_height), layout="constrained")
    top = figure
    if with_maps:
        top, bottom = figure.subfigures(2, 1, height_ratios=[sum(heights), map_height])
        draw_maps(bottom, min(with_maps, key=lambda r: r.losses[0]))
    top.suptitle("Loss of each run in nats: solved (blue), not solved (orange), the floor (red)")
    panels = top.subplots(len(tasks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, task in zip(panels, tasks, strict=True):
        draw_task(panel, task, [row for row in rows if row[0].task == task])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_task(panel: Any, task: str, rows: list[tuple[Cell, int, list[Run]]]) -> None:
    """Draw a line for each row: a dot for the loss of each run, a bar for the floor."""
    for height, (cell, i, runs) in enumerate(rows):
        for r in runs:
            color = "tab:blue" if r.accuracies[i] >= SOLVED else "tab:orange"
            panel.scatter(r.losses[i], height, s=40, alpha=0.6, color=color, zorder=3)
        if cell.floors[i] is not None:
            panel.vlines(cell.floors[i], height - 0.4, height + 0.4, color="tab:red", linewidth=2.5)
    labels = [label_of(cell, i).replace("`", "") for cell, i, _ in rows]
    panel.set_yticks(range(len(rows)), labels)
    panel.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    right = panel.get_xlim()[1]
    panel.set_xlim(-0.02 * right, right)
    panel.grid(axis="x", alpha=0.3)
    panel.set_title(f"{task}: {TASKS[task].title}", loc="left", fontsize=11)


def draw_maps(figure: Any, best: Run) -> None:
    """Draw the two attention maps of a run, with the scores of their heads."""
    panels = figure.subplots(1, 2)
    scores = list(best.measures.values())[:2]
    names = ["Previous-token head, layer 1", "Induction head, last layer"]
    for panel, weights, name, score in zip(panels, best.maps, names, scores, strict=True):
        panel.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        panel.set_title(f"{name}: score {score:.2f}", fontsize=10)
        panel.set_xlabel("position attended to")
        panel.set_ylabel("position")


# ---- The command line


def choose_cells(cfg: Config) -> list[int]:
    """The indices in CELLS that --task and --rungs choose; raises data.InputError if none is."""
    tasks = names_in("task", cfg.task, TASK_NAMES)
    rungs = names_in("rungs", cfg.rungs, RUNGS)
    chosen = []
    for i, cell in enumerate(CELLS):
        if cell.task in tasks and cell.script in rungs:
            chosen.append(i)
    if not chosen:
        why = "no script of --rungs has one of the tasks of --task; leave one of the flags out"
        raise data.InputError(f"--task, --rungs: {why}")
    return chosen


def page_with(results: str, page: str) -> str:
    """The text of a page with new results between its marks; InputError if it has no marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise data.InputError(
            f"--out: probes.md there has no lines {BEGIN} and {END}; choose another folder"
        )
    return f"{before}{BEGIN}\n\n{results}\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    """Train what the flags in argv say; print the tables, and write them and the picture."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        cells = choose_cells(cfg)
        page, picture = Path(cfg.out) / "probes.md", Path(cfg.out) / "probes.png"
        can_draw = find_spec("matplotlib") is not None
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            if not page.exists():
                page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
            page_with("", read(page))  # has the page both marks?
            page.open("ab").close()  # finds out now whether the results can be written later
            if can_draw:
                picture.open("ab").close()
        except OSError as error:
            raise data.InputError(f"--out {cfg.out}: can't write there ({error})") from None

        runs = run_all(cells, cfg)
        results = table(runs, cfg)
        write({page: page_with(results, read(page))})
        if can_draw:
            draw(runs, picture)
        else:
            why = "pip install -r requirements-dev.txt brings matplotlib"
            print(f"notice: no picture without matplotlib; {why}", file=sys.stderr)
        print(results)


if __name__ == "__main__":
    main()
