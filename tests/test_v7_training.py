"""v7_training.py: the recipe, checkpoints that survive, processes that equal one."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, VOCAB_SIZE, tiny, tiny_flags

import data
import v7_training as v7
from lab.ladder import ROOT

LOSSES = ("step", "train_loss", "val_loss", "learning_rate")
CHARACTERS = data.CharTokenizer(TEXT).characters


def flags(corpus, out, **changes):
    return [*tiny_flags(v7, out_dir=out, **changes), "--data", str(corpus)]


def command(corpus, out, *more, **changes):
    return [sys.executable, "v7_training.py", *flags(corpus, out, **changes), *more]


def run(*args, **options):
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=100, **options)
    assert done.returncode == 0, done.stderr
    return done


def saved(out, name="latest.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def log_of(out):
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(a, b):
    """Every bit of the weights and of the optimizer, and all losses."""
    a_state, b_state = saved(a), saved(b)
    assert a_state["step"] == b_state["step"]
    for name, tensor in a_state["model"].items():
        assert torch.equal(tensor, b_state["model"][name]), name
    for number, moments in a_state["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, b_state["optimizer"]["state"][number][name])
    a_log = {entry["step"]: entry for entry in log_of(a)}
    b_log = {entry["step"]: entry for entry in log_of(b)}
    for step, entry in a_log.items():
        assert [entry[key] for key in LOSSES] == [b_log[step][key] for key in LOSSES]


def end_of(output):
    """The loss of the whole split and the sample."""
    return output.split("whole validation split", 1)[1]


def test_decay_is_on_matrices_and_embeddings_only():
    model = v7.LanguageModel(tiny(v7), VOCAB_SIZE)
    decayed, others = v7.make_optimizer(model, tiny(v7, weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight")
        assert "ln_" not in names[id(parameter)]
    for parameter in others["params"]:
        assert "ln_" in names[id(parameter)] or names[id(parameter)].endswith("bias")


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_a_tenth():
    cfg = tiny(v7, learning_rate=0.01, warmup_iters=10, max_iters=110)
    rates = [v7.learning_rate_at(step, cfg) for step in range(111)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[9] == pytest.approx(0.01)
    assert rates[10] == pytest.approx(0.01)
    assert rates[35] == pytest.approx(0.01 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert rates[60] == pytest.approx(0.0055)
    assert rates[110] == pytest.approx(0.001)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert v7.learning_rate_at(500, cfg) == pytest.approx(0.001)


@pytest.mark.parametrize(("warmup_iters", "max_iters"), [(0, 5), (5, 5), (9, 5), (0, 0)])
def test_the_learning_rate_of_odd_lengths(warmup_iters, max_iters):
    cfg = tiny(v7, learning_rate=0.01, warmup_iters=warmup_iters, max_iters=max_iters)
    assert all(0 < v7.learning_rate_at(step, cfg) <= 0.01 for step in range(max_iters + 1))


def test_training_steps_as_the_recipe_says(splits, monkeypatch):
    """One step by hand: the rate of the schedule, the norm clipped to 1, AdamW, the decay."""
    cfg = tiny(v7, max_iters=1, warmup_iters=2, learning_rate=0.02, weight_decay=0.5)
    model = v7.LanguageModel(cfg, VOCAB_SIZE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=2.0)  # for a gradient that is longer than 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms = []
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(real(*args).item())
    )
    v7.train(model, *splits, cfg)
    assert norms[0] > 1
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    length = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert length.item() == pytest.approx(1.0, rel=1e-4)
    for name, parameter in model.named_parameters():
        decay = 0.5 if parameter.ndim == 2 else 0.0
        gradient = gradients[name]
        # At the first step, Adam's averages are the gradient and its square.
        moved = gradient / (gradient.abs() + 1e-8)
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * moved
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_accumulation_equals_the_large_batch(splits, monkeypatch):
    models = []
    for batch_size, steps in ((4, 3), (12, 1)):
        torch.manual_seed(1)
        cfg = tiny(v7, batch_size=batch_size, grad_accum_steps=steps, max_iters=4, warmup_iters=0)
        model = v7.LanguageModel(cfg, VOCAB_SIZE)
        rows = iter(torch.randint(VOCAB_SIZE, (10**4, TINY["block_size"] + 1)))

        def batch(tokens, cfg, rows=rows, model=model):
            if not model.training:
                return torch.zeros(2, 1, TINY["block_size"], dtype=torch.int64)
            windows = torch.stack([next(rows) for _ in range(cfg.batch_size)])
            return windows[:, :-1], windows[:, 1:]

        monkeypatch.setattr(v7, "get_batch", batch)
        v7.train(model, *splits, cfg)
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_two_batches_have_one_seed(splits, monkeypatch):
    seeds = []
    real = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    for seed in (7, 8):
        v7.train(
            v7.LanguageModel(tiny(v7), VOCAB_SIZE), *splits,
            tiny(v7, seed=seed, max_iters=9, grad_accum_steps=2),
        )
    assert len(seeds) == len(set(seeds)) == 2 * 9 * 2


def test_a_recipe_without_a_vocabulary_writes_nothing(splits, tmp_path):
    cfg = tiny(v7, out_dir=str(tmp_path / "out"))
    v7.train(v7.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg)
    assert not (tmp_path / "out").exists()


def test_killed_and_resumed_equals_never_stopped(corpus, tmp_path):
    length = dict(max_iters=240, eval_interval=30, grad_accum_steps=2, dropout=0.3, n_layer=1)
    straight = run(*command(corpus, tmp_path / "straight", **length))
    with subprocess.Popen(
        command(corpus, tmp_path / "killed", **length), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:
        for line in process.stdout:
            if line.startswith("step 60:"):
                break
        process.kill()
    assert 30 <= saved(tmp_path / "killed")["step"] < 240
    resumed = run(*command(corpus, tmp_path / "killed", "--resume", **length))
    assert "step 0:" not in resumed.stdout
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert end_of(straight.stdout) == end_of(resumed.stdout)
    assert [entry["step"] for entry in log_of(tmp_path / "killed")] == list(range(0, 241, 30))
    seconds = [entry["seconds"] for entry in log_of(tmp_path / "killed")]
    assert seconds == sorted(seconds)


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send these to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_samples(corpus, tmp_path, number):
    length = dict(max_iters=800, eval_interval=50, n_layer=1)
    with subprocess.Popen(
        command(corpus, tmp_path / "out", "--prompt", "The ", **length), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline().startswith("step 0:")
        assert process.stdout.readline().startswith("step 50:")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    step = saved(tmp_path / "out")["step"]
    assert 50 <= step < 800
    assert step == 50 or f"step {step}: " in out
    assert "whole validation split" in out
    assert "\nThe " in out
    assert [entry["step"] for entry in log_of(tmp_path / "out")] == [*range(0, step, 50), step]


@pytest.mark.skipif(os.name == "nt", reason="gloo under torchrun is not for Windows")
def test_two_processes_equal_twice_the_accumulation(corpus, tmp_path):
    length = dict(max_iters=12, eval_interval=6, warmup_iters=2, dropout=0.2)
    one = run(*command(corpus, tmp_path / "one", grad_accum_steps=4, **length))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = run(*launch, *command(corpus, tmp_path / "two", grad_accum_steps=2, **length)[1:])
    a, b = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert a["step"] == b["step"] == 12
    for name, tensor in a["model"].items():
        torch.testing.assert_close(tensor, b["model"][name], rtol=1e-4, atol=2e-5, msg=name)
    losses = [re.findall(r"loss (\d+\.\d+)", done.stdout) for done in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 2 * 3 + 1, "one process logs, and only it"
    assert float(losses[0][-1]) == pytest.approx(float(losses[1][-1]), abs=2e-4)
    assert two.stderr.count("small defaults") == 1


def test_gradients_are_shared_once_a_step(splits, monkeypatch):
    """With a stand-in for DistributedDataParallel that notes when it would have shared them."""
    shared, silent = [], []

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *batch):
            shared.append(not silent)
            return self.module(*batch)

        @contextlib.contextmanager
        def no_sync(self):
            silent.append(True)
            yield
            silent.pop()

    monkeypatch.setattr(v7.nn.parallel, "DistributedDataParallel", Wrapper)
    monkeypatch.setattr(v7, "join_processes", lambda cfg: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag: None)
    cfg = tiny(v7, grad_accum_steps=3)
    v7.train(v7.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg)
    assert shared == [False, False, True] * 3


def refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        v7.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    return last


@pytest.fixture
def trained(corpus, tmp_path, capsys):
    """A folder with the checkpoints of a finished run."""
    out = tmp_path / "trained"
    v7.main(flags(corpus, out))
    capsys.readouterr()
    return out


class Trap:
    """What a hostile file may hold: reading it without care runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


