"""v11d_chat.py: talk to a released model.

A chat model reads one text, and continues it. Special tokens in it say who is speaking:

    <|im_start|>user
    Hello!<|im_end|>
    <|im_start|>assistant

The model was fine-tuned on such texts, and ends its answer with <|im_end|>. Its chat template, a
small program that comes with it, turns all messages so far into that text; support/chat.py runs it.
--show_tokens shows what the model reads.

With each turn, that text grows at its end, so the cache stays between turns: Conversation.read
keeps the tokens that the old and the new text have in common, and reads only the rest. That needs
a mask: a new token sees all the old ones, the new ones before it, and itself. Some templates also
change old turns. Then the two texts differ earlier, and more is read again.

New here: the mask in MultiHeadAttention, common_length, Conversation and talk. With --init_from,
          --sample_only is the default now, and a conversation takes the place of the sample.
Run it:   python part7_released/v11d_chat.py --init_from HuggingFaceTB/SmolLM2-135M-Instruct
Expect:   an answer to what you type. Without --init_from, the losses of v11a_llama.py.
Diff:     git diff --no-index part7_released/v11c_llama_weights.py part7_released/v11d_chat.py
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting
from support import batches, chat, checkpoints, hardware, llama_files, model_files, runs, terminal
from support.notices import warn_of_long_warmup
from support.stopwatch import Stopwatch

# Our names and those in the released files. query_norm contains query, so it is replaced first.
LLAMA_NAMES = {
    "token_embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm",
    "norm_f": "model.norm",
    "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.projection": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.expansion": "mlp.up_proj",
    "feed_forward.projection": "mlp.down_proj",
}

# The defaults for training that starts from released weights, on every device.
FINE_TUNING = {
    "learning_rate": 3e-5, "dropout": 0.0, "weight_decay": 0.1, "batch_size": 4, "max_iters": 200,
    "warmup_iters": 20, "eval_interval": 50, "eval_iters": 10,
}


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
    weight_decay: float = setting("weight decay of matrices and embeddings", gpu=0.1, cpu=0.3)
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
    head_size: int = setting("width of a head; 0: n_embd / n_head", 0, below=2**20)
    intermediate_size: int = setting("hidden width; 0: 8/3 * n_embd", 0, below=2**20)
    qkv_bias: bool = setting("biases for queries, keys and values", False)
    qk_norm: bool = setting("normalise queries and keys, with weights", False)
    tie_word_embeddings: bool = setting("one matrix for tokens in and out", False)
    rms_norm_eps: float = setting("added to the mean square", 1e-5, least=1e-12)
    rope_theta: float = setting("base of the frequencies", 10_000.0, least=1)
    rope_factor: float = setting("divides slow frequencies; 1 is off", 1.0, least=1)
    rope_low_freq_factor: float = setting("a frequency with fewer turns is low", 1.0, least=1e-9)
    rope_high_freq_factor: float = setting("one with more turns is high", 4.0, least=1e-9)
    original_max_position_embeddings: int = setting("context for counting turns", 8192, least=1)
    tokenizer: str = setting("char, or the path of a tokenizer.json", "char")
    init_from: str = setting("start from this folder or Hugging Face repository", "")
    export: str = setting("folder to write the best weights to", "")
    system: str = setting("what to tell a chat model before the conversation", "")
    show_tokens: bool = setting("show what the model reads in a conversation", False)
    allow_special: bool = setting("let messages have special tokens, such as <|im_end|>", False)


SIZES = [  # a run that is resumed must keep these, because the model depends on them
    "n_embd", "n_head", "n_layer", "n_kv_head", "head_size", "intermediate_size", "qkv_bias",
    "qk_norm", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "rope_factor",
    "rope_low_freq_factor", "rope_high_freq_factor", "original_max_position_embeddings",
    "tokenizer",
]


class FileTokenizer:
    """A tokenizer.json and what belongs to it, with the methods of CharTokenizer."""

    name = "file"  # for checkpoints, as are the characters, but only CharTokenizer has any
    characters = ""

    def __init__(self, content: dict) -> None:
        """content: what llama_files.read_tokenizer returns; a checkpoint keeps it."""
        self.content = content
        self.tokenizer = Tokenizer.from_str(content["json"])
        self.tokenizer.no_truncation()  # a limit in the file would cut off most of a corpus
        self.tokenizer.no_padding()
        self.n_vocab = content["n_vocab"]
        self.end_of_text = content["end_of_text"]

    def encode(self, text: str, flag: str = "--prompt") -> list[int]:
        """Text to token ids; raises data.InputError, naming flag, if it can't be encoded."""
        return llama_files.encode(self.tokenizer, text, flag)

    def decode(self, tokens: list[int]) -> str:
        """Token ids to text, without special tokens; "\ufffd" for a part of a character."""
        return self.tokenizer.decode(tokens)


