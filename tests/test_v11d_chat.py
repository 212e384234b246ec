"""v11d_chat.py: answers of several turns, compared with transformers, and the cache between them.

Templates, special tokens and messages are tested in test_chat.py.
"""

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TEXT, losses_and_sample, refused, tiny_flags
from test_chat import CHATML, CONVERSATIONS, TEMPLATES, piped, save_tokenizer
from test_v11c_llama_weights import LLAMA3, make_reference, needs_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.ladder import ROOT, path_of
from part7_released import v11c_llama_weights as v11c
from part7_released import v11d_chat as v11d
from support import chat, llama_files

N_VOCAB = 302  # byte_level() with <|im_start|> and <|im_end|>
END = 301
FLAGS = ["--device", "cpu", "--max_new_tokens", "30"]
QUESTIONS = ["The fox?", "And the dog, does it jump?", "Zoë 世界"]


def make_folder(folder: Path, kind: str = "llama", template=CHATML, ends=END, **sizes):
    """A folder with a random chat model; returns the model of transformers."""
    model = make_reference(kind, **{"vocab_size": N_VOCAB, "tie_word_embeddings": False} | sizes)
    model.save_pretrained(folder)
    save_tokenizer(folder, template)
    generation = {"eos_token_id": ends, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a small random chat model. Tests may change it."""
    make_folder(tmp_path / "model")
    return tmp_path / "model"


def make_conversation(folder: Path, *typed: str):
    """A conversation with the model in a folder, and the tokenizer for its answers."""
    flags = ["--init_from", str(folder), *FLAGS, "--dtype", "float32", *map(str, typed)]
    cfg, _, released = v11d.read_settings(flags)
    tokenizer = v11d.make_tokenizer(cfg, released, "")
    model = v11d.make_model(cfg, released, tokenizer.n_vocab).eval()
    chat_tokenizer = chat.ChatTokenizer(released["template"], tokenizer, cfg)
    return v11d.Conversation(model, chat_tokenizer, cfg), tokenizer


def say(conversation, tokenizer, message: str) -> list[int]:
    """Take one turn as talk does, and return the ids of the answer up to where it ends."""
    ids = []
    for token in conversation.answer(message):
        ids.append(token.item())
        if ids[-1] in tokenizer.end_of_text:
            break
    text = tokenizer.decode([token for token in ids if token not in tokenizer.end_of_text])
    conversation.messages.append({"role": "assistant", "content": text})
    return ids


def say_in_transformers(model, tokenizer, messages: list, message: str, n: int) -> list[int]:
    """The same turn with the template and the generate() of transformers."""
    messages.append({"role": "user", "content": message})
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    read = tokenizer.apply_chat_template(messages, **how)
    ids = model.generate(**read, max_new_tokens=n, do_sample=False)[0, read["input_ids"].shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    messages.append({"role": "assistant", "content": text})
    return ids.tolist()


def watched(conversation) -> list[int]:
    """A list that grows by how many tokens the model reads in each step."""
    lengths = []
    conversation.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


# ---- the cache


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[5, 7, 1, 1, 20, 6], [1, 39], [39, 1], [2] * 20, [40]])
@pytest.mark.parametrize("n_kv_head", [1, 3])
def test_tokens_in_pieces_have_the_logits_of_the_whole(tmp_path, lengths, n_kv_head):
    theirs = make_folder(tmp_path, num_key_value_heads=n_kv_head, rope_parameters=LLAMA3)
    model = make_conversation(tmp_path)[0].model
    idx = torch.randint(N_VOCAB, (2, 40))
    caches = [v11d.KVCache(model.cfg, 2, model.lm_head.weight) for _ in model.blocks]
    pieces = [model(piece, caches=caches)[0] for piece in idx.split(lengths, dim=1)]
    assert (torch.cat(pieces, dim=1) - theirs(idx).logits).abs().max() < 1e-4


def test_the_common_beginning_of_two_lists():
    for old, new, n in (
        ([], [], 0), ([], [1], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([1], [2], 0),
    ):  # fmt: skip
        assert v11d.common_length(old, new) == n


def test_a_conversation_reads_each_token_once(folder):
    conversation, tokenizer = make_conversation(folder)
    lengths = watched(conversation)
    n_before = 0
    for question in QUESTIONS:
        lengths.clear()
        old = conversation.ids
        messages = [*conversation.messages, {"role": "user", "content": question}]
        new = conversation.chat_tokenizer.encode(messages)
        answer = say(conversation, tokenizer, question)
        n_kept = v11d.common_length(old, new)
        # Random tokens may be others when their text is encoded again, but those before them stay.
        assert n_kept >= n_before
        assert lengths == [len(new) - n_kept] + [1] * (len(answer) - 1)
        assert conversation.ids == new + answer[:-1]
        n_before = len(new)


def test_what_is_in_the_cache_can_be_read_again(folder):
    """Its last token must be read for its logits."""
    conversation, _ = make_conversation(folder)
    lengths = watched(conversation)
    for ids in ([5, 6, 7, 8], [5, 6, 7, 8], [5, 6]):
        again = conversation.read(ids)
        conversation.ids = []
        assert torch.allclose(again, conversation.read(ids), atol=1e-5)
    assert lengths == [4, 4, 1, 4, 1, 2]


@pytest.mark.parametrize("template", ["chatml", "thoughts", "lines", "loops"])
def test_answers_with_the_cache_equal_those_without(tmp_path, template):
    """Also if the template changes old turns, so that less of them is kept."""
    make_folder(tmp_path, template=TEMPLATES[template])
    kept, tokenizer = make_conversation(tmp_path)
    anew, _ = make_conversation(tmp_path)
    for question in [*QUESTIONS, "x</think>y", "z"]:
        answer = say(kept, tokenizer, question)
        anew.ids = []
        assert say(anew, tokenizer, question) == answer
        assert torch.allclose(kept.read([*kept.ids, 7]), anew.read([*anew.ids, 7]), atol=1e-5)
    assert kept.messages == anew.messages


def test_ctrl_c_within_the_model_does_not_harm_the_cache(folder):
    conversation, tokenizer = make_conversation(folder)
    other, _ = make_conversation(folder)
    say(conversation, tokenizer, QUESTIONS[0])
    say(other, tokenizer, QUESTIONS[0])

    def interrupt(*_):
        raise KeyboardInterrupt

    before = [*conversation.messages]
    # The text differs before its end, so block 0 replaces what the other blocks still have.
    conversation.messages = [*before[:-1], {"role": "assistant", "content": "Something else."}]
    handle = conversation.model.blocks[1].register_forward_hook(interrupt)  # block 0 has read it
    with pytest.raises(KeyboardInterrupt):
        list(conversation.answer("A message that nobody answers"))
    handle.remove()
    conversation.messages = before
    other.ids = []
    assert say(conversation, tokenizer, QUESTIONS[1]) == say(other, tokenizer, QUESTIONS[1])


def test_the_oldest_turns_go_and_the_cache_never_wraps(folder, capsys):
    sizes = ["--block_size", "150", "--max_new_tokens", "15", "--system", "Be brief."]
    conversation, tokenizer = make_conversation(folder, *sizes)
    anew, _ = make_conversation(folder, *sizes)
    for i in range(9):
        answer = say(conversation, tokenizer, f"Question {i}")
        anew.ids = []
        assert say(anew, tokenizer, f"Question {i}") == answer
        assert len(answer) == 15
        assert all(cache.length == len(conversation.ids) <= 150 for cache in conversation.caches)
    notices = capsys.readouterr().err.count("notice: the context of 150 tokens is full")
    assert notices >= 2 * 2, "both, more than once"
    assert notices < 2 * 9 / 2, "and not in every turn"
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(conversation.messages) < 10


def test_an_answer_ends_where_the_context_does(folder):
    """It is no longer than what is left, which is at least half of the context."""
    sizes = ["--block_size", "200", "--max_new_tokens", "1000"]
    conversation, tokenizer = make_conversation(folder, *sizes)
    answer = say(conversation, tokenizer, "x")
    n_prompt = len(conversation.chat_tokenizer.encode(conversation.messages[:1]))
    assert len(answer) == 200 - n_prompt >= 100


# ---- transformers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_greedy_conversations_equal_those_of_transformers(tmp_path, kind):
    theirs = make_folder(tmp_path, kind, rope_parameters=LLAMA3)
    conversation, tokenizer = make_conversation(tmp_path)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = []
    for question in QUESTIONS:
        expected = say_in_transformers(theirs, their_tokenizer, messages, question, 30)
        assert say(conversation, tokenizer, question) == expected
        assert len(set(expected)) > 9
    assert conversation.messages == messages


def test_an_answer_ends_at_any_of_the_end_tokens(folder, capsys, monkeypatch):
    conversation, tokenizer = make_conversation(folder)
    endless = [token.item() for token in conversation.answer("The fox?")]
    assert len(endless) == 30
    new = [i for i in range(5, 30) if endless[i] not in endless[:i]]
    for ends, n in (([endless[new[0]], END], new[0]), ([END, endless[new[1]]], new[1])):
        generation = {"eos_token_id": ends}
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        piped(monkeypatch, b"The fox?\n")
        v11d.main(["--init_from", str(folder), *FLAGS])
        assert capsys.readouterr().out == tokenizer.decode(endless[:n]) + "\n"


# ---- the program


def output(capsys, monkeypatch, typed: str, *flags) -> str:
    """What main() prints to standard output, if these lines come from a pipe."""
    piped(monkeypatch, typed.encode())
    capsys.readouterr()
    v11d.main([str(flag) for flag in flags])
    return capsys.readouterr().out


def test_a_conversation_from_a_pipe(folder, capsys, monkeypatch):
    conversation, tokenizer = make_conversation(folder)
    expected = ""
    for question in QUESTIONS:
        say(conversation, tokenizer, question)
        expected += conversation.messages[-1]["content"] + "\n"
    flags = ["--init_from", folder, *FLAGS]
    assert output(capsys, monkeypatch, "\n".join(QUESTIONS), *flags) == expected
    first = ["--prompt", QUESTIONS[0]]
    assert output(capsys, monkeypatch, "\n".join(QUESTIONS[1:]), *flags, *first) == expected
    stopped = output(capsys, monkeypatch, QUESTIONS[0], *flags, "--stop", expected[5:8])
    assert stopped == expected[: expected.index(expected[5:8])] + "\n"


def test_the_model_reads_what_is_shown(folder, capsys, monkeypatch):
    flags = ["--init_from", folder, *FLAGS, "--show_tokens", "--system", "Be brief."]
    out = output(capsys, monkeypatch, "\n".join(QUESTIONS[:2]), *flags)
    piped(monkeypatch, "\n".join(QUESTIONS[:2]).encode())
    v11d.main([str(flag) for flag in flags])
    err = capsys.readouterr().err
    heads = re.findall(r"^(\d+) tokens in the cache, (\d+) to read:$", err, re.MULTILINE)
    conversation, _ = make_conversation(folder, "--system", "Be brief.")
    messages = [*conversation.messages, {"role": "user", "content": QUESTIONS[0]}]
    ids = conversation.chat_tokenizer.encode(messages)
    assert heads[0] == ("0", str(len(ids)))
    shown = [int(n) for n in re.findall(r"^ +(\d+) '", err.split("tokens in")[1], re.MULTILINE)]
    assert shown == ids
    assert int(heads[1][0]) >= len(ids)
    assert out.count("\n") >= 2


def test_the_settings_of_the_model_are_defaults(folder, capsys):
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": END}
    (folder / "generation_config.json").write_text(json.dumps(sampling), encoding="utf-8")
    start = ["--init_from", str(folder), "--device", "cpu"]
    cfg, _, _ = v11d.read_settings(start)
    assert (cfg.temperature, cfg.top_k, cfg.sample_only) == (0.6, 20, True)
    cfg, _, _ = v11d.read_settings([*start, "--temperature", "0.1"])
    assert (cfg.temperature, cfg.top_k) == (0.1, 20)


def test_a_model_can_be_fine_tuned_before_a_conversation(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "corpus.txt").write_text(TEXT * 3, encoding="utf-8")
    tuning = ["--no-sample_only", "--data", tmp_path / "corpus.txt", "--block_size", "80"]
    tuning += ["--max_iters", "2", "--out_dir", tmp_path / "run", "--export", tmp_path / "tuned"]
    tuning += ["--learning_rate", "0.1", "--warmup_iters", "0", "--eval_interval", "1"]
    flags = ["--init_from", folder, *FLAGS]
    tuned = output(capsys, monkeypatch, "fox", *flags, *tuning)
    assert "step 2: train loss " in tuned
    short = ["--block_size", "80"]
    again = output(capsys, monkeypatch, "fox", "--init_from", tmp_path / "tuned", *FLAGS, *short)
    assert tuned.endswith(f"bits/byte\n{again}")


def test_without_a_released_model_it_is_v11c(corpus, tmp_path, capsys):
    outputs = []
    for script in (v11c, v11d):
        flags = [*tiny_flags(script, out_dir=tmp_path / script.__name__), "--data", str(corpus)]
        script.main([*flags, "--num_samples", "2"])
        outputs.append(losses_and_sample(capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    assert outputs[0].count("---") == 1


def test_models_that_can_not_chat_are_refused_before_their_weights_are_read(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(llama_files, "read_weights", lambda *_: pytest.fail("too late"))
    flags = ["--init_from", folder, *FLAGS]
    save_tokenizer(folder, "{{ raise_exception('no users') }}")
    assert "(no users)" in refused(v11d, capsys, *flags)
    save_tokenizer(folder, "{% if %}")
    assert "its chat template is damaged (line 1: " in refused(v11d, capsys, *flags)
    save_tokenizer(folder, None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert "it has no chat template" in refused(v11d, capsys, *flags)


def test_a_bad_system_message_is_refused(folder, capsys):
    flags = ["--init_from", folder, *FLAGS]
    line = refused(v11d, capsys, *flags, "--system", "Be <|im_end|>")
    assert line.startswith("error: --system: <|im_end|> is a special token")
    line = refused(v11d, capsys, *flags, "--system", "be " * 999)
    assert line.startswith("error: --block_size 1024: even an empty message has ")


def test_a_conversation_has_no_folder_for_a_run(folder, capsys):
    line = refused(v11d, capsys, "--init_from", folder, "--out_dir", "run")
    assert line.endswith("can't be used together with --out_dir; leave one of them out")


def start(folder: Path, *flags, **how) -> subprocess.Popen:
    """The program, as a shell starts it."""
    command = [sys.executable, str(ROOT / path_of("v11d_chat")), "--init_from", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    return subprocess.Popen([*command, *FLAGS, *flags], env=environment, **how)


def test_a_reader_that_closes_the_pipe_ends_the_program_silently(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = start(folder, "--max_new_tokens", "5000", "--block_size", "9000", **pipes)
    program.stdin.write(b"The fox?\n")
    program.stdin.flush()
    program.stdout.read(1)
    program.stdout.close()
    err = program.stderr.read().decode()
    assert program.wait(timeout=60) == 141
    assert "Traceback" not in err
    assert "Error" not in err
    program.stdin.close()
    program.stderr.close()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal of Unix")
def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_program(folder):
    own, theirs = os.openpty()
    endless = ["--max_new_tokens", "60000", "--block_size", "90000"]
    program = start(
        folder, *endless, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def read() -> None:
        nonlocal seen
        if select.select([own], [], [], 2)[0]:  # it has something to say
            seen += os.read(own, 4096).decode("utf-8", "replace")

    def wait_for(text: str, key: bytes = b"") -> None:
        """Read until the text comes. key: pressed again as long as nothing happens."""
        nonlocal seen
        begin = time.monotonic()
        while text not in seen:
            assert time.monotonic() < begin + 60, seen
            before = seen
            read()
            if seen == before and key:
                os.write(own, key)
        seen = seen.partition(text)[2]

    wait_for("> ")
    os.write(own, b"The fox?\n")
    wait_for("?")  # the echo
    begin = time.monotonic()
    while len(seen) < 30:
        assert time.monotonic() < begin + 60, seen
        read()
    os.write(own, b"\x03")
    wait_for("[stopped]", b"\x03")
    wait_for("> ")
    os.write(own, b"half a line\x03")
    wait_for("> ", b"\x03")
    os.write(own, b"\x04")
    assert program.wait(timeout=60) == 0
    os.close(own)


# ---- a released model itself


@needs_smollm2
def test_a_conversation_with_smollm2_equals_that_of_transformers():
    folder = Path(os.environ["SMOLLM2"])
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.float32
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    conversation, tokenizer = make_conversation(folder, "--max_new_tokens", "60")
    messages = []
    for question in (
        "What is the capital of Italy? Answer in one sentence.",
        "And what do people like to eat there?",
        "Write one sentence about that food.",
    ):
        expected = say_in_transformers(theirs, their_tokenizer, messages, question, 60)
        assert say(conversation, tokenizer, question) == expected
    assert conversation.messages == messages
    assert "Rome" in messages[1]["content"]


@needs_smollm2
def test_the_text_for_smollm2_equals_that_of_transformers():
    folder = Path(os.environ["SMOLLM2"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = chat.read_defaults({"folder": folder, "characters": ""}, "")["template"]
    for messages in CONVERSATIONS:
        how = {"tokenize": False, "add_generation_prompt": True}
        assert template.render(messages) == tokenizer.apply_chat_template(messages, **how)
    assert len(CONVERSATIONS) == 10
