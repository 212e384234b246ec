"""support/stopwatch.py: the speed of training steps, without the first one and without pauses."""

import re

import pytest
import torch
from conftest import build, tiny

from part2_training import v6b_fast as v6b
from support import stopwatch


class Gpu:
    """A GPU and a clock. Python notices how long the work takes only if it waits for the GPU."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.queued = 0.0
        self.waited = []
        monkeypatch.setattr(stopwatch, "wait_for", self.wait)
        monkeypatch.setattr(stopwatch.time, "perf_counter", self.clock)

    def work(self, seconds):
        self.queued += seconds

    def wait(self, device):
        self.waited.append(device)
        self.now += self.queued
        self.queued = 0.0

    def clock(self):
        self.now += 1e-9  # no two readings are the same
        return self.now


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def run_steps(gpu, watch, *seconds, n_tokens=20):
    """One training step for each of the times."""
    for time_of_step in seconds:
        gpu.work(time_of_step)
        watch.count(n_tokens)


# ---- the stopwatch alone


def test_the_speed_is_tokens_by_seconds(gpu):
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 2, 2, 2, 6)
    assert watch.stop() == ", 6 tokens/s"  # 60 tokens in 10 seconds


def test_tokens_are_added_up_and_large_numbers_have_commas(gpu):
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 1)
    run_steps(gpu, watch, 1, n_tokens=20_000_000)
    run_steps(gpu, watch, 1, n_tokens=4_691_356)
    assert watch.stop() == ", 12,345,678 tokens/s"


def test_there_is_no_speed_before_the_second_step(gpu):
    watch = stopwatch.Stopwatch("cuda:1")
    assert watch.stop() == ""
    watch.start()
    run_steps(gpu, watch, 2)
    assert watch.stop() == ""
    watch.start()
    run_steps(gpu, watch, 2)
    assert watch.stop() == ", 10 tokens/s"


def test_the_first_step_does_not_count(gpu):
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 500, 2, 2)
    assert watch.stop() == ", 10 tokens/s"


def test_only_the_first_step_of_all_is_left_out(gpu):
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 500, 2)
    watch.stop()
    watch.start()
    run_steps(gpu, watch, 4, 1)
    assert watch.stop() == ", 8 tokens/s"


@pytest.mark.parametrize("waits", [True, False])
def test_the_time_between_stop_and_start_does_not_count(gpu, waits):
    """Whether or not the work in between waits for the GPU itself."""
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 2, 2)
    assert watch.stop() == ", 10 tokens/s"
    gpu.work(1000)
    if waits:
        gpu.wait("cuda:1")
    watch.start()
    run_steps(gpu, watch, 1, 1)
    assert watch.stop() == ", 20 tokens/s"


def test_each_start_begins_at_0(gpu):
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 2, 2)
    watch.start()
    assert watch.stop() == ""


def test_the_work_before_the_first_step_does_not_count(gpu):
    gpu.work(1000)
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 2, 2)
    assert watch.stop() == ", 10 tokens/s"


def test_the_stopwatch_waits_for_the_device_that_it_was_made_for(gpu):
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 2, 2)
    watch.stop()
    assert set(gpu.waited) == {"cuda:1"}


def test_steps_do_not_wait_for_the_gpu_except_the_first(gpu):
    watch = stopwatch.Stopwatch("cuda:1")
    run_steps(gpu, watch, 2)
    n_waits = len(gpu.waited)
    run_steps(gpu, watch, 2, 2, 2)
    assert len(gpu.waited) == n_waits
    watch.stop()
    assert len(gpu.waited) == n_waits + 1


def test_waiting_reads_a_number_from_the_device(monkeypatch):
    read = []

    class Number:
        def __init__(self, *_, device):
            self.device = device

        def item(self):
            read.append(self.device)

    monkeypatch.setattr(torch, "zeros", Number)
    stopwatch.wait_for("cuda:1")
    assert read == ["cuda:1"]


def test_a_cpu_has_nothing_to_wait_for():
    stopwatch.wait_for("cpu")


# ---- in the training loop


@pytest.mark.parametrize(
    ("max_iters", "eval_interval", "expected"),
    [
        (5, 2, {0: "", 2: "10", 4: "10", 5: "10"}),
        (5, 5, {0: "", 5: "10"}),
        (3, 1, {0: "", 1: "", 2: "10", 3: "10"}),
        (0, 1, {0: ""}),
    ],
)
def test_tokens_per_second_count_neither_loss_estimates_nor_the_first_step(
    splits, gpu, monkeypatch, capsys, max_iters, eval_interval, expected
):
    """4 windows of 5 tokens in 2 seconds are 10 tokens/s; the first step takes 500 seconds more."""
    real, steps = v6b.train_step, []

    def train_step(*args):
        gpu.work(2 if steps else 502)
        steps.append(1)
        real(*args)

    def estimate_loss(*_):
        gpu.work(1000)
        gpu.wait("cpu")
        return 1.0

    monkeypatch.setattr(v6b, "train_step", train_step)
    monkeypatch.setattr(v6b, "estimate_loss", estimate_loss)
    v6b.train(build(v6b), *splits, tiny(v6b, max_iters=max_iters, eval_interval=eval_interval))
    out = capsys.readouterr().out
    lines = re.findall(r"^step (\d+):.* val loss 1\.0000(?:, (.*) tokens/s)?$", out, re.MULTILINE)
    assert {int(step): speed for step, speed in lines} == expected
    assert len(steps) == max_iters


def speeds_and_notices(gpu, capsys, device, *seconds):
    """What a stopwatch says about intervals of one step each, after the first step."""
    watch = stopwatch.Stopwatch(device)
    run_steps(gpu, watch, 5.0)
    for time_of_step in seconds:
        watch.start()
        run_steps(gpu, watch, time_of_step)
        watch.stop()
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("notice: ")]


def test_a_run_that_becomes_much_slower_says_so_once(gpu, capsys):
    [line] = speeds_and_notices(gpu, capsys, "cpu", 1.0, 2.9, 4.0, 9.0, 1.0, 9.0)
    assert line.startswith("notice: training has become 4 times slower; ")
    assert "OMP_NUM_THREADS=1" in line


def test_a_run_that_keeps_its_speed_says_nothing(gpu, capsys):
    assert speeds_and_notices(gpu, capsys, "cpu", 1.0, 2.9, 0.97, 2.8) == []


def test_a_few_short_steps_are_not_compared(gpu, capsys):
    assert speeds_and_notices(gpu, capsys, "cpu", 0.01, 0.1, 0.4) == []


def test_a_slow_gpu_is_not_a_matter_of_threads(gpu, capsys):
    assert speeds_and_notices(gpu, capsys, "cuda", 1.0, 9.0) == []
