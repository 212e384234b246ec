"""Conversations: a model's chat template, its way to sample, and messages from a terminal or pipe.

A chat template turns messages into one text. It is a program in the language of Jinja, and comes
with the model: in chat_template.jinja or in tokenizer_config.json. It is a stranger's program, so
it runs in Jinja's sandbox, where it can't reach files or change what it is given.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.flags import InputError, Stopped
from support import llama_files
from support.model_files import read_companions

Message = dict[str, str]  # its "role" (system, user or assistant) and its "content"

# The sampling settings in generation_config.json: their types, and what each means if it isn't
# there. The last one is that of transformers.
SAMPLING = {
    "temperature": ((int, float), 1.0), "top_p": ((int, float), 1.0),
    "repetition_penalty": ((int, float), 1.0), "top_k": ((int,), 50),
}


# ---- what comes with a model


def read_defaults(released: dict[str, Any], system: str) -> dict[str, Any]:
    """Return a released model's chat "template", and its defaults for the settings of sampling.

    released: what llama_files.read_config returned. system: the first message, or "" for none.
    Raises InputError if the model has no template, if that refuses such a conversation, or if one
    of the files is damaged.
    """
    folder = released["folder"]
    files = read_companions(folder, "--init_from")
    text = files.get("chat_template.jinja")
    if text is None:
        text = template_in(json.loads(files.get("tokenizer_config.json", "{}")), folder)
    if not text or released["characters"]:
        why = "it has no chat template, so it isn't made for conversations"
        remedy = "v11c_llama_weights.py goes on with a text, or choose an instruct model"
        raise InputError(f"--init_from {folder}: {why}; {remedy}")
    template = Template(text, special_tokens(files), folder)
    template.render([*system_message(system), {"role": "user", "content": "Hello!"}])
    config = json.loads(files.get("generation_config.json", "{}"))
    return {"template": template, **read_sampling(config, folder / "generation_config.json")}


def system_message(text: str) -> list[Message]:
    """The message of the system as the beginning of a conversation; nothing if the text is ""."""
    return [{"role": "system", "content": text}] if text else []


def template_in(config: dict[str, Any], folder: Path) -> str | None:
    """The template in a tokenizer_config.json, or None; of several templates, the default one.

    Raises InputError if it isn't text.
    """
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {}
        for entry in template:
            if isinstance(entry, dict):
                named[entry.get("name")] = entry.get("template")
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        path = folder / "tokenizer_config.json"
        raise InputError(f"--init_from {path}: its chat_template isn't text, so it is damaged")
    return template


def read_sampling(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of sampling in a generation_config.json; without do_sample, they are greedy.

    Raises InputError if one of them is damaged.
    """
    if not config.get("do_sample"):
        return {"temperature": 0.0}
    sampling = {}
    for name, (types, default) in SAMPLING.items():
        value = config.get(name)
        if value is None:
            value = default
        if type(value) not in types or not 0 <= value < 1000:
            raise InputError(f"--init_from {path}: its {name} is {value!r}, so it is damaged")
        sampling[name] = value
    return sampling


def special_tokens(files: dict[str, str]) -> dict[str, str]:
    """The names that a template has for special tokens, such as bos_token, and their texts."""
    tokens = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, token in json.loads(files.get(file, "{}")).items():
            if isinstance(token, dict):  # with settings beside its text
                token = token.get("content")
            if name.endswith("_token") and isinstance(token, str):
                tokens[name] = token
    return tokens


# ---- the template


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks answers for training: just its content.

    Some templates have it, and transformers knows it.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """Return what is between the two."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message: str) -> None:
    """What a template calls to refuse a conversation."""
    raise TemplateError(message)


def strftime_now(text: str) -> str:
    """What a template calls for the date."""
    return datetime.now().strftime(text)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    """What a template calls for JSON. Jinja's own would escape what HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Template:
    """A chat template, with the settings, functions and variables that transformers gives it."""

    def __init__(self, text: str, variables: dict[str, str], folder: Path) -> None:
        """variables: special tokens, by their names. Raises InputError if the text is damaged."""
        self.variables = variables
        self.where = f"--init_from {folder}: its chat template"
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        with self.mistakes():
            self.program = environment.from_string(text)

    def render(self, messages: list[Message]) -> str:
        """The text of messages, up to where an answer begins; raises InputError if that fails."""
        given = {"tools": None, "documents": None, "add_generation_prompt": True}
        with self.mistakes():
            return self.program.render({**given, **self.variables, "messages": messages})

    @contextmanager
    def mistakes(self) -> Iterator[None]:
        """Raise InputError for whatever goes wrong in the block inside, and at Ctrl-C."""
        remedy = "choose another model, or mend the template"
        try:
            yield
        except Stopped:  # SIGTERM ends the program
            raise
        except KeyboardInterrupt:
            raise InputError(f"{self.where} didn't end before Ctrl-C; {remedy}") from None
        except TemplateSyntaxError as error:
            why = f"line {error.lineno}: {error.message}"
            raise InputError(f"{self.where} is damaged ({why}); {remedy}") from None
        except Exception as error:  # a stranger's program may raise anything
            why = str(error) or type(error).__name__
            raise InputError(f"{self.where} refuses these messages ({why}); {remedy}") from None