def make_tokenizer(cfg: Config, saved: dict, text: str) -> FileTokenizer | data.CharTokenizer:
    """The tokenizer of a checkpoint or, in a new run, that of --tokenizer."""
    if cfg.tokenizer == "char":
        return data.CharTokenizer(saved.get("characters", text))
    if "tokenizer_content" in saved:
        return FileTokenizer(saved["tokenizer_content"])
    return FileTokenizer(llama_files.read_tokenizer(Path(cfg.tokenizer), "--tokenizer"))


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


def head_size_of(cfg: Config) -> int:
    """The width of a head; raises data.InputError if it isn't an even number."""
    head_size = cfg.head_size
    if head_size == 0:
        if cfg.n_embd % cfg.n_head != 0:
            raise data.InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}")
        head_size = cfg.n_embd // cfg.n_head
    if head_size % 2 != 0:
        raise data.InputError(f"--head_size: {head_size} is odd, but rotation needs pairs")
    return head_size


class KVCache:
    """The keys and values of the last block_size tokens that one layer has processed."""

    def __init__(self, cfg: Config, batch_size: int, like: torch.Tensor) -> None:
        shape = (batch_size, cfg.n_kv_head, cfg.block_size, head_size_of(cfg))
        # new_empty keeps the dtype and the device of the tensor, which is a weight of the model.
        self.keys = like.new_empty(shape)  # (B, n_kv_head, block_size, head_size)
        self.values = like.new_empty(shape)  # (B, n_kv_head, block_size, head_size)
        self.length = 0  # the number of tokens so far, including those that were replaced

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


