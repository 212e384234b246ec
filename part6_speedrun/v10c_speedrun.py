"""v10c_speedrun.py: the lowest loss within a given time.

The same steps take longer on one machine than on another. With --minutes, a run is measured by the
clock: progress is the fraction of the time that has passed, so the learning rate reaches zero when
the time ends, on a laptop as well as on a server. How large a model should be depends on the time,
too, so with --minutes, the sizes, the learning rate and other defaults come from BUDGETS. They were
found by trials on two CPU cores.

The clock runs while the model trains and while its loss is estimated, except for the last estimate,
which comes when the time is over. A run by the clock can't be repeated exactly, because no two runs
get equally far. Its checkpoints say how many seconds it has trained, so that --resume goes on where
it stopped.

New here: BUDGETS, progress_at, read_settings. train counts seconds as well as steps.
Run it:   python part6_speedrun/v10c_speedrun.py --minutes 2
Expect:   on two CPU cores, a validation loss of about 1.55 within 2 minutes, and already after 1.6,
          when v5_gpt.py reaches 1.68.
Diff:     git diff --no-index part6_speedrun/v10b_tricks.py part6_speedrun/v10c_speedrun.py
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting
from support import batches, checkpoints, hardware, runs, terminal
from support.notices import warn_of_long_warmup
from support.stopwatch import Stopwatch

# The settings of runs by the clock, the best that trials on two CPU cores found. Their max_iters
# is more than the time allows, and their loss estimates cover about 112,000 tokens (batch_size *
# block_size * eval_iters): all that shakespeare has for validation.
SHORT = {
    "batch_size": 2, "block_size": 512, "n_embd": 128, "n_head": 2, "n_kv_head": 2, "n_layer": 4,
    "learning_rate": 8e-3, "weight_decay": 0.05, "warmup_iters": 50, "max_iters": 10_000_000,
    "eval_interval": 5000, "eval_iters": 110,
}
LONG = {
    **SHORT, "batch_size": 4, "n_embd": 192, "n_head": 3, "n_kv_head": 3, "learning_rate": 7e-3,
    "eval_iters": 55,
}
LONGEST = {
    **SHORT, "batch_size": 3, "n_embd": 384, "n_head": 6, "n_kv_head": 6, "learning_rate": 5e-3,
    "eval_interval": 2000, "eval_iters": 73,
}
BUDGETS = {0: SHORT, 5: LONG, 18: LONGEST}  # {least minutes: settings}, ascending


@dataclass
class Config:
    """The settings. Each one is also a command-line flag with the same name.

    A setting has one default, or one for GPUs and one for the CPU. In shape comments, B is the
    number of windows in a batch, T the number of tokens in a window, and V the size of the
    vocabulary; "()" is a single number, and "(B, T) each" the shape of every tensor on the left.
    """

    batch_size: int = setting("windows in a batch", gpu=64, cpu=24, least=1)
    block_size: int = setting("longest context, in tokens", gpu=256, cpu=64, least=1)
    n_embd: int = setting("width of the embeddings", gpu=384, cpu=96, least=1)
    n_head: int = setting("attention heads in a layer", gpu=6, cpu=4, least=1)
    n_layer: int = setting("number of blocks", gpu=6, cpu=3, least=1, most=1000)
    dropout: float = setting("probability of dropping an activation", gpu=0.2, cpu=0.0, below=1)
    learning_rate: float = setting("learning rate", gpu=1e-3, cpu=3e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=3600)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=400, least=1)
    eval_iters: int = setting("batches in a loss estimate", gpu=200, cpu=75, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", "shakespeare")
    prompt: str = setting("text that the sample starts with", "\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", 500)
    dtype: str = setting("dtype of matmuls", "auto", choices=["auto", "float32", "bfloat16"])
    compile: bool = setting("use torch.compile", gpu=hardware.can_compile(), cpu=False)
    weight_decay: float = setting("weight decay of the blocks' matrices", gpu=0.1, cpu=0.3)
    warmup_iters: int = setting("steps of linear warm-up", 100)
    out_dir: str = setting("folder of the run, by default a new one in out/", "")
    resume: bool = setting("continue the newest run, or that of --out_dir", False)
    sample_only: bool = setting("only sample, from the best weights of a run", False)
    temperature: float = setting("divides the logits; 0 is greedy", 1.0)
    top_k: int = setting("sample from the k most likely tokens; 0 is off", 0)
    top_p: float = setting("total probability of tokens to choose from; 1 is off", 1.0, most=1)
    repetition_penalty: float = setting("for repeated tokens; 1 is off", 1.0, least=0.01, most=100)
    num_samples: int = setting("samples, one after the other", 1, least=1)
    prompt_file: str = setting("text file with the prompt, instead of --prompt", "")
    stop: str = setting("end a sample before this text", "")
    n_kv_head: int = setting("key/value heads in a layer", 2, least=1)
    qk_norm: bool = setting("normalise queries and keys, without weights", True)
    zero_init: bool = setting("start projections, bigrams and the last layer at 0", True)
    embedding_norm: bool = setting("normalise the embeddings", True)
    bigrams: bool = setting("embed pairs of characters", True)
    smear: bool = setting("add a part of the previous embedding", True)
    value_embeddings: bool = setting("mix embeddings into values", True)
    slow_head: bool = setting("a fifth of the learning rate for the last layer", True)
    relu_squared: bool = setting("squared ReLU in place of SwiGLU", True)
    minutes: float = setting("train by the clock; not reproducible; 0 is off", 0.0)


SIZES = [  # a run that is resumed must keep these, because the model depends on them
    "n_embd", "n_head", "n_layer", "n_kv_head", "qk_norm", "embedding_norm", "bigrams", "smear",
    "value_embeddings", "relu_squared",
]


def choose_dtype(cfg: Config) -> str:
    """Return the dtype of matmuls, "float32" or "bfloat16"; auto means the faster of them.

    Raises data.InputError if --dtype is bfloat16 and the hardware doesn't support it.
    """
    supported = hardware.supports_bfloat16(cfg.device)
    if cfg.dtype == "bfloat16" and not supported:
        why = f"not supported on {cfg.device}; use --dtype float32"
        raise data.InputError(f"--dtype bfloat16: {why}")
    if cfg.dtype != "auto":
        return cfg.dtype
    # On a CPU, converting the numbers costs a narrow model more than the matmuls gain.
    bfloat16_is_slower = cfg.device.startswith("cpu") and cfg.n_embd < 128
    if supported and not bfloat16_is_slower:
        return "bfloat16"
    return "float32"


def autocast(cfg: Config) -> torch.autocast:
    """A context in which matmuls run in cfg.dtype; the weights stay float32."""
    device_type = torch.device(cfg.device).type
    enabled = cfg.dtype == "bfloat16"
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)


class KVCache:
    """The keys and values of the last block_size tokens that one layer has processed."""

    def __init__(self, cfg: Config, batch_size: int, device: torch.device) -> None:
        shape = (batch_size, cfg.n_kv_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.keys = torch.empty(shape, device=device)  # (B, n_kv_head, block_size, head_size)
        self.values = torch.empty(shape, device=device)  # (B, n_kv_head, block_size, head_size)
        self.length = 0  # the number of tokens so far, including those that were replaced
        # The newest token, which LanguageModel.embed needs. Before any, it is 0, as in training.
        self.last_token = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T keys and values, float (B, n_kv_head, T, head_size) each; return all that are kept.

        In a full cache, a token replaces the oldest. The order of the keys doesn't matter: their
        rotation says where they belong.
        """
        block_size = self.keys.shape[2]
        begin = self.length % block_size
        end = begin + key.shape[2]
        self.keys[:, :, begin:end] = key
        self.values[:, :, begin:end] = value
        self.length += key.shape[2]
        n_keys = min(self.length, block_size)
        keys = self.keys[:, :, :n_keys]  # (B, n_kv_head, n_keys, head_size)
        values = self.values[:, :, :n_keys]  # (B, n_kv_head, n_keys, head_size)
        return keys, values


