"""v7_training.py: the recipe, checkpoints that outlive a crash, and processes that act as one."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import data

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, VOCAB_SIZE, refused, tiny, tiny_flags

import v7_training as v7
from lab.ladder import ROOT

CHARACTERS = data.CharTokenizer(TEXT).characters


@pytest.fixture(autouse=True)
def quick_utilisation(monkeypatch):
    """Skip the matrix products that measure the machine; they take longer than a tiny run."""
    monkeypatch.setattr(v7, "repeat", lambda product, number: [1.0])


def flags(corpus, out, **changes):
    return [*tiny_flags(v7, out_dir=out, **changes), "--data", str(corpus)]


def start(*command):
    """Start a Python program in the repository, with its output in pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, **pipes)


def saved(out, name="latest.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def log_of(out):
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(a, b):
    """Check that two runs have the same weights and optimizer, bit for bit, and the same losses."""
    a_state, b_state = saved(a), saved(b)
    assert a_state["step"] == b_state["step"]
    for name, tensor in a_state["model"].items():
        assert torch.equal(tensor, b_state["model"][name]), name
    for number, averages in a_state["optimizer"]["state"].items():
        for name, tensor in averages.items():
            assert torch.equal(tensor, b_state["optimizer"]["state"][number][name])
    keys = ("step", "train_loss", "val_loss", "learning_rate")
    a_log, b_log = ([[entry[key] for key in keys] for entry in log_of(out)] for out in (a, b))
    assert a_log == b_log


def end_of(output):
    """The loss on the whole validation split, and the sample."""
    return output.split("whole validation split", 1)[1]


# ---- the recipe


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


def test_the_learning_rate_warms_up_and_then_falls_along_a_cosine_to_a_tenth():
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
def test_the_learning_rate_stays_in_range_however_long_the_warm_up(warmup_iters, max_iters):
    cfg = tiny(v7, learning_rate=0.01, warmup_iters=warmup_iters, max_iters=max_iters)
    assert all(0 < v7.learning_rate_at(step, cfg) <= 0.01 for step in range(max_iters + 1))


def test_a_step_follows_the_recipe(splits, monkeypatch):
    """One step by hand: the scheduled rate, a gradient shortened to 1, AdamW, and decay."""
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


def test_small_batches_add_up_to_a_large_one(splits, monkeypatch):
    models = []
    for batch_size, steps in ((4, 3), (12, 1)):
        torch.manual_seed(1)
        cfg = tiny(v7, batch_size=batch_size, grad_accum_steps=steps, max_iters=4, warmup_iters=0)
        model = v7.LanguageModel(cfg, VOCAB_SIZE)
        rows = iter(torch.randint(VOCAB_SIZE, (100, TINY["block_size"] + 1)))

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


def test_every_batch_has_a_seed_of_its_own(splits, monkeypatch):
    seeds = []
    real = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    for seed in (7, 8):
        cfg = tiny(v7, seed=seed, max_iters=9, grad_accum_steps=2)
        v7.train(v7.LanguageModel(tiny(v7), VOCAB_SIZE), *splits, cfg)
    assert len(seeds) == len(set(seeds)) == 2 * 9 * 2


def test_the_whole_loss_covers_every_window_once():
    tokens = np.array(data.CharTokenizer(TEXT).encode(TEXT), dtype=np.uint16)
    cfg = tiny(v7, batch_size=6)
    model = v7.LanguageModel(cfg, VOCAB_SIZE)
    model.eval()
    losses = []
    for first in range(0, len(tokens) - 5, 5):
        window = torch.from_numpy(tokens[first : first + 6].astype(np.int64))[None]
        losses.append(model(window[:, :-1], window[:, 1:])[1].item())
    assert len(losses) % cfg.batch_size, "the last batch is not a full one"
    model.train()
    assert v7.whole_loss(model, tokens, cfg) == pytest.approx(np.mean(losses), rel=1e-5)
    assert model.training


def test_a_run_ends_with_its_loss_in_three_units(corpus, tmp_path, capsys):
    v7.main(flags(corpus, tmp_path / "out"))
    out = capsys.readouterr().out
    found = re.search(r"split: loss (\d\.\d+), perplexity (\d+\.\d+), (\d\.\d+) bits per", out)
    loss, perplexity, bits = map(float, found.groups())
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(loss / math.log(2), rel=1e-3)


# ---- runs that stop and go on


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(corpus, tmp_path, capsys):
    length = dict(max_iters=240, eval_interval=30, grad_accum_steps=2, dropout=0.3, n_layer=1)
    with start("v7_training.py", *flags(corpus, tmp_path / "killed", **length)) as process:
        for line in process.stdout:
            if line.startswith("step 60:"):
                break
        process.kill()
    assert 30 <= saved(tmp_path / "killed")["step"] < 240
    v7.main([*flags(corpus, tmp_path / "killed", **length), "--resume"])
    resumed = capsys.readouterr().out
    v7.main(flags(corpus, tmp_path / "straight", **length))
    straight = capsys.readouterr().out
    assert "step 0:" in straight
    assert "step 0:" not in resumed
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert end_of(straight) == end_of(resumed)
    log = log_of(tmp_path / "killed")
    assert [entry["step"] for entry in log] == list(range(0, 241, 30))
    seconds = [entry["seconds"] for entry in log]
    assert seconds == sorted(seconds)


def test_a_finished_run_that_is_resumed_gives_the_same_sample(corpus, tmp_path, capsys):
    v7.main(flags(corpus, tmp_path / "out"))
    expected = end_of(capsys.readouterr().out)
    v7.main([*flags(corpus, tmp_path / "out"), "--resume"])
    assert end_of(capsys.readouterr().out) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_but_still_saves_and_samples(
    corpus, tmp_path, capsys, monkeypatch, number
):
    """The signal comes during the third step. A second one would end the program at once."""
    real, batches = v7.get_batch, []

    def batch(tokens, cfg):
        batches.append(1)
        if len(batches) == 4 + 3:  # four for the first loss estimate, then one for each step
            signal.raise_signal(number)
            assert signal.getsignal(number) == signal.SIG_DFL
        return real(tokens, cfg)

    monkeypatch.setattr(v7, "get_batch", batch)
    v7.main([*flags(corpus, tmp_path, max_iters=800, eval_interval=50), "--prompt", "The "])
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d+):", out, re.MULTILINE) == ["0", "3"]
    assert "\nThe " in end_of(out)
    assert saved(tmp_path)["step"] == 3
    assert [entry["step"] for entry in log_of(tmp_path)] == [0, 3]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(os.name == "nt", reason="gloo under torchrun is not for Windows")
