"""v8g_epochs.py: train by epochs; each of them uses every window of the text once.

Until now, each batch was drawn at random. If a text is n windows long, a random window misses a
given token with a probability of about 1 - 1/n. All of n random windows miss it with (1 - 1/n)^n,
which is about 1/e or 37%. For a text that is too large to be read even once, that doesn't matter. A
small one is better used in epochs: cut it into windows that don't overlap, shuffle them, go through
all of them, and shuffle again.

    one epoch = ceil(windows / batch_size) steps; the last batch has the windows that are left

To see how much more text helps, train on less: --subset N uses only N windows, in each epoch.
The tokens after the last whole window, fewer than block_size, are left out.

New here: choose_windows, epoch_batches, --epochs in place of --max_iters and --eval_interval, and
          --subset. The loss is estimated before the first epoch and after each.
Run it:   python part4_gpt2/v8g_epochs.py
          python part4_gpt2/v8g_epochs.py --epochs 3 --subset 1000
          python part4_gpt2/v8g_epochs.py --data my_text.txt --val_data my_other_text.txt
Expect:   with --tokenizer char --subset 8000, 2.11 nats per character; v8f_gpt1.py reaches 2.12
          with as many random windows.
Diff:     git diff --no-index part4_gpt2/v8f_gpt1.py part4_gpt2/v8g_epochs.py
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting, token_files
from support import batches, checkpoints, gpt1_files, hardware, llama_files, runs, terminal
from support.notices import warn_of_long_warmup
from support.stopwatch import Stopwatch

# The sizes of the released model (Radford et al. 2018).
PRESETS = {"gpt1": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512}}


@dataclass
class Config:
    """The settings. Each one is also a command-line flag with the same name.

    A setting has one default, or one for GPUs and one for the CPU. In shape comments, B is the
    number of windows in a batch, T the number of tokens in a window, and V the size of the
    vocabulary; "()" is a single number, and "(B, T) each" the shape of every tensor on the left.
    """

    batch_size: int = setting("windows in a batch", gpu=64, cpu=8, least=1)
    block_size: int = setting("longest context, in tokens", gpu=256, cpu=64, least=1)
    n_embd: int = setting("width of the embeddings", gpu=384, cpu=96, least=1)
    n_head: int = setting("attention heads in a layer", gpu=6, cpu=4, least=1)
    n_layer: int = setting("number of blocks", gpu=6, cpu=3, least=1, most=1000)
    dropout: float = setting("probability of dropping an activation", gpu=0.2, cpu=0.0, below=1)
    learning_rate: float = setting("learning rate", gpu=1e-3, cpu=3e-3, least=1e-9, below=1)
    epochs: int = setting("times that each window is trained on", gpu=20, cpu=1)
    subset: int = setting("windows to train on; 0 is all", 0)
    eval_iters: int = setting("batches in a loss estimate", gpu=200, cpu=75, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, a text, a .bin", "shakespeare")
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
    tokenizer: str = setting("auto (gpt2 or else char), gpt2, char, or a tokenizer.json", "auto")
    val_data: str = setting("text or .bin to validate on, instead of 10% of data", "")
    preset: str = setting("sizes of a released model", "", choices=list(PRESETS))
    init_from: str = setting("start from openai-gpt, or from a folder", "")
    export: str = setting("folder to write the best weights to", "")


# A run that is resumed must keep these. The first three say how many steps an epoch has.
SIZES = [
    "batch_size", "subset", "block_size", "tokenizer", "preset", "n_embd", "n_head", "n_layer",
]


class BPETokenizer:
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2), with tiktoken's files."""

    name = "gpt2"
    characters = ""  # a checkpoint lists them, but only CharTokenizer has any

    def __init__(self) -> None:
        self.encoding = tiktoken.get_encoding("gpt2")
        self.n_vocab = self.encoding.n_vocab
        self.end_of_text = [self.encoding.eot_token]  # where generation stops

    def encode(self, text: str, flag: str = "--prompt") -> list[int]:
        """Text to token ids. Unlike CharTokenizer's, it needs no flag: any text can be encoded."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Token ids to text, with "\ufffd" for bytes that aren't a whole character."""
        return self.encoding.decode(tokens)


class GPT1Tokenizer:
    """GPT-1's tokens, or those of another tokenizer.json, with the methods of CharTokenizer."""

    name = "file"  # checkpoints store it, and with it the text of the tokenizer.json

    def __init__(self, content: dict) -> None:
        """content: a dict with "json" (a tokenizer.json's text), "n_vocab" and "end_of_text"."""
        self.content = content
        self.tokenizer = Tokenizer.from_str(content["json"])
        self.tokenizer.no_truncation()  # a limit in the file would cut off most of a corpus
        self.n_vocab = content["n_vocab"]
        self.end_of_text = content["end_of_text"]  # GPT-1 has none

    def encode(self, text: str, flag: str = "--prompt") -> list[int]:
        """Text to token ids; [0], which is <unk> in GPT-1, if there are none, as for spaces."""
        ids = self.tokenizer.encode(text).ids
        return ids if ids else [0]

    def decode(self, tokens: list[int]) -> str:
        """Token ids to text; GPT-1's is in lower case, with one space between two words."""
        return self.tokenizer.decode(tokens)


