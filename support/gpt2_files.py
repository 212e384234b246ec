"""GPT-2 and GPT-1 in the folders of transformers: settings, vocabularies and embeddings."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.flags import InputError
from data.token_files import N_VOCAB
from support import model_files

RELEASED = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]  # on the Hugging Face hub
NORMS = {"gpt2": "pre", "openai-gpt": "post"}  # by model_type
SIZES = ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size"]
# What else a configuration may say, with the only values that our model has.
ONLY = {
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "afn": ["gelu", "gelu_new"],  # both mean gelu_new in GPT-1
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "reorder_and_upcast_attn": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}
# The embeddings of tokens and positions in GPT-2 and in GPT-1.
TOKENS = ["wte.weight", "tokens_embed.weight"]
POSITIONS = ["wpe.weight", "positions_embed.weight"]


def find_folder(name: str) -> Path:
    """Return the folder called name or, for a name in RELEASED, that of the downloaded model.

    Raises InputError if there is no such folder, or if the download fails.
    """
    if os.path.isdir(name):
        return Path(name)
    if name not in RELEASED:
        why = f"no such folder, and not one of {', '.join(RELEASED)}"
        raise InputError(f"--init_from {name}: {why}")
    return model_files.download(name, f"openai-community/{name}", ["config.json"])


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model's settings by our names, its "folder", and its "characters", if it has any.

    Raises InputError if config.json is damaged or describes a model unlike ours.
    """
    path = folder / "config.json"
    config = model_files.read_json(path, "--init_from")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in NORMS:
        why = f"its model_type is {kind!r}, but only {' and '.join(NORMS)} can be loaded"
        raise InputError(f"--init_from {path}: {why}")
    for size in SIZES:
        model_files.integer(config, size, path, "--init_from")
    model_files.integer(config, "n_layer", path, "--init_from", most=1000)
    for name, possible in ONLY.items():
        if config.get(name, possible[0]) not in possible:
            why = f"its {name} is {config[name]!r}, but this model has only {possible[0]!r}"
            raise InputError(f"--init_from {path}: {why}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        why = f"its n_inner is {config['n_inner']!r}, but this model has only 4 * n_embd"
        raise InputError(f"--init_from {path}: {why}")
    if config["n_embd"] % config["n_head"] != 0:
        raise InputError(f"--init_from {path}: its n_embd is not a multiple of its n_head")
    characters = model_files.read_characters(config, path)
    n_vocab = len(characters) if characters else N_VOCAB
    padded = math.ceil(n_vocab / 64) * 64  # which makes matmuls on a GPU faster
    if config["vocab_size"] not in (n_vocab, padded):
        why = f"its vocabulary has {config['vocab_size']:,} tokens, the tokenizer {n_vocab:,}"
        remedy = "only a model with the same tokens can be loaded"
        raise InputError(f"--init_from {path}: {why}; {remedy}")
    return {
        "norm": NORMS[kind], "n_layer": config["n_layer"], "n_head": config["n_head"],
        "n_embd": config["n_embd"], "block_size": config["n_positions"], "folder": folder,
        "tokenizer": "char" if characters else "gpt2", "characters": characters,
    }


def check_sizes(cfg: Any, released: dict[str, Any]) -> None:
    """Raise InputError if a flag would change the shape of a weight.

    Only --block_size may be smaller: then the last positions are left out.
    """
    for name in ("norm", "n_layer", "n_head", "n_embd", "tokenizer"):
        value = getattr(cfg, name)
        if value != released[name]:
            why = f"the model has {released[name]!r}, which can't be changed; leave the flag out"
            raise InputError(f"--{name} {value}: {why}")
    if cfg.block_size > released["block_size"]:
        why = f"the model has only {released['block_size']} positions"
        raise InputError(f"--block_size {cfg.block_size}: {why}")


def read_weights(
    folder: Path, own: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights in a folder, one by one, each with the shape of that of its name in own.

    Embeddings may have more rows than own, which are left out. Raises InputError if the weights
    don't fit, or if they are damaged.
    """
    embedding = TOKENS[0] if TOKENS[0] in own else TOKENS[1]
    return model_files.read_weights(folder, own, embedding, padded=[*TOKENS, *POSITIONS])


def write_model(cfg: Any, weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
    """Write config.json and model.safetensors to cfg.export; raises InputError if that fails.

    config.json also has the end-of-text token or, if the tokens are characters, the characters.
    """
    end_of_text = tokenizer.n_vocab - 1 if tokenizer.name == "gpt2" else None
    config = {
        "model_type": "openai-gpt" if cfg.norm == "post" else "gpt2", "n_layer": cfg.n_layer,
        "n_head": cfg.n_head, "n_embd": cfg.n_embd, "n_positions": cfg.block_size,
        "vocab_size": tokenizer.n_vocab, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
    }
    if tokenizer.name == "char":
        config["characters"] = "".join(tokenizer.characters)
    texts = {"config.json": json.dumps(config, indent=2) + "\n"}
    model_files.save_model(Path(cfg.export), texts, weights)
