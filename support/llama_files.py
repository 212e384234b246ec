"""Llama, Mistral and Qwen3 in the folders of transformers: settings, tokenizers and weights."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from data.flags import NO_LIMIT, InputError
from data.pretrained import check_export, check_head, listed, save_model

import torch
from tqdm import tqdm

__all__ = [
    "check_export", "copy_weights", "encode", "find_folder", "read_config", "read_tokenizer",
    "write_model",
]

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
    "attention_bias": False, "mlp_bias": False,
}
# The entries of rope_parameters that have no effect if its type is "default".
NO_SCALING = {
    "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KINDS = ["llama", "mistral", "qwen3"]  # by model_type
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # in safetensors
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFERS = ("rotary_emb.inv_freq",)  # entries of old weight files that aren't weights


# ---- folders and downloads


def find_folder(name: str) -> Path:
    """Return the folder called name or, for a repository "owner/name", that of its download.

    The Hugging Face hub's own client downloads the files, into its cache, which HF_HUB_OFFLINE=1
    uses without a network. Raises InputError if there is no such folder or the download fails.
    """
    if os.path.isdir(name):
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        why = "no such folder, nor the name of a repository, such as HuggingFaceTB/SmolLM2-135M"
        raise InputError(f"--init_from {name}: {why}")
    from huggingface_hub import hf_hub_download, logging  # here: they take long to import
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    logging.set_verbosity_error()  # or each retry without a network prints a warning
    print(f"looking for {name} in the cache and on the Hugging Face hub", file=sys.stderr)
    try:
        folder = Path(hf_hub_download(name, "config.json")).parent
        hf_hub_download(name, "tokenizer.json")
        try:
            hf_hub_download(name, "generation_config.json")
        except LocalEntryNotFoundError:  # no network
            why = "generation_config.json isn't in the cache, so config.json says where texts end"
            print(f"notice: {why}", file=sys.stderr)
        except EntryNotFoundError:
            pass  # not every model has one
        try:
            hf_hub_download(name, "model.safetensors")
        except EntryNotFoundError:
            hf_hub_download(name, "model.safetensors.index.json")
            for part in sorted(set(read_index(folder).values())):
                hf_hub_download(name, part)
    except InputError:
        raise
    except Exception as error:  # no network, a licence that isn't accepted, a full disk, ...
        message = str(error).strip() or type(error).__name__
        why = message.splitlines()[0]
        remedy = "check the name and the network, or name a folder with the model's files"
        raise InputError(f"--init_from {name}: can't download it ({why}); {remedy}") from None
    return folder


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """Return the JSON object in a file; raises InputError, naming flag, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{flag} {path}: can't read it ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} {path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path}: should hold a JSON object")
    return content


# ---- settings


def read_config(folder: Path) -> dict[str, Any]:
    """Return a released model's settings by our names, and four things that aren't settings:

    its "vocab_size", its "max_position_embeddings", the "dtype_of_files", a torch.dtype, and its
    "characters", "" if its tokens are others. The block_size is at most 1,024, because long caches
    take much memory, but --block_size may be longer. Raises InputError if config.json is damaged or
    describes a model that isn't like ours.
    """
    path = folder / "config.json"
    config = {**DEFAULTS, **read_json(path, "--init_from")}
    check_kind(config, path)
    is_qwen = config["model_type"] == "qwen3"
    n_head = config.get("num_attention_heads")
    # What transformers takes if an entry isn't there.
    n_kv_head = {"llama": n_head, "mistral": 8, "qwen3": 32}[config["model_type"]]
    config.setdefault("num_key_value_heads", n_kv_head)
    config.setdefault("head_dim", 128 if is_qwen else None)
    context = {"llama": 2048, "mistral": 131_072, "qwen3": 32_768}[config["model_type"]]
    config.setdefault("max_position_embeddings", context)
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = n_head
    if config["head_dim"] is None:
        config["head_dim"] = 0
    released = {}
    for ours, theirs in INTEGERS.items():
        released[ours] = integer(config, theirs, path, "--init_from")
    if released["n_head"] % released["n_kv_head"] != 0:
        why = "its num_attention_heads is not a multiple of its num_key_value_heads"
        raise InputError(f"--init_from {path}: {why}")
    if released["head_size"] == 0 and released["n_embd"] % released["n_head"] != 0:
        why = "its hidden_size is not a multiple of its num_attention_heads"
        raise InputError(f"--init_from {path}: {why}")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(config[name], bool):
            raise InputError(f"--init_from {path}: its {name} is {config[name]!r}, not a bool")
    characters = config.get("characters", "")
    if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
        raise InputError(f"--init_from {path}: its characters aren't in order, so it is damaged")
    return {
        **released,
        "block_size": min(released["max_position_embeddings"], 1024),
        **read_rope(config, path),
        "qk_norm": is_qwen,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "rms_norm_eps": number(config, "rms_norm_eps", path, least=1e-12),
        "dtype_of_files": read_dtype(config, folder),
        "characters": characters,
        "tokenizer": "char" if characters else str(folder.resolve()),
    }


