"""Llama, Mistral, Qwen2 and Qwen3 as transformers stores them: settings, tokenizers, weights."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.flags import NO_LIMIT, InputError
from support import model_files
from support.model_files import COMPANIONS, DTYPES, integer, read_json

# Our names for the entries of config.json that are positive integers.
INTEGERS = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_size": "head_dim",
    "intermediate_size": "intermediate_size", "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
# What an entry means if it isn't there.
DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "num_key_value_heads": None, "head_dim": None,
    "use_sliding_window": True, "sliding_window": None,
}
# The entries of rope_parameters that have no effect if its type is "default".
NO_SCALING = {
    "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The models that can be loaded, by model_type, and what else an entry means if it isn't there.
QWEN = {
    "num_key_value_heads": 32, "max_position_embeddings": 32_768, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28,
}
KINDS = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096,
    },
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
}
EMBEDDING = "model.embed_tokens.weight"


# ---- folders and downloads


def find_folder(name: str) -> Path:
    """Return the folder called name or, for a repository "owner/name", that of its download.

    Raises InputError if there is no such folder, or if the download fails.
    """
    if os.path.isdir(name):
        return Path(name)
    if not model_files.REPOSITORY.fullmatch(name):
        why = "no such folder, nor the name of a repository, such as HuggingFaceTB/SmolLM2-135M"
        raise InputError(f"--init_from {name}: {why}")
    files = ["config.json", "tokenizer.json"]
    folder = model_files.download(name, name, files, COMPANIONS)
    ends = "generation_config.json"
    if not (folder / ends).exists():
        why = f"no {ends} there or in the cache, so config.json says where a text ends"
        print(f"notice: {why}", file=sys.stderr)
    return folder


# ---- settings


def read_config(folder: Path) -> dict[str, Any]:
    """Return a released model's settings by our names, and what isn't a setting:

    its "folder", "vocab_size", "max_position_embeddings" and "dtype_of_files", and its
    "characters", "" if its tokens are others. The block_size is at most 1,024, because long caches
    take much memory, but --block_size may be longer. Raises InputError if config.json is damaged or
    describes a model that isn't like ours.
    """
    path = folder / "config.json"
    config = read_json(path, "--init_from")
    kind = config.get("model_type")
    if kind not in list(KINDS):
        why = f"its model_type is {kind!r}, but only {', '.join(KINDS)} can be loaded"
        raise InputError(f"--init_from {path}: {why}")
    config = {**DEFAULTS, **KINDS[kind], **config}
    check_kind(config, path)
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    if config["head_dim"] is None:
        config["head_dim"] = 0
    released = {}
    for ours, theirs in INTEGERS.items():
        least = 0 if theirs == "head_dim" else 1
        most = 1000 if theirs == "num_hidden_layers" else NO_LIMIT - 1
        released[ours] = integer(config, theirs, path, "--init_from", least, most)
    if released["n_head"] % released["n_kv_head"] != 0:
        why = "its num_attention_heads is not a multiple of its num_key_value_heads"
        raise InputError(f"--init_from {path}: {why}")
    if released["head_size"] == 0 and released["n_embd"] % released["n_head"] != 0:
        why = "its hidden_size is not a multiple of its num_attention_heads"
        raise InputError(f"--init_from {path}: {why}")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(config[name], bool):
            raise InputError(f"--init_from {path}: its {name} is {config[name]!r}, not a bool")
    characters = model_files.read_characters(config, path)
    return {
        **released,
        "folder": folder,
        "block_size": min(released["max_position_embeddings"], 1024),
        **read_rope(config, path),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "tie_word_embeddings": config["tie_word_embeddings"],
        "rms_norm_eps": number(config, "rms_norm_eps", path, least=1e-12),
        "dtype_of_files": read_dtype(config, folder),
        "characters": characters,
        "tokenizer": "char" if characters else str(folder.resolve()),
    }


def check_kind(config: dict[str, Any], path: Path) -> None:
    """Raise InputError, naming what it is, if a model has anything that ours doesn't have."""
    lacking = []
    if config.get("quantization_config") is not None:
        lacking.append("quantized weights")
    # Qwen2 has biases of queries, keys and values, whatever this says; the others, one more.
    if config["attention_bias"] is True and config["model_type"] != "qwen2":
        lacking.append("biases in attention")
    if config["mlp_bias"] is True:
        lacking.append("biases in the feed-forward network")
    if config["hidden_act"] != "silu":
        lacking.append(f"the activation {config['hidden_act']!r}")
    if any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        lacking.append("experts")
    if has_windows(config, path):
        lacking.append("sliding windows")
    if lacking:
        why = f"it has {' and '.join(lacking)}, which this model lacks"
        raise InputError(f"--init_from {path}: {why}; choose another model")


