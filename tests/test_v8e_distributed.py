"""v8e_distributed.py: large batches from small ones, and from several processes.

What the processes share is also here: support/processes.py, and support/runs.py for several.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY,
    VOCAB_SIZE,
    build,
    losses_and_sample,
    random_tokens,
    refused_input,
    tiny,
    tiny_flags,
)
from filelock import FileLock

import data
from data.flags import Stopped
from lab.common import train
from lab.ladder import ROOT
from part4_gpt2 import v8d_gpt2_weights as v8d
from part4_gpt2 import v8e_distributed as v8e
from support import checkpoints, processes, runs

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


def saved(folder) -> dict:
    return torch.load(Path(folder) / "latest.pt", weights_only=True)


def start(*flags):
    """Two processes of the script, in a process group of their own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*LAUNCH, "part4_gpt2/v8e_distributed.py", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


# ---- batches


def test_one_batch_per_step_in_one_process_is_v8d(corpus, tmp_path, capsys):
    """The same batches, dropout and weights to the last bit, and the same sample."""
    outputs, states = [], []
    for script in (v8d, v8e):
        folder = tmp_path / script.__name__
        settings = {"max_iters": 6, "warmup_iters": 2, "dropout": 0.3, "out_dir": folder}
        script.main([*tiny_flags(script, **settings), "--data", str(corpus)])
        outputs.append(losses_and_sample(capsys.readouterr().out))
        states.append(saved(folder))
    assert outputs[0] == outputs[1]
    assert states[0]["history"] == states[1]["history"]
    assert list(states[0]["model"]) == list(states[1]["model"])
    for name, weight in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], weight), name


def test_small_batches_add_up_to_a_large_one(splits, monkeypatch):
    models = []
    for batch_size, steps in ((4, 3), (12, 1)):
        torch.manual_seed(1)
        cfg = tiny(v8e, batch_size=batch_size, grad_accum_steps=steps, max_iters=4, warmup_iters=0)
        model = v8e.LanguageModel(cfg, VOCAB_SIZE)
        torch.manual_seed(2)
        rows = iter(random_tokens(4 * 12, TINY["block_size"] + 1))

        def get_batch(tokens, batch_size, block_size, device, rows=rows):
            windows = torch.stack([next(rows) for _ in range(batch_size)])
            return windows[:, :-1], windows[:, 1:]

        monkeypatch.setattr(data, "get_batch", get_batch)
        train(v8e, model, *splits, cfg)
        assert list(rows) == []
        models.append(model)
    assert_same_weights(models[0].state_dict(), models[1].state_dict())


