"""v7_training.py: the same model, trained by the recipe of real training runs.

AdamW pulls matrices and embeddings, and nothing else, towards 0 (Loshchilov and Hutter 2019). The
step size rises in a line while Adam's averages are still rough, then falls along half a cosine to
a tenth (Loshchilov and Hutter 2017). A gradient longer than 1 is shortened to 1 (Pascanu et al.
2013). With progress going from 0 to 1 after the warm-up:

    step size = learning_rate (0.1 + 0.9 (1 + cos(pi progress)) / 2)

A step may average the gradients of several batches, in several processes too, as if they were one.
Checkpoints let a killed run go on; each batch has a seed of its own, and on the CPU the bits are
those of a run that never stopped.

New here: make_optimizer, learning_rate_at, clipping, accumulation, whole_loss, checkpoints with
          --resume and --sample_only, torchrun, log.jsonl, Ctrl-C that saves.
Run it:   python v7_training.py
          torchrun --standalone --nproc_per_node=2 v7_training.py
Expect:   a validation loss of about 1.59 after the small run; v6_fast.py reaches 1.69.
"""

import ctypes
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from timeit import repeat
from zipfile import ZipFile

import data
from data import setting

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from tqdm import tqdm


@dataclass
class Config:
    """The settings. Each one is also a command-line flag with the same name.

    In shape comments, B is the number of windows in a batch, T the number of tokens in a window,
    and V the size of the vocabulary.
    """

    batch_size: int = setting("windows in a batch", gpu=64, cpu=24, least=1)
    block_size: int = setting("longest context, in tokens", gpu=256, cpu=64, least=1)
    n_embd: int = setting("width of the embeddings", gpu=384, cpu=96, least=1)
    n_head: int = setting("attention heads in a layer", gpu=6, cpu=4, least=1)
    n_layer: int = setting("number of blocks", gpu=6, cpu=3, least=1, below=1001)
    dropout: float = setting("probability of dropping an activation", gpu=0.2, cpu=0.0, below=1)
    learning_rate: float = setting("learning rate", gpu=1e-3, cpu=2e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=4000)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=400, least=1)
    eval_iters: int = setting("batches in a loss estimate", gpu=200, cpu=25, least=1)
    seed: int = setting("random seed", gpu=1337, cpu=1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", gpu="shakespeare", cpu="shakespeare")
    prompt: str = setting("text that the sample starts with", gpu="\n", cpu="\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", gpu=500, cpu=500)
    dtype: str = setting(
        "auto is the faster one", gpu="auto", cpu="auto", choices=["auto", "float32", "bfloat16"]
    )
    compile: bool = setting("use torch.compile", gpu=find_spec("triton") is not None, cpu=False)
    weight_decay: float = setting("weight decay of matrices and embeddings", gpu=0.1, cpu=0.1)
    warmup_iters: int = setting("steps of linear warm-up", gpu=100, cpu=100)
    grad_accum_steps: int = setting("batches per step, in each process", gpu=1, cpu=1, least=1)
    out_dir: str = setting("folder for checkpoints and log.jsonl", gpu="out/v7", cpu="out/v7")
    resume: bool = setting("go on from latest.pt; repeat the flags", gpu=False, cpu=False)
    sample_only: bool = setting("only sample, from best.pt in out_dir", gpu=False, cpu=False)


def choose_dtype(cfg: Config) -> str:
    """The dtype of matrix products, "float32" or "bfloat16"; data.InputError where it can't be."""
    on_cuda, on_cpu = cfg.device.startswith("cuda"), cfg.device.startswith("cpu")
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    has_bfloat16 = on_cpu and (amx or avx512)
    if on_cuda:
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.dtype == "auto":
        # On the CPU, a narrow model loses more by converting than its matrix products gain.
        return "bfloat16" if has_bfloat16 and (on_cuda or cfg.n_embd >= 256) else "float32"
    if cfg.dtype == "bfloat16" and not has_bfloat16:
        raise data.InputError(f"--dtype bfloat16: not in the hardware of {cfg.device}; use float32")
    return cfg.dtype


class MultiHeadAttention(nn.Module):
    """n_head heads and a projection of their outputs (Vaswani et al. 2017, section 3.2.2).

    Maps float (B, T, n_embd) to the same shape. Raises data.InputError if n_head doesn't divide
    n_embd.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.n_embd % cfg.n_head != 0:
            raise data.InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}")
        self.n_head = cfg.n_head
        self.query_key_value = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.projection = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.query_key_value(x)  # (B, T, 3 * n_embd)
        parts = parts.unflatten(2, (3, self.n_head, -1))  # (B, T, 3, n_head, head_size)
        parts = parts.permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_size)
        query, key, value = parts  # (B, n_head, T, head_size) each
        # CUDA's kernel drops attention weights as it goes. The CPU's can't: asked to, PyTorch takes
        # the slow way through (B, n_head, T, T) tensors. So, off CUDA, what is dropped are numbers
        # of the values that the weights multiply: as many zeros in the sum, the same expectation.
        dropout_p = self.dropout.p if x.is_cuda and self.training else 0.0
        value = value if x.is_cuda else self.dropout(value)  # (B, n_head, T, head_size)
        heads = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, dropout_p=dropout_p, is_causal=True
        )
        x = heads.transpose(1, 2).flatten(2)  # (B, T, n_embd)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class FeedForward(nn.Module):
    """A two-layer network applied to each position separately (Vaswani et al. 2017, section 3.3).

    Maps float (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.expansion = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.projection = nn.Linear(4 * cfg.n_embd, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.expansion(x))  # (B, T, 4 * n_embd)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class Block(nn.Module):
    """Attention, then a feed-forward network, each with LayerNorm on its input.

    LayerNorm has the same place as in GPT-2 (Radford et al. 2019, section 2.3). Maps float
    (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attention = MultiHeadAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.feed_forward = FeedForward(cfg)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.ln_1(x))  # (B, T, n_embd)
        x = x + self.feed_forward(self.ln_2(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.block_size = cfg.block_size
        self.use_bfloat16 = choose_dtype(cfg) == "bfloat16"
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)  # (block_size, n_embd)
        self.blocks = nn.Sequential(*[Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size)
        # Small weights and zero biases, as in GPT (Radford et al. 2018, section 4.1). LayerNorm's
        # weights have one dimension, so they keep PyTorch's initial value, 1.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats, or None without targets.

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        """
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, n_embd)
        # Weights, residual connections and losses stay float32; only the products are shortened.
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            x = self.blocks(x)  # (B, T, n_embd)
            x = self.ln_f(x)  # (B, T, n_embd)
            logits = self.lm_head(x).float()  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy expects the V logits of a prediction in dimension 1; here they are in
        # dimension 2. Each position of each window is a prediction, so make them B * T rows.
        rows = logits.flatten(0, 1)  # (B * T, V)
        loss = F.cross_entropy(rows, targets.flatten())  # ()
        return logits, loss

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Append max_new_tokens sampled tokens to idx, int64 (B, T) -> (B, T + max_new_tokens)."""
        for _ in tqdm(range(max_new_tokens), desc="generating", delay=1, leave=False):
            # There are embeddings for block_size positions only, so older tokens drop out of view.
            context = idx[:, -self.block_size :]  # (B, min(T, block_size))
            logits, _ = self(context)  # (B, min(T, block_size), V)
            # Only the last position predicts a token that isn't there yet.
            probabilities = F.softmax(logits[:, -1], dim=-1)  # (B, V)
            next_token = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
        return idx


def get_batch(tokens: np.ndarray | torch.Tensor, cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of tokens and their targets, int64 (B, T), on the device without a wait."""
    if isinstance(tokens, torch.Tensor):
        n_starts, device = len(tokens) - cfg.block_size, tokens.device
        starts = torch.randint(n_starts, (cfg.batch_size, 1), device=device)  # (B, 1)
        windows = tokens[starts + torch.arange(cfg.block_size + 1, device=device)]  # (B, T + 1)
        return windows[:, :-1].long(), windows[:, 1:].long()  # (B, T) and (B, T)
    x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, "cpu")  # (B, T) each
    if cfg.device.startswith("cuda"):  # it fetches from pinned memory while the program goes on
        x, y = x.pin_memory(), y.pin_memory()
    return tuple(t.to(cfg.device, non_blocking=t.is_pinned()) for t in (x, y))  # (B, T) each


