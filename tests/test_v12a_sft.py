"""v12a_sft.py: conversations as tokens, a loss on answers alone, and answers to many questions."""

import json
import re
import signal
from dataclasses import replace

import pytest
import torch
from conftest import refused, refused_input, shaken, tiny, tiny_flags
from torch.nn import functional as F

from data import tasks
from part5_modern import v9d_gqa as v9d
from part8_assistant import v12a_sft as v12a
from support import answers, batches, checkpoints

TOKENIZER = v12a.ChatTokenizer("abcd efgh")
FITS = {"block_size": 6}  # a letter and an answer of two
LEARNS = {"n_embd": 32, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "block_size": 12}


def talk(*messages: str) -> tasks.Conversation:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]


def make_model(**changes):
    torch.manual_seed(1)
    return shaken(v12a.LanguageModel(tiny(v12a, **changes), TOKENIZER.n_vocab))


@pytest.fixture
def jsonl(tmp_path):
    """A file of short conversations: the answer to a letter is the same letter twice."""
    path = tmp_path / "twice.jsonl"
    lines = [json.dumps({"messages": talk(a, a + a)}) for a in "abcdefgh" * 5]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---- special tokens


def test_no_text_is_encoded_as_a_special_token():
    special = {TOKENIZER.user, TOKENIZER.assistant, TOKENIZER.end}
    assert special == {TOKENIZER.n_vocab - i for i in (1, 2, 3)}
    assert len(TOKENIZER.characters) + 3 == TOKENIZER.n_vocab
    assert not special & set(TOKENIZER.encode("".join(TOKENIZER.characters)))
    typed = v12a.ChatTokenizer("<user> <assistant> <end>")
    tokens, _ = v12a.encode(talk("<end><assistant>"), typed)
    assert sum(token >= typed.user for token in tokens) == 2


def test_special_tokens_have_no_text():
    tokens = [TOKENIZER.user, *TOKENIZER.encode("ab"), TOKENIZER.end, TOKENIZER.assistant]
    assert TOKENIZER.decode(tokens) == "ab"


# ---- targets


def test_only_answers_and_their_ends_are_targets():
    a, b, c, d = TOKENIZER.encode("abcd")
    user, assistant, end = TOKENIZER.user, TOKENIZER.assistant, TOKENIZER.end
    tokens, targets = v12a.encode(talk("ab", "c", "d", "da"), TOKENIZER)
    assert tokens == [user, a, b, end, assistant, c, end, user, d, end, assistant, d, a, end]
    none = -100
    assert targets == [none] * 5 + [c, end] + [none] * 4 + [d, a, end]


def test_rows_are_padded_and_padding_is_no_target():
    encoded = [v12a.encode(talk(*m), TOKENIZER) for m in (("a", "b"), ("abc", "d"))]
    examples = batches.pad(encoded, 9)
    assert examples.shape == (2, 2, 9)
    for (tokens, targets), (x, y) in zip(encoded, examples.tolist(), strict=True):
        n = len(tokens) - 1
        assert x[:n] == tokens[:-1]
        assert y == targets[1:] + [-100] * (9 - n)
    assert batches.pad(encoded, 7).shape == (2, 2, 7)
    message = refused_input(batches.pad, encoded, 6)
    assert message.startswith("--block_size 6: a conversation has 8 tokens; give at least 7")


def test_every_example_has_a_target(corpus):
    """Otherwise a step could divide by 0 targets."""
    words = [a + b + c for a in "bcdfg" for b in "aeiou" for c in "klmnp"]
    corpus.write_text(" ".join(words), encoding="utf-8")
    cfg = tiny(v12a)
    for task in ("words", "sums"):
        settings = replace(cfg, task=task, n_demonstrations=300, data=str(corpus))
        _, demonstrations, test = tasks.load_conversations(settings)
        tokenizer = v12a.ChatTokenizer(tasks.CHARACTERS)
        encoded = [v12a.encode(c, tokenizer) for c in demonstrations + test]
        examples = batches.pad(encoded, v12a.Config().block_size)
        assert (examples[:, 1] != -100).any(axis=1).all()


