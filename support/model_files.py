"""Models as transformers stores them: download them, read their weights, export others like them.

A model is a folder. It has config.json with the settings, model.safetensors with the weights (or
several such files) and, for most models, tokenizer.json and its COMPANIONS.
"""

import json
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from tqdm import tqdm

from data.files import rename, replace_file
from data.flags import NO_LIMIT, InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READABLE = [*DTYPES.values(), torch.float64]
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # the name of one on the Hugging Face hub
PART = re.compile(r"model-\d+-of-(\d+)\.safetensors")  # of a model too large for one file
HEAD = "lm_head.weight"
# What may be beside a tokenizer.json: the class of the tokenizer and its special tokens, how to
# generate, and how to put the messages of a chat together.
COMPANIONS = [
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
]
# Entries of weight files that aren't weights: masks, position ids, frequencies of rotations.
BUFFERS = (".attn.bias", ".attn.masked_bias", "position_ids", "rotary_emb.inv_freq")


def download(
    name: str, repository: str, files: list[str], optional: Sequence[str] = ()
) -> Path:
    """Return the folder with a model's files and weights, from the Hugging Face hub or its cache.

    The hub's own client downloads what isn't in its cache yet. With HF_HUB_OFFLINE=1, or without a
    network, it takes everything from the cache. Raises InputError, naming --init_from, if one of
    the files or the weights can't be had; the optional files may be missing.
    """
    from huggingface_hub import logging, snapshot_download  # here: they take long to import

    logging.set_verbosity_error()  # or each retry without a network prints a warning
    print(f"looking for {name} in the cache and on the Hugging Face hub", file=sys.stderr)
    patterns = [*files, *optional, "model.safetensors", "model-*-of-*.safetensors"]
    try:
        with ended_by_signals():
            folder = Path(snapshot_download(repository, allow_patterns=patterns))
        missing = [file for file in files if not (folder / file).exists()]
        if missing:
            raise FileNotFoundError(f"{missing[0]} is neither there nor in the cache")
        if lacks_weights(folder):
            raise FileNotFoundError(f"{lacks_weights(folder)} there or in the cache")
    except Exception as error:  # no network, a licence that isn't accepted, a full disk, ...
        message = str(error).strip() or type(error).__name__
        why = message.splitlines()[0]
        remedy = "check the name and the network, or name a folder with the model's files"
        raise InputError(f"--init_from {name}: can't download it ({why}); {remedy}") from None
    return folder


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the block runs, Ctrl-C and SIGTERM end the program at once.

    By Python's own handlers, it would first wait for its threads, and so for all of a download.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        numbers = []
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---- settings


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


def integer(
    config: dict[str, Any], name: str, path: Path, flag: str, least: int = 1,
    most: int = NO_LIMIT - 1,
) -> int:
    """Return an integer of a configuration; raises InputError, naming flag, if it isn't one."""
    value = config.get(name)
    if type(value) is not int or not least <= value <= most:
        why = f"its {name} is {value!r}, not an integer from {least} to {most:,}"
        raise InputError(f"{flag} {path}: {why}")
    return value


def read_characters(config: dict[str, Any], path: Path) -> str:
    """Return the alphabet of a model whose tokens are characters, or "" for any other model.

    Raises InputError if it is damaged.
    """
    characters = config.get("characters", "")
    if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
        raise InputError(f"--init_from {path}: its characters aren't in order, so it is damaged")
    return characters


def read_companions(folder: Path, flag: str) -> dict[str, str]:
    """Return the texts of those COMPANIONS that a folder has, by their names.

    Raises InputError, naming flag, if one of them is damaged.
    """
    texts = {}
    for name in COMPANIONS:
        path = folder / name
        if not path.exists():
            continue
        if path.suffix == ".json":
            read_json(path, flag)
        try:
            texts[name] = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"{flag} {path}: can't read it ({error.strerror})") from None
        except ValueError as error:
            raise InputError(f"{flag} {path}: not text in UTF-8 ({error})") from None
    return texts


# ---- reading weights


def weight_paths(folder: Path) -> list[Path]:
    """The weight files in a folder: model.safetensors or, without that, its numbered parts."""
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    return sorted(path for path in folder.glob("model-*.safetensors") if PART.fullmatch(path.name))


