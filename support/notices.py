"""Notices about settings that are allowed, but rarely meant. They go to standard error."""

import sys


def warn_of_long_warmup(warmup_iters: int, n_steps: int) -> None:
    """Print a notice if the warm-up takes more than half of a run's steps."""
    if warmup_iters > n_steps / 2:
        why = f"more than half of the {n_steps} steps; give a smaller number"
        print(f"notice: --warmup_iters {warmup_iters}: {why}", file=sys.stderr)
