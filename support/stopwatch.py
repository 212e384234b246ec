"""How fast a model trains, in tokens per second."""

import sys
import time

import torch

SLOWER = 3  # times as slow as before, which is worth a notice


class Stopwatch:
    """Measures the speed of training steps.

    The first step doesn't count, because torch.compile does its work in it. Nor does the time
    between stop and start, in which losses are estimated and checkpoints saved.

    Once, it prints a notice if training on the CPU has become several times slower.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.is_first_step = True
        self.fastest = 0.0  # tokens/s
        self.has_noticed = False
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
        speed = self.n_tokens / seconds
        if seconds < 0.5:  # a few short steps say nothing about the rest
            return f", {speed:,.0f} tokens/s"
        self.fastest = max(self.fastest, speed)
        if self.device.startswith("cpu") and speed < self.fastest / SLOWER and not self.has_noticed:
            self.has_noticed = True
            why = f"training has become {self.fastest / speed:.0f} times slower"
            remedy = "if other programs use the cores, OMP_NUM_THREADS=1 may help"
            print(f"notice: {why}; {remedy}", file=sys.stderr)
        return f", {speed:,.0f} tokens/s"


def wait_for(device: str) -> None:
    """Wait until a GPU has finished everything that is queued on it; Python runs ahead of it."""
    torch.zeros(1, device=device).item()  # can't be read before the work ahead of it is done