def has_windows(config: dict[str, Any], path: Path) -> bool:
    """Whether any layer sees only the newest tokens; raises InputError if that can't be read."""
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise InputError(f"--init_from {path}: its layer_types are {layer_types!r}, not a list")
    if any(layer != "full_attention" for layer in layer_types):
        return True
    if not config["use_sliding_window"] or config["sliding_window"] is None:
        return False
    if config["model_type"] not in ("qwen2", "qwen3"):
        return True
    # The number of the first layer that has a window, if layer_types don't say it.
    first = integer(config, "max_window_layers", path, "--init_from", least=0)
    n_layer = integer(config, "num_hidden_layers", path, "--init_from")
    return first < n_layer and not layer_types


def number(config: dict[str, Any], name: str, path: Path, least: float) -> float:
    """Return a number of a configuration; raises InputError if it isn't one, or is too small."""
    value = config.get(name)
    if type(value) not in (int, float) or not least <= value < NO_LIMIT:
        why = f"its {name} is {value!r}, not a number from {least:g} on"
        raise InputError(f"--init_from {path}: {why}")
    return float(value)


def read_rope(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of the rotation; raises InputError for a type that v11a doesn't have.

    They are in rope_parameters or, in older files, in rope_theta and rope_scaling.
    """
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
    for name in ("rope_parameters", "rope_scaling"):
        entry = config.get(name) or {}
        if not isinstance(entry, dict):
            raise InputError(f"--init_from {path}: its {name} is {entry!r}, not a JSON object")
        rope.update(entry)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        why = f"its rope_type is {kind!r}, but this model has only 'default' and 'llama3'"
        raise InputError(f"--init_from {path}: {why}; choose another model")
    for part in (rope, config):
        if part.get("partial_rotary_factor", 1) != 1:
            why = "it rotates only a part of each head, which this model doesn't"
            raise InputError(f"--init_from {path}: {why}; choose another model")
    if kind == "default":
        rope.update(NO_SCALING)
    length = "original_max_position_embeddings"
    rope.setdefault(length, config.get("max_position_embeddings"))
    low = number(rope, "low_freq_factor", path, least=1e-9)
    high = number(rope, "high_freq_factor", path, least=1e-9)
    if low >= high:
        why = "its low_freq_factor isn't below its high_freq_factor"
        raise InputError(f"--init_from {path}: {why}")
    return {
        "rope_theta": number(rope, "rope_theta", path, least=1),
        "rope_factor": number(rope, "factor", path, least=1),
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        length: integer(rope, length, path, "--init_from"),
    }


def read_dtype(config: dict[str, Any], folder: Path) -> str:
    """Return the dtype that config.json names or, if it names none, that of the embedding."""
    path = folder / "config.json"
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        files = model_files.weight_files(folder)
        if EMBEDDING not in files:
            raise InputError(f"--init_from {folder}: the weights don't fit; missing: {EMBEDDING}")
        name = model_files.read_weight(files[EMBEDDING], EMBEDDING).dtype
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        why = f"its dtype is {name!r}, but only {', '.join(DTYPES)} can be loaded"
        raise InputError(f"--init_from {path}: {why}")
    return name


# ---- tokenizers


def read_tokenizer(path: Path, flag: str) -> dict[str, Any]:
    """Return what belongs to a tokenizer.json, given its path or that of its folder.

    "json": its text. "n_vocab": how many tokens there are; a config.json beside it may have more
    than the file, to make matmuls faster. "end_of_text": the ids of the tokens that end a text, if
    config.json or generation_config.json name any. "files": for an export, the texts of those
    COMPANIONS that are beside it, by their names, if there are any. Raises InputError, naming flag.
    """
    from tokenizers import Tokenizer  # here, because only v11b and later need it

    if os.path.isdir(path):
        path = path / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
        vocabulary = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except OSError as error:
        why = f"can't read it ({error.strerror}); give the path of a tokenizer.json"
        raise InputError(f"{flag} {path}: {why}") from None
    except Exception as error:  # tokenizers has no class of its own for a damaged file
        raise InputError(f"{flag} {path}: not a tokenizer.json ({error})") from None
    if not vocabulary:
        raise InputError(f"{flag} {path}: it has no tokens; give another tokenizer.json")
    n_vocab = max(vocabulary.values()) + 1
    end_of_text = []
    for name in ("config.json", "generation_config.json"):  # the second one counts, if it has any
        beside = path.with_name(name)
        if not beside.exists():
            continue
        config = read_json(beside, flag)
        ids = config.get("eos_token_id")
        if ids is not None:
            end_of_text = ids if isinstance(ids, list) else [ids]
        if any(type(token) is not int for token in end_of_text):
            raise InputError(f"{flag} {beside}: its eos_token_id is {ids!r}, not token ids")
        if name == "config.json" and "vocab_size" in config:
            n_model = integer(config, "vocab_size", beside, flag)
            if n_model < n_vocab:
                why = f"its vocab_size is {n_model:,}, but {path.name} has {n_vocab:,} tokens"
                raise InputError(f"{flag} {beside}: {why}")
            n_vocab = n_model
    content = {"json": text, "n_vocab": n_vocab, "end_of_text": end_of_text}
    files = model_files.read_companions(path.parent, flag)
    return {**content, "files": files} if files else content


def encode(tokenizer: Any, text: str, flag: str, add_special_tokens: bool = True) -> list[int]:
    """Text to token ids, with the special tokens that belong at its beginning, or without them.

    Raises InputError, naming flag, if the tokenizer can't encode the text.
    """
    try:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except Exception as error:  # a character that its vocabulary lacks, half of a character, ...
        why = str(error).removeprefix("WordLevel error: ")
        raise InputError(f"{flag}: the tokenizer can't encode it ({why})") from None
    if text and not ids:
        raise InputError(f"{flag}: the tokenizer makes no tokens of it; use another text")
    return ids


# ---- weights


def read_weights(
    folder: Path, expected: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights in a folder, one by one, each with its name and shape in expected.

    Raises InputError if the weights don't fit, or if they are damaged.
    """
    return model_files.read_weights(folder, expected, EMBEDDING)


def write_model(
    cfg: Any, released: dict, weights: dict[str, torch.Tensor], tokenizer: Any
) -> None:
    """Write a model to cfg.export: config.json, model.safetensors and the files of its tokenizer.

    If the tokens are characters, config.json has them. released: what read_config returned, or
    empty if the model didn't start from released weights. Raises InputError if writing fails.
    """
    config = model_config(cfg, released, weights, tokenizer)
    if cfg.qk_norm and cfg.qkv_bias:
        config["attention_bias"] = True
        weights = add_output_biases(weights)
    if tokenizer.name == "char":
        config["characters"] = "".join(tokenizer.characters)
        texts = {}
    else:
        texts = tokenizer_files(tokenizer, cfg.block_size)
        if config["model_type"] == "qwen2" and not has_own_class(tokenizer):
            why = "AutoTokenizer of transformers 5 takes any Qwen2's tokens for Qwen's own"
            remedy = "load these with PreTrainedTokenizerFast.from_pretrained"
            print(f"notice: --export {cfg.export}: {why}; {remedy}", file=sys.stderr)
    texts["config.json"] = model_files.dumped(config)
    model_files.save_model(Path(cfg.export), texts, weights)


def model_config(
    cfg: Any, released: dict, weights: dict[str, torch.Tensor], tokenizer: Any
) -> dict[str, Any]:
    """What config.json says about a model; the arguments are those of write_model."""
    name, kind = "LlamaForCausalLM", "llama"
    if cfg.qk_norm:
        name, kind = "Qwen3ForCausalLM", "qwen3"
    elif cfg.qkv_bias:
        name, kind = "Qwen2ForCausalLM", "qwen2"
    context = released.get("max_position_embeddings", cfg.block_size)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    n_embd = cfg.n_embd
    return {
        "architectures": [name],
        "model_type": kind,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head,
        "hidden_size": n_embd,
        "head_dim": cfg.head_size if cfg.head_size > 0 else n_embd // cfg.n_head,
        "intermediate_size": weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "vocab_size": tokenizer.n_vocab,
        "max_position_embeddings": max(context, cfg.block_size),
        "rms_norm_eps": cfg.rms_norm_eps,
        **rope_config(cfg),
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,  # what transformers before version 4.56 calls it
        "bos_token_id": None,
        "eos_token_id": model_files.one_or_more(tokenizer.end_of_text),
    }


def rope_config(cfg: Any) -> dict[str, Any]:
    """What config.json says about the rotation, once for old and once for new programs.

    transformers before version 5 doesn't know rope_parameters. Without the other two, it takes
    10,000 and no scaling, and says nothing.
    """
    scaling = None
    if cfg.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": cfg.rope_factor,
            "low_freq_factor": cfg.rope_low_freq_factor,
            "high_freq_factor": cfg.rope_high_freq_factor,
            "original_max_position_embeddings": cfg.original_max_position_embeddings,
        }
    parameters = {"rope_theta": cfg.rope_theta, **(scaling or {"rope_type": "default"})}
    return {
        "rope_parameters": parameters, "rope_theta": cfg.rope_theta, "rope_scaling": scaling,
    }


