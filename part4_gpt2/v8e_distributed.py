"""v8e_distributed.py: large batches, from small ones in turn and from several GPUs at once.

GPT-2 trains on half a million tokens per step, which fit into no GPU. The gradient of a mean is the
mean of gradients, so the batch can be cut:

- Gradient accumulation: grad_accum_steps small batches, one after the other. backward() adds up
  their gradients; the optimizer then takes one step.
- Data parallelism: torchrun starts a process for each GPU, with a copy of the model and batches of
  its own. DistributedDataParallel (Li et al. 2020) averages the gradients of all processes during
  backward(), so all copies take the same step.

Each batch has its own random seed, which doesn't depend on the process that draws it. So two
processes train the same model as one that accumulates twice as much, up to rounding.

New here: grad_accum_steps, seed_batch, stop_requested and the inner loop of train.
          support/processes.py connects the processes. Only the first of them prints and saves.
Run it:   python part4_gpt2/v8e_distributed.py
          python part4_gpt2/v8e_distributed.py --grad_accum_steps 2
          torchrun --standalone --nproc_per_node=2 part4_gpt2/v8e_distributed.py --device cpu
Expect:   4.95 nats per token or 2.315 bits per character. v8d_gpt2_weights.py, which draws other
          random batches, reaches 5.04.
Diff:     git diff --no-index part4_gpt2/v8d_gpt2_weights.py part4_gpt2/v8e_distributed.py
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting, token_files
from support import gpt2_files, hardware, model_files, processes
from support.old import checkpoints, runs

# The settings of the released models (Radford et al. 2018 and 2019).
PRESETS = {
    "gpt1": {"norm": "post", "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512},
    "gpt2": {"norm": "pre", "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    "gpt2-medium": {"norm": "pre", "n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024},
    "gpt2-large": {"norm": "pre", "n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024},
    "gpt2-xl": {"norm": "pre", "n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024},
}

# What the parts of our model are called in GPT-2's files; ln_1, ln_2 and ln_f have those names.
GPT2_NAMES = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "blocks": "h",
    "attention.query_key_value": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "feed_forward.expansion": "mlp.c_fc",
    "feed_forward.projection": "mlp.c_proj",
}
# In GPT-1's files, the embeddings have other names.
GPT1_NAMES = {
    **GPT2_NAMES, "token_embedding": "tokens_embed", "position_embedding": "positions_embed",
}

# The defaults for training that starts from released weights, on every device.
FINE_TUNING = {
    "learning_rate": 3e-5, "dropout": 0.1, "weight_decay": 0.1, "batch_size": 4, "max_iters": 200,
    "eval_interval": 50, "eval_iters": 10,
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
    n_layer: int = setting("number of blocks", gpu=6, cpu=3, least=1, most=1000)
    dropout: float = setting("probability of dropping an activation", gpu=0.2, cpu=0.0, below=1)
    learning_rate: float = setting("learning rate", gpu=1e-3, cpu=3e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=1000)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=250, least=1)
    eval_iters: int = setting("maximum batches in a loss estimate", gpu=200, cpu=75, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, a text, a .bin", "shakespeare")
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
    tokenizer: str = setting(
        "auto: gpt2 if its files load, else char", "auto", choices=["auto", "gpt2", "char"]
    )
    val_data: str = setting("text or .bin to validate on, not 10% of data", "")
    norm: str = setting("pre as in GPT-2, post as in GPT-1", "pre", choices=["pre", "post"])
    preset: str = setting("sizes of a released model", "", choices=list(PRESETS))
    init_from: str = setting("start from gpt2 to gpt2-xl, or from a folder", "")
    export: str = setting("folder to write the best weights to", "")
    grad_accum_steps: int = setting("batches per step, in each process", 1, least=1)


# The settings that determine the shapes of the weights.
SIZES = ["tokenizer", "norm", "preset", "block_size", "n_embd", "n_head", "n_layer"]


class BPETokenizer:
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2), with tiktoken's files."""

    name = "gpt2"
    characters = ""  # it knows all of them

    def __init__(self) -> None:
        self.encoding = tiktoken.get_encoding("gpt2")
        self.n_vocab = self.encoding.n_vocab

    def encode(self, text: str, flag: str = "--prompt") -> list[int]:
        """Text to token ids. Any text can be encoded, so flag is never named in an error."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Token ids to text, with "\ufffd" for bytes that aren't a whole character."""
        return self.encoding.decode(tokens)


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