def test_the_mean_is_over_all_targets_of_a_step_and_padding_changes_nothing():
    model = make_model(block_size=20)
    conversations = [talk("a", "b"), talk("bcd", "abcdabcdabc"), talk("a", "b", "c", "dd")]
    encoded = [v12a.encode(c, TOKENIZER) for c in conversations]
    total, n = 0.0, 0
    for tokens, targets in encoded:
        logits, _ = model(torch.tensor([tokens[:-1]]))
        for scores, target in zip(logits[0], targets[1:], strict=True):
            if target != -100:
                total += F.cross_entropy(scores, torch.tensor(target)).item()
                n += 1
    assert n == 2 + 12 + 2 + 3
    x, y = torch.from_numpy(batches.pad(encoded, 20)).unbind(1)
    _, loss = model(x, y)
    assert loss.item() == pytest.approx(total / n, rel=1e-5)
    loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    x[:, -1] = TOKENIZER.end  # other padding
    model.zero_grad()
    model(x, y)[1].backward()
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def test_the_rows_of_an_estimate_are_all_examples_once():
    examples = torch.arange(12)[:, None, None].expand(12, 2, 3).numpy()
    rows = [batches.get_spread_rows(examples, i, 3, 4, "cpu")[0][:, 0] for i in range(3)]
    assert sorted(torch.cat(rows).tolist()) == list(range(12))
    x, y = batches.get_random_rows(examples, 5)
    assert x.shape == y.shape == (5, 3)


# ---- answers


def test_answers_as_a_batch_are_those_of_one_at_a_time():
    model = make_model(block_size=20).eval()
    cfg = tiny(v12a, block_size=20, temperature=0.0)
    asked = [talk(text, "") for text in ("ab", "c", "dd", "abcd", "ba", "a")]
    together = v12a.answer(model, asked, TOKENIZER, cfg)
    assert together == [v12a.answer(model, [c], TOKENIZER, cfg)[0] for c in asked]
    assert len(set(together)) > 3
    others = [talk(conversation[0]["content"], "x") for conversation in asked]
    assert together == v12a.answer(model, others, TOKENIZER, cfg)


def test_an_answer_ends_with_its_token_or_with_the_context():
    class Fixed:  # says d, then ends, if the prompt is short
        def eval(self):
            pass

        def train(self):
            pass

        def stream(self, idx, n, cfg):
            for i in range(n):
                end = i == 1 and idx.shape[1] < 4
                yield torch.full((len(idx), 1), 9 if end else 4)

    cfg = tiny(v12a, block_size=8)
    replies = answers.complete(Fixed(), [[1, 2], [1, 2, 3, 4], [3, 2]], 9, cfg)
    assert replies == [[4, 9], [4, 4, 4, 4], [4, 9]]
    assert refused_input(answers.complete, Fixed(), [[1] * 8], 9, cfg).startswith("--block_size 8:")


def test_a_batch_ends_when_each_of_its_texts_has_ended():
    said = [[4, 9], [9, 4], [5, 5]]  # 9 is the end: of the second text, then of the first
    tokens = [torch.tensor(step)[:, None] for step in said]
    assert len(list(answers.until_end(iter(tokens), 9))) == 2


def test_a_model_that_is_training_still_is_after_it_has_answered():
    model = make_model(block_size=20).train()
    v12a.answer(model, [talk("a", "")], TOKENIZER, tiny(v12a, block_size=20))
    assert model.training


# ---- runs


def stop_at(last):
    """A train_step after which, at step last, Ctrl-C is pressed."""
    original = v12a.train_step

    def train_step(model, optimizer, tokens, step, cfg):
        original(model, optimizer, tokens, step, cfg)
        if step == last:
            signal.raise_signal(signal.SIGINT)

    return train_step


def test_it_learns_to_answer(jsonl, capsys):
    flags = tiny_flags(v12a, max_iters=150, eval_interval=150, warmup_iters=10, **LEARNS)
    v12a.main([*flags, "--conversations", str(jsonl), "--weight_decay", "0"])
    out = capsys.readouterr().out
    first, last = re.findall(r"right answers: others ([\d.]+)%", out)
    assert float(first) < 50
    assert float(last) == 100
    assert re.search(r"user: e\nassistant: ee\n", out)
    folder = flags[flags.index("--out_dir") + 1]
    v12a.main(["--sample_only", "--out_dir", folder, "--ask", "c"])
    assert capsys.readouterr().out == "user: c\nassistant: cc\n"


