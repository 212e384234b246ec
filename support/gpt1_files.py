"""GPT-1 in the folders of transformers: where a run starts from, its weights, and its tokens.

v8d_gpt2_weights.py explains how weights are named, transposed, loaded and exported. GPT-1's files
differ from GPT-2's in the names of the embeddings, and in their tokens.
"""

from pathlib import Path
from typing import Any

import torch

from data.flags import read_flags
from support import gpt2_files, model_files, runs

# What the parts of our model are called in GPT-1's files.
GPT1_NAMES = {
    "token_embedding": "tokens_embed",
    "position_embedding": "positions_embed",
    "blocks": "h",
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attention.query_key_value": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "feed_forward.expansion": "mlp.c_fc",
    "feed_forward.projection": "mlp.c_proj",
}
# The defaults for training that starts from released weights, on every device.
FINE_TUNING = {
    "learning_rate": 6.25e-5, "dropout": 0.1, "weight_decay": 0.01, "batch_size": 4,
    "max_iters": 200, "warmup_iters": 20, "eval_interval": 50, "eval_iters": 10,
}


def read_settings(
    config_class: type, lesson: str, argv: list[str] | None, fixed: list[str]
) -> tuple[Any, dict, dict]:
    """Return the settings of a run, and its checkpoint and released model, each {} if it has none.

    The released model is what gpt2_files.read_config returns. Raises data.InputError for flags that
    contradict each other.
    """
    cfg = read_flags(config_class, lesson, argv)  # only to see how the run starts
    saved, released = {}, {}
    if cfg.init_from:
        model_files.refuse_conflicts(cfg)
        folder = gpt2_files.find_folder(cfg.init_from, "openai-gpt")
        released = gpt2_files.read_config(folder, "openai-gpt")
        cfg = read_flags(config_class, lesson, argv, released | FINE_TUNING)
        gpt2_files.check_sizes(cfg, released)
    else:
        cfg, saved = runs.read_settings(config_class, lesson, argv, fixed)
    model_files.check_export(cfg.export)
    return cfg, saved, released


def weights_by_released_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model with the names and shapes of the released files; no copies."""
    weights = {}
    for name, parameter in model.named_parameters():
        for ours, theirs in GPT1_NAMES.items():
            name = name.replace(ours, theirs)
        weight = parameter.detach()
        is_linear = weight.ndim == 2 and ".c_" in name  # in c_attn, c_proj or c_fc
        weights[name] = weight.T if is_linear else weight
    return weights


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights in a folder into a model; raises data.InputError if they don't fit."""
    own = weights_by_released_name(model)
    for name, weight in gpt2_files.read_weights(folder, own):
        own[name].copy_(weight)  # changes the model, whose numbers own shares


def write_model(cfg: Any, model: torch.nn.Module, tokenizer: Any) -> None:
    """Write a model and its tokens to cfg.export; raises data.InputError if that fails."""
    gpt2_files.write_model(cfg, weights_by_released_name(model), tokenizer, "openai-gpt")