def rotation_angles(positions: torch.Tensor, head_size: int) -> torch.Tensor:
    """The angles of all pairs at positions, int64 (T,): float (T, head_size // 2), in radians."""
    i = torch.arange(0, head_size, 2, device=positions.device)  # (head_size // 2,)
    frequencies = 1 / 10_000 ** (i / head_size)  # (head_size // 2,)
    return positions[:, None] * frequencies  # (T, head_size // 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys, float (..., T, head_size); cos and sin: (T, head_size // 2) each.

    A pair is a number in the first half of the head and one in the second, as in the library
    transformers.
    """
    a, b = x.chunk(2, dim=-1)  # (..., T, head_size // 2) each
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # (..., T, head_size)
    # With autocast, x may be bfloat16, while cos and sin are float32.
    return rotated.to(x.dtype)  # (..., T, head_size)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, float (..., size) (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))  # (size,)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        return x * torch.rsqrt(mean_square + self.eps) * self.weight  # (..., size)


class MultiHeadAttention(nn.Module):
    """n_head heads and a projection of their outputs (Vaswani et al. 2017, section 3.2.2).

    Maps float (B, T, n_embd) to the same shape. Raises data.InputError if the heads can't have the
    same even size, or if n_kv_head doesn't divide n_head.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.n_embd % cfg.n_head != 0:
            raise data.InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}")
        if cfg.n_embd // cfg.n_head % 2 != 0:
            why = f"not a multiple of 2 * --n_head {cfg.n_head}, but rotation needs pairs"
            raise data.InputError(f"--n_embd {cfg.n_embd}: {why}")
        if cfg.n_head % cfg.n_kv_head != 0:
            why = f"not a multiple of --n_kv_head {cfg.n_kv_head}"
            raise data.InputError(f"--n_head {cfg.n_head}: {why}")
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        self.qk_norm = cfg.qk_norm
        kv_size = cfg.n_embd // cfg.n_head * cfg.n_kv_head
        self.query = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.key = nn.Linear(cfg.n_embd, kv_size, bias=False)
        self.value = nn.Linear(cfg.n_embd, kv_size, bias=False)
        if cfg.value_embeddings:
            self.mix = nn.Parameter(torch.full((2,), 0.5))  # (2,)
        self.projection = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None = None,
        value_embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        B, T, n_embd = x.shape
        query = self.query(x)  # (B, T, n_embd)
        key = self.key(x)  # (B, T, n_kv_head * head_size)
        value = self.value(x)  # (B, T, n_kv_head * head_size)
        if value_embedding is not None:
            value = self.mix[0] * value + self.mix[1] * value_embedding  # same shape
        # Cut the last dimension into heads, and put the heads next to the batch: attention works on
        # the last two dimensions and treats all those before them as the batch.
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        key = key.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, head_size)
        value = value.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, head_size)
        if self.qk_norm:
            query = F.rms_norm(query, query.shape[-1:])  # (B, n_head, T, head_size)
            key = F.rms_norm(key, key.shape[-1:])  # (B, n_kv_head, T, head_size)
        query = rotate(query, cos, sin)  # (B, n_head, T, head_size)
        key = rotate(key, cos, sin)  # (B, n_kv_head, T, head_size)
        if cache is not None:
            key, value = cache.append(key, value)  # (B, n_kv_head, n_keys, head_size) each
        # scaled_dot_product_attention is a function, not a module, so model.eval() doesn't switch
        # off its dropout.
        dropout_p = self.dropout.p if self.training else 0.0
        # With is_causal, query 0 only sees key 0. A single new query is query 0, but must see all.
        # With enable_gqa, n_head / n_kv_head neighbouring query heads share a key/value head.
        x = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, dropout_p=dropout_p, is_causal=T > 1, enable_gqa=True
        )
        # Put the outputs of the heads side by side again.
        x = x.transpose(1, 2).reshape(B, T, n_embd)  # (B, T, n_embd)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class FeedForward(nn.Module):
    """A two-layer network, gated or with squared ReLU, applied to each position separately.

    Maps float (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        hidden = 8 * math.ceil(cfg.n_embd / 3)  # two thirds of 4 * n_embd, in multiples of 8
        if cfg.relu_squared:
            hidden = 4 * cfg.n_embd
        self.gate = None if cfg.relu_squared else nn.Linear(cfg.n_embd, hidden, bias=False)
        self.expansion = nn.Linear(cfg.n_embd, hidden, bias=False)
        self.projection = nn.Linear(hidden, cfg.n_embd, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            x = F.relu(self.expansion(x)).square()  # (B, T, hidden)
        else:
            x = F.silu(self.gate(x)) * self.expansion(x)  # (B, T, hidden)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class Block(nn.Module):
    """Attention, then a feed-forward network, each with RMSNorm on its input.

    GPT-2 has its LayerNorms in the same place (Radford et al. 2019, section 2.3). Maps float
    (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(cfg.n_embd)
        self.attention = MultiHeadAttention(cfg)
        self.norm_2 = RMSNorm(cfg.n_embd)
        self.feed_forward = FeedForward(cfg)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None = None,
        value_embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.norm_1(x), cos, sin, cache, value_embedding)  # (B, T, n_embd)
        x = x + self.feed_forward(self.norm_2(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.block_size = cfg.block_size
        self.head_size = cfg.n_embd // cfg.n_head
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.norm_f = RMSNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        self.cfg = cfg  # the switches
        if cfg.bigrams:
            self.bigram_embedding = nn.Embedding(vocab_size**2, cfg.n_embd)  # (V * V, n_embd)
        if cfg.smear:
            self.smear_gate = nn.Linear(cfg.n_embd, 1, bias=False)
        if cfg.value_embeddings:
            kv_size = self.head_size * cfg.n_kv_head
            embeddings = [nn.Embedding(vocab_size, kv_size) for _ in self.blocks]
            self.value_embeddings = nn.ModuleList(embeddings)  # (V, kv_size) each
        if cfg.zero_init:
            for name, parameter in self.named_parameters():
                if "projection" in name or "bigram" in name or "lm_head" in name:
                    nn.init.zeros_(parameter)

    def embed(self, idx: torch.Tensor, caches: list[KVCache] | None) -> torch.Tensor:
        """What the first block gets, float (B, T, n_embd), for token ids, int64 (B, T)."""
        # The token before idx. Without caches it isn't known, so token 0 takes its place.
        last_token = torch.zeros_like(idx[:, 0])  # (B,)
        if caches is not None:  # the first block's cache keeps it from one call to the next
            last_token = caches[0].last_token  # (B,)
            caches[0].last_token = idx[:, -1]  # (B,)
        previous = torch.cat((last_token[:, None], idx[:, :-1]), dim=1)  # (B, T)
        x = self.token_embedding(idx)  # (B, T, n_embd)
        if self.cfg.bigrams:
            pairs = previous * self.token_embedding.num_embeddings + idx  # (B, T), below V * V
            x = x + self.bigram_embedding(pairs)  # (B, T, n_embd)
        if self.cfg.embedding_norm:
            x = F.rms_norm(x, x.shape[-1:])  # (B, T, n_embd)
        if self.cfg.smear:
            before = F.rms_norm(self.token_embedding(previous), x.shape[-1:])  # (B, T, n_embd)
            x = x + self.smear_gate(x).tanh() * before  # (B, T, n_embd)
        return x

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats (None without targets).

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        caches: one for each block. They must be empty, unless idx is a single token.
        """
        n_old = 0 if caches is None else caches[0].length
        positions = torch.arange(n_old, n_old + idx.shape[1], device=idx.device)  # (T,)
        angles = rotation_angles(positions, self.head_size)  # (T, head_size // 2)
        cos, sin = angles.cos(), angles.sin()  # (T, head_size // 2) each
        x = self.embed(idx, caches)  # (B, T, n_embd)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            value_embedding = None
            if self.cfg.value_embeddings:
                value_embedding = self.value_embeddings[i](idx)  # (B, T, n_kv_head * head_size)
            x = block(x, cos, sin, cache, value_embedding)  # (B, T, n_embd)
        # Each block has added to x, so normalise the sum before the last layer reads it.
        x = self.norm_f(x)  # (B, T, n_embd)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy expects the V logits of a prediction in dimension 1; here they are in
        # dimension 2. Each position of each window is a prediction, so make them B * T rows.
        rows = logits.flatten(0, 1)  # (B * T, V)
        loss = F.cross_entropy(rows, targets.flatten())  # ()
        return logits, loss

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, cfg: Config) -> Iterator[torch.Tensor]:
        """Continue idx, int64 (B, T): yield each token, int64 (B, 1), as soon as it is chosen."""
        caches = [KVCache(cfg, len(idx), idx.device) for _ in self.blocks]
        for _ in range(max_new_tokens):
            # The model is trained on block_size positions, so older tokens drop out of view.
            context = idx[:, -self.block_size :]  # (B, min(T, block_size))
            if caches[0].length > 0:
                context = idx[:, -1:]  # (B, 1); the caches have the tokens before it
            logits, _ = self(context, caches=caches)  # (B, context.shape[1], V)
            # Only the last position predicts a token that isn't there yet.
            next_token = choose_token(logits[:, -1], idx, cfg)  # (B, 1)
            idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
            yield next_token


def apply_repetition_penalty(logits: torch.Tensor, idx: torch.Tensor, r: float) -> torch.Tensor:
    """Lower the logits, float (B, V), of the tokens in idx, int64 (B, T)."""
    used = logits.gather(1, idx)  # (B, T), the same number each time a token occurs
    # Dividing a negative logit would raise it, so multiply.
    lowered = torch.where(used > 0, used / r, used * r)  # (B, T)
    return logits.scatter(1, idx, lowered)  # (B, V)


def apply_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set the logits, float (B, V), that are below the k-th largest to -inf."""
    largest, _ = logits.topk(min(k, logits.shape[1]))  # (B, min(k, V))
    return logits.masked_fill(logits < largest[:, -1:], -math.inf)  # (B, V)


def apply_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the most likely tokens until their probabilities reach p; set other logits to -inf.

    logits: float (B, V), as is the result.
    """
    ascending, order = logits.sort(dim=1)  # (B, V) each
    # Drop tokens, the least likely first, while their probabilities add up to at most 1 - p.
    drop_sorted = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - p  # (B, V)
    drop_sorted[:, -1] = False  # the most likely token stays, whatever p is
    drop = torch.zeros_like(drop_sorted).scatter(1, order, drop_sorted)  # (B, V), in order of ids
    return logits.masked_fill(drop, -math.inf)  # (B, V)


def choose_token(logits: torch.Tensor, idx: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Sample a token, int64 (B, 1), from logits, float (B, V). It comes after idx, int64 (B, T).

    Raises data.InputError if the largest logit isn't a finite number.
    """
    if not logits.amax(dim=1).isfinite().all():  # amax is NaN if any logit is
        raise data.InputError("the logits are not finite numbers; the weights may be damaged")
    if cfg.repetition_penalty != 1:
        logits = apply_repetition_penalty(logits, idx, cfg.repetition_penalty)  # (B, V)
    if cfg.temperature < 1e-6:  # 0 is greedy; dividing by nearly 0 could overflow
        return logits.argmax(dim=1, keepdim=True)  # (B, 1)
    logits = logits / cfg.temperature  # (B, V)
    if cfg.top_k > 0:
        logits = apply_top_k(logits, cfg.top_k)  # (B, V)
    if 0 < cfg.top_p < 1:
        logits = apply_top_p(logits, cfg.top_p)  # (B, V)
    probabilities = F.softmax(logits, dim=-1)  # (B, V)
    return torch.multinomial(probabilities, num_samples=1)  # (B, 1)


@torch.no_grad()
def estimate_loss(model: LanguageModel, tokens: np.ndarray, cfg: Config) -> float:
    """Return the mean loss in nats over eval_iters batches; a single one is noisy.

    They are the same each time, so that a lower loss means better weights, not easier batches.
    """
    model.eval()  # switches off dropout, if the model has any
    losses = torch.zeros(cfg.eval_iters)  # (eval_iters,)
    for i in range(cfg.eval_iters):
        x, y = batches.get_spread_batch(  # (B, T) each
            tokens, i, cfg.eval_iters, cfg.batch_size, cfg.block_size, cfg.device
        )
        with autocast(cfg):
            _, loss = model(x, y)  # ()
        losses[i] = loss.item()
    model.train()
    return losses.mean().item()


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a matrix, float (rows, columns), close to 1; same shape.

    In shape comments, n is the smaller one of rows and columns.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # small singular values more than triple in each round
    # All singular values must be at most 1, and none is larger than the norm.
    x = matrix / (matrix.norm() + 1e-7)  # (rows, columns)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.mT  # (columns, rows), so that the product below is the smaller one of the two
    for _ in range(5):
        square = x @ x.mT  # (n, n)
        x = a * x + (b * square + c * square @ square) @ x  # (n, max(rows, columns))
    if is_tall:
        x = x.mT  # (rows, columns)
    return x  # (rows, columns)


class Muon(torch.optim.Optimizer):
    """Momentum and orthogonalised updates (Jordan et al. 2024), weight decay (Liu et al. 2025)."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update all matrices from their gradients."""
        momentum = 0.95
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if "average" not in state:
                    state["average"] = torch.zeros_like(matrix)  # (rows, columns)
                average = state["average"]  # of the gradients so far, (rows, columns)
                average.mul_(momentum).add_(matrix.grad, alpha=1 - momentum)
                # Nesterov's momentum: the newest gradient counts once more.
                update = momentum * average + (1 - momentum) * matrix.grad  # (rows, columns)
                update = orthogonalise(update)  # (rows, columns)
                # The numbers in an orthogonal matrix are about 1 / sqrt(longer side). This makes
                # them as large as in AdamW's updates, so that both can have the same learning rate
                # (Liu et al. 2025).
                scale = 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=group["lr"] * scale)


def make_optimizers(model: LanguageModel, cfg: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW (Loshchilov and Hutter 2019) for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    muon = Muon(matrices, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    embeddings = [p for n, p in model.named_parameters() if "embedding" in n or "smear" in n]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": embeddings, "weight_decay": 0.0},  # and the gate of smear
        {"params": [model.lm_head.weight], "weight_decay": 0.0, "is_head": True},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True)
    return [muon, adamw]


def progress_at(step: int, seconds: float, cfg: Config) -> float:
    """The fraction of a run that is done, 0 to 1.

    seconds: how long the run has taken so far. With --minutes, the run ends when its time or its
    steps are used up, so what counts is the larger fraction of the two.
    """
    if step >= cfg.max_iters:  # max_iters may be 0
        return 1.0
    progress = step / cfg.max_iters
    if cfg.minutes > 0:
        progress = max(progress, seconds / (60 * cfg.minutes))
    return min(progress, 1.0)


def learning_rate_at(step: int, progress: float, cfg: Config) -> float:
    """The learning rate of a step: linear warm-up, then a cosine (Loshchilov and Hutter 2017)."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    # progress counts from the start of the run, not from the end of the warm-up: with --minutes,
    # nobody knows beforehand how long the warm-up will take.
    return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def train_step(
    model: LanguageModel, optimizers: list[torch.optim.Optimizer], tokens: np.ndarray, step: int,
    progress: float, cfg: Config,
) -> None:
    """Move the weights a little, so that the loss on one random batch falls."""
    # The batch and the dropout of a step depend only on the run's seed and the step's number.
    torch.manual_seed(batches.mix_seed(cfg.seed, step))
    x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, "cpu")  # (B, T) each
    x, y = hardware.to_device([x, y], cfg.device)  # (B, T) each
    with autocast(cfg):
        _, loss = model(x, y)  # ()
    model.zero_grad()  # backward() adds to the gradients, so clear the last step's
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, progress, cfg)
            if cfg.slow_head and "is_head" in group:
                group["lr"] /= 5
        with autocast(cfg):  # Muon multiplies matrices, too
            optimizer.step()


def compile_model(model: LanguageModel, cfg: Config) -> Callable:
    """Return the model or, with --compile, a faster version of it with the same weights."""
    if not cfg.compile or not hardware.compiler_works(cfg.device):
        return model
    return torch.compile(model)


def checkpoint(
    model: LanguageModel, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> dict:
    """What training needs to go on from a step; run.save adds the settings and the tokenizer."""
    muon, adamw = optimizers
    return {
        "model": model.state_dict(),
        "optimizer": {
            "muon": muon.state_dict()["state"],  # its averages
            "adamw": adamw.state_dict()["state"],  # its m, v and step counts, no settings
        },
        "step": step,  # the learning rate and the random numbers follow from it
        "seconds": seconds,  # with --minutes, the learning rate follows from these
    }


def restore(
    model: LanguageModel, optimizers: list[torch.optim.Optimizer], run: runs.Run
) -> tuple[int, float]:
    """Load what a checkpoint holds; return the next step and the seconds so far, 0 at first."""
    if run.is_new:
        return 0, 0.0
    checkpoints.load_weights(model, run.saved)
    muon, adamw = optimizers
    checkpoints.load_averages(muon, run.saved, "muon")
    checkpoints.load_averages(adamw, run.saved, "adamw")
    return run.saved["step"], run.saved.get("seconds", 0.0)  # a run that v10b started has none


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config, run: runs.Run
) -> dict[int, tuple[float, float]]:
    """Train the model; return {step: (train loss, validation loss)}, in nats, of each estimate.

    Raises data.InputError if a loss is no longer finite.
    """
    hardware.keep_freed_memory()
    optimizers = make_optimizers(model, cfg)
    warn_of_long_warmup(cfg.warmup_iters, cfg.max_iters)
    # Only for training: loss estimates are in eval mode, which would need a second compilation.
    compiled_model = compile_model(model, cfg)
    stopwatch = Stopwatch(cfg.device)
    first_step, seconds = restore(model, optimizers, run)
    started = time.perf_counter() - seconds  # as if the run had never been interrupted
    with tqdm(total=cfg.max_iters, initial=first_step, desc="training") as bar:
        for step in count(first_step):  # the last round only estimates the loss
            seconds = time.perf_counter() - started
            progress = progress_at(step, seconds, cfg)
            bar.total = round(step / progress) if step > 0 else None  # at the speed so far
            if step % cfg.eval_interval == 0 or progress == 1:
                speed = stopwatch.stop()  # such as ", 12,345 tokens/s"; "" at first
                train_loss = estimate_loss(model, train_data, cfg)
                val_loss = estimate_loss(model, val_data, cfg)
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                run.save(checkpoint(model, optimizers, step, seconds), train_loss, val_loss)
                losses = f"train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                tqdm.write(f"step {step}: {losses}{speed}")
                stopwatch.start()
            if progress == 1:
                break
            if run.stop_requested():
                run.save_latest(checkpoint(model, optimizers, step, seconds))
                break

            train_step(compiled_model, optimizers, train_data, step, progress, cfg)
            stopwatch.count(cfg.batch_size * cfg.block_size)  # ignores the first step
            bar.update()
    return run.history


def read_settings(argv: list[str] | None) -> tuple[Config, dict]:
    """Return the settings and the checkpoint, if any; --minutes changes the defaults."""
    cfg, saved = runs.read_settings(Config, __doc__, argv, SIZES)
    if cfg.minutes == 0 or saved:
        return cfg, saved  # a run that is resumed keeps its settings
    for least_minutes, settings in BUDGETS.items():
        if cfg.minutes >= least_minutes:
            budget = settings  # the last one that applies stays
    # Read the flags again, with these defaults.
    return data.read_flags(Config, __doc__, argv, budget), saved


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():  # a user's mistake prints one line, no traceback
        # saved is latest.pt with --resume, best.pt with --sample_only, and empty in a new run.
        cfg, saved = read_settings(argv)
        cfg = replace(cfg, dtype=choose_dtype(cfg))  # no longer "auto"
        torch.manual_seed(cfg.seed)

        text = "" if cfg.sample_only else data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(saved.get("characters", text))  # a run keeps its characters
        cfg = terminal.read_prompt_file(cfg, tokenizer)  # its text becomes cfg.prompt
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        prompt = torch.tensor([tokenizer.encode(start)], device=cfg.device)  # (1, T)

        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {n_parameters:,} parameters, {cfg.dtype}, on {cfg.device}", file=sys.stderr)
        if not cfg.sample_only:
            run = runs.Run(cfg, __file__, tokenizer, text, saved)  # a folder and its files
            train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size, cfg.data)
            sizes = f"{len(train_data):,} for training, {len(val_data):,} for validation"
            print(f"tokens: {sizes}", file=sys.stderr)
            with run:  # in here, Ctrl-C only asks train to stop
                train(model, train_data, val_data, cfg, run)
        best = saved if cfg.sample_only else run.best()
        checkpoints.load_weights(model, best)

        print(f"sampling with the weights after step {best['step']}", file=sys.stderr)
        torch.manual_seed(cfg.seed)  # so that --sample_only repeats this sample
        model.eval()
        for i in range(cfg.num_samples):
            if i > 0:
                print("---")
            tokens = model.stream(prompt, cfg.max_new_tokens, cfg)
            terminal.print_text(start, tokens, tokenizer, cfg.stop)


if __name__ == "__main__":
    main()