def utilisation(model: LanguageModel, tokens_per_second: float, cfg: Config) -> float:
    """The share of the device's rate of matrix products, measured here, that training uses."""
    n = 1024 if cfg.device.startswith("cpu") else 8192
    a = torch.randn(n, n, device=cfg.device).to(getattr(torch, choose_dtype(cfg)))  # (n, n)
    seconds = min(repeat(lambda: (a @ a)[0, 0].item(), number=1))  # item() waits for the device
    N = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    flops_per_token = 6 * N + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
    return tokens_per_second * flops_per_token * seconds / (2 * n**3)


@torch.no_grad()
def estimate_loss(model: LanguageModel, tokens: np.ndarray | torch.Tensor, cfg: Config) -> float:
    """Return the mean loss in nats over eval_iters random batches; a single one is noisy."""
    model.eval()  # switches off dropout, which v5 introduces
    losses = torch.zeros(cfg.eval_iters, device=cfg.device)  # (eval_iters,)
    for i in range(cfg.eval_iters):
        x, y = get_batch(tokens, cfg)  # (B, T) each
        _, loss = model(x, y)  # ()
        losses[i] = loss
    model.train()
    return losses.mean().item()


@torch.no_grad()
def whole_loss(model: LanguageModel, tokens: np.ndarray, cfg: Config) -> float:
    """Mean loss, in nats, over all whole windows of tokens one after the other, in eval mode."""
    model.eval()
    T, n, total = cfg.block_size, (len(tokens) - 1) // cfg.block_size, 0.0
    for i in tqdm(range(0, n, cfg.batch_size), "validation", delay=1, leave=False):
        B = min(cfg.batch_size, n - i)
        ids = torch.from_numpy(tokens[i * T : (i + B) * T + 1].astype(np.int64))  # (B * T + 1,)
        x, y = ids[:-1].view(B, T), ids[1:].view(B, T)  # (B, T) each
        _, loss = model(x.to(cfg.device), y.to(cfg.device))  # ()
        total += loss.item() * B
    model.train()
    return total / n


