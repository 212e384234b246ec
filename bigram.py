"""bigram.py: the next character from the current one alone, looked up in a table.

The table has a row and a column for each of the V distinct characters of the corpus. Row i holds
the logits of what comes after character i; softmax turns them into probabilities:

    p(next = j | current = i) = exp(table[i, j]) / sum over k of exp(table[i, k])

Training lowers the cross-entropy, the mean of -ln p(the character that did come next), in nats.
Knowing nothing costs ln(V): 4.17 for the 65 characters of Shakespeare.

New here: all that is around the model and stays on every later rung. The text becomes tokens;
nine tenths train, one tenth validates; random batches, AdamW, loss estimates, and a sample.
Run it:   python bigram.py
          python bigram.py --prompt "ROMEO:" --max_new_tokens 200
Expect:   a validation loss of about 2.50 after the small run. Counting the pairs of the training
          text, instead of learning them, would give 2.48: more steps gain little.
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

    In shape comments, B is the number of windows in a batch, T the number of tokens in a window,
    and V the size of the vocabulary.
    """

    batch_size: int = setting("windows in a batch", gpu=64, cpu=24, least=1)
    block_size: int = setting("longest context, in tokens", gpu=256, cpu=64, least=1)
    learning_rate: float = setting("learning rate", gpu=1e-2, cpu=2e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=3600)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=400, least=1)
    eval_iters: int = setting("batches in a loss estimate", gpu=200, cpu=25, least=1)
    seed: int = setting("random seed", gpu=1337, cpu=1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", gpu="shakespeare", cpu="shakespeare")
    prompt: str = setting("text that the sample starts with", gpu="\n", cpu="\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", gpu=500, cpu=500)


class LanguageModel(nn.Module):
    """From each token and those before it, logits of the token that comes next."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, vocab_size)  # (V, V)
        nn.init.zeros_(self.token_embedding.weight)  # all tokens equally likely: the loss is ln(V)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """int64 token ids and targets (B, T) -> float logits (B, T, V), mean loss () in nats."""
        logits = self.token_embedding(idx)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # ()
        return logits, loss

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Continue token ids idx, int64 (B, T); returns them as (B, T + max_new_tokens)."""
        for _ in tqdm(range(max_new_tokens), desc="generating", delay=1, leave=False):
            logits, _ = self(idx)  # (B, T, V)
            probabilities = F.softmax(logits[:, -1], dim=-1)  # (B, V)
            next_token = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
        return idx


@torch.no_grad()
def estimate_loss(model: LanguageModel, tokens: np.ndarray, cfg: Config) -> float:
    """Mean loss, in nats, over eval_iters random batches of tokens, in eval mode (no dropout)."""
    model.eval()
    losses = torch.zeros(cfg.eval_iters)  # (eval_iters,)
    for i in range(cfg.eval_iters):
        x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, cfg.device)  # (B, T) each
        _, losses[i] = model(x, y)
    model.train()
    return losses.mean().item()


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config
) -> list[tuple[int, float, float]]:
    """Fit the model to train_data; returns the history: (step, train loss, validation loss)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate)
    history = []
    with tqdm(total=cfg.max_iters, desc="training") as bar:
        for step in range(cfg.max_iters + 1):
            if step % cfg.eval_interval == 0 or step == cfg.max_iters:
                train_loss = estimate_loss(model, train_data, cfg)
                val_loss = estimate_loss(model, val_data, cfg)
                history.append((step, train_loss, val_loss))
                tqdm.write(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
                if not math.isfinite(train_loss + val_loss):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
            if step == cfg.max_iters:
                break
            x, y = data.get_batch(train_data, cfg.batch_size, cfg.block_size, cfg.device)
            _, loss = model(x, y)  # ()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
    return history


def main(argv: list[str] | None = None) -> None:
    """Train on a corpus and print losses and a sample; argv holds flags as typed on a shell."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        torch.manual_seed(cfg.seed)
        text = data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text)
        prompt = torch.tensor([tokenizer.encode(cfg.prompt or "\n")], device=cfg.device)  # (1, T)
        train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size)
        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        size = "small" if cfg.device.startswith("cpu") else "full-size"
        print(f"{size} defaults, {n_parameters:,} parameters: {cfg}", file=sys.stderr)
        train(model, train_data, val_data, cfg)
        model.eval()
        sample = model.generate(prompt, cfg.max_new_tokens)  # (1, T + max_new_tokens)
        print(tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
