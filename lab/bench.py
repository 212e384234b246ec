"""bench.py: how fast the scripts train and generate, and how much memory they take.

All models have the same shape, and so does the GPT-2 of the library transformers, for comparison.
They take turns, round after round, so that whatever else the machine does slows all of them alike.
Each turn has a process of its own. A training turn is one step to warm up and then the steps that
count, exactly as the script's own train() runs them. A generation turn fills the context of
block_size tokens, starting from one token, or generates --new_tokens tokens. With --vocabularies,
v8a_byte_pairs.py learns that many tokens from the training split of Shakespeare, and encodes all of
it.

Run it:   python lab/bench.py
          python lab/bench.py --models v5_gpt,v6b_fast --batch_size 24 --block_size 64 --steps 50
          python lab/bench.py --models "" --writers v7a_sampling,v7b_kv_cache
          python lab/bench.py --models "" --writers "" --vocabularies 1024,4096
Writes:   lab/out/bench.md, tables of medians, with ratios to v5_gpt.py and v7a_sampling.py.
"""

import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

import data
from data import setting
from lab.common import generate, train, with_dtype
from lab.ladder import SCRIPTS, load, part_of
from part2_training import v6b_fast
from part4_gpt2 import v8a_byte_pairs
from support import hardware
from support.stopwatch import wait_for

# The GPT-2 of transformers with its own dtype, which is float32, and with that of v6b_fast.py.
REFERENCES = ["transformers", "transformers_autocast"]
# v8g trains by epochs, and a step of it is one of v8f; part 8 trains on conversations.
ON_TEXT = [script for script in SCRIPTS if part_of(script) != 8]
MODELS = [script for script in ON_TEXT[1:] if script != "v8g_epochs"] + REFERENCES
WRITERS = [*ON_TEXT[ON_TEXT.index("v7a_sampling") :], "transformers"]
SAMPLES = (1, 16)  # texts generated at a time
VOCAB_SIZE = 65  # as in Shakespeare


@dataclass
class Config:
    """What to measure and how often. The models have the GPU defaults' shape on every device."""

    batch_size: int = setting("windows in a batch", 64, least=1)
    block_size: int = setting("longest context, in tokens", 256, least=2, below=20_000)
    n_embd: int = setting("width of the embeddings", 384, least=1)
    n_head: int = setting("attention heads in a layer", 6, least=1)
    n_kv_head: int = setting("key/value heads from v9d on", 2, least=1)
    n_layer: int = setting("number of blocks", 6, least=1, most=1000)
    dropout: float = setting("probability of dropping an activation", 0.0, below=1)
    dtype: str = setting("dtype from v6b on", "auto", choices=["auto", "float32", "bfloat16"])
    compile: bool = setting("use torch.compile from v6b on", gpu=v6b_fast.Config.compile, cpu=False)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    models: str = setting("what to train, separated by commas", ",".join(MODELS))
    writers: str = setting("what to generate with, separated by commas", ",".join(WRITERS))
    vocabularies: str = setting("numbers of v8a's tokens to learn, separated by commas", "")
    new_tokens: int = setting("tokens to generate; 0 fills the context", 0, below=1_000_000)
    rounds: int = setting("turns of each model", gpu=5, cpu=3, least=1)
    steps: int = setting("training steps in a turn, after one to warm up", gpu=50, cpu=2, least=1)
    out: str = setting("folder for bench.md", "lab/out")


@dataclass
class Turn:
    """What a training turn measured; gigabytes are None on systems that don't count them."""

    tokens_per_second: float
    utilisation: float
    gb_before: float | None
    gb_after: float | None
    dtype: str


class Reference(nn.Module):
    """The GPT-2 of transformers, with the interface of a script's model."""

    def __init__(self, cfg: v6b_fast.Config, vocab_size: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = dict(n_embd=cfg.n_embd, n_head=cfg.n_head, n_layer=cfg.n_layer)
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.dropout)
        sizes = dict(vocab_size=vocab_size, n_positions=cfg.block_size)
        no_tokens = dict(bos_token_id=None, eos_token_id=None)
        self.gpt2 = GPT2LMHeadModel(GPT2Config(**shape, **dropouts, **sizes, **no_tokens))

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 token ids and targets (B, T) -> float logits (B, T, V), mean loss () in nats."""
        logits = self.gpt2(idx, use_cache=False).logits  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # and ()

    def generate(self, idx: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Append sampled tokens to idx, int64 (B, T), using the library's own cache."""
        return self.gpt2.generate(  # (B, T + max_new_tokens)
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=max_new_tokens,
            do_sample=True, top_k=0, use_cache=True,
        )