def check_kind(config: dict[str, Any], path: Path) -> None:
    """Raise InputError, naming what it is, if a model has anything that ours doesn't have."""
    kind = config.get("model_type")
    if kind not in KINDS:
        why = f"its model_type is {kind!r}, but only {', '.join(KINDS)} can be loaded"
        raise InputError(f"--init_from {path}: {why}")
    lacking = []
    if config.get("quantization_config") is not None:
        lacking.append("quantized weights")
    if config["attention_bias"] is True:
        lacking.append("biases in attention")
    if config["mlp_bias"] is True:
        lacking.append("biases in the feed-forward network")
    if config["hidden_act"] != "silu":
        lacking.append(f"the activation {config['hidden_act']!r}")
    if any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        lacking.append("experts")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise InputError(f"--init_from {path}: its layer_types are {layer_types!r}, not a list")
    uses_window = config.get("use_sliding_window", kind != "qwen3")
    window = config.get("sliding_window", 4096 if kind == "mistral" else None)
    has_window = uses_window and window is not None
    if has_window or any(layer != "full_attention" for layer in layer_types):
        lacking.append("sliding windows")
    if lacking:
        why = f"it has {' and '.join(lacking)}, which this model lacks"
        raise InputError(f"--init_from {path}: {why}; choose another model")


def integer(config: dict[str, Any], name: str, path: Path, flag: str) -> int:
    """Return a positive integer of a configuration, or the 0 of a head_dim that isn't there.

    Raises InputError, naming flag, if it isn't one.
    """
    value = config.get(name)
    least = 0 if name == "head_dim" else 1
    most = 1000 if name == "num_hidden_layers" else NO_LIMIT - 1
    if type(value) is not int or not least <= value <= most:
        why = f"its {name} is {value!r}, not an integer from {least} to {most:,}"
        raise InputError(f"{flag} {path}: {why}")
    return value


def number(config: dict[str, Any], name: str, path: Path, least: float) -> float:
    """Return a number of a configuration; raises InputError if it isn't one, or is too small."""
    value = config.get(name)
    if type(value) not in (int, float) or not least <= value < NO_LIMIT:
        why = f"its {name} is {value!r}, not a number from {least:g} on"
        raise InputError(f"--init_from {path}: {why}")
    return float(value)