def rotation_angles(positions: torch.Tensor, cfg: Config) -> torch.Tensor:
    """The angles of all pairs at positions, int64 (T,): float (T, head_size // 2), in radians."""
    head_size = head_size_of(cfg)
    i = torch.arange(0, head_size, 2, device=positions.device)  # (head_size // 2,)
    frequencies = 1 / cfg.rope_theta ** (i / head_size)  # (head_size // 2,)
    if cfg.rope_factor != 1:
        turns = frequencies * cfg.original_max_position_embeddings / math.tau  # (head_size // 2,)
        low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
        # The share of each frequency that isn't divided: 0 for low ones, 1 for high ones.
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # (head_size // 2,)
        frequencies = frequencies * (kept + (1 - kept) / cfg.rope_factor)  # (head_size // 2,)
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
        # bfloat16 has too few digits for a mean.
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
        query_size, kv_size = head_size * cfg.n_head, head_size * cfg.n_kv_head
        self.query = nn.Linear(cfg.n_embd, query_size, bias=cfg.qkv_bias)
        self.key = nn.Linear(cfg.n_embd, kv_size, bias=cfg.qkv_bias)
        self.value = nn.Linear(cfg.n_embd, kv_size, bias=cfg.qkv_bias)
        self.projection = nn.Linear(query_size, cfg.n_embd, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)
        self.query_norm, self.key_norm = nn.Identity(), nn.Identity()
        if cfg.qk_norm:
            self.query_norm = RMSNorm(head_size, cfg.rms_norm_eps)
            self.key_norm = RMSNorm(head_size, cfg.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        B, T, _ = x.shape
        query = self.query(x)  # (B, T, n_head * head_size)
        key = self.key(x)  # (B, T, n_kv_head * head_size)
        value = self.value(x)  # (B, T, n_kv_head * head_size)
        # Cut the last dimension into heads, and put the heads next to the batch: attention works on
        # the last two dimensions and treats all those before them as the batch.
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        key = key.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, head_size)
        value = value.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, head_size)
        query = rotate(self.query_norm(query), cos, sin)  # (B, n_head, T, head_size)
        key = rotate(self.key_norm(key), cos, sin)  # (B, n_kv_head, T, head_size)
        if cache is not None:
            key, value = cache.append(key, value)  # (B, n_kv_head, n_keys, head_size) each
        # scaled_dot_product_attention is a function, not a module, so model.eval() doesn't switch
        # off its dropout.
        dropout_p = self.dropout.p if self.training else 0.0
        # With is_causal, query 0 only sees key 0. A single new query is query 0, but must see all.
        # Several new queries after old keys need a mask. Row t is True for the keys that query t
        # sees: all n_keys - T old ones, and the new ones up to its own.
        n_keys = key.shape[2]
        mask = None
        if 1 < T < n_keys:
            mask = x.new_ones(T, n_keys, dtype=torch.bool).tril(diagonal=n_keys - T)  # (T, n_keys)
        # With enable_gqa, n_head / n_kv_head neighbouring query heads share a key/value head.
        x = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, attn_mask=mask, dropout_p=dropout_p,
            is_causal=T > 1 and mask is None, enable_gqa=True,
        )
        # Put the outputs of the heads side by side again.
        x = x.transpose(1, 2).flatten(2)  # (B, T, n_head * head_size)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class FeedForward(nn.Module):
    """A gated two-layer network applied to each position separately (Shazeer 2020, section 2).

    Maps float (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        hidden = cfg.intermediate_size
        if hidden == 0:
            hidden = 8 * math.ceil(cfg.n_embd / 3)  # two thirds of 4 * n_embd, in multiples of 8
        self.gate = nn.Linear(cfg.n_embd, hidden, bias=False)
        self.expansion = nn.Linear(cfg.n_embd, hidden, bias=False)
        self.projection = nn.Linear(hidden, cfg.n_embd, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.gate(x)) * self.expansion(x)  # (B, T, hidden)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class Block(nn.Module):
    """Attention, then a feed-forward network, each with RMSNorm on its input.

    GPT-2 has its LayerNorms in the same place (Radford et al. 2019, section 2.3). Maps float
    (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(cfg.n_embd, cfg.rms_norm_eps)
        self.attention = MultiHeadAttention(cfg)
        self.norm_2 = RMSNorm(cfg.n_embd, cfg.rms_norm_eps)
        self.feed_forward = FeedForward(cfg)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.norm_1(x), cos, sin, cache)  # (B, T, n_embd)
        x = x + self.feed_forward(self.norm_2(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.block_size = cfg.block_size
        self.cfg = cfg  # rotation_angles needs it
        if cfg.rope_low_freq_factor >= cfg.rope_high_freq_factor:
            raise data.InputError("--rope_low_freq_factor: must be below --rope_high_freq_factor")
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.norm_f = RMSNorm(cfg.n_embd, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.token_embedding.weight  # (V, n_embd), the same parameter
        # Small weights, as in GPT (Radford et al. 2018, section 4.1). RMSNorm's have one dimension,
        # so they keep their initial value, 1.
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats (None without targets).

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        caches: one for each block. The tokens in them come before idx. They and idx must
        fit in block_size, except that a single new token may replace the oldest.
        """
        n_old = 0 if caches is None else caches[0].length
        positions = torch.arange(n_old, n_old + idx.shape[1], device=idx.device)  # (T,)
        angles = rotation_angles(positions, self.cfg)  # (T, head_size // 2)
        cos, sin = angles.cos(), angles.sin()  # (T, head_size // 2) each
        x = self.token_embedding(idx)  # (B, T, n_embd)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if caches is None else caches[i])  # (B, T, n_embd)
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
        caches = [KVCache(cfg, len(idx), like=self.lm_head.weight) for _ in self.blocks]
        for _ in range(max_new_tokens):
            # The model is trained on block_size positions, so older tokens drop out of view.
            context = idx[:, -self.block_size :]  # (B, min(T, block_size))
            if caches[0].length > 0:
                context = idx[:, -1:]  # (B, 1); the caches have the tokens before it
            logits, _ = self(context, caches=caches)  # (B, context.shape[1], V)
            # Only the last position predicts a token that isn't there yet.
            next_token = choose_token(logits[:, -1].float(), idx, cfg)  # (B, 1), chosen in float32
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


def make_optimizer(model: LanguageModel, cfg: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay for matrices and embeddings only."""
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


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: np.ndarray, step: int,
    cfg: Config,
) -> None:
    """Move the weights a little, so that the loss on one random batch falls."""
    # The batch and the dropout of a step depend only on the run's seed and the step's number.
    torch.manual_seed(batches.mix_seed(cfg.seed, step))
    x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, "cpu")  # (B, T) each
    x, y = hardware.to_device([x, y], cfg.device)  # (B, T) each
    with autocast(cfg):
        _, loss = model(x, y)  # ()
    optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, cfg)
    optimizer.step()


