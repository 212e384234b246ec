"""evaluate.py: the loss of any script's model on all of a split, which estimates only sample."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import numpy as np
from torch import nn

from part2_training import v6c_recipe


def whole_loss(model: nn.Module, tokens: np.ndarray, cfg: Any) -> float:
    """The mean loss in nats over all whole windows of tokens, computed in float32."""
    everything = v6c_recipe.Config(
        batch_size=cfg.batch_size, block_size=cfg.block_size, device=cfg.device, dtype="float32",
        eval_iters=len(tokens),
    )
    return v6c_recipe.estimate_loss(model, tokens, everything)