def lacks_weights(folder: Path) -> str:
    """What is missing of a folder's weight files, in words, or "" if they are all there."""
    paths = weight_paths(folder)
    if not paths:
        return "no model.safetensors"
    part = PART.fullmatch(paths[0].name)
    if part and len(paths) != int(part[1]):  # each name ends with how many there are
        return f"only {len(paths)} of the {int(part[1])} weight files"
    return ""


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file that has each weight; raises InputError if one can't be read."""
    from safetensors import safe_open  # here, because only v8d and v11c need it

    if lacks_weights(folder):
        raise InputError(f"--init_from {folder}: {lacks_weights(folder)}; name another folder")
    files = {}
    for path in weight_paths(folder):
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except Exception as error:  # safetensors has its own class for a damaged file
            raise InputError(f"--init_from {path}: can't read it ({error})") from None
    return {name: path for name, path in files.items() if not name.endswith(BUFFERS)}


def read_weights(
    folder: Path, expected: dict[str, torch.Tensor], embedding: str, padded: Sequence[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and weights in a folder, one by one, in the order of expected.

    expected: tensors with the names and shapes that the weights must have, on any device.
    embedding: the name of the token embedding. A model that uses it as its output layer, too, has
    no lm_head.weight of its own; the folder may still have one, if the two are equal.
    padded: the names of weights that may have more rows than expected, which are left out.

    Raises InputError if the weights don't fit, or if they are damaged.
    """
    files = weight_files(folder)
    stored = {name.removeprefix("transformer."): name for name in files}
    if len(stored) < len(files):
        twice = [name for name in stored if f"transformer.{name}" in files and name in files]
        raise InputError(f"--init_from {folder}: with and without transformer.: {listed(twice)}")
    if HEAD in stored and HEAD not in expected and embedding in stored:
        head, other = stored.pop(HEAD), stored[embedding]
        if not torch.equal(read_weight(files[head], head), read_weight(files[other], other)):
            why = "its lm_head.weight isn't its token embedding, but this model has one for both"
            raise InputError(f"--init_from {files[head]}: {why}")
    check_names(expected, stored, folder)
    for name, own in tqdm(expected.items(), desc="loading", delay=1):
        path = files[stored[name]]
        weight = read_weight(path, stored[name])
        if name in padded and weight.ndim == own.ndim:
            weight = weight[: len(own)]
        if weight.shape != own.shape:
            shapes = f"{tuple(weight.shape)} instead of {tuple(own.shape)}"
            raise InputError(f"--init_from {path}: {name} has the shape {shapes}")
        check_numbers(weight, f"{path}: {name}", own.dtype)
        yield name, weight


def check_names(expected: Iterable[str], stored: Iterable[str], folder: Path) -> None:
    """Raise InputError if a folder lacks weights, or has others."""
    problems = []
    missing = [name for name in expected if name not in stored]
    if missing:
        problems.append(f"missing: {listed(missing)}")
    extra = [name for name in stored if name not in expected]
    if extra:
        problems.append(f"extra: {listed(extra)}")
    if problems:
        raise InputError(f"--init_from {folder}: the weights don't fit; {'; '.join(problems)}")


def listed(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    if len(names) <= 5:
        return ", ".join(names)
    return f"{', '.join(names[:5])} and {len(names) - 5} more"


def read_weight(path: Path, name: str) -> torch.Tensor:
    """Return one weight in a file; raises InputError if it is damaged.

    The file is opened anew for each weight, because the part of an open file that has been read
    stays in this program's memory: all weights would end up there, beside those of the model.
    """
    from safetensors import safe_open  # here, because only v8d and v11c need it

    try:
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(name)
    except Exception as error:  # safetensors has its own class for a damaged file
        raise InputError(f"--init_from {path}: can't read {name} ({error})") from None
    if weight.dtype not in READABLE:
        why = f"{name} is {weight.dtype}, but only {', '.join(DTYPES)} can be loaded"
        raise InputError(f"--init_from {path}: {why}")
    return weight


def check_numbers(weight: torch.Tensor, where: str, dtype: torch.dtype) -> None:
    """Raise InputError, saying where, if a weight has numbers that dtype can't hold."""
    lowest, highest = weight.aminmax()  # both are NaN if any number is
    if not (lowest.to(dtype).isfinite() and highest.to(dtype).isfinite()):
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"--init_from {where} has numbers that aren't finite in {name}")


# ---- flags and exports


def refuse_conflicts(cfg: Any) -> None:
    """Raise InputError if other flags contradict --init_from."""
    flag = ""
    if cfg.resume:
        flag = "--resume"
    elif cfg.sample_only and cfg.out_dir:
        flag = "--out_dir"
    elif getattr(cfg, "preset", ""):
        flag = "--preset"
    if flag:
        why = f"can't be used together with {flag}; leave one of them out"
        raise InputError(f"--init_from {cfg.init_from}: {why}")


def check_export(export: str) -> None:
    """Make the folder for --export; without one (""), there is nothing to do.

    Raises InputError if a model is in the folder already, or if it can't be written.
    """
    if not export:
        return
    folder = Path(export)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = ("config.json", "model.safetensors", "tokenizer.json", *COMPANIONS)
        is_used = any((folder / name).exists() for name in files)
        weights = folder / "model.safetensors"
        if weights.with_name("model.safetensors.unfinished").exists() and not weights.exists():
            is_used = False  # an export was killed here before it was whole
        with TemporaryFile(dir=folder):
            pass  # so it can be written
    except OSError as error:
        raise InputError(f"--export {folder}: can't write there ({error.strerror})") from None
    if is_used:
        why = 'already holds a model; name another folder, or "" to export nothing'
        raise InputError(f"--export {folder}: {why}")


def save_model(folder: Path, texts: dict[str, str], weights: dict[str, torch.Tensor]) -> None:
    """Write texts, by the names of their files, and model.safetensors to an --export folder.

    Raises InputError if that fails; then there is no model.safetensors.
    """
    from safetensors.torch import save_file  # here, because only v8d and v11c need it

    contiguous = {name: weight.contiguous().cpu() for name, weight in weights.items()}
    unfinished = folder / "model.safetensors.unfinished"
    try:
        # safetensors makes files that only their owner can read, so note what is usual here.
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(contiguous, unfinished, {"format": "pt"})
        unfinished.chmod(mode)
        for name, text in texts.items():
            write_text(folder / name, text)
        rename(unfinished, folder / "model.safetensors")
    except InputError:
        raise
    except Exception as error:  # safetensors has its own class for a full disk
        raise InputError(f"--export {folder}: can't write the weights ({error})") from None
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"exported to {folder}", file=sys.stderr)