def compile_model(model: LanguageModel, cfg: Config) -> Callable:
    """Return the model or, with --compile, a faster version of it with the same weights."""
    if not cfg.compile or not hardware.compiler_works(cfg.device):
        return model
    return torch.compile(model)


def checkpoint(model: LanguageModel, optimizer: torch.optim.Optimizer, step: int) -> dict:
    """What training needs to go on from a step; run.save adds the settings and the tokenizer."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],  # AdamW's m, v and step counts, no settings
        "step": step,  # the learning rate and the random numbers follow from it
    }


def restore(model: LanguageModel, optimizer: torch.optim.Optimizer, run: runs.Run) -> int:
    """Load what a checkpoint holds; return the number of the next step, 0 in a new run."""
    if run.is_new:
        return 0
    checkpoints.load_weights(model, run.saved)
    checkpoints.load_averages(optimizer, run.saved)
    return run.saved["step"]


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config, run: runs.Run
) -> dict[int, tuple[float, float]]:
    """Train the model; return {step: (train loss, validation loss)}, in nats, of each estimate.

    Raises data.InputError if a loss is no longer finite.
    """
    hardware.keep_freed_memory()
    optimizer = make_optimizer(model, cfg)
    warn_of_long_warmup(cfg.warmup_iters, cfg.max_iters)
    # Only for training: loss estimates are in eval mode, which would need a second compilation.
    compiled_model = compile_model(model, cfg)
    stopwatch = Stopwatch(cfg.device)
    first_step = restore(model, optimizer, run)
    with tqdm(total=cfg.max_iters, initial=first_step, desc="training") as bar:
        for step in range(first_step, cfg.max_iters + 1):  # the last round only estimates the loss
            if step % cfg.eval_interval == 0 or step == cfg.max_iters:
                speed = stopwatch.stop()  # such as ", 12,345 tokens/s"; "" at first
                train_loss = estimate_loss(model, train_data, cfg)
                val_loss = estimate_loss(model, val_data, cfg)
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                run.save(checkpoint(model, optimizer, step), train_loss, val_loss)
                losses = f"train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                tqdm.write(f"step {step}: {losses}{speed}")
                stopwatch.start()
            if step == cfg.max_iters:
                break
            if run.stop_requested():
                run.save_latest(checkpoint(model, optimizer, step))
                break

            train_step(compiled_model, optimizer, train_data, step, cfg)
            stopwatch.count(cfg.batch_size * cfg.block_size)  # ignores the first step
            bar.update()
    return run.history


def describe_best(
    history: dict[int, tuple[float, float]], tokens: np.ndarray,
    tokenizer: FileTokenizer | data.CharTokenizer,
) -> str:
    """Return the lowest validation loss, in nats per token, as perplexity and in bits per byte.

    Perplexity is exp(loss): the model is as unsure as if it guessed among that many tokens.
    tokens: int (n,), of which the first million show how long a token is on average.
    """
    loss = min(val_loss for _, val_loss in history.values())
    ids = tokens[:1_000_000]  # (min(n, 1_000_000),)
    text = tokenizer.decode(ids.tolist())
    bytes_per_token = len(text.encode("utf-8")) / len(ids)
    bits_per_byte = loss / math.log(2) / bytes_per_token
    perplexity = math.exp(min(loss, 700))  # more would overflow
    return f"{loss:.4f} nats per token, perplexity {perplexity:.4g}, {bits_per_byte:.3f} bits/byte"


def read_settings(argv: list[str] | None) -> tuple[Config, dict, dict]:
    """Decide where a run starts: return its settings, its checkpoint and its released model.

    A dict that isn't needed is empty. Raises data.InputError for flags that contradict each other.
    """
    cfg = data.read_flags(Config, __doc__, argv)  # only to see how the run starts
    if not cfg.init_from:
        cfg, saved = runs.read_settings(Config, __doc__, argv, SIZES)
        model_files.check_export(cfg.export)  # now, not after hours of training
        return replace(cfg, dtype=choose_dtype(cfg)), saved, {}
    model_files.refuse_conflicts(cfg)
    model_files.check_export(cfg.export)
    folder = llama_files.find_folder(cfg.init_from)  # downloads a repository, if it isn't there
    released = llama_files.read_config(folder)  # settings, tokenizer, folder and dtype
    # Add the chat template and settings for sampling; a template may refuse --system.
    released.update(chat.read_defaults(released, cfg.system))
    released["sample_only"] = True  # unless --no-sample_only says otherwise
    # The settings in released and FINE_TUNING become the defaults; no flag can change SIZES.
    cfg = data.read_flags(Config, __doc__, argv, released | FINE_TUNING, fixed=SIZES)
    model_files.refuse_conflicts(cfg)  # again, because sample_only may be true now
    if cfg.sample_only and cfg.dtype == "auto":
        return replace(cfg, dtype=released["dtype_of_files"]), {}, released
    return replace(cfg, dtype=choose_dtype(cfg)), {}, released


def weights_by_released_name(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights of a model by their names in the released files; no copies."""
    weights = {}
    for name, parameter in model.named_parameters():
        for ours, theirs in LLAMA_NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = parameter.detach()
    return weights


