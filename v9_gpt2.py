"""v9_gpt2.py: become GPT-2: its tokenizer, its architecture, its weights, in and out.

Tokens are parts of words (byte-pair encoding, Sennrich et al. 2016). query_key_value gets biases,
ReLU becomes GELU (Hendrycks and Gimpel 2016), the output head is the token embedding, without a
bias (Press and Wolf 2017), and projections, which add to x, start smaller by 1 / sqrt(2 n_layer)
(Radford et al. 2019, section 2.3). --norm post is GPT-1, which norms sums (Radford et al. 2018).

New here: --tokenizer to --subset in Config, what they need, and .bin files of tokens as --data.
Run it:   python v9_gpt2.py
          python v9_gpt2.py --init_from gpt2 --max_iters 0 --prompt "The meaning of life is"
Expect:   a validation loss of 4.83 per token with the first, 1.57 per character (v8: 1.59).
"""

import ctypes
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import tee
from pathlib import Path
from timeit import repeat
from zipfile import ZipFile

import data
from data import setting

import numpy as np
import tiktoken
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

PRESETS = {  # values of the first SIZES
    "gpt1": ("post", 12, 12, 768, 512), "gpt2": ("pre", 12, 12, 768, 1024),
    "gpt2-medium": ("pre", 24, 16, 1024, 1024), "gpt2-large": ("pre", 36, 20, 1280, 1024),
    "gpt2-xl": ("pre", 48, 25, 1600, 1024),
}
SIZES = ("norm", "n_layer", "n_head", "n_embd", "block_size", "layer_norm_epsilon")
RELEASED_NAMES = {
    "token_embedding": "wte", "position_embedding": "wpe", "blocks.": "h.", "projection": "c_proj",
    "attention.query_key_value": "attn.c_attn", "attention": "attn",
    "feed_forward.expansion": "mlp.c_fc", "feed_forward": "mlp",
}
FIXED = {  # what a configuration may name, with the one value that this model has
    "activation_function": "gelu_new", "afn": "gelu", "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
}


