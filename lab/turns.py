"""turns.py: how long v11d takes to the first token of an answer, turn by turn.

In each turn, the same question is put to two conversations with the same messages: one keeps its
cache, the other begins anew and reads all of the text. Both must choose the same token. Then the
first one writes the rest of the answer, which both take over.

Times are those of the processor, from the message to the token, so other programs don't count. With
one thread (OMP_NUM_THREADS=1), that is the time on an idle machine.

Run it:   python lab/turns.py --init_from HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import torch
from tqdm import tqdm

import data
from data import setting
from part7_released import v11d_chat as v11d
from support import chat


@dataclass
class Config:
    """What to measure and how often."""

    init_from: str = setting("the model, a folder or repository", "")
    question: str = setting("what is asked in each turn", "Tell me more about the history of it.")
    max_new_tokens: int = setting("tokens in an answer", 50, least=1)
    turns: int = setting("turns of a conversation", 10, least=1)
    rounds: int = setting("conversations", 3, least=1)
    dtype: str = setting("dtype of the weights", "float32", choices=["float32", "bfloat16"])
    device: str = setting("a device that counts as processor time", "cpu", choices=["cpu"])


@dataclass
class Turn:
    """A turn: tokens of the text, those read with a kept cache, and seconds to the first token."""

    n_tokens: int
    n_read: int
    kept: float
    anew: float


def first_token(conversation: v11d.Conversation, question: str) -> tuple[list, int, float]:
    """Ask, and return the stream of the other tokens, the first one, and how long that took."""
    start = time.process_time()
    stream = conversation.answer(question)
    token = next(stream).item()
    return stream, token, time.process_time() - start


def take_turn(
    kept: v11d.Conversation, anew: v11d.Conversation, tokenizer: v11d.FileTokenizer, question: str
) -> tuple[Turn, float]:
    """Measure a turn; return it and the seconds that the other tokens of its answer took."""
    old = kept.ids
    stream, token, seconds_kept = first_token(kept, question)
    text = kept.ids
    anew.ids = []
    _, same, seconds_anew = first_token(anew, question)
    if token != same:
        raise data.InputError("the two conversations differ; the cache is wrong")
    start = time.process_time()
    ids = [token] + [other.item() for other in stream]
    seconds = time.process_time() - start
    answer = {"role": "assistant", "content": tokenizer.decode(ids)}
    kept.messages.append(answer)
    anew.messages.append(answer)
    n_read = len(text) - v11d.common_length(old, text)
    return Turn(len(text), n_read, seconds_kept, seconds_anew), seconds


def table(rounds: list[list[Turn]]) -> str:
    """The turns in Markdown; times are the medians over the rounds."""
    lines = [
        "| turn | tokens of the text | read, kept cache | seconds | read, new cache | seconds |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for i, turn in enumerate(rounds[0]):
        kept = median(turns[i].kept for turns in rounds)
        anew = median(turns[i].anew for turns in rounds)
        cells = f"{turn.n_tokens:,} | {turn.n_read:,} | {kept:.2f} | {turn.n_tokens:,} | {anew:.2f}"
        lines.append(f"| {i + 1} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure as the flags in argv say, and print the table."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        if not cfg.init_from:
            raise data.InputError("--init_from: name an instruct model, a folder or repository")
        flags = ["--init_from", cfg.init_from, "--device", cfg.device, "--dtype", cfg.dtype]
        flags += ["--temperature", "0", "--max_new_tokens", str(cfg.max_new_tokens)]
        settings, _, released = v11d.read_settings(flags)
        tokenizer = v11d.make_tokenizer(settings, released, "")
        chat_tokenizer = chat.ChatTokenizer(released["template"], tokenizer, settings)
        model = v11d.make_model(settings, released, tokenizer.n_vocab).eval()
        rounds, seconds = [], 0.0
        for _ in tqdm(range(cfg.rounds), desc="conversations"):
            kept = v11d.Conversation(model, chat_tokenizer, settings)
            anew = v11d.Conversation(model, chat_tokenizer, settings)
            turns = []
            for _ in range(cfg.turns):
                turn, more = take_turn(kept, anew, tokenizer, cfg.question)
                turns.append(turn)
                seconds += more
            rounds.append(turns)
        n_tokens = cfg.rounds * cfg.turns * (cfg.max_new_tokens - 1)
        speed = f"{n_tokens / max(seconds, 1e-9):.1f} tokens per second of processor time"
        threads = torch.get_num_threads()
        print(f"{cfg.dtype}, PyTorch {torch.__version__}, {threads} threads: {speed}\n")
        print(table(rounds))


if __name__ == "__main__":
    main()