def train_reference(
    model: Reference, train_data: np.ndarray, _: np.ndarray, cfg: v6b_fast.Config
) -> None:
    """The training loop of v5 without the loss estimates, in the dtype of cfg."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate)
    for _ in range(cfg.max_iters):
        x, y = data.get_batch(train_data, cfg.batch_size, cfg.block_size, cfg.device)  # (B, T) each
        with v6b_fast.autocast(cfg):
            _, loss = model(x, y)  # (B, T, V) and ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def peak_memory(device: str) -> float | None:
    """The most memory this process has used so far, in GB, on the GPU if it uses one."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, elsewhere KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def be_quiet() -> None:
    """Discard what a process prints: the scripts' logs, and Python's message after Ctrl-C."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def config_of(script: Any, cfg: Config) -> Any:
    """A script's Config with the shape and the number of steps to measure."""
    values = asdict(cfg) | {"max_iters": 1 + cfg.steps, "eval_interval": 10**9, "eval_iters": 1}
    known = {field.name for field in fields(script.Config)}
    config = script.Config(**{name: value for name, value in values.items() if name in known})
    return with_dtype(script, config)


def take_turn(name: str, cfg: Config) -> Turn:
    """Train a new model for 1 + steps steps in this process, and time all but the first."""
    script = v6b_fast if name in REFERENCES else load(name)
    script_cfg = config_of(script, cfg)
    make = Reference if name in REFERENCES else script.LanguageModel
    if name == "transformers":
        script_cfg = replace(script_cfg, dtype="float32")

    torch.manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (200_000,)).tolist()
    train_data, val_data = data.split(ids, cfg.block_size)
    gb_before = peak_memory(cfg.device)
    model = make(script_cfg, VOCAB_SIZE).to(cfg.device)
    times = []

    def note_time(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not isinstance(optimizer, torch.optim.AdamW):
            return  # in v10a, AdamW follows Muon in each step
        if len(times) in (0, cfg.steps):
            wait_for(cfg.device)
        times.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(note_time)
    if name in REFERENCES:
        train_reference(model, train_data, val_data, script_cfg)
    else:
        train(script, model, train_data, val_data, script_cfg)
    hook.remove()
    tokens = cfg.steps * cfg.batch_size * cfg.block_size
    tokens_per_second = tokens / (times[cfg.steps] - times[0])

    gb_after = peak_memory(cfg.device)
    dtype = dtype_of(script, script_cfg)
    flops = flops_per_token(model, name, cfg)
    return Turn(
        tokens_per_second=tokens_per_second,
        utilisation=tokens_per_second * flops / matmul_rate(dtype, cfg.device),
        gb_before=gb_before,
        gb_after=gb_after,
        dtype=dtype,
    )


def dtype_of(script: Any, cfg: Any) -> str:
    """The dtype in which a script's matmuls run, "float32" or "bfloat16"."""
    if not hasattr(script, "choose_dtype"):
        return "float32"
    return script.choose_dtype(cfg)


def flops_per_token(model: nn.Module, name: str, cfg: Config) -> float:
    """The FLOPs that training takes per token (Chowdhery et al. 2022, appendix B).

    They are 6 for each weight in a matmul, 2 of them in the forward pass and 4 in the backward
    pass, and 12 n_embd block_size in each layer for the scores and the sums of values.
    """
    if name in REFERENCES:  # transformers has a layer of its own in place of nn.Linear
        with torch.device("meta"):  # no memory: only the shapes are counted
            model = v6b_fast.LanguageModel(config_of(v6b_fast, cfg), VOCAB_SIZE)
    n_weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    n_layer = len(model.blocks) if hasattr(model, "blocks") else 1
    return 6 * n_weights + 12 * n_layer * cfg.n_embd * cfg.block_size


def matmul_rate(dtype: str, device: str) -> float:
    """The FLOPs per second of a large square matmul, the best of five."""
    n = 1024 if device.startswith("cpu") else 8192
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))  # (n, n)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # item() waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def write_turn(name: str, cfg: Config, num_samples: int) -> float:
    """Generate num_samples texts from one token each, in float32: return the tokens/s."""
    script = v6b_fast if name == "transformers" else load(name)
    make = Reference if name == "transformers" else script.LanguageModel
    torch.manual_seed(0)
    config = config_of(script, cfg)
    model = make(config, VOCAB_SIZE).to(cfg.device).eval()
    idx = torch.zeros(num_samples, 1, dtype=torch.int64, device=cfg.device)  # (num_samples, 1)
    generate(script, model, idx, min(8, cfg.block_size - 1), config)[0, 0].item()  # to warm up
    start = time.perf_counter()
    generate(script, model, idx, count_new_tokens(cfg), config)[0, 0].item()  # waits for the device
    return num_samples * count_new_tokens(cfg) / (time.perf_counter() - start)


