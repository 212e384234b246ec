"""v6_fast.py: the same function as v5, computed so that the machine is kept busy.

The same weights give the same logits; what changes is how. One matrix product makes the queries,
keys and values of all heads. A fused kernel (Dao et al. 2022) works through attention piece by
piece, without the (T, T) tensors. Matrix products run in bfloat16 where the hardware is faster so.
On CUDA, torch.compile fuses the operations in between. No batch keeps the device waiting.

How busy is it? Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) is the share of the
device's rate of matrix products that the model's own make up, where training takes

    6 N + 12 n_layer n_embd block_size    FLOPs per token, with N weights in matrix products

New here: query_key_value, scaled_dot_product_attention, --dtype, --compile, a fused AdamW,
          get_batch, keep_machine_busy, tokens/s and utilisation; Head is gone.
Run it:   python v6_fast.py
Expect:   the loss of v5_gpt.py, 1.68 or 1.69 with the CPU defaults, in less time.
"""

import ctypes
import math
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from timeit import repeat

import data
from data import setting

import numpy as np
import torch
from torch import nn
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
    learning_rate: float = setting("learning rate", gpu=3e-4, cpu=2e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=3600)
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
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config
) -> list[tuple[int, float, float]]:
    """Train the model; return the history as (step, train loss, validation loss), in nats.

    Raises data.InputError if a loss is no longer finite.
    """
    keep_machine_busy(cfg)
    if not cfg.device.startswith("cpu") and len(train_data) < 2**28:  # 1 GiB as int32
        train_data = torch.from_numpy(train_data.astype(np.int32)).to(cfg.device)
        val_data = torch.from_numpy(val_data.astype(np.int32)).to(cfg.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, fused=True)
    run = torch.compile(model) if cfg.compile else model
    history = []
    last_step, start = 0, time.perf_counter()
    with tqdm(total=cfg.max_iters, desc="training") as bar:
        for step in range(cfg.max_iters + 1):  # the last round only estimates the loss
            if step % cfg.eval_interval == 0 or step == cfg.max_iters:
                model.lm_head.weight[0, 0].item()  # waits until the device has caught up
                n_tokens = (step - last_step) * cfg.batch_size * cfg.block_size
                speed = n_tokens / (time.perf_counter() - start)
                train_loss = estimate_loss(run, train_data, cfg)
                val_loss = estimate_loss(run, val_data, cfg)
                history.append((step, train_loss, val_loss))
                losses = f"train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                tqdm.write(f"step {step}: {losses}, {speed:,.0f} tokens/s")
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                last_step, start = step, time.perf_counter()
            if step == cfg.max_iters:
                break
            x, y = get_batch(train_data, cfg)
            _, loss = run(x, y)  # ()
            optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
            loss.backward()
            optimizer.step()
            bar.update()
    if cfg.max_iters:
        print(f"model FLOPs utilisation: {utilisation(model, speed, cfg):.0%}")
    return history


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        torch.manual_seed(cfg.seed)

        text = data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text)
        train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size)
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        prompt = torch.tensor([tokenizer.encode(start)], device=cfg.device)  # (1, T)

        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        sizes = f"{len(train_data):,} for training, {len(val_data):,} for validation"
        print(f"model: {n_parameters:,} parameters, on {cfg.device}", file=sys.stderr)
        print(f"tokens: {sizes}", file=sys.stderr)
        train(model, train_data, val_data, cfg)

        model.eval()
        sample = model.generate(prompt, cfg.max_new_tokens)  # (1, T + max_new_tokens)
        print(tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
