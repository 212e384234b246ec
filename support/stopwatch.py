"""How fast a model trains, in tokens per second."""

import time

import torch


class Stopwatch:
    """Measures the speed of training steps.

    The first step doesn't count, because torch.compile does its work in it. Nor does the time
    between stop and start, in which losses are estimated and checkpoints saved.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.is_first_step = True
        self.start()

    def start(self) -> None:
        """Start again, at 0."""
        wait_for(self.device)
        self.n_tokens = 0
        self.started = time.perf_counter()

    def count(self, n_tokens: int) -> None:
        """Add the tokens of a training step; called after each step."""
        self.n_tokens += n_tokens
        if self.is_first_step:
            self.is_first_step = False
            self.start()

    def stop(self) -> str:
        """Return the speed since the start as ", 12,345 tokens/s", or "" before the second step."""
        if self.n_tokens == 0:
            return ""
        wait_for(self.device)
        seconds = time.perf_counter() - self.started
        return f", {self.n_tokens / seconds:,.0f} tokens/s"


def wait_for(device: str) -> None:
    """Wait until a GPU has finished everything that is queued on it; Python runs ahead of it."""
    torch.zeros(1, device=device).item()  # can't be read before the work ahead of it is done
