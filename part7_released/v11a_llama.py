"""v11a_llama.py: the rest of the architecture of Llama and Qwen3.

The released models of today are v9d with a few more settings:

- head_size: a head may be wider than n_embd / n_head.
- intermediate_size: the hidden width of the feed-forward network.
- qk_norm: Qwen3 normalises each query and key before the rotation. In large models, that keeps the
  scores from growing until training diverges (Dehghani et al. 2023, section 2).
- tie_word_embeddings: one matrix serves as token embedding and output layer, as in GPT-2. That
  saves a large part of a small model.
- rope_theta: the larger the base, the slower the slowest rotations, which tell distances of many
  thousands of tokens apart.
- rope_factor: Llama 3.1 was first trained on shorter contexts. To extend them, it slows down the
  rotations that make at most one turn in such a context (low_freq_factor), and leaves those alone
  that make at least four (high_freq_factor).

New here: these settings, and head_size_of.
Run it:   python part7_released/v11a_llama.py
          python part7_released/v11a_llama.py --qk_norm --tie_word_embeddings --rope_theta 1000
Expect:   a validation loss of about 1.56, as v9d_gqa.py within seed noise. Without flags, this is
          its model, trained on other batches.
Diff:     git diff --no-index part5_modern/v9d_gqa.py part7_released/v11a_llama.py
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting
from support import hardware
from support.old import checkpoints, runs


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
    n_layer: int = setting("number of blocks", gpu=6, cpu=3, least=1, most=1000)
    dropout: float = setting("probability of dropping an activation", gpu=0.2, cpu=0.0, below=1)
    learning_rate: float = setting("learning rate", gpu=1e-3, cpu=3e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=3600)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=400, least=1)
    eval_iters: int = setting("maximum batches in a loss estimate", gpu=200, cpu=75, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", "shakespeare")
    prompt: str = setting("text that the sample starts with", "\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", 500)
    dtype: str = setting("dtype of matmuls", "auto", choices=["auto", "float32", "bfloat16"])
    compile: bool = setting("use torch.compile", gpu=hardware.has_triton(), cpu=False)
    weight_decay: float = setting("weight decay of matrices and embeddings", gpu=0.1, cpu=0.3)
    warmup_iters: int = setting("steps of linear warm-up", 100)
    out_dir: str = setting("folder of the run, by default a new one in out/", "")
    resume: bool = setting("continue the newest run, or that of --out_dir", False)
    sample_only: bool = setting("only sample, from the best weights of a run", False)
    temperature: float = setting("divides the logits; 0 is greedy", 1.0)
    top_k: int = setting("sample from the k most likely tokens; 0 is off", 0)
    top_p: float = setting("total probability to sample from; 1 is off", 1.0, most=1)
    repetition_penalty: float = setting("on tokens of the text; 1: off", 1.0, most=100)
    num_samples: int = setting("samples, one after the other", 1, least=1)
    prompt_file: str = setting("text file with the prompt, instead of --prompt", "")
    stop: str = setting("end a sample before this text", "")
    n_kv_head: int = setting("key/value heads in a layer", 2, least=1)
    head_size: int = setting("width of a head; 0: n_embd / n_head", 0, below=2**20)
    intermediate_size: int = setting("hidden width; 0: 8/3 * n_embd", 0, below=2**20)
    qk_norm: bool = setting("normalise queries and keys", False)
    tie_word_embeddings: bool = setting("one matrix for tokens in and out", False)
    rms_norm_eps: float = setting("added to the mean square", 1e-5, least=1e-12)
    rope_theta: float = setting("base of the frequencies", 10_000.0, least=1)
    rope_factor: float = setting("divides slow frequencies; 1 is off", 1.0, least=1)
    rope_low_freq_factor: float = setting("fewer turns count as slow", 1.0, least=1e-9)
    rope_high_freq_factor: float = setting("more turns count as fast", 4.0, least=1e-9)
    original_max_position_embeddings: int = setting("original context", 8192, least=1)


# The settings that the weights were trained with, so they can't change.
SIZES = [
    "n_embd", "n_head", "n_layer", "n_kv_head", "head_size", "intermediate_size", "qk_norm",
    "tie_word_embeddings", "rms_norm_eps", "rope_theta", "rope_factor", "rope_low_freq_factor",
    "rope_high_freq_factor", "original_max_position_embeddings",
]


def choose_dtype(cfg: Config) -> torch.dtype:
    """The dtype for matmuls, torch.float32 or torch.bfloat16, as --dtype says.

    Raises data.InputError if --dtype is bfloat16 and the hardware doesn't support it.
    """
    supported = hardware.supports_bfloat16(cfg.device)
    if cfg.dtype == "bfloat16" and not supported:
        why = f"not supported on {cfg.device}; use --dtype float32"
        raise data.InputError(f"--dtype bfloat16: {why}")
    if cfg.dtype == "auto" and supported:
        # On a CPU, converting the numbers costs a narrow model more than the matmuls gain.
        is_narrow = cfg.device.startswith("cpu") and cfg.n_embd < 128
        return torch.float32 if is_narrow else torch.bfloat16
    return torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32


def autocast(cfg: Config) -> torch.autocast:
    """A context in which matmuls run in the dtype of choose_dtype; the weights stay float32."""
    device_type = torch.device(cfg.device).type
    enabled = choose_dtype(cfg) == torch.bfloat16
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)


def head_size_of(cfg: Config) -> int:
    """The width of a head; raises data.InputError if it isn't an even number."""
    head_size = cfg.head_size
    if head_size == 0:
        if cfg.n_embd % cfg.n_head != 0:
            raise data.InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}")
        head_size = cfg.n_embd // cfg.n_head
    if head_size % 2 != 0:
        raise data.InputError(f"--head_size {head_size}: odd, but rotation needs pairs")
    return head_size