def make_model(cfg: Config, released: dict, n_vocab: int) -> LanguageModel:
    """Return a new model or a released one; raises data.InputError if its weights don't fit."""
    if not released:
        return LanguageModel(cfg, n_vocab).to(cfg.device)
    dtype = model_files.DTYPES[cfg.dtype] if cfg.sample_only else torch.float32
    with torch.device("meta"):  # tensors without memory or values; to_empty gives them memory
        model = LanguageModel(cfg, n_vocab).to(dtype).to_empty(device="cpu")
    if cfg.tie_word_embeddings:  # to_empty turned the shared matrix into two
        model.lm_head.weight = model.token_embedding.weight
    parameters = weights_by_released_name(model)  # they share their memory with the model's
    for name, weight in llama_files.read_weights(released["folder"], parameters):  # checks shapes
        parameters[name].copy_(weight)
    return model.to(cfg.device)


def common_length(old: list[int], new: list[int]) -> int:
    """How many token ids at the beginning of two lists are the same."""
    n = 0
    while n < len(old) and n < len(new) and old[n] == new[n]:
        n += 1
    return n


class Conversation:
    """The messages so far, and caches with keys and values of the tokens that were read."""

    def __init__(
        self, model: LanguageModel, chat_tokenizer: chat.ChatTokenizer, cfg: Config
    ) -> None:
        self.model, self.chat_tokenizer, self.cfg = model, chat_tokenizer, cfg
        self.messages = chat.system_message(cfg.system)  # a list; empty without --system
        self.caches = [KVCache(cfg, 1, like=model.lm_head.weight) for _ in model.blocks]
        self.ids = []  # the tokens in the caches

    @torch.no_grad()
    def read(self, ids: list[int]) -> torch.Tensor:
        """Read tokens into the caches, beginning with the first one that isn't there yet.

        ids: those of the whole conversation. Returns the logits after the last, float (1, V).
        """
        # The last token is read in any case, because its logits are needed.
        n_kept = common_length(self.ids, ids[:-1])
        for cache in self.caches:
            cache.length = n_kept  # append overwrites the rest
        # If Ctrl-C interrupts the model, only some caches have the new tokens; all have these.
        self.ids = ids[:n_kept]
        idx = torch.tensor([ids[n_kept:]], device=self.cfg.device)  # (1, T)
        logits, _ = self.model(idx, caches=self.caches)  # (1, T, V)
        self.ids = ids.copy()
        return logits[:, -1].float()  # (1, V)

    def answer(self, message: str) -> Iterator[torch.Tensor]:
        """Yield the tokens of the answer to a message, int64 (1, 1) each, as they are chosen."""
        self.messages.append({"role": "user", "content": message})
        self.messages = self.chat_tokenizer.drop_oldest(self.messages)  # until they fit
        ids = self.chat_tokenizer.encode(self.messages)
        if self.cfg.show_tokens:
            self.chat_tokenizer.show(ids, n_kept=common_length(self.ids, ids))
        for _ in range(min(self.cfg.max_new_tokens, self.cfg.block_size - len(ids))):
            logits = self.read(ids)  # (1, V)
            idx = torch.tensor([ids], device=self.cfg.device)  # (1, T)
            next_token = choose_token(logits, idx, self.cfg)  # (1, 1)
            yield next_token
            ids.append(next_token.item())