def dumped(content: dict[str, Any]) -> str:
    """A JSON object as text."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def with_changes(text: str, changes: dict[str, Any]) -> str:
    """The text of a JSON object with other values for some names; None removes a name.

    If that changes nothing, the text stays as it is.
    """
    content = json.loads(text)
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    return dumped(content) if changes else text


def one_or_more(ids: Sequence[int]) -> None | int | list[int]:
    """The ids of tokens as configurations have them: None, a number, or a list of several."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def tokenizer_config(text: str, end_of_text: Sequence[int]) -> str:
    """Return a tokenizer_config.json with which AutoTokenizer does what a tokenizer.json says.

    Without one, it takes the class that is usual for the kind of model, which may split a text in
    other places, add tokens, or put one before each text. text: that of the tokenizer.json.
    end_of_text: the ids of the tokens that end a text, of which AutoTokenizer knows only one.
    """
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    # An ordinary token would become a special one, and be found in the middle of words.
    added = {token["id"]: token for token in json.loads(text).get("added_tokens") or []}
    ends = [added[token] for token in end_of_text if token in added]
    if ends:
        token = {name: value for name, value in ends[0].items() if name != "id"}
        config["eos_token"] = {"__type": "AddedToken", **token}
    return dumped(config)


def write_text(path: Path, text: str) -> None:
    """Replace a file of an --export folder by text; raises InputError if that fails."""
    replace_file(path, lambda file: file.write(text.encode("utf-8")), "--export")
