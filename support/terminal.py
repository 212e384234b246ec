"""What goes in and out of the terminal around generation: the prompt, and text piece by piece."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.corpora import load_text


def read_prompt_file(cfg: Any, tokenizer: Any) -> Any:
    """Return the settings with the text of --prompt_file, if there is one, as the prompt.

    Raises InputError if the file can't be read, or if tokenizer can't encode its text or --stop.
    """
    tokenizer.encode(cfg.stop, "--stop")
    if cfg.prompt_file:
        prompt = load_text(Path(cfg.prompt_file), "--prompt_file")
        tokenizer.encode(prompt, "--prompt_file")
        cfg = replace(cfg, prompt=prompt, prompt_file="")  # so a checkpoint has the text itself
    if getattr(cfg, "init_from", "") and not hasattr(cfg, "system"):  # which v11d has
        notice_chat_model(cfg.prompt, tokenizer)
    return cfg


def notice_chat_model(prompt: str, tokenizer: Any) -> None:
    """Print a notice if the model was trained on conversations, but the prompt isn't one.

    Such a model comes with a chat template, and a conversation has special tokens.
    """
    files = getattr(tokenizer, "content", {}).get("files", {})
    config = json.loads(files.get("tokenizer_config.json", "{}"))
    if not prompt.strip() or not (config.get("chat_template") or files.get("chat_template.jinja")):
        return
    added = tokenizer.tokenizer.get_added_tokens_decoder().values()
    if not any(token.special and token.content in prompt for token in added):
        what = "this model was trained on conversations, and may go on with a plain text oddly"
        print(f"notice: {what}; to chat with it, use v11d_chat.py", file=sys.stderr)


def print_samples(model: Any, prompt: torch.Tensor, tokenizer: Any, cfg: Any) -> None:
    """Print the prompt, int64 (1, T), and how the model goes on, as often as --num_samples says."""
    start = cfg.prompt if cfg.prompt else "\n"
    for i in range(cfg.num_samples):
        if i > 0:
            print("---")
        tokens = model.stream(prompt, cfg.max_new_tokens, cfg)
        print_text(start, tokens, tokenizer, cfg.stop)


def print_text(start: str, tokens: Iterator[torch.Tensor], tokenizer: Any, stop: str) -> None:
    """Print start and then the text of tokens, int64 (1, 1) each, as they come; end before stop."""
    print(start, end="", flush=True)
    pieces = decode_stream(tokens, tokenizer, tokenizer.encode(start))
    for piece in end_before(stop, pieces):
        print(piece, end="", flush=True)
    print()


def print_pairs(pairs: list[tuple[int, int]], tokenizer: Any) -> None:
    """Print pairs of tokens and what they become together, on standard error."""
    arrow = "→"
    try:
        arrow.encode(sys.stderr.encoding or "utf-8")
    except UnicodeEncodeError:  # an old console
        arrow = "->"
    for pair in pairs:
        first, second = [tokenizer.decode([token]) for token in pair]
        print(f"{first!r} + {second!r} {arrow} {tokenizer.decode(pair)!r}", file=sys.stderr)


def decode_stream(
    tokens: Iterator[torch.Tensor], tokenizer: Any, prompt: list[int]
) -> Iterator[str]:
    """Yield the text of tokens, int64 (1, 1) each, as they come, up to one that ends a text.

    prompt: the token ids before them. A token may be a part of a character, or lose a space at the
    beginning of a text. So each is decoded together with some of the tokens before it.
    """
    ids = list(prompt)
    begin, end = 0, len(ids)  # tokens before begin aren't decoded again, those before end are shown
    n_shown = len(tokenizer.decode(ids))  # characters of the text from begin on
    for token in tokens:
        if token.item() in getattr(tokenizer, "end_of_text", ()):
            break
        ids.append(token.item())
        text = tokenizer.decode(ids[begin:])
        n_held_back = n_unfinished(text)
        n_new = len(ids) - end
        if n_held_back > 0 and n_new < 4:
            continue  # a character may be four tokens, one for each of its bytes
        n_ready = len(text) - n_held_back
        if n_ready > n_shown:  # not so after a special token, which has no text
            yield text[n_shown:n_ready]
            n_shown = n_ready
            if n_held_back == 0 or n_new > 9:  # so that bytes without meaning end some time
                begin, end = end, len(ids)
                n_shown = len(tokenizer.decode(ids[begin:])) - n_held_back
    yield tokenizer.decode(ids[begin:])[n_shown:]


def n_unfinished(text: str) -> int:
    """How many characters at the end of text may change when the next token comes.

    Bytes that aren't a character become "\ufffd". The last three may be the start of one.
    """
    n = len(text) - len(text.rstrip("\ufffd"))
    return min(n, 3)


def end_before(stop: str, pieces: Iterator[str]) -> Iterator[str]:
    """Yield pieces of a text up to where stop begins, if it does; "" stops nothing.

    Hold back the last len(stop) - 1 characters: they may be the start of it.
    """
    n_held_back = max(0, len(stop) - 1)
    text = ""  # what hasn't been yielded yet
    for piece in pieces:
        text += piece
        if stop and stop in text:
            yield text[: text.index(stop)]
            return
        n_ready = max(0, len(text) - n_held_back)
        yield text[:n_ready]
        text = text[n_ready:]
    yield text