def talk(conversation: Conversation, tokenizer: FileTokenizer) -> None:
    """Answer each message. Ctrl-C ends an answer; the end of the input ends the conversation."""
    for message in chat.read_messages(conversation.chat_tokenizer):  # it refuses long ones
        text = ""
        with chat.until_ctrl_c():
            answer = conversation.answer(message)
            # An answer is decoded on its own, up to a token that ends a text, such as <|im_end|>.
            pieces = terminal.decode_stream(answer, tokenizer, prompt=[])
            for piece in terminal.end_before(conversation.cfg.stop, pieces):
                print(piece, end="", flush=True)
                text += piece
        print()
        conversation.messages.append({"role": "assistant", "content": text})


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():  # a user's mistake prints one line, no traceback
        cfg, saved, released = read_settings(argv)
        torch.manual_seed(cfg.seed)

        text = "" if cfg.sample_only else data.load_text(cfg.data)
        tokenizer = make_tokenizer(cfg, saved or released, text)  # both are {} in a new run
        cfg = terminal.read_prompt_file(cfg, tokenizer)  # its text becomes cfg.prompt
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        prompt = torch.tensor([tokenizer.encode(start)], device=cfg.device)  # (1, T)

        model = make_model(cfg, released, tokenizer.n_vocab)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {n_parameters:,} parameters, {cfg.dtype}, on {cfg.device}", file=sys.stderr)
        if not cfg.sample_only:
            run = runs.Run(cfg, __file__, tokenizer, text, saved)  # a folder and its files
            # Not uint16, because ids may be above 65,535.
            ids = np.array(tokenizer.encode(text, "--data"), dtype=np.uint32)
            train_data, val_data = data.split(ids, cfg.block_size, cfg.data)
            sizes = f"{len(train_data):,} for training, {len(val_data):,} for validation"
            print(f"tokens: {sizes}", file=sys.stderr)
            with run:  # in here, Ctrl-C only asks train to stop
                history = train(model, train_data, val_data, cfg, run)
            print(f"validation loss: {describe_best(history, val_data, tokenizer)}")
            saved = run.best()
        if saved:  # empty if the run only samples from a released model
            checkpoints.load_weights(model, saved)
            print(f"sampling with the weights after step {saved['step']}", file=sys.stderr)
        if cfg.export:
            llama_files.write_model(cfg, released, weights_by_released_name(model), tokenizer)

        torch.manual_seed(cfg.seed)  # so that --sample_only repeats this sample
        model.eval()
        if released:
            chat_tokenizer = chat.ChatTokenizer(released["template"], tokenizer, cfg)
            talk(Conversation(model, chat_tokenizer, cfg), tokenizer)
        else:
            terminal.print_samples(model, prompt, tokenizer, cfg)


if __name__ == "__main__":
    main()