class KVCache:
    """The keys and values of the last block_size tokens that one layer has processed."""

    def __init__(self, cfg: Config, batch_size: int, weight: torch.Tensor) -> None:
        """Make room for block_size tokens, with the dtype and on the device of weight."""
        head_size = head_size_of(cfg)
        self.keys = weight.new_empty(  # (B, n_kv_head, block_size, head_size)
            batch_size, cfg.n_kv_head, cfg.block_size, head_size
        )
        self.values = torch.empty_like(self.keys)  # (B, n_kv_head, block_size, head_size)
        self.length = 0  # the number of tokens so far, including those that were replaced

    def append(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T tokens, float (B, n_kv_head, T, head_size) each; return those of all tokens kept.

        Several tokens must fit into the room that is left. In a full cache, a single token replaces
        the oldest. The order of the keys doesn't matter: their rotation says where they belong.
        """
        block_size = self.keys.shape[2]
        begin = self.length % block_size
        end = begin + key.shape[2]
        self.keys[:, :, begin:end] = key
        self.values[:, :, begin:end] = value
        self.length += key.shape[2]
        kept = min(self.length, block_size)
        keys = self.keys[:, :, :kept]  # (B, n_kv_head, kept, head_size)
        values = self.values[:, :, :kept]  # (B, n_kv_head, kept, head_size)
        return keys, values


def rotation_angles(positions: torch.Tensor, cfg: Config) -> torch.Tensor:
    """The angles of all pairs at positions, int64 (T,): float (T, head_size // 2), in radians."""
    head_size = head_size_of(cfg)
    i = torch.arange(0, head_size, 2, device=positions.device)  # (head_size // 2,)
    frequencies = 1 / cfg.rope_theta ** (i / head_size)  # (head_size // 2,)
    if cfg.rope_factor != 1:
        context = cfg.original_max_position_embeddings
        turns = context * frequencies / (2 * math.pi)  # (head_size // 2,)
        low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
        # How much of a frequency stays: 0 for slow rotations, 1 for fast ones, or in between.
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # (head_size // 2,)
        slowed = frequencies / cfg.rope_factor  # (head_size // 2,)
        frequencies = kept * frequencies + (1 - kept) * slowed  # (head_size // 2,)
    return positions[:, None] * frequencies  # (T, head_size // 2)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys, float (..., T, head_size), by angles, (T, head_size // 2).

    A pair is a number in the first half of the head and one in the second, as in transformers.
    """
    cos, sin = angles.cos(), angles.sin()  # (T, head_size // 2) each
    a, b = x.chunk(2, dim=-1)  # (..., T, head_size // 2) each
    a, b = a * cos - b * sin, b * cos + a * sin  # (..., T, head_size // 2) each
    return torch.cat((a, b), dim=-1).to(x.dtype)  # (..., T, head_size)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, float (..., size) (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))  # (size,)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The mean is computed in float32, because bfloat16 has too few digits for it.
        mean_square = x.float().pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        normalised = x * torch.rsqrt(mean_square + self.eps)  # (..., size)
        return normalised.to(x.dtype) * self.weight  # (..., size)


class MultiHeadAttention(nn.Module):
    """n_head heads and a projection of their outputs (Vaswani et al. 2017, section 3.2.2).

    Maps float (B, T, n_embd) to the same shape. Raises data.InputError if the heads can't have the
    same even size, or if n_kv_head doesn't divide n_head.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        head_size = head_size_of(cfg)
        if cfg.n_head % cfg.n_kv_head != 0:
            why = f"not a multiple of --n_kv_head {cfg.n_kv_head}"
            raise data.InputError(f"--n_head {cfg.n_head}: {why}")
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        self.query_size = head_size * cfg.n_head
        self.kv_size = head_size * cfg.n_kv_head
        self.query_key_value = nn.Linear(cfg.n_embd, self.query_size + 2 * self.kv_size, bias=False)
        self.projection = nn.Linear(self.query_size, cfg.n_embd, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)
        self.query_norm, self.key_norm = nn.Identity(), nn.Identity()
        if cfg.qk_norm:
            self.query_norm = RMSNorm(head_size, cfg.rms_norm_eps)
            self.key_norm = RMSNorm(head_size, cfg.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, angles: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        B, T, _ = x.shape
        sizes = [self.query_size, self.kv_size, self.kv_size]
        query, key, value = self.query_key_value(x).split(sizes, dim=-1)  # (B, T, sizes[i]) each
        # Cut the last dimension into heads, and put the heads next to the batch: attention works on
        # the last two dimensions and treats all those before them as the batch.
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        key = key.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, head_size)
        value = value.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, head_size)
        query = rotate(self.query_norm(query), angles)  # (B, n_head, T, head_size)
        key = rotate(self.key_norm(key), angles)  # (B, n_kv_head, T, head_size)
        # The call below is a function, so model.eval() doesn't switch off its dropout.
        dropout_p = self.dropout.p if self.training else 0.0
        n_old = 0  # the number of tokens before those in x
        if cache is not None:
            n_old = cache.length
            key, value = cache.append(key, value)  # (B, n_kv_head, n_keys, head_size) each
        mask = None
        if n_old > 0 and T > 1:
            # Query i may look at n_old + i + 1 keys, but is_causal would show it the first i + 1.
            # A single query may look at all of them, and needs no mask.
            ones = torch.ones(T, n_old + T, dtype=torch.bool, device=x.device)  # (T, n_old + T)
            mask = ones.tril(diagonal=n_old)  # (T, n_old + T)
        # With enable_gqa, n_head / n_kv_head neighbouring query heads share a key/value head.
        x = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=n_old == 0,
            enable_gqa=True,
        )
        # Put the outputs of the heads side by side again.
        x = x.transpose(1, 2).reshape(B, T, self.query_size)  # (B, T, query_size)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class FeedForward(nn.Module):
    """A gated two-layer network applied to each position separately (Shazeer 2020, section 2).

    Maps float (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        hidden = cfg.intermediate_size
        if hidden == 0:
            hidden = 8 * math.ceil(cfg.n_embd / 3)  # two thirds of 4 * n_embd, a multiple of 8
        self.gate = nn.Linear(cfg.n_embd, hidden, bias=False)
        self.expansion = nn.Linear(cfg.n_embd, hidden, bias=False)
        self.projection = nn.Linear(hidden, cfg.n_embd, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.gate(x)) * self.expansion(x)  # (B, T, hidden)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class Block(nn.Module):
    """Attention, then a feed-forward network, each with RMSNorm on its input.

    RMSNorm is where GPT-2 has LayerNorm (Radford et al. 2019, section 2.3). Maps float
    (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(cfg.n_embd, cfg.rms_norm_eps)
        self.attention = MultiHeadAttention(cfg)
        self.ln_2 = RMSNorm(cfg.n_embd, cfg.rms_norm_eps)
        self.feed_forward = FeedForward(cfg)

    def forward(
        self, x: torch.Tensor, angles: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.ln_1(x), angles, cache)  # (B, T, n_embd)
        x = x + self.feed_forward(self.ln_2(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg  # choose_token reads its settings from it
        self.block_size = cfg.block_size
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.blocks = nn.Sequential(*[Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = RMSNorm(cfg.n_embd, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        # Small weights, as in GPT (Radford et al. 2018, section 4.1). RMSNorm's have one dimension,
        # so they keep their initial value, 1.
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats, or None without targets.

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        caches: one for each block, with the tokens before idx.
        """
        n_old = 0 if caches is None else caches[0].length
        positions = torch.arange(n_old, n_old + idx.shape[1], device=idx.device)  # (T,)
        angles = rotation_angles(positions, self.cfg)  # (T, head_size // 2)
        x = self.token_embedding(idx)  # (B, T, n_embd)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, angles, cache)  # (B, T, n_embd)
        # Each block has added to x, so normalise the sum before the last layer reads it.
        x = self.ln_f(x)  # (B, T, n_embd)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy expects the V logits of a prediction in dimension 1; here they are in
        # dimension 2. Each position of each window is a prediction, so make them B * T rows.
        rows = logits.flatten(0, 1)  # (B * T, V)
        loss = F.cross_entropy(rows, targets.flatten())  # ()
        return logits, loss

    def make_caches(self, batch_size: int) -> list[KVCache]:
        """Return an empty cache for each block."""
        return [KVCache(self.cfg, batch_size, self.lm_head.weight) for _ in self.blocks]

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int) -> Iterator[torch.Tensor]:
        """Continue idx, int64 (B, T): yield each token, int64 (B, 1), as soon as it is chosen."""
        caches = self.make_caches(len(idx))
        context = idx[:, -self.block_size :]  # (B, min(T, block_size))
        for _ in range(max_new_tokens):
            logits, _ = self(context, caches=caches)  # (B, context.shape[1], V)
            # Only the last position predicts a token that isn't there yet.
            next_token = choose_token(logits[:, -1].float(), idx, self.cfg)  # (B, 1)
            idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
            context = next_token  # (B, 1), because the caches have the rest
            yield next_token

    def generate(self, idx: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Append max_new_tokens sampled tokens to idx, int64 (B, T) -> (B, T + max_new_tokens)."""
        new_tokens = list(self.stream(idx, max_new_tokens))
        return torch.cat([idx, *new_tokens], dim=1)  # (B, T + max_new_tokens)


def apply_repetition_penalty(logits: torch.Tensor, idx: torch.Tensor, r: float) -> torch.Tensor:
    """Lower the logits, float (B, V), of the tokens in idx, int64 (B, T)."""
    used = logits.gather(1, idx)  # (B, T)
    # Dividing a negative logit would raise it, so multiply.
    lowered = torch.where(used > 0, used / r, used * r)  # (B, T)
    return logits.scatter(1, idx, lowered)  # (B, V)


def apply_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set the logits, float (B, V), that are below the k-th largest to -inf."""
    largest, _ = logits.topk(min(k, logits.shape[1]))  # (B, min(k, V))
    return logits.masked_fill(logits < largest[:, -1:], -math.inf)  # (B, V)


def apply_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Set the logits, float (B, V), of the least likely tokens to -inf: at most 1 - p in all."""
    ascending, order = logits.sort(dim=1)  # (B, V) each
    drop = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - p  # (B, V)
    drop[:, -1] = False  # the most likely token stays, whatever p is
    # From sorted order back to the order of the tokens.
    drop = drop.scatter(1, order, drop)  # (B, V)
    return logits.masked_fill(drop, -math.inf)  # (B, V)


def choose_token(logits: torch.Tensor, idx: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Sample the token after idx, int64 (B, T), from its logits, float (B, V): int64 (B, 1)."""
    if cfg.repetition_penalty >= 1e-6:  # a smaller number is as good as 0
        logits = apply_repetition_penalty(logits, idx, cfg.repetition_penalty)  # (B, V)
    if cfg.temperature < 1e-6:
        return logits.argmax(dim=1, keepdim=True)  # (B, 1)
    logits = logits / cfg.temperature  # (B, V)
    if cfg.top_k > 0:
        logits = apply_top_k(logits, cfg.top_k)  # (B, V)
    if 0 < cfg.top_p < 1:
        logits = apply_top_p(logits, cfg.top_p)  # (B, V)
    probabilities = F.softmax(logits, dim=-1)  # (B, V)
    return torch.multinomial(probabilities, num_samples=1)  # (B, 1)


def stream_text(
    tokens: Iterator[torch.Tensor], tokenizer: data.CharTokenizer, stop: str
) -> Iterator[str]:
    """Yield the text of tokens, int64 (1, 1) each, piece by piece; it ends before stop, if any."""
    n_waiting = max(0, len(stop) - 1)  # so many last characters may be the beginning of stop
    text = ""  # what hasn't been yielded yet
    for token in tokens:
        text += tokenizer.decode([token.item()])
        if stop and stop in text:
            yield text[: text.index(stop)]
            return
        n_ready = max(0, len(text) - n_waiting)
        yield text[:n_ready]
        text = text[n_ready:]
    yield text


def get_batch(tokens: np.ndarray, cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random windows and their targets, int64 (B, T) each, without making a GPU wait."""
    x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, "cpu")  # (B, T) each
    if cfg.device.startswith("cuda"):
        # From pinned memory, the GPU fetches a contiguous tensor itself while Python goes on.
        x = x.contiguous().pin_memory()  # (B, T)
        y = y.contiguous().pin_memory()  # (B, T)
    x = x.to(cfg.device, non_blocking=True)  # (B, T)
    y = y.to(cfg.device, non_blocking=True)  # (B, T)
    return x, y


@torch.no_grad()
def estimate_loss(model: LanguageModel, tokens: np.ndarray, cfg: Config) -> float:
    """Return the mean loss in nats over the same windows each time, to make estimates comparable.

    The windows lie side by side and cover the split or, if it is larger than eval_iters batches,
    are spread evenly over it.
    """
    model.eval()  # switches off dropout, which v5 introduces
    n_windows = (len(tokens) - 1) // cfg.block_size
    n_chosen = min(n_windows, cfg.eval_iters * cfg.batch_size)
    # The numbers of the windows, evenly spread; all of them if n_chosen is n_windows.
    chosen = np.arange(n_chosen) * n_windows // n_chosen  # (n_chosen,)
    starts = chosen * cfg.block_size  # (n_chosen,)
    total = 0.0
    for i in range(0, n_chosen, cfg.batch_size):
        if runs.stop_requested():
            raise KeyboardInterrupt  # train catches it and saves
        batch = starts[i : i + cfg.batch_size]
        x, y = data.get_windows(tokens, batch, cfg.block_size, cfg.device)  # (B, T) each
        with autocast(cfg):
            _, loss = model(x, y)  # ()
        total += loss.item() * len(batch)  # the last batch may be smaller
    model.train()
    return total / n_chosen


def make_optimizer(model: LanguageModel, cfg: Config) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019) of matrices and embeddings."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate_at(step: int, cfg: Config) -> float:
    """The learning rate of a step: linear warm-up, then a cosine (Loshchilov and Hutter 2017)."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    progress = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)  # 0 to 1
    return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def shorten_warmup(cfg: Config) -> Config:
    """Cut a warm-up that would take more than half of the run down to a tenth of the run."""
    if cfg.warmup_iters <= cfg.max_iters / 2 or cfg.max_iters == 0:
        return cfg
    n = cfg.max_iters // 10
    why = f"a warm-up of {cfg.warmup_iters} steps would take up most of a run of {cfg.max_iters}"
    print(f"notice: {why}, so --warmup_iters is {n}", file=sys.stderr)
    return replace(cfg, warmup_iters=n)


def save_checkpoint(
    name: str, model: LanguageModel, optimizer: torch.optim.AdamW, step: int, log: list[dict],
    run: dict | None,
) -> None:
    """Write the state between two steps to the folder of the run; without a run, do nothing."""
    if run is None:
        return
    state = {
        **run,  # the folder, the script, the settings, the characters, a checksum of the text
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],  # the averages
        "step": step,
        "random_state": torch.get_rng_state(),
        "log": log,
    }
    checkpoints.write_checkpoint(state, Path(run["folder"], name))


def wait_for(device: str) -> None:
    """Wait until a GPU has finished everything that is queued on it; Python runs ahead of it."""
    torch.zeros(1, device=device).item()  # can't be read before the work ahead of it is done


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config,
    run: dict | None = None, state: dict | None = None,
) -> list[tuple[int, float, float]]:
    """Train the model; return the history as (step, train loss, validation loss), in nats.

    Raises data.InputError if a loss is no longer finite. run: what checkpoints say about the run;
    without it, nothing is saved. state: the checkpoint to continue from.
    """
    hardware.keep_freed_memory()
    cfg = shorten_warmup(cfg)
    optimizer = make_optimizer(model, cfg)
    if cfg.compile:
        hardware.check_compiler(cfg.device)
    compiled_model = torch.compile(model) if cfg.compile else model  # with the same weights
    history = []
    first_step, log = 0, []
    if state is not None:
        checkpoints.load_averages(optimizer, state)
        torch.set_rng_state(state["random_state"])
        first_step, log = state["step"], state["log"]
        history = [(entry["step"], entry["train_loss"], entry["val_loss"]) for entry in log]
    warming_up = True
    clock_step, clock_start = 0, time.perf_counter()
    with tqdm(total=cfg.max_iters, initial=first_step, desc="training") as bar:
        for step in range(first_step, cfg.max_iters + 1):  # the last round only estimates the loss
            if runs.stop_requested():
                save_checkpoint("latest.pt", model, optimizer, step, log, run)
                raise KeyboardInterrupt
            is_known = len(log) > 0 and log[-1]["step"] == step  # from the checkpoint
            if not is_known and (step % cfg.eval_interval == 0 or step == cfg.max_iters):
                speed = 0.0  # tokens/s, unknown before the second step
                if not warming_up and step > clock_step:
                    wait_for(cfg.device)
                    seconds = time.perf_counter() - clock_start
                    speed = (step - clock_step) * cfg.batch_size * cfg.block_size / seconds
                try:
                    train_loss = estimate_loss(model, train_data, cfg)
                    val_loss = estimate_loss(model, val_data, cfg)
                except KeyboardInterrupt:
                    save_checkpoint("latest.pt", model, optimizer, step, log, run)
                    raise
                history.append((step, train_loss, val_loss))
                report = f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                if speed > 0:
                    report += f", {speed:,.0f} tokens/s"
                tqdm.write(report)
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                is_best = all(val_loss < entry["val_loss"] for entry in log)
                losses = {"step": step, "train_loss": train_loss, "val_loss": val_loss}
                log.append({**losses, "tokens_per_second": speed})
                save_checkpoint("latest.pt", model, optimizer, step, log, run)
                if is_best:
                    save_checkpoint("best.pt", model, optimizer, step, log, run)
                if run is not None:
                    checkpoints.write_log(log, Path(run["folder"], "log.jsonl"))
                clock_step, clock_start = step, time.perf_counter()
            if step == cfg.max_iters:
                break

            x, y = get_batch(train_data, cfg)  # (B, T) each
            with autocast(cfg):
                _, loss = compiled_model(x, y)  # ()
            optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, cfg)
            optimizer.step()
            bar.update()
            if warming_up:  # the first step compiles the model, so the clock starts after it
                wait_for(cfg.device)
                clock_step, clock_start = step + 1, time.perf_counter()
                warming_up = False
    return history


def in_units(loss: float) -> str:
    """Return a loss, in nats per character, also in bits per character and as perplexity.

    Perplexity is exp(loss): the model is as unsure as if it guessed among that many characters.
    """
    perplexity = math.exp(min(loss, 700))  # more would overflow
    bits = loss / math.log(2)
    return f"{loss:.4f} nats per character, {bits:.3f} bits, perplexity {perplexity:.4g}"


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        state = None
        if cfg.resume or cfg.sample_only:
            state = runs.find_checkpoint(cfg)
            # Parse again, with the settings of the checkpoint as defaults.
            cfg = data.read_flags(Config, __doc__, argv, saved=state["config"], fixed=SIZES)
        torch.manual_seed(cfg.seed)

        text = "" if cfg.sample_only else data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text if state is None else state["characters"])
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        flag = "--prompt"
        if cfg.prompt_file:
            flag = "--prompt_file"
            start = data.load_text(Path(cfg.prompt_file), flag)
            cfg = replace(cfg, prompt=start, prompt_file="")  # what a checkpoint should hold
        prompt = torch.tensor([tokenizer.encode(start, flag)], device=cfg.device)  # (1, T)
        tokenizer.encode(cfg.stop, "--stop")  # refuse a stop that can't occur

        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {n_parameters:,} parameters, on {cfg.device}", file=sys.stderr)
        if state is not None:
            checkpoints.load_weights(model, state)
        if not cfg.sample_only:
            run = runs.describe_run(cfg, __file__, tokenizer, text, state)
            train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size, cfg.data)
            sizes = f"{len(train_data):,} for training, {len(val_data):,} for validation"
            print(f"tokens: {sizes}", file=sys.stderr)
            with runs.running(run):
                train(model, train_data, val_data, cfg, run, state)
            state = checkpoints.read_checkpoint(Path(run["folder"], "best.pt"))
            checkpoints.load_weights(model, state)
            val_loss = state["log"][-1]["val_loss"]  # the best one: best.pt's log ends there
            print(f"validation loss {in_units(val_loss)}")

        print(f"sampling with the weights after step {state['step']}", file=sys.stderr)
        torch.manual_seed(cfg.seed)  # so that --sample_only repeats this sample
        model.eval()
        model.to(choose_dtype(cfg))  # in bfloat16, half as many bytes to read for each token
        for i in range(cfg.num_samples):
            if i > 0:
                print("---")
            print(start, end="", flush=True)
            tokens = model.stream(prompt, cfg.max_new_tokens)
            for piece in stream_text(tokens, tokenizer, cfg.stop):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