class ChatTokenizer:
    """From messages to the token ids that the model reads."""

    def __init__(self, template: Template, tokenizer: Any, cfg: Any) -> None:
        """tokenizer: a FileTokenizer. InputError if --system or --block_size can't be used."""
        self.template = template
        self.tokenizer = tokenizer.tokenizer
        self.cfg = cfg
        # Room for an answer, but never more than half of the context.
        self.longest = cfg.block_size - min(cfg.max_new_tokens, cfg.block_size // 2)
        self.refuse_special(cfg.system, "--system")
        self.refuse_long("", f"--block_size {cfg.block_size}")

    def encode(self, messages: list[Message], flag: str = "the message") -> list[int]:
        """The token ids of messages; raises InputError, naming flag, if they can't be encoded."""
        return self.encode_text(self.template.render(messages), flag)

    def encode_text(self, text: str, flag: str) -> list[int]:
        """The token ids of a text, without those that a tokenizer adds at its beginning.

        The template has all special tokens that belong there.
        """
        return llama_files.encode(self.tokenizer, text, flag, add_special_tokens=False)

    def check(self, message: str, flag: str) -> None:
        """Raise InputError, naming flag, if a message is too long or contains a special token."""
        self.refuse_long(message, flag)
        self.refuse_special(message, flag)

    def refuse_long(self, message: str, flag: str) -> None:
        """Raise InputError, naming flag, if a message alone leaves no room for an answer."""
        alone = [*system_message(self.cfg.system), {"role": "user", "content": message}]
        n = len(self.encode(alone, flag))
        if n > self.longest:
            what = "even an empty message" if not message else "with it, the text"
            why = f"{what} has {n:,} tokens, but there is only room for {self.longest:,}"
            raise InputError(f"{flag}: {why}; shorten the text, or give a larger --block_size")

    def refuse_special(self, text: str, flag: str) -> None:
        """Raise InputError, naming flag, if there is a special token in a text.

        With those of the template in it, a message could speak for the system.
        """
        if self.cfg.allow_special:
            return
        added_tokens = self.tokenizer.get_added_tokens_decoder()
        for token in self.encode_text(text, flag):
            if token in added_tokens and added_tokens[token].special:
                name = added_tokens[token].content
                why = "is a special token, with which a message could speak for the system"
                raise InputError(f"{flag}: {name} {why}; --allow_special lets it through")

    def drop_oldest(self, messages: list[Message]) -> list[Message]:
        """Return messages without the oldest turns if they leave no room for an answer.

        The model has to read what remains anew, so only half of the room is kept: that makes it
        happen seldom. The message of the system and the newest one stay.
        """
        if len(self.encode(messages)) <= self.longest:
            return messages
        n_system = len(system_message(self.cfg.system))
        system, turns = messages[:n_system], messages[n_system:]
        n_dropped = 0
        while len(turns) > 1 and len(self.encode(system + turns)) > self.longest // 2:
            turns = turns[2:]  # a message and its answer
            n_dropped += 1
        what = f"the context of {self.cfg.block_size:,} tokens is full"
        print(f"notice: {what}, so the oldest {n_dropped} turns are forgotten", file=sys.stderr)
        return system + turns

    def show(self, ids: list[int], n_kept: int) -> None:
        """Print the tokens that the model reads, each with its text; n_kept are in the caches."""
        print(f"{n_kept:,} tokens in the cache, {len(ids) - n_kept:,} to read:", file=sys.stderr)
        for token in ids[n_kept:]:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            print(f"{token:8} {text!r}", file=sys.stderr)


# ---- the terminal


def read_messages(tokenizer: ChatTokenizer) -> Iterator[str]:
    """Yield --prompt, if there is one, then each line that is typed, or that comes from a pipe.

    Whoever types is told what is wrong with a message, and can type another. From a pipe, it ends
    the program: raises InputError.
    """
    is_typed = is_typing()
    prompt = tokenizer.cfg.prompt.strip()
    if prompt:
        tokenizer.check(prompt, "--prompt")
        yield prompt
    prepare_input(is_typed)
    while True:
        try:
            message = read_line("> " if is_typed else "")
            if message is None:
                break
            if message:
                tokenizer.check(message, "the message")
                yield message
        except InputError as error:
            if not is_typed:
                raise
            print(f"error: {error}", file=sys.stderr)


def is_typing() -> bool:
    """Whether someone sits at a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def prepare_input(is_typed: bool) -> None:
    """Let input() edit lines and remember them or, if they come from a pipe, read UTF-8."""
    if is_typed:
        with suppress(ImportError):  # Windows has it in the terminal itself
            import readline  # noqa: F401
        end = "Ctrl-Z and Enter end" if os.name == "nt" else "Ctrl-D ends"
        print(f"Ctrl-C stops an answer, {end} the conversation", file=sys.stderr)
    elif hasattr(sys.stdin, "reconfigure"):
        with suppress(OSError):  # some of it has been read
            sys.stdin.reconfigure(encoding="utf-8-sig")


def read_input(prompt: str) -> str:
    """What input returns; raises what a signal raised, also where readline notices it late."""
    try:
        return input(prompt)
    except SystemError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        raise


def read_line(prompt: str) -> str | None:
    """The next line without spaces around it, "" if Ctrl-C discards it, and None at the end.

    Raises InputError if it isn't UTF-8.
    """
    try:
        return read_input(prompt).strip()
    except UnicodeDecodeError as error:
        raise InputError(f"the message: not text in UTF-8 ({error.reason})") from None
    except (EOFError, RuntimeError):  # without a standard input, there is nothing to read
        if prompt:
            print()
        return None
    except Stopped:
        raise
    except KeyboardInterrupt:
        if not prompt:
            raise
        print()
        return ""


@contextmanager
def until_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the block inside, and nothing else."""
    try:
        yield
    except Stopped:  # SIGTERM ends the program
        raise
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
