"""Conversations in files of JSON lines, one conversation a line, as other programs write them."""

import json

from data.flags import InputError

Conversation = list[dict[str, str]]  # messages, each with a "role" and a "content"


def read_conversations(text: str, name: str) -> list[Conversation]:
    """The conversations in the text of a file called name: {"messages": [...]} on each line.

    Raises InputError, which names the line, for what can't be used.
    """
    conversations = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            conversations.append(read_line(line, f"--conversations {name}, line {number}"))
    if len(conversations) < 2:
        why = "needs at least two conversations, one of them for the test"
        raise InputError(f"--conversations {name}: {why}; add lines")
    return conversations


def read_line(line: str, where: str) -> Conversation:
    """The conversation in a line of JSON; raises InputError, which begins with where."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply, or a number with too many digits")
        raise InputError(f"{where}: not JSON ({reason}); write one object a line") from None
    form = '{"messages": [{"role": "user", "content": "..."}, ...]}'
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: has no list of messages; write {form}")
    roles = ("user", "assistant")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"{where}: message {i + 1} has no text as its content; write {form}")
        role, expected = message.get("role"), roles[i % 2]
        if role != expected:
            why = f"message {i + 1} has the role {role!r} instead of {expected!r}"
            raise InputError(f"{where}: {why}; user and assistant take turns, the user first")
        if message["content"] == "":
            raise InputError(f"{where}: message {i + 1} is empty; give it a text")
    if len(messages) % 2:
        raise InputError(f"{where}: ends with a question; give it an answer, or leave it out")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