def test_two_processes_equal_one_that_accumulates_twice_as_much(corpus, tmp_path, capsys):
    length = dict(max_iters=12, eval_interval=6, warmup_iters=2, dropout=0.2)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = flags(corpus, tmp_path / "two", grad_accum_steps=2, **length)
    with start(*launch, "v7_training.py", *two) as process:
        v7.main(flags(corpus, tmp_path / "one", grad_accum_steps=4, **length))
        one_out = capsys.readouterr().out
        two_out, two_err = process.communicate(timeout=100)
    assert process.returncode == 0, two_err
    assert two_err.count(" parameters, on cpu") == 1
    a, b = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert a["step"] == b["step"] == 12
    for name, tensor in a["model"].items():
        torch.testing.assert_close(tensor, b["model"][name], rtol=1e-4, atol=2e-5, msg=name)
    losses = [re.findall(r"loss (\d+\.\d+)", out) for out in (one_out, two_out)]
    assert len(losses[0]) == len(losses[1]) == 2 * 3 + 1, "one process prints, and only one"
    assert float(losses[0][-1]) == pytest.approx(float(losses[1][-1]), abs=2e-4)


def test_processes_share_gradients_once_a_step(splits, monkeypatch):
    """A stand-in for DistributedDataParallel notes when the real one would share gradients."""
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