def make_optimizer(model: LanguageModel, cfg: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, which have two dimensions, and nothing else."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)


def learning_rate_at(step: int, cfg: Config) -> float:
    """The step size of a step: linear warm-up, then a cosine from learning_rate to a tenth."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    progress = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def save_checkpoint(state: dict, cfg: Config) -> None:
    """Replace latest.pt and, at the least loss so far, best.pt by whole files, or InputError."""
    folder, log, unfinished = Path(cfg.out_dir), state["log"], Path(cfg.out_dir, "unfinished")
    is_best = log[-1]["val_loss"] == min(entry["val_loss"] for entry in log[1:] or log)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ["best.pt", "latest.pt"] if is_best else ["latest.pt"]:
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # on the disk, not on its way there
            if state["step"]:  # at step 0, to know that saving works is all
                if len(log) == 2 and (folder / name).exists():  # of another run
                    (folder / name).replace(folder / f"older_{name}")
                lines = (json.dumps(entry) + "\n" for entry in log)
                (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
                unfinished.replace(folder / name)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            unfinished.unlink()
        raise data.InputError(f"--out_dir {folder}: can't save ({error}); use another") from None


def load_checkpoint(cfg: Config) -> dict:
    """The state in best.pt to sample from, else in latest.pt; raises data.InputError for none."""
    path = Path(cfg.out_dir) / ("best.pt" if cfg.sample_only else "latest.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # and no code run
        if ZipFile(path).testzip() or state["log"][-1]["step"] != state["step"]:
            raise ValueError("a wrong checksum, or no state of train")
        shape = {n: state["config"][n] for n in ("block_size", "n_embd", "n_head", "n_layer")}
        model = LanguageModel(replace(cfg, dtype="auto", **shape), len(state["vocabulary"]))
        model.load_state_dict(state["model"])
        (optimizer := make_optimizer(model, cfg)).load_state_dict(state["optimizer"])
        for p, averages in optimizer.state.items():  # of shapes that its kernel does not check
            torch.stack((p, averages["exp_avg"], averages["exp_avg_sq"]))
        torch.Generator().set_state(state["random"])
    except Exception:  # what it is depends on the damage
        raise data.InputError(f"--out_dir: {path} is missing or damaged; train first") from None
    for name, saved in shape.items():
        if saved != getattr(cfg, name):
            raise data.InputError(f"--{name} {getattr(cfg, name)}: {path} has {saved}; use that")
    return state


def join_processes(cfg: Config) -> tuple[int, int]:
    """The rank of this process and how many there are, 0 and 1 unless torchrun has started it."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    if cfg.device.startswith("cuda"):
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(cfg.device)
    cfg.device = cfg.device.replace("mps", "cpu")  # gloo does not share what is on MPS
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in cfg.device else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


def keep_machine_busy(cfg: Config) -> None:
    """Settings of the whole process; raises data.InputError where --compile can't work."""
    torch.backends.cuda.matmul.allow_tf32 = True  # for float32 products on tensor cores
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # It gives the memory of each large tensor back to Linux, which zeroes every page of the
        # next one. Now it keeps it: no mmap (-4 is M_MMAP_MAX), no trim (-1, M_TRIM_THRESHOLD).
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)
    if cfg.compile:
        try:
            torch.compile(torch.square)(torch.ones(1, device=cfg.device))
        except Exception as error:  # which one depends on what is missing
            why = str(error).partition("\n")[0]
            raise data.InputError(f"--compile: {why}; use --no-compile") from None


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config,
    vocabulary: list[str] | None = None, state: dict | None = None,
) -> list[tuple[int, float, float]]:
    """Train the model; return the history as (step, train loss, validation loss), in nats.

    Raises data.InputError if a loss is no longer finite.
    """
    rank, world_size = join_processes(cfg)
    keep_machine_busy(cfg)
    if not cfg.device.startswith("cpu") and len(train_data) < 2**28:  # 1 GiB as int32
        train_data = torch.from_numpy(train_data.astype(np.int32)).to(cfg.device)
        val_data = torch.from_numpy(val_data.astype(np.int32)).to(cfg.device)
    optimizer = make_optimizer(model, cfg)
    run = torch.compile(model) if cfg.compile else model
    ddp_model = nn.parallel.DistributedDataParallel(run) if world_size > 1 else run
    first, log = (state["step"], state["log"]) if state else (0, [])
    if state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        torch.set_rng_state(state["random"])
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first is noted, the next acts as ever
        signal.signal(number, lambda n, _: signals.append(n) or signal.signal(n, signal.SIG_DFL))
    last_step, start, speed = first, time.perf_counter(), log and log[-1]["tokens_per_second"]
    with tqdm(total=cfg.max_iters, initial=first, desc="training", disable=rank > 0) as bar:
        for step in range(first, cfg.max_iters + 1):
            stop = torch.tensor(len(signals))  # ()
            if world_size > 1:
                distributed.all_reduce(stop)  # on the CPU; all end with the same step
            due = stop or step % cfg.eval_interval == 0 or step == cfg.max_iters
            if due and rank == 0 and not (log and log[-1]["step"] == step):
                model.lm_head.weight[0, 0].item()  # waits until the device has caught up
                seconds = time.perf_counter() - start
                n_tokens = (step - last_step) * cfg.batch_size * cfg.block_size
                speed = n_tokens * cfg.grad_accum_steps * world_size / seconds
                train_loss = estimate_loss(run, train_data, cfg)
                val_loss = estimate_loss(run, val_data, cfg)
                losses = f"train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                tqdm.write(f"step {step}: {losses}, {speed:,.0f} tokens/s")
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                entry = {"step": step, "train_loss": train_loss, "val_loss": val_loss}
                entry |= {"learning_rate": learning_rate_at(step, cfg), "tokens_per_second": speed}
                log.append(entry | {"seconds": seconds + (log[-1]["seconds"] if log else 0)})
                if vocabulary:  # without one to save with them, no checkpoints
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    state |= {"config": asdict(cfg), "vocabulary": vocabulary}
                    state |= {"step": step, "log": log, "random": torch.get_rng_state()}
                    save_checkpoint(state, cfg)
                last_step, start = step, time.perf_counter()
            if stop or step == cfg.max_iters:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, cfg)
            optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
            for i in range(cfg.grad_accum_steps):
                # A seed for each batch: it is the same whichever process draws it, and when.
                index = (step * cfg.grad_accum_steps + i) * world_size + rank
                torch.manual_seed(cfg.seed + 1_000_003 * (index + 1))
                x, y = get_batch(train_data, cfg)
                more = world_size > 1 and i + 1 < cfg.grad_accum_steps
                with ddp_model.no_sync() if more else nullcontext():
                    _, loss = ddp_model(x, y)  # ()
                    (loss / cfg.grad_accum_steps).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.update()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if speed:
        print(f"model FLOPs utilisation: {utilisation(model, speed / world_size, cfg):.0%}")
    return [(entry["step"], entry["train_loss"], entry["val_loss"]) for entry in log]


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        rank, _ = join_processes(cfg)
        torch.manual_seed(cfg.seed)
        state = load_checkpoint(cfg) if cfg.resume or cfg.sample_only else None
        text = "".join(state["vocabulary"]) if cfg.sample_only else data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text)
        if state and state["vocabulary"] != tokenizer.characters:
            raise data.InputError(f"--data {cfg.data}: not the text of the checkpoint; use that")
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        prompt = torch.tensor([tokenizer.encode(start)], device=cfg.device)  # (1, T)
        splits = [] if cfg.sample_only else data.split(tokenizer.encode(text), cfg.block_size)
        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        if rank == 0:
            print(f"model: {n_parameters:,} parameters, on {cfg.device}", file=sys.stderr)
        if state:
            model.load_state_dict(state["model"])
        if splits:
            train(model, *splits, cfg, tokenizer.characters, state)
        if rank > 0:
            os._exit(0)  # Python's own end can abort: gloo may hold a tensor (pytorch#190489)
        if splits:
            loss = whole_loss(model, splits[1], cfg)
            units = f"perplexity {torch.tensor(loss).exp():.3f}, {loss / math.log(2):.3f} bits"
            print(f"whole validation split: loss {loss:.4f}, {units} per character")
        model.eval()
        sample = model.generate(prompt, cfg.max_new_tokens)  # (1, T + max_new_tokens)
        print(tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
