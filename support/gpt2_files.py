"""Models in the folders of transformers: config.json, and model.safetensors with the weights."""

import json
import math
import os
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from data.checkpoints import replace_file
from data.flags import NO_LIMIT, InputError

import torch

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
EMBEDDINGS = ["wte.weight", "wpe.weight", "tokens_embed.weight", "positions_embed.weight"]
# Entries of weight files that aren't weights: masks, and the numbers of the positions.
BUFFERS = (".attn.bias", ".attn.masked_bias", "position_ids")


def find_folder(name: str) -> Path:
    """Return the folder called name or, for a name in RELEASED, that of the downloaded model.

    The Hugging Face hub's own client downloads it, into its cache, which HF_HUB_OFFLINE=1 uses
    without a network. Raises InputError if there is no such folder, or if the download fails.
    """
    if os.path.isdir(name):
        return Path(name)
    if name not in RELEASED:
        why = f"no such folder, and not one of {', '.join(RELEASED)}"
        raise InputError(f"--init_from {name}: {why}")
    from huggingface_hub import hf_hub_download, logging  # here: they take long to import

    logging.set_verbosity_error()  # or each retry without a network prints a warning
    print(f"looking for {name} in the cache and on the Hugging Face hub", file=sys.stderr)
    try:
        hf_hub_download(f"openai-community/{name}", "config.json")
        weights = hf_hub_download(f"openai-community/{name}", "model.safetensors")
    except Exception as error:  # no network, an empty cache, a full disk, ...
        message = str(error).strip() or type(error).__name__
        why = message.splitlines()[0]
        remedy = "check the network, or name a folder that has config.json and model.safetensors"
        raise InputError(f"--init_from {name}: can't download it ({why}); {remedy}") from None
    return Path(weights).parent


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model's settings by our names, its vocab_size, and its characters, if it has any.

    Raises InputError if config.json is damaged or describes a model unlike ours.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--init_from {path}: can't read it ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--init_from {path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"--init_from {path}: not a configuration, which would be a JSON object")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in NORMS:
        why = f"its model_type is {kind!r}, but only {' and '.join(NORMS)} can be loaded"
        raise InputError(f"--init_from {path}: {why}")
    for size in SIZES:
        value = config.get(size)
        if type(value) is not int or value < 1:
            raise InputError(f"--init_from {path}: its {size} is {value!r}, not a positive integer")
        most = 1000 if size == "n_layer" else NO_LIMIT - 1
        if value > most:
            raise InputError(f"--init_from {path}: its {size} is {value}, more than {most:,}")
    for name, possible in ONLY.items():
        if config.get(name, possible[0]) not in possible:
            why = f"its {name} is {config[name]!r}, but this model has only {possible[0]!r}"
            raise InputError(f"--init_from {path}: {why}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        why = f"its n_inner is {config['n_inner']!r}, but this model has only 4 * n_embd"
        raise InputError(f"--init_from {path}: {why}")
    if config["n_embd"] % config["n_head"] != 0:
        raise InputError(f"--init_from {path}: its n_embd is not a multiple of its n_head")
    characters = config.get("characters", "")
    if not isinstance(characters, str):
        raise InputError(f"--init_from {path}: its characters are {characters!r}, not a string")
    if list(characters) != sorted(set(characters)):
        raise InputError(f"--init_from {path}: its characters aren't in order, so it is damaged")
    return {
        "norm": NORMS[kind], "n_layer": config["n_layer"], "n_head": config["n_head"],
        "n_embd": config["n_embd"], "block_size": config["n_positions"],
        "vocab_size": config["vocab_size"], "characters": characters,
    }


def check_vocabulary(config: dict[str, Any], tokenizer: Any) -> None:
    """Raise InputError if a model's vocabulary isn't that of tokenizer.

    It may have been padded to a multiple of 64, which makes matmuls on a GPU faster.
    """
    n_vocab, n_released = tokenizer.n_vocab, config["vocab_size"]
    padded = math.ceil(n_vocab / 64) * 64
    if n_released not in (n_vocab, padded):
        why = f"its vocabulary has {n_released:,} tokens, the tokenizer {n_vocab:,}"
        raise InputError(f"--init_from: {why}; only a model with the same tokens can be loaded")


def read_weights(folder: Path, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights in model.safetensors, each with the shape of that of the same name in own.

    Embeddings may have more rows than own, which are left out. Raises InputError if the file is
    damaged, if weights are missing, or if there are others.
    """
    from safetensors.torch import load_file  # here, because only v8c and later need it

    path = folder / "model.safetensors"
    try:
        stored = load_file(path)
    except Exception as error:  # safetensors has its own class for a damaged file
        raise InputError(f"--init_from {path}: can't read it ({error})") from None
    weights = {}
    for name, weight in stored.items():
        if not name.endswith(BUFFERS):
            weights[name.removeprefix("transformer.")] = weight
    head = weights.pop("lm_head.weight", None)  # the embedding once more
    for name in EMBEDDINGS:
        if name in weights and name in own:
            if head is not None and name in ("wte.weight", "tokens_embed.weight"):
                check_head(head, weights[name], path)
            if weights[name].ndim == 2:
                weights[name] = weights[name][: len(own[name])]
    missing = [name for name in own if name not in weights]
    extra = [name for name in weights if name not in own]
    misshapen = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = []
    for what, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen)):
        if names:
            problems.append(f"{what}: {listed(names)}")
    if problems:
        raise InputError(f"--init_from {path}: the weights don't fit; {'; '.join(problems)}")
    for name, weight in weights.items():
        if not weight.float().isfinite().all():
            raise InputError(f"--init_from {path}: {name} has numbers that aren't finite")
    return weights


def check_head(head: torch.Tensor, embedding: torch.Tensor, path: Path) -> None:
    """Raise InputError if a stored output layer isn't the token embedding."""
    if not torch.equal(head, embedding):
        why = "its lm_head.weight isn't its token embedding, but this model has one for both"
        raise InputError(f"--init_from {path}: {why}")


def listed(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    if len(names) <= 5:
        return ", ".join(names)
    return f"{', '.join(names[:5])} and {len(names) - 5} more"


def check_export(folder: Path) -> None:
    """Make the folder for an export; raises InputError if a model is in it, or can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = ("config.json", "model.safetensors", "tokenizer.json")
        is_used = any((folder / name).exists() for name in files)
        with TemporaryFile(dir=folder):
            pass  # so it can be written
    except OSError as error:
        raise InputError(f"--export {folder}: can't write there ({error.strerror})") from None
    if is_used:
        why = 'already holds a model; name another folder, or "" to export nothing'
        raise InputError(f"--export {folder}: {why}")


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
    save_model(Path(cfg.export), texts, weights)


def save_model(folder: Path, texts: dict[str, str], weights: dict[str, torch.Tensor]) -> None:
    """Write texts, by the names of their files, and model.safetensors to an --export folder.

    Raises InputError if that fails; then there is no model.safetensors.
    """
    from safetensors.torch import save_file  # here, because only v8c and later need it

    contiguous = {name: weight.contiguous().cpu() for name, weight in weights.items()}
    unfinished = folder / "model.safetensors.unfinished"
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(contiguous, unfinished, {"format": "pt"})
        unfinished.chmod(mode)  # safetensors makes a file that only its owner can read
        for name, text in texts.items():
            write_text(folder / name, text)
        unfinished.replace(folder / "model.safetensors")
    except InputError:
        raise
    except Exception as error:  # safetensors has its own class for a full disk
        raise InputError(f"--export {folder}: can't write the weights ({error})") from None
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file of an --export folder by text; raises InputError if that fails."""
    replace_file(path, lambda file: file.write(text.encode("utf-8")), "--export")