def pretend(monkeypatch, rank: int, n_processes: int):
    """Let this process take itself for one of several, without a connection to the others."""
    environment = {
        "TORCHELASTIC_RUN_ID": "1", "RANK": rank, "WORLD_SIZE": n_processes, "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": n_processes,
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


def test_every_batch_has_a_seed_of_its_own(splits, monkeypatch):
    """It is the same whichever process draws it."""

    def draws(n_processes, grad_accum_steps):
        drawn = {}
        real = data.get_batch
        for rank in range(n_processes):
            for seed in (7, 8):
                for step in range(3):
                    seeds = []

                    def get_batch(*args, seeds=seeds):
                        seeds.append(torch.initial_seed())
                        return real(*args)

                    cfg = tiny(v8e, seed=seed, grad_accum_steps=grad_accum_steps)
                    with monkeypatch.context() as patch:
                        pretend(patch, rank, n_processes)
                        patch.setattr(data, "get_batch", get_batch)
                        v8e.train_step(model, optimizer, splits[0], step, cfg)
                    for i, number in enumerate(seeds):
                        drawn[seed, step, i * n_processes + rank] = number
        return drawn

    model = build(v8e)
    optimizer = v8e.make_optimizer(model, tiny(v8e))
    one = draws(1, 4)
    assert len(set(one.values())) == len(one) == 2 * 3 * 4
    assert draws(2, 2) == one
    assert draws(4, 1) == one


def test_processes_share_gradients_once_in_a_step(splits):
    model, shared = build(v8e), []
    model.register_forward_hook(lambda *_: shared.append(model.require_backward_grad_sync))
    cfg = tiny(v8e, grad_accum_steps=3)
    v8e.train_step(model, v8e.make_optimizer(model, cfg), splits[0], 0, cfg)
    assert shared == [False, False, True]


def test_the_speed_counts_the_tokens_of_all_batches(splits, monkeypatch):
    counted = []
    monkeypatch.setattr(v8e.Stopwatch, "count", lambda _, n_tokens: counted.append(n_tokens))
    monkeypatch.setattr(v8e, "share_gradients", lambda model: model)
    pretend(monkeypatch, 0, 2)
    train(v8e, build(v8e), *splits, tiny(v8e, grad_accum_steps=3))
    assert counted == [4 * 5 * 3 * 2] * 3


# ---- one of several processes


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes.device_of_process("cuda") == "cuda", "without torchrun"
    for rank in (0, 1):
        pretend(monkeypatch, rank, 2)
        assert processes.device_of_process("cuda") == f"cuda:{rank}"
        assert processes.device_of_process("cpu") == "cpu"
    assert chosen == [0, 1]
    pretend(monkeypatch, 0, 3)
    line = refused_input(processes.device_of_process, "cuda")
    assert line == "--device cuda: only 2 GPUs; use --nproc_per_node=2"
    line = refused_input(processes.device_of_process, "mps")
    assert line == "--device mps: torchrun's processes need cuda or cpu; use one"


def make_run(folder):
    cfg = tiny(v8e, out_dir=str(folder))
    return runs.Run(cfg, "x/v8e_distributed.py", data.CharTokenizer("ab"), "ab", {})


@pytest.mark.parametrize(
    ("has_gpu", "has_nccl", "backend"),
    [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo")],
)
def test_gpus_share_gradients_through_nccl_where_there_is_one(
    monkeypatch, has_gpu, has_nccl, backend
):
    """On Windows there are GPUs, but there is no nccl."""
    started = []
    pretend(monkeypatch, 0, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(processes.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(processes.distributed, "init_process_group", started.append)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(processes.distributed, name, lambda: None)
    with processes.joined_processes():
        assert started == [backend]


def test_only_the_first_process_has_the_folder(tmp_path, monkeypatch, capsys):
    """The others know the same losses, and write nothing."""
    folder = tmp_path / "run"
    for rank, names in {1: set(), 0: {"best.pt", "latest.pt", "lock", "log.jsonl"}}.items():
        pretend(monkeypatch, rank, 2)
        monkeypatch.setattr(runs, "largest_of_all", lambda number: number)
        run = make_run(folder)
        with run:
            run.save({"model": {}, "optimizer": {}, "step": 3}, 3.5, 4.0)
            run.save_latest({"model": {}, "optimizer": {}, "step": 4})
        assert run.history == {3: (3.5, 4.0)}
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == names
        assert capsys.readouterr().err == (f"folder: {folder}\n" if rank == 0 else "")
    assert checkpoints.read_checkpoint(folder / "latest.pt")["step"] == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_stops_if_another_was_asked_to(tmp_path, monkeypatch, capsys, rank):
    """It ends as if it had been asked itself; the first one says how to continue."""
    pretend(monkeypatch, rank, 2)
    answers = iter([0, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM])
    asked = []

    def largest_of_all(number):
        asked.append(number)
        return max(number, next(answers))

    monkeypatch.setattr(runs, "largest_of_all", largest_of_all)
    run = make_run(tmp_path)
    with pytest.raises(Stopped) as stop, run:
        assert not run.stop_requested()
        assert run.stop_requested()
        assert run.stop_requested()
    assert stop.value.number == signal.SIGTERM
    assert asked == [0, 0, signal.SIGTERM, signal.SIGTERM], "once more at the end of the run"
    assert ("stopped and saved" in capsys.readouterr().err) == (rank == 0)


def test_a_signal_after_the_last_step_stops_all_processes(tmp_path, monkeypatch):
    pretend(monkeypatch, 1, 2)
    monkeypatch.setattr(runs, "largest_of_all", lambda number: signal.SIGTERM)
    with pytest.raises(Stopped) as stop, make_run(tmp_path):
        pass
    assert stop.value.number == signal.SIGTERM


def test_a_signal_that_torchrun_repeats_does_not_end_a_process(tmp_path, monkeypatch):
    pretend(monkeypatch, 1, 2)
    monkeypatch.setattr(runs, "largest_of_all", lambda number: number)
    run = make_run(tmp_path)
    with pytest.raises(Stopped) as stop, run:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "which would end it"
        assert run.stop_requested()
    assert stop.value.number == signal.SIGTERM


# ---- two processes


@needs_gloo
def test_two_processes_equal_one_that_accumulates_twice_as_much(corpus, tmp_path, capsys):
    """And one process can go on where two have ended."""

    def flags(name, grad_accum_steps):
        length = {"max_iters": 12, "eval_interval": 6, "warmup_iters": 2, "dropout": 0.2}
        how = {"out_dir": tmp_path / name, "grad_accum_steps": grad_accum_steps}
        return [*tiny_flags(v8e, **length, **how), "--data", str(corpus)]

    with start(*flags("two", 2)) as process:
        v8e.main(flags("one", 4))
        one = capsys.readouterr().out
        two, two_err = process.communicate(timeout=100)
    assert process.returncode == 0, two_err
    assert two_err.count(", float32, on cpu\n") == 1
    losses = [re.findall(r"loss:? (\d+\.\d+)", out) for out in (one, two)]
    assert losses[0] == losses[1], "one process prints, and only one"
    states = [saved(tmp_path / name) for name in ("one", "two")]
    assert states[0]["step"] == states[1]["step"] == 12
    assert_same_weights(states[0]["model"], states[1]["model"])

    for name in ("one", "two"):
        resumed = ["--resume", "--out_dir", str(tmp_path / name), "--grad_accum_steps", "4"]
        v8e.main([*resumed, "--max_iters", "14"])
    states = [saved(tmp_path / name) for name in ("one", "two")]
    assert list(states[0]["history"]) == list(states[1]["history"]) == [0, 6, 12, 14]
    assert_same_weights(states[0]["model"], states[1]["model"])


@needs_gloo
@pytest.mark.parametrize("mistake", ["a flag", "a folder in use"])
def test_a_mistake_is_reported_once(corpus, tmp_path, mistake):
    """Also one that only the first process can notice, for which the others can't wait."""
    words, said = ["--data", "missing.txt"], "--data missing.txt: "
    if mistake == "a folder in use":
        words, said = ["--data", corpus], f"--out_dir {tmp_path}: another run is using it"
    with FileLock(tmp_path / "lock"), start(*tiny_flags(v8e, out_dir=tmp_path), *words) as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert err.count("error: ") == err.count(f"error: {said}") == 1


@needs_gloo
@pytest.mark.parametrize("event", ["a process dies", "Ctrl-C", "SIGTERM to the second"])
def test_a_run_that_is_cut_short_can_be_resumed(corpus, tmp_path, event, capsys):
    folder = tmp_path / "run"
    length = {"max_iters": 10**6, "eval_interval": 100, "out_dir": folder}
    with start(*tiny_flags(v8e, **length), "--data", corpus) as process:
        while not (folder / "best.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        second = int(children[-1])
        if event == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif event == "SIGTERM to the second":
            os.kill(second, signal.SIGTERM)
        else:
            os.kill(second, signal.SIGKILL)
        _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    if event == "a process dies":
        assert err.count("error: ") == 1
        assert "error: another process of this run has ended" in err
    else:
        assert err.count("stopped and saved; to continue: ") == 1
        assert "error: " not in err
    capsys.readouterr()
    state = checkpoints.read_checkpoint(folder / "latest.pt")
    v8e.main(["--resume", "--out_dir", str(folder), "--max_iters", str(state["step"] + 1)])
    assert f"step {state['step'] + 1}: " in capsys.readouterr().out
