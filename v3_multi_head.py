"""v3_multi_head.py: several attention heads side by side.

A single head computes one set of weights over the past, so each position can look for one thing at
a time. n_head narrower heads can look for n_head different things at once. Each has size
n_embd / n_head, so together they have as many weights as the single head, and their concatenated
outputs are as wide as its output. A linear projection then mixes what the heads found:

    multi_head(x) = concat(head_1(x), ..., head_n(x)) @ W + b

(In v3 and v4, the next layer is linear too, and could learn what the projection does. From v5 on,
an addition and a normalisation come between the two.)

New here: MultiHeadAttention, which takes the place of the single Head in the model.
Run it:   python v3_multi_head.py
Probe:    python lab/probes.py --task xor    # a task that v2_single_head.py can't solve
Expect:   a validation loss of about 2.10 with the CPU defaults; v2_single_head.py reaches 2.35.
Diff:     git diff --no-index v2_single_head.py v3_multi_head.py
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting


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
    learning_rate: float = setting("learning rate", gpu=3e-4, cpu=2e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=3600)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=400, least=1)
    eval_iters: int = setting("batches in a loss estimate", gpu=200, cpu=25, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", "shakespeare")
    prompt: str = setting("text that the sample starts with", "\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", 500)


class Head(nn.Module):
    """One head of causal self-attention (Vaswani et al. 2017, section 3.2.1).

    Maps float (B, T, n_embd) to float (B, T, head_size).
    """

    def __init__(self, cfg: Config, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        # No biases, as in the paper. One on the keys would have no effect: it would add the same
        # number to all scores of a query, and the softmax depends only on how far they are apart.
        self.query = nn.Linear(cfg.n_embd, head_size, bias=False)
        self.key = nn.Linear(cfg.n_embd, head_size, bias=False)
        self.value = nn.Linear(cfg.n_embd, head_size, bias=False)
        ones = torch.ones(cfg.block_size, cfg.block_size)  # (block_size, block_size)
        # mask[i, j] is True if j > i: position i must not look at position j, which comes later.
        # A buffer moves to the GPU with the model, but it isn't trained. persistent=False keeps it
        # out of the saved weights.
        mask = ones.triu(diagonal=1).bool()  # (block_size, block_size)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        query = self.query(x)  # (B, T, head_size)
        key = self.key(x)  # (B, T, head_size)
        value = self.value(x)  # (B, T, head_size)
        # If the numbers in query and key are independent, with mean 0 and variance 1, a sum of
        # head_size products has variance head_size. With scores that large, the softmax would put
        # nearly all the weight on one position, and its gradient would almost vanish. Dividing by
        # the square root brings the variance back to 1.
        scores = query @ key.transpose(1, 2) / self.head_size**0.5  # (B, T, T)
        # All positions of a window are trained at once, and the target at each is the input at
        # the next. A model that could look ahead would copy it instead of learning to predict.
        # exp(-inf) is 0, so hidden positions get no weight. While generating, T can be smaller than
        # block_size.
        scores = scores.masked_fill(self.mask[:T, :T], -math.inf)  # (B, T, T)
        weights = F.softmax(scores, dim=-1)  # (B, T, T)
        return weights @ value  # (B, T, head_size)


class MultiHeadAttention(nn.Module):
    """n_head heads and a projection of their outputs (Vaswani et al. 2017, section 3.2.2).

    Maps float (B, T, n_embd) to the same shape. Raises data.InputError if n_head doesn't divide
    n_embd.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.n_embd % cfg.n_head != 0:
            raise data.InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}")
        head_size = cfg.n_embd // cfg.n_head
        # ModuleList registers the heads, so that the optimizer finds their weights.
        self.heads = nn.ModuleList([Head(cfg, head_size) for _ in range(cfg.n_head)])
        # With a bias, as in GPT-2.
        self.projection = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, n_embd)
        return self.projection(x)  # (B, T, n_embd)


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.block_size = cfg.block_size
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)  # (block_size, n_embd)
        self.attention = MultiHeadAttention(cfg)
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats (None without targets).

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        """
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, n_embd)
        x = self.attention(x)  # (B, T, n_embd)
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
        _, loss = model(x, y)  # ()
        losses[i] = loss.item()
    model.train()
    return losses.mean().item()


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: np.ndarray, cfg: Config
) -> None:
    """Move the weights a little, so that the loss on one random batch falls."""
    x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, cfg.device)  # (B, T) each
    _, loss = model(x, y)  # ()
    optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
    loss.backward()
    optimizer.step()


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config
) -> dict[int, tuple[float, float]]:
    """Train the model; return {step: (train loss, validation loss)}, in nats, of each estimate.

    Raises data.InputError if a loss is no longer finite.
    """
    # AdamW divides each weight's step by the average size of its gradient (more in v6c_recipe.py).
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate)
    history = {}
    with tqdm(total=cfg.max_iters, desc="training") as bar:
        for step in range(cfg.max_iters + 1):  # the last round only estimates the loss
            if step % cfg.eval_interval == 0 or step == cfg.max_iters:
                train_loss = estimate_loss(model, train_data, cfg)
                val_loss = estimate_loss(model, val_data, cfg)
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                history[step] = (train_loss, val_loss)
                tqdm.write(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
            if step == cfg.max_iters:
                break

            train_step(model, optimizer, train_data, cfg)
            bar.update()
    return history


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():  # a user's mistake prints one line, no traceback
        cfg = data.read_flags(Config, __doc__, argv)
        torch.manual_seed(cfg.seed)

        text = data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text)
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        prompt = torch.tensor([tokenizer.encode(start)], device=cfg.device)  # (1, T)

        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {n_parameters:,} parameters, on {cfg.device}", file=sys.stderr)

        train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size, cfg.data)
        sizes = f"{len(train_data):,} for training, {len(val_data):,} for validation"
        print(f"tokens: {sizes}", file=sys.stderr)
        train(model, train_data, val_data, cfg)

        model.eval()
        sample = model.generate(prompt, cfg.max_new_tokens)  # (1, T + max_new_tokens)
        print(tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