class KVCache:
    """The keys and values of the tokens that one layer has processed, with room for more."""

    def __init__(self, cfg: Config, batch_size: int, weight: torch.Tensor) -> None:
        """Make room for block_size tokens, with the dtype and on the device of weight."""
        head_size = cfg.n_embd // cfg.n_head
        self.keys = weight.new_empty(  # (B, n_head, block_size, head_size)
            batch_size, cfg.n_head, cfg.block_size, head_size
        )
        self.values = torch.empty_like(self.keys)  # (B, n_head, block_size, head_size)
        self.length = 0  # the number of tokens in the cache

    def append(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T tokens, float (B, n_head, T, head_size) each; return those of all tokens so far."""
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]  # (B, n_head, end, head_size) each


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

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        B, T, n_embd = x.shape
        query, key, value = self.query_key_value(x).split(n_embd, dim=-1)  # (B, T, n_embd) each
        # Cut the last dimension into heads, and put the heads next to the batch: attention works on
        # the last two dimensions and treats all those before them as the batch.
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        key = key.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        value = value.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        # The call below is a function, so model.eval() doesn't switch off its dropout.
        dropout_p = self.dropout.p if self.training else 0.0
        n_old = 0  # the number of tokens before those in x
        if cache is not None:
            n_old = cache.length
            key, value = cache.append(key, value)  # (B, n_head, n_old + T, head_size) each
        mask = None
        if n_old > 0 and T > 1:
            # Query i may look at n_old + i + 1 keys, but is_causal would show it the first i + 1.
            # A single query may look at all of them, and needs no mask.
            ones = torch.ones(T, n_old + T, dtype=torch.bool, device=x.device)  # (T, n_old + T)
            mask = ones.tril(diagonal=n_old)  # (T, n_old + T)
        x = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=n_old == 0
        )
        # Put the outputs of the heads side by side again.
        x = x.transpose(1, 2).reshape(B, T, n_embd)  # (B, T, n_embd)
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

    LayerNorm has the same place as in GPT-2 (Radford et al. 2019, section 2.3) or, if cfg.norm is
    "post", as in GPT-1: after each addition. Maps float (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm = cfg.norm
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attention = MultiHeadAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.feed_forward = FeedForward(cfg)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        if self.norm == "post":
            x = self.ln_1(x + self.attention(x, cache))  # (B, T, n_embd)
            x = self.ln_2(x + self.feed_forward(x))  # (B, T, n_embd)
            return x
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.ln_1(x), cache)  # (B, T, n_embd)
        x = x + self.feed_forward(self.ln_2(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg  # choose_token reads its settings from it
        self.block_size = cfg.block_size
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)  # (block_size, n_embd)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.Sequential(*[Block(cfg) for _ in range(cfg.n_layer)])
        # With norm post, each block ends with a LayerNorm already.
        self.ln_f = nn.LayerNorm(cfg.n_embd) if cfg.norm == "pre" else nn.Identity()
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight  # (V, n_embd), the same parameter
        # Small weights and zero biases, as in GPT (Radford et al. 2018, section 4.1). LayerNorm's
        # weights have one dimension, so they keep PyTorch's initial value, 1.
        for name, parameter in self.named_parameters():
            if name.endswith("projection.weight") and cfg.norm == "pre":
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * cfg.n_layer))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

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
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, n_embd)
        x = self.dropout(x)  # (B, T, n_embd)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, cache)  # (B, T, n_embd)
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
            if caches[0].length == self.block_size:
                # The caches are full: begin again with the last half of the text.
                caches = self.make_caches(len(idx))
                half = (self.block_size + 1) // 2
                context = idx[:, -half:]  # (B, half)
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
    tokens: Iterator[torch.Tensor], tokenizer: BPETokenizer | data.CharTokenizer, stop: str
) -> Iterator[str]:
    """Yield the text of tokens, int64 (1, 1) each, piece by piece; it ends before stop, if any."""
    n_waiting = max(0, len(stop) - 1)  # so many last characters may be the beginning of stop
    text = ""  # what hasn't been yielded yet
    undecoded = []
    for token in tokens:
        undecoded.append(token.item())
        new_text = tokenizer.decode(undecoded)
        if new_text.endswith("\ufffd"):
            continue  # a character whose other bytes are in the next tokens
        undecoded = []
        text += new_text
        if stop and stop in text:
            yield text[: text.index(stop)]
            return
        n_ready = max(0, len(text) - n_waiting)
        yield text[:n_ready]
        text = text[n_ready:]
    text += tokenizer.decode(undecoded)
    if stop and stop in text:
        text = text[: text.index(stop)]
    yield text


def read_settings(released: dict, argv: list[str] | None) -> Config:
    """Return the settings for a released model: its sizes, FINE_TUNING, and the flags in argv.

    Raises data.InputError for a flag that would change a size; only block_size may be smaller.
    """
    saved = {**released, **FINE_TUNING, "preset": ""}
    saved["tokenizer"] = "char" if released["characters"] else "gpt2"
    cfg = data.read_flags(Config, __doc__, argv, saved=saved)
    saved["warmup_iters"] = cfg.max_iters // 10
    fixed = [name for name in SIZES if name != "block_size"]
    cfg = data.read_flags(Config, __doc__, argv, saved=saved, fixed=fixed)
    if cfg.block_size > released["block_size"]:
        why = f"the model has only {released['block_size']} positions"
        raise data.InputError(f"--block_size {cfg.block_size}: {why}")
    return cfg


def released_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights of a model with the names and shapes of the released files; no copies."""
    names = GPT1_NAMES if model.cfg.norm == "post" else GPT2_NAMES
    weights = {}
    for name, parameter in model.named_parameters():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weight = parameter.detach()
        is_matrix = weight.ndim == 2 and ".c_" in name
        weights[name] = weight.T if is_matrix else weight
    return weights


def load_released(model: LanguageModel, folder: Path) -> None:
    """Copy the weights in a folder into the model; raises data.InputError if they don't fit."""
    own = released_weights(model)
    for name, weight in gpt2_files.read_weights(folder, own):
        own[name].copy_(weight)


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
    if run is None or processes.process_rank() > 0:
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


def seed_batch(cfg: Config, step: int, i: int) -> None:
    """Seed what is random about batch i of this process: its windows, and what dropout drops."""
    index = i * processes.n_processes() + processes.process_rank()  # among all batches of the step
    sequence = np.random.SeedSequence([cfg.seed, step, index])  # mixes numbers into a seed
    torch.manual_seed(int(sequence.generate_state(1)[0]))


def stop_requested() -> bool:
    """Whether any process has been asked to stop. All get the same answer, and stop together."""
    stop = torch.tensor(float(runs.stop_requested()))  # ()
    if processes.n_processes() > 1:
        distributed.all_reduce(stop)  # the sum over all processes
    return stop.item() > 0


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
    parallel_model = compiled_model
    n_processes = processes.n_processes()
    if n_processes > 1:
        parallel_model = nn.parallel.DistributedDataParallel(compiled_model)
    tokens_per_step = cfg.batch_size * cfg.block_size * cfg.grad_accum_steps * n_processes
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
            if stop_requested():
                save_checkpoint("latest.pt", model, optimizer, step, log, run)
                raise KeyboardInterrupt
            is_known = len(log) > 0 and log[-1]["step"] == step  # from the checkpoint
            is_due = step % cfg.eval_interval == 0 or step == cfg.max_iters
            # The first process estimates the loss, and saves, for all of them.
            if processes.process_rank() == 0 and is_due and not is_known:
                speed = 0.0  # tokens/s, unknown before the second step
                if not warming_up and step > clock_step:
                    wait_for(cfg.device)
                    seconds = time.perf_counter() - clock_start
                    speed = (step - clock_step) * tokens_per_step / seconds
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

            optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
            for i in range(cfg.grad_accum_steps):
                seed_batch(cfg, step, i)
                x, y = get_batch(train_data, cfg)  # (B, T) each
                # backward() of the last batch averages the sums of all processes; before, it would
                # only cost time.
                is_last = i == cfg.grad_accum_steps - 1
                only_add = n_processes > 1 and not is_last
                with parallel_model.no_sync() if only_add else nullcontext():
                    with autocast(cfg):
                        _, loss = parallel_model(x, y)  # ()
                    (loss / cfg.grad_accum_steps).backward()
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


def characters_per_token(
    tokens: np.ndarray | token_files.TokenFile, tokenizer: BPETokenizer | data.CharTokenizer
) -> float:
    """The mean length of a token in characters, over the first million tokens."""
    n = min(len(tokens), 1_000_000)
    ids = tokens[np.arange(n)]  # (n,)
    return len(tokenizer.decode(ids.tolist())) / n


def in_units(loss: float, token_length: float) -> str:
    """Return a loss, in nats per token, also as perplexity and in bits per character.

    Perplexity is exp(loss): the model is as unsure as if it guessed among that many tokens.
    token_length: the mean length of a token in characters.
    """
    perplexity = math.exp(min(loss, 700))  # more would overflow
    bits = loss / math.log(2) / token_length
    return f"{loss:.4f} nats per token, perplexity {perplexity:.4g}, {bits:.3f} bits per character"


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line(torchrun=True):
        processes.mute()  # all but the first process, which would print the same
        cfg = data.read_flags(Config, __doc__, argv)
        if cfg.preset:
            # Parse again, with the sizes of the preset as defaults.
            cfg = data.read_flags(Config, __doc__, argv, saved=PRESETS[cfg.preset])
        state, released = None, None
        if cfg.init_from:
            if cfg.resume:
                raise data.InputError("--init_from: can't start a run that --resume continues")
            folder = gpt2_files.find_folder(cfg.init_from)
            released = gpt2_files.read_config(folder)
            cfg = read_settings(released, argv)
        elif cfg.resume or cfg.sample_only:
            export_to = cfg.export
            state = runs.find_checkpoint(cfg)
            # Parse again, with the settings of the checkpoint as defaults.
            cfg = data.read_flags(Config, __doc__, argv, saved=state["config"], fixed=SIZES)
            if cfg.sample_only:
                cfg = replace(cfg, export=export_to)  # not again where the run has exported to
        model_files.check_export(cfg.export)
        torch.manual_seed(cfg.seed)

        cfg = replace(cfg, device=processes.device_of_process(cfg.device))
        cfg = replace(cfg, tokenizer=token_files.choose_tokenizer(cfg.tokenizer))
        text = ""
        if cfg.tokenizer == "char" and not cfg.sample_only:
            text = data.load_text(cfg.data)
        if cfg.tokenizer == "gpt2":
            tokenizer = BPETokenizer()
        else:
            saved = released if state is None else state
            tokenizer = data.CharTokenizer(text if saved is None else saved["characters"])
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
        if released is not None:
            gpt2_files.check_vocabulary(released, tokenizer)
            load_released(model, folder)
        if not cfg.sample_only:
            train_data, val_data = token_files.load_splits(cfg, tokenizer, text)
            corpus = token_files.checksum(train_data, val_data)
            run = runs.describe_run(cfg, __file__, tokenizer, corpus, state)
            sizes = f"{len(train_data):,} for training, {len(val_data):,} for validation"
            print(f"tokens: {sizes}", file=sys.stderr)
            with processes.joined_processes(), runs.running(run):
                train(model, train_data, val_data, cfg, run, state)
            if processes.process_rank() > 0:
                return
            state = checkpoints.read_checkpoint(Path(run["folder"], "best.pt"))
            checkpoints.load_weights(model, state)
            val_loss = state["log"][-1]["val_loss"]  # the best one: best.pt's log ends there
            token_length = characters_per_token(val_data, tokenizer)
            print(f"validation loss {in_units(val_loss, token_length)}")

        if cfg.export:
            gpt2_files.write_model(cfg, released_weights(model), tokenizer)
            print(f"exported to {cfg.export}", file=sys.stderr)
        origin = f"of {cfg.init_from}" if state is None else f"after step {state['step']}"
        print(f"sampling with the weights {origin}", file=sys.stderr)
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