@dataclass
class Config:
    """The settings. Each one is also a command-line flag with the same name.

    In shape comments, B is the number of windows in a batch, T the number of tokens in a window,
    and V the size of the vocabulary.
    """

    batch_size: int = setting("windows in a batch", gpu=64, cpu=8, least=1)
    block_size: int = setting("longest context, in tokens", gpu=256, cpu=64, least=1)
    n_embd: int = setting("width of the embeddings", gpu=384, cpu=96, least=1)
    n_head: int = setting("attention heads in a layer", gpu=6, cpu=4, least=1)
    n_layer: int = setting("number of blocks", gpu=6, cpu=3, least=1, below=1001)
    dropout: float = setting("probability of dropping an activation", gpu=0.2, cpu=0.0, below=1)
    learning_rate: float = setting("learning rate", gpu=1e-3, cpu=2e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=1500)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=150, least=1)
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
    out_dir: str = setting("folder for checkpoints and log.jsonl", gpu="out/v9", cpu="out/v9")
    resume: bool = setting("go on from latest.pt; repeat the flags", gpu=False, cpu=False)
    sample_only: bool = setting("only sample, from best.pt in out_dir", gpu=False, cpu=False)
    prompt_file: str = setting("a text file with the prompt, instead of --prompt", gpu="", cpu="")
    num_samples: int = setting("samples, made as one batch", gpu=1, cpu=1, least=1, below=1025)
    stop: str = setting("end a sample before this text", gpu="", cpu="")
    temperature: float = setting("below 1 sharper, above 1 flatter, 0 greedy", gpu=1.0, cpu=1.0)
    top_k: int = setting("sample from the k likeliest tokens", gpu=65536, cpu=65536, least=1)
    top_p: float = setting(
        "probability mass to sample from", gpu=1.0, cpu=1.0, least=1e-9, below=1 + 1e-9
    )
    repetition_penalty: float = setting(
        "above 1 discourages repetition", gpu=1.0, cpu=1.0, least=0.01, below=101
    )
    tokenizer: str = setting(
        "auto: gpt2 if possible", gpu="auto", cpu="auto", choices=["auto", "gpt2", "char"]
    )
    preset: str = setting("sizes of a released model", gpu="", cpu="", choices=list(PRESETS))
    norm: str = setting(
        "pre as in GPT-2, post as in GPT-1", gpu="pre", cpu="pre", choices=["pre", "post"]
    )
    layer_norm_epsilon: float = setting(
        "added to variances in LayerNorm", gpu=1e-5, cpu=1e-5, least=1e-12, below=1
    )
    init_from: str = setting("first weights: gpt2 to gpt2-xl, or a folder", gpu="", cpu="")
    export: str = setting("folder to write the model to, for transformers", gpu="", cpu="")
    val_data: str = setting("validation text; it and data can be a .bin of uint16", gpu="", cpu="")
    epochs: int = setting("passes over the training tokens, instead of max_iters", gpu=0, cpu=0)
    subset: int = setting("use this many characters of the text; 0: all", gpu=0, cpu=0)


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
        self.query_key_value = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)
        self.projection = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        parts = self.query_key_value(x)  # (B, T, 3 * n_embd)
        parts = parts.unflatten(2, (3, self.n_head, -1))  # (B, T, 3, n_head, head_size)
        parts = parts.permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_size)
        query, key, value = parts  # (B, n_head, T, head_size) each
        # CUDA's kernel drops attention weights as it goes. The CPU's can't: asked to, PyTorch takes
        # the slow way through (B, n_head, T, T) tensors. So, off CUDA, what is dropped are numbers
        # of the values that the weights multiply: as many zeros in the sum, the same expectation.
        dropout_p = self.dropout.p if x.is_cuda and self.training else 0.0
        value = value if x.is_cuda else self.dropout(value)  # (B, n_head, T, head_size)
        if cache is not None:  # (2, B, n_head, end, head_size), where T is end or 1
            cache[:, :, :, -x.shape[1] :] = parts[1:]
            key, value = cache  # (B, n_head, end, head_size) each
        heads = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, dropout_p=dropout_p, is_causal=x.shape[1] > 1
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
        x = F.gelu(self.expansion(x), approximate="tanh")  # (B, T, 4 * n_embd)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class Block(nn.Module):
    """Attention, then a feed-forward network, each with LayerNorm on its input.

    LayerNorm has the same place as in GPT-2 (Radford et al. 2019, section 2.3). Maps float
    (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm = cfg.norm
        self.ln_1 = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.attention = MultiHeadAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.feed_forward = FeedForward(cfg)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        if self.norm == "post":
            x = self.ln_1(x + self.attention(x, cache))  # (B, T, n_embd)
            return self.ln_2(x + self.feed_forward(x))  # (B, T, n_embd)
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.ln_1(x), cache)  # (B, T, n_embd)
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
        ln_f = nn.LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.ln_f = ln_f if cfg.norm == "pre" else nn.Identity()
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight
        # Small weights and zero biases, as in GPT (Radford et al. 2018, section 4.1). LayerNorm's
        # weights have one dimension, so they keep PyTorch's initial value, 1.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                added = 2 * cfg.n_layer if name.endswith("projection.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(added))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats, or None without targets.

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        """
        end = idx.shape[1] if cache is None else cache.shape[4]
        positions = torch.arange(end - idx.shape[1], end, device=idx.device)  # (T,)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, n_embd)
        # Weights, residual connections and losses stay float32; only the products are shortened.
        shorten = self.use_bfloat16 and cache is None  # to cast weights for each token is slower
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=shorten):
            for i, block in enumerate(self.blocks):
                x = block(x, None if cache is None else cache[i])  # (B, T, n_embd)
            x = self.ln_f(x)  # (B, T, n_embd)
            logits = self.lm_head(x).float()  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy expects the V logits of a prediction in dimension 1; here they are in
        # dimension 2. Each position of each window is a prediction, so make them B * T rows.
        rows = logits.flatten(0, 1)  # (B * T, V)
        loss = F.cross_entropy(rows, targets.flatten())  # ()
        return logits, loss

    @torch.inference_mode()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, **how: float) -> Iterator:
        """Yield tokens, (B, 1) each, that continue idx, int64 (B, T); how is for choose_token."""
        n_head, n_embd = self.blocks[0].attention.n_head, self.token_embedding.embedding_dim
        size = (len(self.blocks), 2, len(idx), n_head, self.block_size, n_embd // n_head)
        cache, end = self.lm_head.weight.new_empty(size), 0  # end: how many positions it holds
        tokens = idx[:, -self.block_size :]  # (B, min(T, block_size))
        for _ in range(max_new_tokens):
            if end + tokens.shape[1] > self.block_size:
                # The cache is full, and its keys and values were made of learned positions, so they
                # can't move up. The last half of the context is read again, from position 0.
                tokens = idx[:, -max(1, self.block_size // 2) :]  # (B, max(1, block_size // 2))
                end = 0
            end += tokens.shape[1]
            logits = self(tokens, cache=cache[..., :end, :])[0][:, -1]  # (B, V)
            tokens = choose_token(logits, idx, **how)  # (B, 1)
            idx = torch.cat((idx, tokens), dim=1)  # (B, T + 1)
            yield tokens

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **how: float) -> torch.Tensor:
        """Append max_new_tokens sampled tokens to idx, int64 (B, T) -> (B, T + max_new_tokens)."""
        stream = self.stream(idx, max_new_tokens, **how)
        stream = tqdm(stream, "generating", max_new_tokens, delay=1, leave=False)
        return torch.cat((idx, *stream), dim=1)  # (B, T + max_new_tokens)


def apply_repetition_penalty(logits: torch.Tensor, idx: torch.Tensor, r: float) -> torch.Tensor:
    """Logits (B, V), lowered for the tokens in idx, int64 (B, T), by a penalty r above 1."""
    used = logits.gather(1, idx)  # (B, T)
    used = torch.where(used < 0, used * r, used / r)  # (B, T)
    return logits.scatter(1, idx, used)  # (B, V)


def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits (B, V), further apart where the temperature is below 1, closer where it is above."""
    return logits / temperature  # (B, V)


def apply_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Logits (B, V), with -inf for those less than the k-th largest."""
    least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < least, -math.inf)  # (B, V)


def apply_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits (B, V), with -inf for the least likely up to 1 - top_p in all; the likeliest stays."""
    ascending, order = logits.sort(dim=1)  # (B, V) each
    dropped = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - top_p  # (B, V)
    dropped[:, -1] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)  # (B, V)


def choose_token(
    logits: torch.Tensor, idx: torch.Tensor, temperature: float = 1.0, top_k: int = 65536,
    top_p: float = 1.0, repetition_penalty: float = 1.0,
) -> torch.Tensor:
    """Draw the token after idx, int64 (B, T), by its logits (B, V); returns it as int64 (B, 1)."""
    logits = apply_repetition_penalty(logits, idx, repetition_penalty)  # (B, V)
    if temperature < 1e-6:  # as good as 0, and too small to divide by
        return logits.argmax(dim=1, keepdim=True)  # (B, 1)
    logits = apply_temperature(logits, temperature)  # (B, V)
    if top_k < logits.shape[1]:
        logits = apply_top_k(logits, top_k)  # (B, V)
    if top_p < 1:
        logits = apply_top_p(logits, top_p)  # (B, V)
    probabilities = F.softmax(logits, dim=-1)  # (B, V)
    return torch.multinomial(probabilities, num_samples=1)  # (B, 1)


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
    if isinstance(tokens, np.memmap) and hasattr(tokens._mmap, "madvise"):  # not on Windows
        tokens._mmap.madvise(4)  # MADV_DONTNEED, or all that was ever read stays in memory
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
        shape = {name: state["config"][name] for name in SIZES}
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


def read_settings(argv: list[str] | None) -> tuple[Config, dict[str, torch.Tensor]]:
    """The settings of flags, preset or release, first come first served, and its weights."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = data.read_flags(Config, __doc__, argv)
    sizes, released = PRESETS.get(cfg.preset, ()), {}
    if cfg.init_from:
        try:
            pair = [Path(cfg.init_from, name) for name in ("config.json", "model.safetensors")]
            if cfg.init_from in PRESETS and not Path(cfg.init_from).is_dir():
                pair = [hf_hub_download(f"openai-community/{cfg.init_from}", p.name) for p in pair]
            config, released = json.loads(Path(pair[0]).read_bytes()), load_file(pair[1])
            norm = {"gpt2": "pre", "openai-gpt": "post"}[config["model_type"]]
            config |= {"norm": norm, "block_size": config["n_positions"]}
            sizes = [config[name] for name in SIZES]
            if lacking := {n: config[n] for n, has in FIXED.items() if config.get(n, has) != has}:
                raise ValueError(f"what this model lacks: {lacking}")
        except Exception as error:  # no network, no file, no such key: each has its own class
            why = f"can't start from it ({type(error).__name__}: {error}); name another"
            raise data.InputError(f"--init_from {cfg.init_from}: {why}") from None
    flags = [f"--{name}={size}" for name, size in zip(SIZES, sizes, strict=False)]
    return data.read_flags(Config, __doc__, flags + argv), released


def released_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The parameters of a model under the names, and turned to the shapes, of a release."""
    weights = {}
    for name, weight in model.named_parameters():
        for ours, theirs in RELEASED_NAMES.items():
            name = name.replace(ours, theirs)
        if model.blocks[0].norm == "post":
            name = name.replace("wte", "tokens_embed").replace("wpe", "positions_embed")
        weights[name] = weight.data.t() if ".c_" in name else weight.data  # t() leaves biases alone
    return weights


def load_released(model: LanguageModel, released: dict[str, torch.Tensor], cfg: Config) -> None:
    """Fill a model with the weights of a release; data.InputError where they are not its own."""
    own, rest = released_weights(model), (".attn.bias", ".masked_bias", "_ids", "lm_head.weight")
    released = {n.removeprefix("transformer."): w for n, w in released.items()}
    here, there = ({(name, w.shape) for name, w in ws.items()} for ws in (own, released))
    if wrong := sorted({name for name, _ in here ^ there if not name.endswith(rest)}):
        why = f"missing, extra or misshapen: {', '.join(wrong)}; check --tokenizer and the sizes"
        raise data.InputError(f"--init_from {cfg.init_from}: {why}")
    for name, weight in own.items():
        weight.copy_(released[name])


def export(model: LanguageModel, cfg: Config) -> None:
    """Write a model as transformers and --init_from read it; data.InputError where it can't."""
    config = {name: getattr(cfg, name) for name in SIZES} | {"n_positions": cfg.block_size}
    config["model_type"] = {"pre": "gpt2", "post": "openai-gpt"}[cfg.norm]
    config["vocab_size"] = model.lm_head.out_features
    weights = {name: weight.contiguous() for name, weight in released_weights(model).items()}
    folder, unfinished = Path(cfg.export), Path(cfg.export, "unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, unfinished, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        unfinished.replace(folder / "model.safetensors")
    except Exception as error:  # safetensors has a class of its own
        raise data.InputError(f"--export {folder}: can't write ({error}); use another") from None


def make_tokenizer(cfg: Config, known: list[str]) -> data.CharTokenizer | tiktoken.Encoding:
    """GPT-2's byte pairs or, by name or in their place, characters: known, or those of data."""
    if cfg.tokenizer == "gpt2" or (cfg.tokenizer == "auto" and set(map(len, known)) != {1}):
        try:
            tokenizer = tiktoken.get_encoding("gpt2")
            tokenizer.encode = lambda text, flag="": tokenizer.encode_ordinary(text)
            return tokenizer
        except Exception as error:  # whatever it was, the remedy is the same
            why = f"no GPT-2 tokenizer ({error}); set TIKTOKEN_CACHE_DIR to a folder that has it"
        if cfg.tokenizer == "gpt2" or cfg.init_from or known or ".bin" in cfg.data + cfg.val_data:
            raise data.InputError(f"--tokenizer gpt2: {why}")
        print(f"notice: {why}. Going on with characters.", file=sys.stderr)
    text = "".join(known) or data.load_text(cfg.data)[: cfg.subset or None]
    if cfg.data == "shakespeare" and not data.corpora.SHAKESPEARE.exists():
        cfg.data = "python"  # what load_text took instead, with a notice
    return data.CharTokenizer(text)


def load_tokens(flag: str, tokenizer: tiktoken.Encoding, cfg: Config) -> np.ndarray:
    """Token ids of a corpus, uint16 (n,): of a .bin, mapped, or a text's, kept in one beside it."""
    name = getattr(cfg, flag.strip("-"))
    path = data.corpora.SHAKESPEARE if name == "shakespeare" else Path(name)
    ids = path if path.suffix == ".bin" else Path(f"{path}.gpt2.bin")
    keep = os.path.isfile(path) and isinstance(tokenizer, tiktoken.Encoding) and not cfg.subset
    if path != ids and not (keep and ids.exists() and ids.stat().st_mtime >= max(path.stat()[-2:])):
        text = data.load_text(name, flag)[: cfg.subset or None]  # changed, or put there, since
        pieces = tqdm(re.split(r"(?<=\S)(?=\n)", text), "encoding", delay=1)  # where tokens end
        tokens = np.fromiter((t for p in pieces for t in tokenizer.encode(p, flag)), np.uint16)
        with suppress(OSError):  # the folder may be another's
            if keep:
                tokens.tofile(f"{ids}.{os.getpid()}")
                Path(f"{ids}.{os.getpid()}").replace(ids)
        return tokens
    try:
        tokens = np.memmap(ids, np.uint16, "r")
        starts = tqdm(range(0, tokens.nbytes, 2**25), "checking tokens", delay=1, leave=False)
        largest = max(np.fromfile(ids, np.uint16, 2**24, offset=i).max() for i in starts)
    except (OSError, ValueError) as error:
        raise data.InputError(f"{flag} {ids}: {error}; it must hold uint16 ids") from None
    if largest >= tokenizer.n_vocab:
        raise data.InputError(f"{flag} {ids}: token {largest} is unknown; encode it anew")
    return tokens


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


def text_of(tokens: Iterator[int], tokenizer: data.CharTokenizer, stop: str) -> Iterator[str]:
    """Yield the text of tokens piece by piece, each once it is certain; it ends before stop."""
    open_tokens, text = [], ""
    for token in tokens:
        open_tokens.append(token)
        more = tokenizer.decode(open_tokens)
        if more.endswith("\ufffd"):  # a character of which other bytes are to come
            continue
        open_tokens, text = [], text + more
        if stop and stop in text:
            yield text.partition(stop)[0]
            return
        held = max((n for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        yield text[: len(text) - held]
        text = text[len(text) - held :]
    yield (text + tokenizer.decode(open_tokens)).partition(stop or "\0")[0]  # no text has a \0


def lay_out_for_rows(model: LanguageModel) -> None:
    """Store wide layers' weights by columns: faster on a CPU for few rows; no training after it."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features > module.in_features:
            module.weight.data = module.weight.data.T.contiguous().T


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():
        cfg, released = read_settings(argv)
        rank, world_size = join_processes(cfg)
        torch.manual_seed(cfg.seed)
        state = load_checkpoint(cfg) if cfg.resume or cfg.sample_only else None
        only_sample = cfg.sample_only or (released and cfg.max_iters + cfg.epochs == 0)
        tokenizer = make_tokenizer(cfg, state["vocabulary"] if state else [])
        vocabulary = [tokenizer.decode([token]) for token in range(tokenizer.n_vocab)]
        if state and state["vocabulary"] != vocabulary:
            raise data.InputError(f"--tokenizer {cfg.tokenizer}: not that of the checkpoint")
        flag = "--prompt"
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        if cfg.prompt_file:
            flag, start = "--prompt_file", data.load_text(Path(cfg.prompt_file), "--prompt_file")
        prompt = torch.tensor([tokenizer.encode(start, flag)], device=cfg.device)  # (1, T)
        tokenizer.encode(cfg.stop, "--stop")  # else it would never come
        names = () if only_sample else ("--data", "--val_data")[: 1 + bool(cfg.val_data)]
        splits = [load_tokens(name, tokenizer, cfg) for name in names]
        splits = data.split(*splits, cfg.block_size) if len(splits) == 1 else splits
        if splits and min(map(len, splits)) <= cfg.block_size:
            raise data.InputError(f"--val_data {cfg.val_data}: too short, or --data is; use more")
        if splits and cfg.epochs:
            n_tokens = cfg.batch_size * cfg.block_size * cfg.grad_accum_steps * world_size
            cfg.max_iters = math.ceil(cfg.epochs * len(splits[0]) / n_tokens)
        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        if rank == 0:
            print(f"model: {n_parameters:,} parameters, on {cfg.device}", file=sys.stderr)
        if state:
            model.load_state_dict(state["model"])
        elif released:
            load_released(model, released, cfg)
        if splits:
            train(model, *splits, cfg, vocabulary, state)
        if rank > 0:
            os._exit(0)  # Python's own end can abort: gloo may hold a tensor (pytorch#190489)
        if cfg.export:
            export(model, cfg)
        if splits:
            loss = whole_loss(model, splits[1], cfg)
            units = f"perplexity {torch.tensor(loss).exp():.3f}, {loss / math.log(2):.3f} bits"
            print(f"whole validation split: loss {loss:.4f}, {units} per token")
        model.eval()
        lay_out_for_rows(model)
        how = {n: getattr(cfg, n) for n in ("temperature", "top_k", "top_p", "repetition_penalty")}
        stream = model.stream(prompt.expand(cfg.num_samples, -1), cfg.max_new_tokens, **how)
        for i, steps in enumerate(tee(stream, cfg.num_samples)):  # one asks, all get a step
            print("---\n" * (i > 0) + start, end="", flush=True)
            for piece in text_of((step[i].item() for step in steps), tokenizer, cfg.stop):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
