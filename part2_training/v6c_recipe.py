"""v6c_recipe.py: the same model, trained with the recipe of large models.

For each weight w with gradient g, AdamW keeps averages of g and of its square over past steps:

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    w = w - learning_rate * (m / (sqrt(v) + 1e-8) + weight_decay * w)

(As they start at 0, m and v are scaled up at first.) The recipe around it is GPT-3's (Brown et al.
2020, appendix B), with values for a small model and a short run:

- Warm-up: the learning rate rises linearly, while m and v still come from few batches.
- Decay: then it falls to 0 along half a cosine, so that the weights settle (in GPT-3, to a tenth).
- Clipping: if all gradients together have a norm above 1, they are scaled down to norm 1.
- Weight decay pulls matrices and embeddings towards 0, but not biases and LayerNorm's weights. It
  is 0.1 on a GPU, as in GPT-3, and 0.3 on the CPU. v6b had PyTorch's 0.01, for all weights.
- beta2 is 0.99: v averages over about 100 steps. PyTorch's default is 0.999, GPT-3's 0.95.

The learning rate's peak is 3e-3 on the CPU (v6b: 2e-3) and 1e-3 on a GPU (v6b: 3e-4). Its decay
brings nearly all of the gain (part2_training/README.md has the loss without each part).

New here: make_optimizer, learning_rate_at, clipping.
Run it:   python part2_training/v6c_recipe.py
Expect:   a validation loss of about 1.60 with the CPU defaults; v6b_fast.py reaches 1.67.
Diff:     git diff --no-index part2_training/v6b_fast.py part2_training/v6c_recipe.py
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting
from support import hardware
from support.notices import warn_of_long_warmup
from support.stopwatch import Stopwatch


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
    eval_iters: int = setting("batches in a loss estimate", gpu=200, cpu=25, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", "shakespeare")
    prompt: str = setting("text that the sample starts with", "\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", 500)
    dtype: str = setting("dtype of matmuls", "auto", choices=["auto", "float32", "bfloat16"])
    compile: bool = setting("use torch.compile", gpu=hardware.can_compile(), cpu=False)
    weight_decay: float = setting("weight decay of matrices and embeddings", gpu=0.1, cpu=0.3)
    warmup_iters: int = setting("steps of linear warm-up", 100)


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
        # With a bias, as in GPT-2.
        self.projection = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, n_embd = x.shape
        query, key, value = self.query_key_value(x).split(n_embd, dim=-1)  # (B, T, n_embd) each
        # Cut the last dimension into heads, and put the heads next to the batch: attention works on
        # the last two dimensions and treats all those before them as the batch.
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        key = key.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        value = value.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        # scaled_dot_product_attention is a function, not a module, so model.eval() doesn't switch
        # off its dropout.
        dropout_p = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, dropout_p=dropout_p, is_causal=True
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
        x = F.relu(self.expansion(x))  # (B, T, 4 * n_embd)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class Block(nn.Module):
    """Attention, then a feed-forward network, each with LayerNorm on its input.

    GPT-2 has its LayerNorms in the same place (Radford et al. 2019, section 2.3). Maps float
    (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(cfg.n_embd)
        self.attention = MultiHeadAttention(cfg)
        self.norm_2 = nn.LayerNorm(cfg.n_embd)
        self.feed_forward = FeedForward(cfg)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.norm_1(x))  # (B, T, n_embd)
        x = x + self.feed_forward(self.norm_2(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.block_size = cfg.block_size
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)  # (block_size, n_embd)
        self.blocks = nn.Sequential(*[Block(cfg) for _ in range(cfg.n_layer)])
        self.norm_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size)
        # Small weights, as in GPT (Radford et al. 2018, section 4.1), and zero biases. LayerNorm's
        # weights have one dimension, so they keep PyTorch's initial value, 1.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats (None without targets).

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        """
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, n_embd)
        x = self.blocks(x)  # (B, T, n_embd)
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


@torch.no_grad()
def estimate_loss(model: LanguageModel, tokens: np.ndarray, cfg: Config) -> float:
    """Return the mean loss in nats over eval_iters random batches; a single one is noisy."""
    model.eval()  # switches off dropout, if the model has any
    losses = torch.zeros(cfg.eval_iters)  # (eval_iters,)
    for i in range(cfg.eval_iters):
        x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, cfg.device)  # (B, T) each
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


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config
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
    history = {}
    with tqdm(total=cfg.max_iters, desc="training") as bar:
        for step in range(cfg.max_iters + 1):  # the last round only estimates the loss
            if step % cfg.eval_interval == 0 or step == cfg.max_iters:
                speed = stopwatch.stop()  # such as ", 12,345 tokens/s"; "" at first
                train_loss = estimate_loss(model, train_data, cfg)
                val_loss = estimate_loss(model, val_data, cfg)
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                history[step] = (train_loss, val_loss)
                losses = f"train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                tqdm.write(f"step {step}: {losses}{speed}")
                stopwatch.start()
            if step == cfg.max_iters:
                break

            train_step(compiled_model, optimizer, train_data, step, cfg)
            stopwatch.count(cfg.batch_size * cfg.block_size)  # ignores the first step
            bar.update()
    return history


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():  # a user's mistake prints one line, no traceback
        cfg = data.read_flags(Config, __doc__, argv)
        cfg = replace(cfg, dtype=choose_dtype(cfg))  # no longer "auto"
        torch.manual_seed(cfg.seed)

        text = data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text)
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        prompt = torch.tensor([tokenizer.encode(start)], device=cfg.device)  # (1, T)

        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {n_parameters:,} parameters, {cfg.dtype}, on {cfg.device}", file=sys.stderr)

        train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size, cfg.data)
        sizes = f"{len(train_data):,} for training, {len(val_data):,} for validation"
        print(f"tokens: {sizes}", file=sys.stderr)
        train(model, train_data, val_data, cfg)

        model.eval()
        sample = model.generate(prompt, cfg.max_new_tokens)  # (1, T + max_new_tokens)
        print(tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