def make_tokenizer(
    cfg: Config, saved: dict, text: str
) -> BPETokenizer | GPT1Tokenizer | data.CharTokenizer:
    """GPT-2's tokens, those of a checkpoint or a tokenizer.json, or the characters of the text."""
    if cfg.tokenizer == "gpt2":
        return BPETokenizer()
    if cfg.tokenizer == "char":
        return data.CharTokenizer(saved.get("characters", text))
    if "tokenizer_content" in saved:
        return GPT1Tokenizer(saved["tokenizer_content"])
    return GPT1Tokenizer(llama_files.read_tokenizer(Path(cfg.tokenizer), "--tokenizer"))


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
    """The keys and values of the tokens that one layer has processed, with room for more."""

    def __init__(self, cfg: Config, batch_size: int, device: torch.device) -> None:
        shape = (batch_size, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.keys = torch.empty(shape, device=device)  # (B, n_head, block_size, head_size)
        self.values = torch.empty(shape, device=device)  # (B, n_head, block_size, head_size)
        self.length = 0  # the number of tokens in the cache

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T keys and values, float (B, n_head, T, head_size) each; return all so far."""
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
        if cache is not None:
            key, value = cache.append(key, value)  # (B, n_head, cache.length, head_size) each
        # scaled_dot_product_attention is a function, not a module, so model.eval() doesn't switch
        # off its dropout.
        dropout_p = self.dropout.p if self.training else 0.0
        # With is_causal, query 0 only sees key 0. A single new query is query 0, but must see all.
        x = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, dropout_p=dropout_p, is_causal=T > 1
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
    """Attention, then a feed-forward network, each with LayerNorm after the addition.

    The first transformer did the same (Vaswani et al. 2017, section 3.1). Maps float (B, T, n_embd)
    to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(cfg.n_embd)
        self.attention = MultiHeadAttention(cfg)
        self.norm_2 = nn.LayerNorm(cfg.n_embd)
        self.feed_forward = FeedForward(cfg)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        # Residual connections: each part adds to x instead of replacing it.
        x = self.norm_1(x + self.attention(x, cache))  # (B, T, n_embd)
        x = self.norm_2(x + self.feed_forward(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.block_size = cfg.block_size
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)  # (block_size, n_embd)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight  # (V, n_embd), the same parameter
        # Small weights, as in GPT (Radford et al. 2018, section 4.1), and zero biases. LayerNorm's
        # weights have one dimension, so they keep PyTorch's initial value, 1.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

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
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, n_embd)
        x = self.dropout(x)  # (B, T, n_embd)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])  # (B, T, n_embd)
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
            # There are embeddings for block_size positions only, so older tokens drop out of view.
            # With empty caches, as at first, the whole context is processed.
            context = idx[:, -self.block_size :]  # (B, min(T, block_size))
            if 0 < caches[0].length < self.block_size:
                context = idx[:, -1:]  # (B, 1); the caches have the tokens before it
            elif caches[0].length == self.block_size:
                # The caches are full: begin again with the newest half of the context.
                caches = [KVCache(cfg, len(idx), idx.device) for _ in self.blocks]
                context = context[:, self.block_size // 2 :]  # (B, block_size - block_size // 2)
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


def make_optimizer(model: LanguageModel, cfg: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay for matrices and embeddings only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate_at(step: int, n_steps: int, cfg: Config) -> float:
    """The learning rate of a step: linear warm-up, then a cosine (Loshchilov and Hutter 2017)."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    progress = (step - cfg.warmup_iters) / max(1, n_steps - cfg.warmup_iters)  # 0 to 1
    return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def choose_windows(tokens: np.ndarray, cfg: Config) -> np.ndarray:
    """Return the starts of the windows to train on, int (n,): all, or --subset of them.

    Raises data.InputError if the text has fewer windows than --subset.
    """
    n_windows = (len(tokens) - 1) // cfg.block_size  # - 1: the last target comes after its window
    starts = np.arange(n_windows) * cfg.block_size  # (n_windows,)
    if cfg.subset == 0:
        return starts
    if cfg.subset > n_windows:
        why = f"the text has only {n_windows:,} windows; leave --subset out to train on all"
        raise data.InputError(f"--subset {cfg.subset}: {why}")
    return np.random.default_rng(cfg.seed).choice(starts, cfg.subset, replace=False)  # (subset,)


def epoch_batches(starts: np.ndarray, epoch: int, first: int, cfg: Config) -> Iterator[np.ndarray]:
    """Shuffle the starts of windows, and yield them in batches, int (B,), with a progress bar.

    The order follows from the seed and the epoch. first: the number of the batch to begin with.
    """
    order = np.random.default_rng([cfg.seed, epoch]).permutation(starts)  # (n,)
    begins = range(0, len(order), cfg.batch_size)
    with tqdm(total=len(begins), initial=first, desc=f"epoch {epoch + 1} of {cfg.epochs}") as bar:
        for begin in begins[first:]:
            yield order[begin : begin + cfg.batch_size]  # the last one may be smaller
            bar.update()


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: np.ndarray,
    starts: np.ndarray, step: int, n_steps: int, cfg: Config,
) -> None:
    """Move the weights a little, so that the loss on the windows at starts, int (B,), falls."""
    # The dropout of a step depends only on the run's seed and the step's number.
    torch.manual_seed(batches.mix_seed(cfg.seed, step))
    x, y = data.get_windows(tokens, starts, cfg.block_size, "cpu")  # (B, T) each
    x, y = hardware.to_device([x, y], cfg.device)  # (B, T) each
    with autocast(cfg):
        _, loss = model(x, y)  # ()
    optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, n_steps, cfg)
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
    """Train the model; return {step: (train loss, validation loss)}, in nats, after each epoch.

    Raises data.InputError if a loss is no longer finite.
    """
    hardware.keep_freed_memory()
    optimizer = make_optimizer(model, cfg)
    starts = choose_windows(train_data, cfg)
    n_batches = math.ceil(len(starts) / cfg.batch_size)  # in an epoch
    n_steps = cfg.epochs * n_batches
    warn_of_long_warmup(cfg.warmup_iters, n_steps)
    # Only for training: loss estimates are in eval mode, which would need a second compilation.
    compiled_model = compile_model(model, cfg)
    stopwatch = Stopwatch(cfg.device)
    step = restore(model, optimizer, run)
    for epoch in range(step // n_batches, cfg.epochs + 1):  # the last round only estimates the loss
        if step % n_batches == 0:  # not if the run is resumed within an epoch
            speed = stopwatch.stop()  # such as ", 12,345 tokens/s"; "" at first
            train_loss = estimate_loss(model, train_data, cfg)  # of all of it, even with --subset
            val_loss = estimate_loss(model, val_data, cfg)
            if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                raise data.InputError("the loss is not finite; try a smaller --learning_rate")
            run.save(checkpoint(model, optimizer, step), train_loss, val_loss)
            losses = f"train loss {train_loss:.4f}, val loss {val_loss:.4f}"
            print(f"epoch {epoch}: {losses}{speed}")
            stopwatch.start()
        if epoch == cfg.epochs:
            break
        for batch in epoch_batches(starts, epoch, step % n_batches, cfg):
            if run.stop_requested():
                run.save_latest(checkpoint(model, optimizer, step))
                return run.history
            train_step(compiled_model, optimizer, train_data, batch, step, n_steps, cfg)
            stopwatch.count(len(batch) * cfg.block_size)  # ignores the first step
            step += 1
    return run.history


def describe_best(
    history: dict[int, tuple[float, float]], tokens: np.ndarray,
    tokenizer: BPETokenizer | data.CharTokenizer,
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
    """Return the settings, and the checkpoint and the released model as dicts; {} for none."""
    cfg, saved, released = gpt1_files.read_settings(Config, __doc__, argv, SIZES)
    if cfg.preset and not saved:
        cfg = data.read_flags(Config, __doc__, argv, PRESETS[cfg.preset])
    cfg = replace(cfg, tokenizer=token_files.choose_tokenizer(cfg.tokenizer))
    return replace(cfg, dtype=choose_dtype(cfg)), saved, released


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():  # a user's mistake prints one line, no traceback
        cfg, saved, released = read_settings(argv)
        torch.manual_seed(cfg.seed)

        text = token_files.load_characters(cfg)  # "" unless --tokenizer is char
        tokenizer = make_tokenizer(cfg, saved or released, text)  # both are {} in a new run
        cfg = terminal.read_prompt_file(cfg, tokenizer)  # its text becomes cfg.prompt
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        prompt = torch.tensor([tokenizer.encode(start)], device=cfg.device)  # (1, T)

        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        if released:
            gpt1_files.load_weights(model, released["folder"])
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {n_parameters:,} parameters, {cfg.dtype}, on {cfg.device}", file=sys.stderr)
        if not cfg.sample_only:
            train_data, val_data = token_files.load_splits(cfg, tokenizer, text)
            checksum = token_files.checksum(train_data, val_data)  # of what the run trains on
            run = runs.Run(cfg, __file__, tokenizer, checksum, saved)  # a folder and its files
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
            gpt1_files.write_model(cfg, model, tokenizer)

        torch.manual_seed(cfg.seed)  # so that --sample_only repeats this sample
        model.eval()
        for i in range(cfg.num_samples):
            if i > 0:
                print("---")
            tokens = model.stream(prompt, cfg.max_new_tokens, cfg)
            terminal.print_text(start, tokens, tokenizer, cfg.stop)


if __name__ == "__main__":
    main()