def add_output_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights, and a bias of zeros in each output of attention.

    A Qwen3 with biases of queries, keys and values has these, too, so only with them is a model
    with qk_norm and qkv_bias one that transformers knows.
    """
    why = "only a Qwen3 with biases in attention is like this model; v11c itself can't read it back"
    print(f"notice: --export: {why}", file=sys.stderr)
    biases = {}
    for name, weight in weights.items():
        if name.endswith("o_proj.weight"):
            biases[name.removesuffix("weight") + "bias"] = weight.new_zeros(len(weight))
    return {**weights, **biases}


def has_own_class(tokenizer: Any) -> bool:
    """Whether a tokenizer came with a tokenizer_config.json, which names its class."""
    return "tokenizer_config.json" in tokenizer.content.get("files", {})


def tokenizer_files(tokenizer: Any, block_size: int) -> dict[str, str]:
    """The files of a tokenizer in an export, by their names: those that it came with.

    Only what is no longer true of them is changed. If there are none, they are made.
    """
    content = tokenizer.content
    files = dict(content.get("files", {}))
    if has_own_class(tokenizer):
        # Programs that came with the model don't come with the export; a longer context does.
        config = json.loads(files["tokenizer_config.json"])
        changes = {"auto_map": None} if "auto_map" in config else {}
        longest = config.get("model_max_length")
        if isinstance(longest, (int, float)) and longest < block_size:
            changes["model_max_length"] = block_size
        text = model_files.with_changes(files["tokenizer_config.json"], changes)
    else:
        text = model_files.tokenizer_config(content["json"], tokenizer.end_of_text)
    files["tokenizer_config.json"] = text
    if tokenizer.end_of_text:
        ends = {"eos_token_id": model_files.one_or_more(tokenizer.end_of_text)}
        text = files.get("generation_config.json", "{}")
        if json.loads(text).get("eos_token_id") is None:
            files["generation_config.json"] = model_files.with_changes(text, ends)
    files["tokenizer.json"] = content["json"]
    return files