def test_a_stopped_run_goes_on_to_the_bit(jsonl, tmp_path, capsys, monkeypatch):
    flags = [*tiny_flags(v12a, max_iters=4, **FITS), "--conversations", str(jsonl)]
    flags += ["--dropout", "0.1", "--out_dir"]
    v12a.main([*flags, str(tmp_path / "whole")])
    estimates = capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(v12a, "train_step", stop_at(2))
        v12a.main([*flags, str(tmp_path / "part")])
    v12a.main(["--resume", "--out_dir", str(tmp_path / "part")])
    whole, part = (torch.load(tmp_path / name / "latest.pt", weights_only=True)
                   for name in ("whole", "part"))
    assert part["step"] == 4
    assert all(torch.equal(part["model"][name], whole["model"][name]) for name in whole["model"])
    resumed = capsys.readouterr().out.splitlines()
    assert resumed[-4:] == estimates.splitlines()[-4:]


def test_another_file_can_not_continue_a_run(jsonl, tmp_path, capsys):
    flags = [*tiny_flags(v12a, out_dir=tmp_path / "run", **FITS), "--conversations", str(jsonl)]
    v12a.main(flags)
    jsonl.write_text(jsonl.read_text(encoding="utf-8") * 2, encoding="utf-8")
    line = refused(v12a, capsys, "--resume", "--out_dir", tmp_path / "run")
    assert line.startswith(f"error: --conversations {jsonl}: not the text ")


def test_a_question_that_can_not_be_asked_is_refused(jsonl, tmp_path, capsys):
    v12a.main([*tiny_flags(v12a, out_dir=tmp_path / "run", **FITS), "--conversations", str(jsonl)])
    sample = ["--sample_only", "--out_dir", tmp_path / "run", "--ask"]
    assert "--ask: the model's alphabet has no 'é'" in refused(v12a, capsys, *sample, "é")
    assert "--block_size 6: a question has " in refused(v12a, capsys, *sample, "abcdefgh")


# ---- a base


def base_run(corpus, folder, script=v9d, **changes):
    script.main([*tiny_flags(script, out_dir=folder, **changes), "--data", str(corpus)])
    return torch.load(folder / "best.pt", weights_only=True)


def test_a_base_gives_its_weights_and_new_tokens_stay_random(corpus, tmp_path):
    base = base_run(corpus, tmp_path / "base")
    tokenizer = v12a.ChatTokenizer(base["characters"] + "éABCDE+")
    cfg = tiny(v12a, base=str(tmp_path / "base"))
    torch.manual_seed(2)
    model = v12a.LanguageModel(cfg, tokenizer.n_vocab)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    checkpoints.load_base(model, tokenizer, cfg, v12a.SIZES)
    for name, weight in model.state_dict().items():
        old = base["model"][name]
        if name not in ("token_embedding.weight", "lm_head.weight"):
            assert torch.equal(weight, old)
            continue
        for character, i in tokenizer.ids.items():
            known = base["characters"].find(character)
            assert torch.equal(weight[i], before[name][i] if known < 0 else old[known])
        assert torch.equal(weight[-3:], before[name][-3:])


def test_a_base_that_speaks_gives_its_special_tokens_too(jsonl, tmp_path):
    folder = tmp_path / "base"
    v12a.main([*tiny_flags(v12a, out_dir=folder, **FITS), "--conversations", str(jsonl)])
    base = torch.load(folder / "best.pt", weights_only=True)
    tokenizer = v12a.ChatTokenizer(base["characters"] + "!")
    cfg = tiny(v12a, base=str(folder))
    model = v12a.LanguageModel(cfg, tokenizer.n_vocab)
    checkpoints.load_base(model, tokenizer, cfg, v12a.SIZES)
    assert torch.equal(model.lm_head.weight[-3:], base["model"]["lm_head.weight"][-3:])


def test_a_base_that_does_not_fit_is_refused(jsonl, corpus, tmp_path, capsys):
    base_run(corpus, tmp_path / "base")
    base_run(corpus, tmp_path / "wide", n_embd=36)

    def refuse(folder, data=corpus):
        flags = tiny_flags(v12a, base=tmp_path / folder)
        return refused(v12a, capsys, *flags, "--conversations", jsonl, "--data", data)

    assert refuse("none").endswith("no such folder; name the folder of a run")
    assert refuse("wide").endswith("has --n_embd 36; give --n_embd 36")
    assert "its text has '" in refuse("base")


@pytest.mark.parametrize("flag", ["--prompt", "--stop", "--num_samples"])
def test_flags_for_samples_are_gone(flag, capsys):
    assert flag in refused(v12a, capsys, flag, "1")