# ---- checkpoints


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a run that has ended. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    v7.main(flags(folder / "corpus.txt", folder / "out"))
    return folder / "out"


@pytest.fixture
def trained(finished_run, tmp_path):
    """A copy of the finished run, for one test to use as it likes."""
    return shutil.copytree(finished_run, tmp_path / "trained")


class Trap:
    """Hostile contents of a file: a reader that isn't careful makes a folder at path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


DAMAGES = ["cut", "empty", "text", "flipped", "foreign", "hostile", "renamed"]
DAMAGES += ["without optimizer", "without log", "another step"]


def damage_file(path, damage, trap):
    """Replace a good checkpoint by a bad one."""
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
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
        torch.save(state | {"log": Trap(trap)}, path)
    elif damage == "renamed":
        model = {f"x.{name}": tensor for name, tensor in state["model"].items()}
        torch.save(state | {"model": model}, path)
    elif damage == "another step":
        torch.save(state | {"step": "three"}, path)
    else:
        del state[damage.removeprefix("without ")]
        torch.save(state, path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(
    trained, corpus, capsys, tmp_path, damage
):
    path = trained / "latest.pt"
    damage_file(path, damage, tmp_path / "trap")
    before = path.read_bytes()
    line = refused(v7, capsys, *flags(corpus, trained), "--resume")
    assert str(path) in line
    assert "damaged" in line
    assert path.read_bytes() == before
    assert not (tmp_path / "trap").exists()


def test_a_trap_works_on_a_careless_reader(tmp_path):
    torch.save(Trap(tmp_path / "trap"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "trap").exists()


def test_a_missing_checkpoint_is_refused(corpus, capsys, tmp_path):
    folder = tmp_path / "none"
    for flag, name in {"--resume": "latest.pt", "--sample_only": "best.pt"}.items():
        line = refused(v7, capsys, *flags(corpus, folder), flag)
        assert str(folder / name) in line
        assert "train first" in line
        assert not folder.exists()


def test_a_checkpoint_with_other_sizes_is_refused(trained, corpus, capsys):
    for name, value in {"block_size": 4, "n_embd": 24, "n_head": 2, "n_layer": 1}.items():
        line = refused(v7, capsys, *flags(corpus, trained, **{name: value}), "--resume")
        assert f"--{name} {value}: " in line
        assert f"has {TINY[name]};" in line


def test_a_checkpoint_with_another_vocabulary_is_refused(trained, corpus, capsys):
    corpus.write_text(TEXT.replace("q", "Q"), encoding="utf-8")
    line = refused(v7, capsys, *flags(corpus, trained), "--resume")
    assert f"--data {corpus}: not the" in line


def test_sampling_needs_no_corpus_and_depends_on_the_seed_alone(trained, capsys, tmp_path):
    outputs = []
    for seed in (3, 3, 4):
        sampling = flags(tmp_path / "none.txt", trained, seed=seed, max_new_tokens=40)
        v7.main([*sampling, "--sample_only", "--prompt", "The "])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("The ")
    assert len(outputs[0]) == 45


def test_samples_come_from_the_best_checkpoint(trained, corpus, capsys):
    state = saved(trained, "best.pt")
    for parameter in state["model"].values():
        parameter.zero_()
    state["model"]["lm_head.bias"][CHARACTERS.index("x")] = 99.0
    torch.save(state, trained / "best.pt")
    v7.main([*flags(corpus, trained), "--sample_only", "--prompt", "The "])
    assert capsys.readouterr().out == "The xxxxxxx\n"


def test_the_best_checkpoint_is_kept_beside_the_latest(splits, tmp_path, monkeypatch):
    losses = iter([3.0, 5.0, 3.0, 4.0, 3.0, 2.0, 3.0, 4.5, 3.0, 2.5])  # train, validation, ...
    monkeypatch.setattr(v7, "estimate_loss", lambda *_: next(losses))
    cfg = tiny(v7, max_iters=8, eval_interval=2, out_dir=str(tmp_path / "out"))
    v7.train(v7.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg, CHARACTERS)
    assert saved(tmp_path / "out", "best.pt")["step"] == 4
    assert saved(tmp_path / "out")["step"] == 8
    assert [entry["val_loss"] for entry in log_of(tmp_path / "out")] == [5.0, 4.0, 2.0, 4.5, 2.5]


def test_the_log_has_every_number(finished_run):
    log = log_of(finished_run)
    assert [entry["step"] for entry in log] == [0, 2, 3]
    keys = {"step", "train_loss", "val_loss", "learning_rate", "tokens_per_second", "seconds"}
    assert all(set(entry) == keys for entry in log)
    assert log[0]["seconds"] < log[1]["seconds"] < log[2]["seconds"]
    tokens = 2 * TINY["batch_size"] * TINY["block_size"]
    seconds = log[1]["seconds"] - log[0]["seconds"]
    assert log[1]["tokens_per_second"] == pytest.approx(tokens / seconds)


def test_training_without_a_vocabulary_saves_nothing(splits, tmp_path):
    cfg = tiny(v7, out_dir=str(tmp_path / "out"))
    v7.train(v7.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg)
    assert not (tmp_path / "out").exists()


def test_a_new_run_leaves_an_older_one_alone_until_it_has_trained(trained, corpus):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    v7.main(flags(corpus, trained, max_iters=0, seed=5))
    for name, content in before.items():
        assert (trained / name).read_bytes() == content


def test_a_new_run_keeps_the_checkpoints_of_an_older_one(trained, corpus):
    before = {name: (trained / name).read_bytes() for name in ("latest.pt", "best.pt")}
    v7.main(flags(corpus, trained, seed=5))
    v7.main([*flags(corpus, trained, seed=5, max_iters=6), "--resume"])
    for name, content in before.items():
        assert (trained / f"older_{name}").read_bytes() == content
        assert (trained / name).read_bytes() != content


def test_a_resumed_run_takes_a_new_weight_decay(trained, corpus, monkeypatch):
    made = []
    real = v7.make_optimizer
    monkeypatch.setattr(v7, "make_optimizer", lambda *args: made.append(real(*args)) or made[-1])
    v7.main([*flags(corpus, trained, weight_decay=0.7, max_iters=6), "--resume"])
    assert [group["weight_decay"] for group in made[-1].param_groups] == [0.7, 0.0]
    assert all(entry["step"] == 6 for entry in made[-1].state.values())


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(corpus, trained, capsys, monkeypatch):
    before = (trained / "latest.pt").read_bytes()
    real, calls = v7.estimate_loss, []

    def estimate(*args):
        calls.append(1)
        return real(*args) if len(calls) < 3 else math.nan

    monkeypatch.setattr(v7, "estimate_loss", estimate)
    assert "not finite" in refused(v7, capsys, *flags(corpus, trained))
    assert len(calls) == 4
    assert (trained / "latest.pt").read_bytes() == before


def test_a_save_that_fails_leaves_the_last_checkpoint(corpus, trained, capsys, monkeypatch):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    real, saves = torch.save, []

    def save(state, file):
        saves.append(state["step"])
        if state["step"] == 0:
            return real(state, file)
        file.write(b"the first half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", save)
    line = refused(v7, capsys, *flags(corpus, trained, seed=9))
    assert line.startswith(f"error: --out_dir {trained}: can't save (no space left on device)")
    assert saves[-1] == 2
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_can_not_be_made_is_refused(corpus, tmp_path, capsys, place):
    (tmp_path / "file").write_text(TEXT, encoding="utf-8")
    out = tmp_path / place
    line = refused(v7, capsys, *flags(corpus, out))
    assert f"--out_dir {out}: can't save" in line
    assert (tmp_path / "file").read_text(encoding="utf-8") == TEXT
