"""v8e_distributed.py: large batches from small ones, and from several processes."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, VOCAB_SIZE, random_tokens, tiny, tiny_flags

from lab.ladder import ROOT
from part4_gpt2 import v8e_distributed as v8e
from support import processes
from support.old import checkpoints

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
needs_gloo = pytest.mark.skipif(os.name == "nt", reason="gloo under torchrun is not for Windows")


def assert_same_weights(a, b):
    """Check that two models, given as dicts of weights, are the same up to rounding.

    The bias of the keys adds the same to all scores of a query, which the softmax ignores. So its
    gradient is 0 but for rounding, and AdamW, which rescales gradients, makes it a random walk.
    """
    assert list(a) == list(b)
    for name in a:
        parts = zip(a[name].chunk(3), b[name].chunk(3), strict=True)
        for part, (x, y) in zip(("query", "key", "value"), parts, strict=True):
            if not (name.endswith("query_key_value.bias") and part == "key"):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5, msg=name)


def start(*flags):
    """Two processes of the script, in a process group of their own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*LAUNCH, "part4_gpt2/v8e_distributed.py", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def test_small_batches_add_up_to_a_large_one(splits, monkeypatch):
    models = []
    for batch_size, steps in ((4, 3), (12, 1)):
        torch.manual_seed(1)
        cfg = tiny(v8e, batch_size=batch_size, grad_accum_steps=steps, max_iters=4, warmup_iters=0)
        model = v8e.LanguageModel(cfg, VOCAB_SIZE)
        torch.manual_seed(2)
        rows = iter(random_tokens(100, TINY["block_size"] + 1))

        def batch(tokens, cfg, rows=rows):
            windows = torch.stack([next(rows) for _ in range(cfg.batch_size)])
            return windows[:, :-1], windows[:, 1:]

        monkeypatch.setattr(v8e, "get_batch", batch)
        v8e.train(model, *splits, cfg)
        models.append(model)
    assert_same_weights(models[0].state_dict(), models[1].state_dict())


def test_every_batch_has_a_seed_of_its_own(monkeypatch):
    """It is the same whichever process draws it."""

    def draws(n_processes, grad_accum_steps):
        drawn = {}
        for rank in range(n_processes):
            monkeypatch.setattr(processes, "n_processes", lambda: n_processes)
            monkeypatch.setattr(processes, "process_rank", lambda rank=rank: rank)
            for i in range(grad_accum_steps):
                for seed in (7, 8):
                    for step in range(9):
                        v8e.seed_batch(tiny(v8e, seed=seed), step, i)
                        drawn[seed, step, i * n_processes + rank] = torch.rand(1).item()
        return drawn

    one = draws(1, 4)
    assert len(set(one.values())) == len(one) == 2 * 9 * 4
    assert draws(2, 2) == one
    assert draws(4, 1) == one


@needs_gloo
def test_two_processes_equal_one_that_accumulates_twice_as_much(corpus, tmp_path, capsys):
    def flags(name, grad_accum_steps, **more):
        length = {"max_iters": 12, "eval_interval": 6, "warmup_iters": 2, "dropout": 0.2}
        how = {"out_dir": tmp_path / name, "grad_accum_steps": grad_accum_steps}
        return [*tiny_flags(v8e, **{**length, **how, **more}), "--data", str(corpus)]

    with start(*flags("two", 2)) as process:
        v8e.main(flags("one", 4))
        one = capsys.readouterr().out
        two, two_err = process.communicate(timeout=100)
    assert process.returncode == 0, two_err
    assert two_err.count(" parameters, on cpu") == 1
    losses = [re.findall(r"loss (\d+\.\d+)", out) for out in (one, two)]
    assert losses[0] == losses[1], "one process prints, and only one"
    names = ("one", "two")
    states = [torch.load(tmp_path / name / "latest.pt", weights_only=True) for name in names]
    assert states[0]["step"] == states[1]["step"] == 12
    assert_same_weights(states[0]["model"], states[1]["model"])

    v8e.main(flags("long", 4, max_iters=16))
    resumed = ["--resume", "--out_dir", str(tmp_path / "two"), "--grad_accum_steps", "4"]
    v8e.main([*resumed, "--max_iters", "16", "--eval_interval", "6"])
    names = ("long", "two")
    states = [torch.load(tmp_path / name / "latest.pt", weights_only=True) for name in names]
    assert states[0]["step"] == states[1]["step"] == 16


@needs_gloo
def test_a_bad_flag_is_reported_once():
    with start(*tiny_flags(v8e), "--data", "missing.txt") as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert err.count("error: --data missing.txt: ") == 1


@needs_gloo
@pytest.mark.parametrize("event", ["a process dies", "Ctrl-C"])
def test_a_run_that_is_cut_short_can_be_resumed(corpus, tmp_path, event, capsys):
    folder = tmp_path / "run"
    length = {"max_iters": 10**6, "eval_interval": 100, "out_dir": folder}
    with start(*tiny_flags(v8e, **length), "--data", corpus) as process:
        while not (folder / "best.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        if event == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            children = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
            ).stdout.split()
            os.kill(int(children[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    if event == "Ctrl-C":
        assert err.count("stopped and saved; to continue: ") == 1
    else:
        assert err.count("error: ") == 1
        assert "error: another process of this run has ended" in err
    capsys.readouterr()
    state = checkpoints.read_checkpoint(folder / "latest.pt")
    v8e.main(["--resume", "--out_dir", str(folder), "--max_iters", str(state["step"] + 1)])
    assert f"step {state['step'] + 1}: " in capsys.readouterr().out