DAMAGES = ["cut", "empty", "text", "flipped", "foreign", "hostile", "without optimizer", "renamed"]
DAMAGES += ["without log", "another step"]


@pytest.mark.parametrize("mode", ["--resume", "--sample_only"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints_that_are_none(trained, corpus, capsys, tmp_path, damage, mode):
    path = trained / ("latest.pt" if mode == "--resume" else "best.pt")
    whole, state = path.read_bytes(), saved(trained, path.name)
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text(TEXT, encoding="utf-8")
    elif damage == "flipped":
        middle = whole.index(state["model"]["lm_head.weight"].numpy().tobytes()) + 100
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    elif damage == "foreign":
        torch.save({"model": {"weight": torch.ones(3)}}, path)
    elif damage == "hostile":
        torch.save(state | {"log": Trap(tmp_path / "trapped")}, path)
    elif damage == "without optimizer":
        torch.save({name: part for name, part in state.items() if name != "optimizer"}, path)
    elif damage == "without log":
        torch.save({name: part for name, part in state.items() if name != "log"}, path)
    elif damage == "another step":
        torch.save(state | {"step": "three"}, path)
    elif damage == "renamed":
        model = {f"x.{name}": tensor for name, tensor in state["model"].items()}
        torch.save(state | {"model": model}, path)
    before = path.read_bytes()
    line = refused(capsys, [*flags(corpus, trained), mode], "damaged")
    assert str(path) in line
    assert path.read_bytes() == before
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("mode", ["--resume", "--sample_only"])
def test_no_checkpoint(corpus, capsys, tmp_path, mode):
    refused(capsys, [*flags(corpus, tmp_path / "none"), mode], "train first")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["block_size", "n_embd", "n_head", "n_layer"])
def test_a_checkpoint_of_another_configuration(trained, corpus, capsys, name):
    value = {"block_size": 4, "n_embd": 24, "n_head": 2, "n_layer": 1}[name]
    line = refused(capsys, [*flags(corpus, trained, **{name: value}), "--resume"], f"--{name}")
    assert str(TINY[name]) in line


def test_a_checkpoint_of_another_vocabulary(trained, corpus, capsys):
    corpus.write_text(TEXT.replace("q", "Q"), encoding="utf-8")
    refused(capsys, [*flags(corpus, trained), "--resume"], f"--data {corpus}: not the")


def test_sampling_needs_no_corpus(trained, capsys, tmp_path):
    outputs = []
    for seed in (3, 3, 4):
        v7.main(
            [*flags(tmp_path / "none.txt", trained, seed=seed, max_new_tokens=40), "--sample_only",
             "--prompt", "The "]
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("The ")
    assert len(outputs[0]) == 45


def test_sampling_is_from_the_best(trained, corpus, capsys):
    state = saved(trained, "best.pt")
    for parameter in state["model"].values():
        parameter.zero_()
    state["model"]["lm_head.bias"][CHARACTERS.index("x")] = 99.0
    torch.save(state, trained / "best.pt")
    v7.main([*flags(corpus, trained), "--sample_only", "--prompt", "The "])
    assert capsys.readouterr().out == "The xxxxxxx\n"


def test_the_best_is_kept_beside_the_latest(splits, tmp_path, monkeypatch):
    losses = iter([3.0, 5.0, 3.0, 4.0, 3.0, 2.0, 3.0, 4.5, 3.0, 2.5])  # train, validation, ...
    monkeypatch.setattr(v7, "estimate_loss", lambda *_: next(losses))
    cfg = tiny(v7, max_iters=8, eval_interval=2, out_dir=str(tmp_path / "out"))
    v7.train(v7.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg, CHARACTERS)
    assert saved(tmp_path / "out", "best.pt")["step"] == 4
    assert saved(tmp_path / "out")["step"] == 8
    assert [entry["val_loss"] for entry in log_of(tmp_path / "out")] == [5.0, 4.0, 2.0, 4.5, 2.5]


def test_the_log_says_all(trained):
    log = log_of(trained)
    assert [entry["step"] for entry in log] == [0, 2, 3]
    keys = {"step", "train_loss", "val_loss", "learning_rate", "tokens_per_second", "seconds"}
    assert all(set(entry) == keys for entry in log)
    assert log[0]["seconds"] < log[1]["seconds"] < log[2]["seconds"]
    tokens = 2 * TINY["batch_size"] * TINY["block_size"]
    seconds = log[1]["seconds"] - log[0]["seconds"]
    assert log[1]["tokens_per_second"] == pytest.approx(tokens / seconds)


def test_a_new_run_does_not_replace_an_older_one_before_it_has_trained(trained, corpus):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    v7.main(flags(corpus, trained, max_iters=0, seed=5))
    for name, content in before.items():
        assert name == "unfinished" or (trained / name).read_bytes() == content


def test_a_new_run_keeps_an_older_one_aside(trained, corpus):
    before = {name: (trained / name).read_bytes() for name in ("latest.pt", "best.pt")}
    v7.main(flags(corpus, trained, seed=5))
    v7.main(flags(corpus, trained, seed=5, max_iters=6) + ["--resume"])
    for name, content in before.items():
        assert (trained / f"older_{name}").read_bytes() == content
        assert (trained / name).read_bytes() != content


def test_a_resumed_run_has_the_weight_decay_that_it_is_given(trained, corpus, monkeypatch):
    made = []
    real = v7.make_optimizer
    monkeypatch.setattr(v7, "make_optimizer", lambda *args: made.append(real(*args)) or made[-1])
    v7.main(flags(corpus, trained, weight_decay=0.7, max_iters=6) + ["--resume"])
    assert [group["weight_decay"] for group in made[-1].param_groups] == [0.7, 0.0]
    assert all(entry["step"] == 6 for entry in made[-1].state.values())


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(corpus, trained, capsys, monkeypatch):
    before = (trained / "latest.pt").read_bytes()
    real, calls = v7.estimate_loss, []

    def estimate(*args):
        calls.append(1)
        return real(*args) if len(calls) < 3 else math.nan

    monkeypatch.setattr(v7, "estimate_loss", estimate)
    refused(capsys, flags(corpus, trained), "not finite")
    assert len(calls) == 4
    assert (trained / "latest.pt").read_bytes() == before


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_folder_that_can_not_be_written(corpus, tmp_path, capsys, place):
    if place.startswith("/") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    (tmp_path / "file").write_text(TEXT, encoding="utf-8")
    out = tmp_path / place
    refused(capsys, flags(corpus, out), f"--out_dir {out}: can't save")
    assert (tmp_path / "file").read_text(encoding="utf-8") == TEXT


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_full_disk(corpus, trained):
    """A limit on the size of files stands for a full disk: writing fails halfway through."""
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    limited += "import v7_training; v7_training.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", limited, *flags(corpus, trained, seed=9)],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 2
    assert f"error: --out_dir {trained}: can't save" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    for name in ("latest.pt", "best.pt", "log.jsonl"):
        assert (trained / name).read_bytes() == before[name]
    assert not (trained / "unfinished").exists()


def test_the_whole_loss_is_that_of_every_window_once():
    tokens = np.array(data.CharTokenizer(TEXT).encode(TEXT), dtype=np.uint16)
    cfg = tiny(v7, batch_size=6)
    model = v7.LanguageModel(cfg, VOCAB_SIZE)
    model.eval()
    losses = []
    for start in range(0, len(tokens) - 5, 5):
        window = torch.from_numpy(tokens[start : start + 6].astype(np.int64))[None]
        losses.append(model(window[:, :-1], window[:, 1:])[1].item())
    assert len(losses) % cfg.batch_size, "the last batch is not a full one"
    model.train()
    assert v7.whole_loss(model, tokens, cfg) == pytest.approx(np.mean(losses), rel=1e-5)
    assert model.training


def test_a_run_ends_with_the_loss_in_three_units(corpus, tmp_path, capsys):
    v7.main(flags(corpus, tmp_path / "out"))
    out = capsys.readouterr().out
    found = re.search(r"split: loss (\d\.\d+), perplexity (\d+\.\d+), (\d\.\d+) bits per", out)
    loss, perplexity, bits = map(float, found.groups())
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(loss / math.log(2), rel=1e-3)
