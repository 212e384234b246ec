"""bigram.py: predict the next character from the current one, with a lookup table.

Row i of the table holds the logits for the character that follows character i, one for each of the
V distinct characters of the text. A softmax turns them into probabilities:

    p(next = j | current = i) = exp(table[i, j]) / sum over k of exp(table[i, k])

The model learns from windows of text. The target at each position is the character that follows:

    window   C i t i z e n
    targets  i t i z e n :

Training lowers the cross-entropy, the mean of -ln p(target), in nats (units of the natural
logarithm). Guessing uniformly scores ln(V), which is ln(65) = 4.17 for Shakespeare.

New here: the code around the model, which later scripts keep: AdamW, loss estimates and sampling.
          Read data/__init__.py first: token ids, the two splits of a text, and random batches.
Run it:   python bigram.py
          python bigram.py --prompt "ROMEO:" --max_new_tokens 200
Expect:   a validation loss of about 2.50 with the CPU defaults. A table made by counting how often
          each pair occurs in the training text (plus one) scores 2.482 on the validation split,
          so longer training would gain little: one character of context isn't enough.
Next:     git diff --no-index bigram.py v2_single_head.py
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
    learning_rate: float = setting("learning rate", gpu=1e-2, cpu=2e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=3600)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=400, least=1)
    eval_iters: int = setting("batches in a loss estimate", gpu=200, cpu=25, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", "shakespeare")
    prompt: str = setting("text that the sample starts with", "\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", 500)


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, vocab_size)  # (V, V)
        # Equal logits make every token equally likely, so the first loss is exactly ln(V).
        nn.init.zeros_(self.token_embedding.weight)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats (None without targets).

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        """
        logits = self.token_embedding(idx)  # (B, T, V)
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
            logits, _ = self(idx)  # (B, T, V)
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
