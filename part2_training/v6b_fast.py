"""v6b_fast.py: the same model, trained faster.

Nothing here changes what is computed, except for rounding:

- Autocast runs matmuls in bfloat16, with 8 significant bits instead of float32's 24, where the
  hardware supports it (Kalamkar et al. 2019). They are several times faster, and their inputs and
  outputs take half the memory. Weights, sums of residual connections and losses stay in float32,
  because adding a small number to a large one in bfloat16 often changes nothing.
- torch.compile fuses chains of small operations into single GPU kernels, so that less data travels
  between the GPU's memory and its cores. On a CPU it brings nothing here, so it is off by default.
- fused=True makes one pass over the weights in each update, instead of one for each operation in
  AdamW's formula.
- Batches are copied to a GPU from pinned memory, so that Python goes on instead of waiting.

The log now shows tokens/s, not counting loss estimates and the first step, in which the model is
compiled.

New here: choose_dtype, autocast, get_batch, --dtype, --compile, fused=True, tokens/s in the log.
Run it:   python part2_training/v6b_fast.py
Expect:   a validation loss of about 1.69 with the CPU defaults, and 1.68 in v6a_fused_attention.py:
          two seeds differ by as much.
Diff:     git diff --no-index part2_training/v6a_fused_attention.py part2_training/v6b_fast.py
"""

import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting
from support import hardware


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
    learning_rate: float = setting("learning rate", gpu=3e-4, cpu=2e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=3600)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=400, least=1)
    eval_iters: int = setting("batches in a loss estimate", gpu=200, cpu=25, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", "shakespeare")
    prompt: str = setting("text that the sample starts with", "\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", 500)
    dtype: str = setting("dtype of matmuls", "auto", choices=["auto", "float32", "bfloat16"])
    compile: bool = setting("use torch.compile", gpu=hardware.has_triton(), cpu=False)


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
        B, T, n_embd = x.shape
        query, key, value = self.query_key_value(x).split(n_embd, dim=-1)  # (B, T, n_embd) each
        # Cut the last dimension into heads, and put the heads next to the batch: attention works on
        # the last two dimensions and treats all those before them as the batch.
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        key = key.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        value = value.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        # The call below is a function, so model.eval() doesn't switch off its dropout.
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
        x = self.blocks(x)  # (B, T, n_embd)
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
    """Return the mean loss in nats over eval_iters random batches; a single one is noisy."""
    model.eval()  # switches off dropout, which v5 introduces
    losses = torch.zeros(cfg.eval_iters)  # (eval_iters,)
    for i in range(cfg.eval_iters):
        x, y = get_batch(tokens, cfg)  # (B, T) each
        with autocast(cfg):
            _, loss = model(x, y)  # ()
        losses[i] = loss.item()
    model.train()
    return losses.mean().item()


def wait_for(device: str) -> None:
    """Wait until a GPU has finished everything that is queued on it; Python runs ahead of it."""
    torch.zeros(1, device=device).item()  # can't be read before the work ahead of it is done


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config
) -> list[tuple[int, float, float]]:
    """Train the model; return the history as (step, train loss, validation loss), in nats.

    Raises data.InputError if a loss is no longer finite.
    """
    hardware.keep_freed_memory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, fused=True)
    if cfg.compile:
        hardware.check_compiler(cfg.device)
    compiled_model = torch.compile(model) if cfg.compile else model  # with the same weights
    history = []
    warming_up = True
    clock_step, clock_start = 0, time.perf_counter()
    with tqdm(total=cfg.max_iters, desc="training") as bar:
        for step in range(cfg.max_iters + 1):  # the last round only estimates the loss
            if step % cfg.eval_interval == 0 or step == cfg.max_iters:
                speed = 0.0  # tokens/s, unknown before the second step
                if not warming_up and step > clock_step:
                    wait_for(cfg.device)
                    seconds = time.perf_counter() - clock_start
                    speed = (step - clock_step) * cfg.batch_size * cfg.block_size / seconds
                train_loss = estimate_loss(model, train_data, cfg)
                val_loss = estimate_loss(model, val_data, cfg)
                history.append((step, train_loss, val_loss))
                report = f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                if speed > 0:
                    report += f", {speed:,.0f} tokens/s"
                tqdm.write(report)
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                clock_step, clock_start = step, time.perf_counter()
            if step == cfg.max_iters:
                break

            x, y = get_batch(train_data, cfg)  # (B, T) each
            with autocast(cfg):
                _, loss = compiled_model(x, y)  # ()
            optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
            loss.backward()
            optimizer.step()
            bar.update()
            if warming_up:  # the first step compiles the model, so the clock starts after it
                wait_for(cfg.device)
                clock_step, clock_start = step + 1, time.perf_counter()
                warming_up = False
    return history


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        torch.manual_seed(cfg.seed)

        text = data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text)
        train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size, cfg.data)
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