def count_new_tokens(cfg: Config) -> int:
    """How many tokens a generation turn adds to the first one."""
    return cfg.block_size - 1 if cfg.new_tokens == 0 else cfg.new_tokens


def token_turn(vocab_size: int, cfg: Config) -> tuple[float, float]:
    """Learn v8a's tokens and encode Shakespeare with them: return the seconds that each takes."""
    text = data.load_text("shakespeare")
    start = time.perf_counter()
    merges = v8a_byte_pairs.learn_merges(text[: len(text) * 9 // 10], vocab_size)
    learned = time.perf_counter()
    v8a_byte_pairs.BytePairTokenizer(merges).encode(text)
    return learned - start, time.perf_counter() - learned


def token_table(turns: dict[int, list[tuple[float, float]]], cfg: Config) -> str:
    """The times of v8a's tokens in Markdown: how they were measured, then a row for each number."""
    lines = [
        f"Byte pairs of v8a_byte_pairs.py on {platform.machine()}, in one thread: seconds to learn "
        "them from the training split and to encode the whole text, the median of "
        f"{cfg.rounds} turns, with the lowest and the highest.",
        "",
        "| tokens | to learn | lowest to highest | to encode | lowest to highest |",
        "|---:|---:|---:|---:|---:|",
    ]
    for vocab_size, times in turns.items():
        cells = [f"{vocab_size:,}"]
        for seconds in zip(*times, strict=True):
            cells += [f"{median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def numbers_in(text: str) -> list[int]:
    """The numbers of tokens in text; raises data.InputError for anything else."""
    numbers = []
    for word in text.split(","):
        if word.strip().isdecimal() and 256 <= int(word) <= 2**16:
            numbers.append(int(word))
        elif word.strip():
            raise data.InputError(f"--vocabularies {word.strip()}: not a number from 256 to 65,536")
    return numbers


def circumstances(cfg: Config) -> str:
    """The shape of the models and the machine, in words."""
    on_gpu = cfg.device.startswith("cuda")
    machine = torch.cuda.get_device_name(cfg.device) if on_gpu else platform.machine()
    return (
        f"block_size {cfg.block_size}, n_embd {cfg.n_embd}, n_head {cfg.n_head}, n_layer "
        f"{cfg.n_layer}, {VOCAB_SIZE} tokens; PyTorch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, on {cfg.device} ({machine})"
    )


def write_table(turns: dict[tuple[int, str], list[float]], cfg: Config) -> str:
    """The speed of generation in Markdown: how it was measured, then a row for each model."""
    lines = [
        f"Generation with {circumstances(cfg)}: {count_new_tokens(cfg)} tokens after a first one, "
        f"for 1 text and for {SAMPLES[1]} at once, in float32. Tokens/s: the median of "
        f"{cfg.rounds} turns, with the lowest and the highest.",
        "",
        "| texts | model | tokens/s | lowest to highest | times v7a |",
        "|---:|---|---:|---:|---:|",
    ]
    medians = {key: median(speeds) for key, speeds in turns.items()}
    for (num_samples, name), speeds in turns.items():
        ratio = "-"
        if (num_samples, "v7a_sampling") in turns:
            ratio = f"{medians[num_samples, name] / medians[num_samples, 'v7a_sampling']:.2f}"
        lines.append(
            f"| {num_samples} | `{name}` | {medians[num_samples, name]:,.0f} | "
            f"{min(speeds):,.0f} to {max(speeds):,.0f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def table(turns: dict[str, list[Turn]], cfg: Config) -> str:
    """The results of training in Markdown: how they were measured, then a row for each model."""
    lines = [
        f"Training with batch_size {cfg.batch_size}, dropout {cfg.dropout:g}, "
        f"{circumstances(cfg)}, torch.compile {'on' if cfg.compile else 'off'}. Tokens/s: the "
        f"median of {cfg.rounds} turns of {cfg.steps} steps, with the lowest and the highest. "
        "Memory: the peak, minus what was in use before there was a model. Utilisation: the "
        "fraction of peak matmul throughput in the same dtype that the model achieves.",
        "",
        "| model | dtype | tokens/s | lowest to highest | times v5 | utilisation | memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    speeds = {name: [turn.tokens_per_second for turn in t] for name, t in turns.items()}
    for name, t in turns.items():
        ratio = "-"
        if "v5_gpt" in turns:
            ratio = f"{median(speeds[name]) / median(speeds['v5_gpt']):.2f}"
        memory = "-"
        if all(turn.gb_after is not None for turn in t):
            memory = f"{max(turn.gb_after - turn.gb_before for turn in t):.2f} GB"
        lines.append(
            f"| `{name}` | {t[0].dtype} | {median(speeds[name]):,.0f} | {min(speeds[name]):,.0f} "
            f"to {max(speeds[name]):,.0f} | {ratio} | "
            f"{median(turn.utilisation for turn in t):.0%} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def names_in(flag: str, text: str, known: list[str]) -> list[str]:
    """The names in text, each once; raises data.InputError for one that isn't known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(known)
        raise data.InputError(f"--{flag}: {', '.join(unknown)} unknown; there are {listed}")
    return names


def main(argv: list[str] | None = None) -> None:
    """Measure as the flags in argv say; print the tables and write them to a file."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        names = names_in("models", cfg.models, MODELS)
        writers = names_in("writers", cfg.writers, WRITERS)
        vocabularies = numbers_in(cfg.vocabularies)
        if not names + writers + vocabularies:
            why = "all empty; say what to measure"
            raise data.InputError(f"--models, --writers and --vocabularies: {why}")
        if not set(REFERENCES).isdisjoint(names + writers) and not find_spec("transformers"):
            why = "no transformers; pip install -r requirements-dev.txt"
            raise data.InputError(f"--models, --writers: {why}")
        if cfg.n_embd % cfg.n_head:
            raise data.InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}")
        if cfg.n_head % cfg.n_kv_head:
            why = f"not a multiple of --n_kv_head {cfg.n_kv_head}"
            raise data.InputError(f"--n_head {cfg.n_head}: {why}")
        v6b_fast.choose_dtype(config_of(v6b_fast, cfg))
        if cfg.compile and not hardware.compiler_works(cfg.device):
            cfg = replace(cfg, compile=False)
        path = Path(cfg.out) / "bench.md"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError as error:
            raise data.InputError(f"--out {cfg.out}: can't write there ({error})") from None
        turns = {name: [] for name in names}
        write_turns = {(n, name): [] for n in SAMPLES for name in writers}
        token_turns = {vocab_size: [] for vocab_size in vocabularies}
        token_round = [(token_turns[n], token_turn, n, cfg) for n in vocabularies]
        train_round = [(turns[name], take_turn, name, cfg) for name in names]
        write_round = [(write_turns[n, name], write_turn, name, cfg, n) for n, name in write_turns]
        todo = (train_round + write_round + token_round) * cfg.rounds
        for results, turn, name, *more in tqdm(todo, desc="turns"):
            try:
                with ProcessPoolExecutor(1, get_context("spawn"), be_quiet) as process:
                    results.append(process.submit(turn, name, *more).result())
            except BrokenProcessPool:
                why = f"the process of {name} was killed, probably for lack of memory"
                raise data.InputError(f"{why}; try a smaller --n_embd or --batch_size") from None
        tables = [table(turns, cfg)] if names else []
        tables += [write_table(write_turns, cfg)] if writers else []
        tables += [token_table(token_turns, cfg)] if vocabularies else []
        path.write_text("\n".join(tables), encoding="utf-8")
        print("\n".join(tables))


if __name__ == "__main__":
    main()