def read_rope(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of the rotation; raises InputError for a type that v9g doesn't have.

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


def read_dtype(config: dict[str, Any], folder: Path) -> torch.dtype:
    """Return the dtype that config.json names or, if it names none, that of the embedding."""
    path = folder / "config.json"
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        from safetensors import safe_open  # here, because only v9i needs it

        files = weight_files(folder)
        if EMBEDDING not in files:
            raise InputError(f"--init_from {folder}: the weights don't fit; missing: {EMBEDDING}")
        with safe_open(files[EMBEDDING], framework="pt") as file:
            name = file.get_slice(EMBEDDING).get_dtype()
        name = DTYPE_NAMES.get(name, name)
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        why = f"its dtype is {name!r}, but only {', '.join(DTYPES)} can be loaded"
        raise InputError(f"--init_from {path}: {why}")
    return DTYPES[name]


# ---- tokenizers


def read_tokenizer(path: Path, flag: str) -> dict[str, Any]:
    """Return what belongs to a tokenizer.json, given its path or that of its folder.

    "json": its text. "n_vocab": how many tokens there are; a config.json beside it may have more
    than the file, to make matmuls faster. "end_of_text": the ids of the tokens that end a text, if
    config.json or generation_config.json name any. Raises InputError, naming flag.
    """
    from tokenizers import Tokenizer  # here, because only v9h and later need it

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
    return {"json": text, "n_vocab": n_vocab, "end_of_text": end_of_text}


def encode(tokenizer: Any, text: str, flag: str) -> list[int]:
    """Text to token ids, with the special tokens that belong at its beginning.

    Raises InputError, naming flag, if the tokenizer can't encode the text.
    """
    try:
        ids = tokenizer.encode(text).ids
    except Exception as error:  # a character that its vocabulary lacks, half of a character, ...
        why = str(error).removeprefix("WordLevel error: ")
        raise InputError(f"{flag}: the tokenizer can't encode it ({why})") from None
    if text and not ids:
        raise InputError(f"{flag}: the tokenizer makes no tokens of it; use another text")
    return ids


# ---- weights


def read_index(folder: Path) -> dict[str, str]:
    """Return which file has each weight; raises InputError if the index is damaged."""
    path = folder / "model.safetensors.index.json"
    files = read_json(path, "--init_from").get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"--init_from {path}: it lacks 'weight_map', so it is damaged")
    for name in files.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"--init_from {path}: {name!r} isn't the name of a weight file")
    return files


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file that has each weight, of one file or of several with an index.

    Raises InputError if there are none or one is damaged.
    """
    from safetensors import safe_open  # here, because only v9i needs it

    single = folder / "model.safetensors"
    if single.exists():
        files = {}
        paths = [single]
    elif (folder / "model.safetensors.index.json").exists():
        files = {name: folder / file for name, file in read_index(folder).items()}
        paths = sorted(set(files.values()))
    else:
        raise InputError(f"--init_from {folder}: it has no model.safetensors; name another folder")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
        except Exception as error:  # safetensors has its own class for a damaged file
            raise InputError(f"--init_from {path}: can't read it ({error})") from None
        if path == single:
            files = {name: path for name in names}
        missing = [name for name, file in files.items() if file == path and name not in names]
        if missing:
            raise InputError(f"--init_from {path}: it lacks {listed(missing)}")
    return {name: file for name, file in files.items() if not name.endswith(BUFFERS)}


def copy_weights(folder: Path, own: dict[str, torch.Tensor]) -> None:
    """Copy the weights in a folder into the tensors of the same names in own, one by one.

    If own has no output layer of its own, the folder may have one that equals the embedding.
    Raises InputError if weights are missing, if there are others, or if they are damaged.
    """
    files = weight_files(folder)
    if HEAD in files and HEAD not in own and EMBEDDING in files:
        head, embedding = read_weight(files[HEAD], HEAD), read_weight(files[EMBEDDING], EMBEDDING)
        check_head(head, embedding, files[HEAD])
        del files[HEAD], head, embedding  # the tensors too, which may be large
    missing = [name for name in own if name not in files]
    extra = [name for name in files if name not in own]
    problems = []
    for what, names in (("missing", missing), ("extra", extra)):
        if names:
            problems.append(f"{what}: {listed(names)}")
    if problems:
        raise InputError(f"--init_from {folder}: the weights don't fit; {'; '.join(problems)}")
    for name, weight in tqdm(own.items(), desc="loading", delay=1):
        released = read_weight(files[name], name)
        if released.shape != weight.shape:
            shapes = f"{tuple(released.shape)} instead of {tuple(weight.shape)}"
            raise InputError(f"--init_from {files[name]}: {name} has the shape {shapes}")
        weight.copy_(released)


def read_weight(path: Path, name: str) -> torch.Tensor:
    """Return one weight in a file; raises InputError if it is damaged.

    The file is opened for each weight anew: what has been read of an open file counts as this
    program's memory, so in the end that would hold all weights twice.
    """
    from safetensors import safe_open  # here, because only v9i needs it

    try:
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(name)
    except Exception as error:  # safetensors has its own class for a damaged file
        raise InputError(f"--init_from {path}: can't read {name} ({error})") from None
    if weight.dtype not in DTYPES.values():
        why = f"{name} is {weight.dtype}, but only {', '.join(DTYPES)} can be loaded"
        raise InputError(f"--init_from {path}: {why}")
    if weight.numel() > 0:
        lowest, highest = weight.aminmax()  # NaN, if there is any
        if not (lowest.isfinite() and highest.isfinite()):
            raise InputError(f"--init_from {path}: {name} has numbers that aren't finite")
    return weight


def write_model(
    cfg: Any, released: dict | None, weights: dict[str, torch.Tensor], tokenizer: Any
) -> None:
    """Write a model to cfg.export: config.json, model.safetensors and its tokenizer.json.

    If the tokens are characters, config.json has them. released: what read_config returned, if the
    model started from released weights. Raises InputError if writing fails.
    """
    context = cfg.block_size if released is None else released["max_position_embeddings"]
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_factor != 1:
        rope["rope_type"] = "llama3"
        rope["factor"] = cfg.rope_factor
        rope["low_freq_factor"] = cfg.rope_low_freq_factor
        rope["high_freq_factor"] = cfg.rope_high_freq_factor
        rope["original_max_position_embeddings"] = cfg.original_max_position_embeddings
    end_of_text = list(tokenizer.end_of_text)
    if len(end_of_text) == 0:
        end_of_text = None
    elif len(end_of_text) == 1:
        end_of_text = end_of_text[0]
    n_embd = cfg.n_embd
    config = {
        "architectures": ["Qwen3ForCausalLM" if cfg.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if cfg.qk_norm else "llama",
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head,
        "hidden_size": n_embd,
        "head_dim": cfg.head_size if cfg.head_size > 0 else n_embd // cfg.n_head,
        "intermediate_size": weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "vocab_size": tokenizer.n_vocab,
        "max_position_embeddings": max(context, cfg.block_size),
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": end_of_text,
    }
    texts = {}
    if tokenizer.name == "char":
        config["characters"] = "".join(tokenizer.characters)
    else:
        texts["tokenizer.json"] = tokenizer.content["json"]
    texts["config.json"] = json.dumps(config, indent=2) + "\n"
    save_model(Path(cfg.export), texts, weights)
