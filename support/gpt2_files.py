"""GPT-2 and GPT-1 in the folders of transformers: settings, vocabularies and weights."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.flags import InputError
from data.token_files import N_VOCAB
from support import model_files

# Short names of models, and their repositories on the Hugging Face hub.
RELEASED = {
    "gpt2": {
        "gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
        "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
        "distilgpt2": "distilbert/distilgpt2",
    },
    "openai-gpt": {"openai-gpt": "openai-community/openai-gpt"},
}
# The kinds of models, the model_type of a config.json, with their classes and our scripts.
CLASSES = {"gpt2": "GPT2LMHeadModel", "openai-gpt": "OpenAIGPTLMHeadModel"}
READERS = {"gpt2": "v8d_gpt2_weights.py", "openai-gpt": "v8f_gpt1.py"}
SIZES = ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size"]
# What else a configuration may say, with the only values that our model has.
ONLY = {
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "afn": ["gelu", "gelu_new"],  # both mean gelu_new in GPT-1
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "reorder_and_upcast_attn": [False, True],  # only how float16 is rounded
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}
# The embeddings of tokens and positions in GPT-2 and in GPT-1.
TOKENS = ["wte.weight", "tokens_embed.weight"]
POSITIONS = ["wpe.weight", "positions_embed.weight"]
# The files with tokens, if there are any, and some that GPT-2 has. The vocabularies for other
# languages often have just as many tokens.
TOKEN_FILES = ["tokenizer.json", "vocab.json"]
SOME_TOKENS = {"\u0120the": 262, "ale": 1000, "hello": 31_373, "\u0120gazed": 50_255}


def find_folder(name: str, kind: str = "gpt2") -> Path:
    """Return the folder called name or that of a downloaded model of this kind.

    name: one in RELEASED, or that of a repository, "owner/name". Raises InputError if there is no
    such folder, or if the download fails.
    """
    released = RELEASED[kind]
    if os.path.isdir(name):
        return Path(name)
    if name not in released and not model_files.REPOSITORY.fullmatch(name):
        why = f"no such folder, and not one of {', '.join(released)}"
        remedy = 'give a folder, one of these, or a repository, "owner/name"'
        raise InputError(f"--init_from {name}: {why}; {remedy}")
    repository = released.get(name, name)
    return model_files.download(name, repository, ["config.json"], TOKEN_FILES)


def read_config(folder: Path, kind: str = "gpt2") -> dict[str, Any]:
    """Return a model's settings by our names, its "folder", and its "characters", if it has any.

    kind: its model_type. Only a GPT-1 may have tokens of its own, in a tokenizer.json. Raises
    InputError if config.json is damaged or describes a model unlike ours.
    """
    path = folder / "config.json"
    config = model_files.read_json(path, "--init_from")
    if config.get("model_type") != kind:
        why = f"its model_type is {config.get('model_type')!r}, not {kind!r}"
        loads = ", ".join(f"{reader} loads {known!r}" for known, reader in READERS.items())
        raise InputError(f"--init_from {path}: {why}; {loads}")
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
    tokenizer = "char" if characters else "gpt2"
    if kind == "openai-gpt" and not characters and (folder / "tokenizer.json").exists():
        tokenizer = str(folder / "tokenizer.json")
    else:
        check_vocabulary(config["vocab_size"], characters, path)
    return {
        "n_layer": config["n_layer"], "n_head": config["n_head"], "n_embd": config["n_embd"],
        "block_size": config["n_positions"], "folder": folder, "tokenizer": tokenizer,
        "characters": characters,
    }


def check_vocabulary(vocab_size: int, characters: str, path: Path) -> None:
    """Raise InputError if a model's tokens aren't its characters or, without any, GPT-2's.

    path: that of its config.json.
    """
    n_vocab = len(characters) if characters else N_VOCAB
    padded = math.ceil(n_vocab / 64) * 64  # which makes matmuls on a GPU faster
    if vocab_size not in (n_vocab, padded):
        why = f"its vocabulary has {vocab_size:,} tokens, the tokenizer {n_vocab:,}"
        remedy = "only a model with the same tokens can be loaded"
        raise InputError(f"--init_from {path}: {why}; {remedy}")
    if not characters:
        check_tokens(path.parent)


def check_tokens(folder: Path) -> None:
    """Raise InputError if the tokens in a folder aren't GPT-2's; not every folder has them."""
    for name in TOKEN_FILES:
        path = folder / name
        if not path.exists():
            continue
        tokens = model_files.read_json(path, "--init_from")
        if name == "tokenizer.json":
            model = tokens.get("model")
            tokens = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(tokens, dict) or not SOME_TOKENS.items() <= tokens.items():
            remedy = "only a model with the same tokens can be loaded"
            raise InputError(f"--init_from {path}: its tokens aren't those of GPT-2; {remedy}")


def check_sizes(cfg: Any, released: dict[str, Any]) -> None:
    """Raise InputError if a flag would change the shape of a weight.

    Only --block_size may be smaller: then the last positions are left out.
    """
    for name in ("n_layer", "n_head", "n_embd", "tokenizer"):
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


def write_model(
    cfg: Any, weights: dict[str, torch.Tensor], tokenizer: Any, kind: str = "gpt2"
) -> None:
    """Write config.json, model.safetensors and the tokens to cfg.export.

    If the tokens are characters, config.json has them. Raises InputError if writing fails.
    """
    end_of_text = tokenizer.n_vocab - 1 if tokenizer.name == "gpt2" else None
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    config = {
        "architectures": [CLASSES[kind]], "model_type": kind, "n_layer": cfg.n_layer,
        "n_head": cfg.n_head, "n_embd": cfg.n_embd, "n_positions": cfg.block_size,
        "vocab_size": tokenizer.n_vocab, **ends,
    }
    texts = {}
    if tokenizer.name == "char":
        config["characters"] = "".join(tokenizer.characters)
    elif tokenizer.name == "file":  # GPT-1's own tokens, none of which ends a text
        text = tokenizer.content["json"]
        texts["tokenizer.json"] = text
        texts["tokenizer_config.json"] = model_files.tokenizer_config(text, [])
    else:
        text = tokenizer_json(tokenizer.encoding)
        texts["tokenizer.json"] = text
        texts["tokenizer_config.json"] = model_files.tokenizer_config(text, [end_of_text])
        texts["generation_config.json"] = model_files.dumped(ends)
    texts["config.json"] = model_files.dumped(config)
    model_files.save_model(Path(cfg.export), texts, weights)


def tokenizer_json(encoding: Any) -> str:
    """Return the tokenizer.json that gives the ids of an encoding of tiktoken, which has none."""
    # Here, because only this function needs it.
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    letters = byte_letters()
    merges = [last_merge(token, ranks) for token in tokens if len(token) > 1]

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    end_of_text = encoding.decode([encoding.eot_token])
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    vocabulary[end_of_text] = encoding.eot_token
    model = models.BPE(vocabulary, [(spelled(left), spelled(right)) for left, right in merges])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end_of_text, normalized=False)])
    return tokenizer.to_str()


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in GPT-2's files: itself, or one that can be printed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that the last merge makes into a token of two or more bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts[i : i + 2] = [pairs[i]]
    return parts[0], parts[1]
