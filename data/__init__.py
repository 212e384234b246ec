"""From text to batches: turn characters into token ids, split them, and draw random windows.

Beside it, corpora.py finds the text and flags.py reads the command line. That is all that part 1
of the course needs. For part 4, prepare.py makes files of token ids, and token_files.py reads them.
For part 8, tasks.py asks questions, and conversations.py reads conversations. files.py replaces a
file only when the new one is complete.
"""

import numpy as np
import torch

from data.corpora import load_text
from data.flags import InputError, command_line, read_flags, setting

__all__ = [
    "CharTokenizer", "InputError", "command_line", "get_batch", "get_windows", "load_text",
    "read_flags", "setting", "split",
]


class CharTokenizer:
    """One token for each distinct character of a text, with the methods of tiktoken's encodings."""

    name = "char"
    end_of_text = ()  # no character ends a text

    def __init__(self, text: str) -> None:
        # A sample starts with a newline by default, so "\n" gets an id even if the text has none.
        self.characters = sorted(set(text) | {"\n"})
        self.n_vocab = len(self.characters)
        if self.n_vocab > 2**16:  # token ids are uint16
            raise InputError("--data: more than 65,536 distinct characters; use another text")
        self.ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str, flag: str = "--prompt") -> list[int]:
        """Text to token ids; raises InputError, naming flag, for characters without an id."""
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            listed = ", ".join(repr(character) for character in unknown)
            why = f"the model's alphabet has no {listed}; use characters of its text"
            raise InputError(f"{flag}: {why}")
        return [self.ids[character] for character in text]

    def decode(self, tokens: list[int]) -> str:
        """Token ids to text."""
        return "".join(self.characters[token] for token in tokens)


def split(
    tokens: list[int] | np.ndarray, block_size: int, name: str = "corpus"
) -> tuple[np.ndarray, np.ndarray]:
    """The first 90% of the tokens for training and the last 10% for validation.

    A list becomes an array of uint16. Anything that can be cut like an array is only cut: an array
    of another dtype, or a file that is mapped into memory (token_files.py).

    Raises InputError, with the name of the corpus, if the last 10% are too short for a window and
    its targets.
    """
    n = len(tokens)
    needed = 10 * block_size + 1  # then the last 10% are block_size + 1 tokens
    if n < needed:
        why = f"{n:,} tokens are too few for --block_size {block_size}, which needs {needed:,}"
        raise InputError(f"--data {name}: {why}; use a longer text or a smaller --block_size")
    if isinstance(tokens, list):
        tokens = np.array(tokens, dtype=np.uint16)  # (n,)
    n_train = n * 9 // 10
    return tokens[:n_train], tokens[n_train:]


def get_batch(
    tokens: np.ndarray, batch_size: int, block_size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw B = batch_size random windows of T = block_size tokens and their targets, int64 (B, T).

    The target at each position is the token that comes next, so a window's targets are the same
    stretch of text, one position later.
    """
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).numpy()  # (B,)
    return get_windows(tokens, starts, block_size, device)


def get_windows(
    tokens: np.ndarray, starts: np.ndarray, block_size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the windows that begin at starts, int (B,), and their targets, int64 (B, T) each."""
    positions = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    # Token ids are kept as uint16 to save memory, but nn.Embedding and cross_entropy want int64.
    windows = tokens[positions].astype(np.int64)  # (B, T + 1)
    windows = torch.from_numpy(windows).to(device)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]  # (B, T) and (B, T)
