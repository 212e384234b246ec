"""The rungs as a learner meets them: real command lines, what they print, what they refuse."""

import dataclasses
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import TEXT, TINY, losses_and_sample, tiny_flags

import data
import v6_fast
import v9_gpt2 as top_rung
from lab.ladder import ROOT

LOSS = re.compile(r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})")


def run(rung, *flags, **options):
    command = [sys.executable, f"{rung.__name__}.py", *map(str, flags)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100, **options
    )


def test_a_run_prints_losses_and_a_sample(rung, corpus):
    done = run(rung, *tiny_flags(rung), "--data", corpus, "--prompt", "The ")
    assert done.returncode == 0, done.stderr
    out = losses_and_sample(done.stdout)
    lines = out.splitlines()
    losses = [LOSS.fullmatch(line) for line in lines[:3]]
    assert [int(match[1]) for match in losses] == [0, 2, 3]  # before, at the interval, at the end
    sample = out.split("\n", 3)[3]
    assert sample.startswith("The ")
    assert len(sample) == len("The ") + TINY["max_new_tokens"] + len("\n")
    assert set(sample) <= set(TEXT)
    assert done.stderr.startswith("small defaults, ")
    assert "training: 100%" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_seed_gives_the_same_output(rung, corpus, capsys):
    outputs = []
    for seed in (7, 7, 8):
        rung.main([*tiny_flags(rung, seed=seed, max_new_tokens=60), "--data", str(corpus)])
        outputs.append(losses_and_sample(capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_help_shows_the_lesson_and_both_defaults_of_every_flag(rung, capsys):
    with pytest.raises(SystemExit) as stop:
        rung.main(["--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{rung.__name__}.py: " in out
    for field in dataclasses.fields(rung.Config):
        small = field.metadata["small"]
        assert f"--{field.name}{',' if field.type is bool else ''} " in out
        assert f"{field.metadata['text']} (default: {field.default!r}, on the CPU {small!r})" in out


def test_the_cpu_gets_the_small_defaults(rung):
    for device in ("cpu", "cpu:0"):
        cfg = data.read_flags(rung.Config, rung.__doc__, ["--device", device, "--max_iters", "9"])
        assert cfg.max_iters == 9
        assert cfg.batch_size < rung.Config().batch_size == 64
        assert cfg.device == device


def test_an_accelerator_gets_the_full_size_defaults(rung, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: real(*shape))  # no such chip here
    assert data.read_flags(rung.Config, "", []) == rung.Config()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert data.read_flags(rung.Config, "", []).device == "mps"


def refused(rung, capsys, *flags):
    """What main() says of flags that it must refuse: one line, status 2, nothing printed."""
    with pytest.raises(SystemExit) as stop:
        rung.main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert "error: " in err
    assert err.index("\n") == len(err) - 1, "one line"
    return err


NOT_POSITIVE = ["batch_size", "block_size", "n_embd", "n_head", "n_layer"]
NOT_POSITIVE += ["eval_interval", "eval_iters", "learning_rate"]
BAD_VALUES = [(name, value) for name in NOT_POSITIVE for value in ("0", "-3", "many")]
BAD_VALUES += [(name, "-1") for name in ("max_iters", "max_new_tokens", "seed")]
BAD_VALUES += [("learning_rate", "nan"), ("learning_rate", "inf"), ("n_embd", "2.5")]
BAD_VALUES += [("dropout", value) for value in ("-0.1", "1", "1.5", "nan", "half")]
BAD_VALUES += [("batch_size", 10**30), ("seed", 2**64), ("max_iters", ""), ("n_head", 7)]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_values_that_make_no_sense(rung, capsys, corpus, name, value):
    if name not in {field.name for field in dataclasses.fields(rung.Config)}:
        name, value = "nonsense", "1"  # a flag that this rung does not have is refused as well
    line = refused(rung, capsys, *tiny_flags(rung), "--data", corpus, f"--{name}", value)
    assert f"--{name}" in line


@pytest.mark.parametrize("value", ["cuda", "cuda:9", "mps", "warp", "", "meta"])
def test_devices_that_are_not_there(rung, capsys, value):
    if value == "meta" or not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        line = refused(rung, capsys, "--device", value)
        assert f"--device {value}:" in line
        assert "--device cpu" in line


BAD_FILES = {
    "empty": b"",
    "only a mark": b"\xef\xbb\xbf",
    "binary": bytes(range(128)) * 40,
    "not UTF-8": "naïve café ".encode("latin-1") * 40,
    "UTF-16": TEXT.encode("utf-16"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_files_that_are_not_text(rung, capsys, tmp_path, kind):
    path = tmp_path / "bad.txt"
    path.write_bytes(BAD_FILES[kind])
    assert f"--data {path}:" in refused(rung, capsys, *tiny_flags(rung), "--data", path)


def test_files_that_are_not_there(rung, capsys, tmp_path):
    for path in (tmp_path, tmp_path / "missing.txt", tmp_path / "no" / "such.txt"):
        assert f"--data {path}:" in refused(rung, capsys, *tiny_flags(rung), "--data", path)
    for path in ("", "two\nlines", "x" * 3000):
        assert "--data" in refused(rung, capsys, *tiny_flags(rung), "--data", path)


def test_a_text_that_is_too_short(rung, capsys, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("0123456789" * 5, encoding="utf-8")
    line = refused(rung, capsys, *tiny_flags(rung), "--data", path)
    assert "50 tokens" in line
    assert "--block_size 5" in line
    assert "51" in line


def test_a_prompt_of_unknown_characters(rung, capsys, corpus):
    line = refused(rung, capsys, *tiny_flags(rung), "--data", corpus, "--prompt", "The é 世")
    assert "--prompt" in line
    assert "'é', '世'" in line


def test_an_empty_prompt_is_the_default_one(rung, corpus, capsys):
    flags = [*tiny_flags(rung), "--data", str(corpus)]
    rung.main(flags)
    default = losses_and_sample(capsys.readouterr().out)
    rung.main([*flags, "--prompt", ""])
    assert losses_and_sample(capsys.readouterr().out) == default
    assert default.splitlines()[3] == ""


def test_windows_line_ends_change_nothing(rung, corpus, capsys):
    flags = [*tiny_flags(rung), "--data", str(corpus)]
    rung.main(flags)
    plain = losses_and_sample(capsys.readouterr().out)
    corpus.write_bytes(TEXT.replace("\n", "\r\n").encode("utf-8"))
    rung.main(flags)
    assert losses_and_sample(capsys.readouterr().out) == plain


def test_no_training_gives_one_loss_and_a_sample(rung, corpus, capsys):
    rung.main([*tiny_flags(rung, max_iters=0), "--data", str(corpus)])
    lines = losses_and_sample(capsys.readouterr().out).splitlines()
    assert LOSS.fullmatch(lines[0])[1] == "0"
    assert not LOSS.fullmatch(lines[1])


def test_sizes_beyond_the_memory(rung, capsys, corpus, monkeypatch):
    monkeypatch.setattr(data, "get_batch", lambda *_: torch.empty(2**50))  # 4 PiB, by no machine
    flags = [*tiny_flags(rung), "--data", corpus]
    assert "out of memory" in refused_after_start(rung, capsys, flags)


def refused_after_start(rung, capsys, flags):
    """The last line of a run that fails once it has begun, with its progress bar above."""
    with pytest.raises(SystemExit) as stop:
        rung.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_not_finite(rung, capsys, corpus, monkeypatch):
    monkeypatch.setattr(rung, "estimate_loss", lambda *_: float("nan"))
    flags = [*tiny_flags(rung), "--data", corpus]
    assert "smaller --learning_rate" in refused_after_start(rung, capsys, flags)


def test_too_little_memory_for_python(capsys):
    with pytest.raises(SystemExit), data.command_line():
        raise MemoryError
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes")
def test_a_reader_that_leaves_ends_a_run_without_a_traceback(corpus):
    command = [sys.executable, f"{top_rung.__name__}.py", *tiny_flags(top_rung, max_iters=10**6)]
    process = subprocess.Popen(
        [*command, "--data", str(corpus)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert LOSS.match(process.stdout.readline())
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_mistakes_in_the_program_are_not_hidden():
    with pytest.raises(RuntimeError, match="a mistake"), data.command_line():
        raise RuntimeError("a mistake")


def test_bad_input_on_a_real_command_line(tmp_path):
    done = run(top_rung, *tiny_flags(top_rung), "--data", tmp_path / "missing.txt")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: --data {tmp_path / 'missing.txt'}: ")
    assert done.stderr.count("\n") == 1


def test_a_console_without_the_characters_of_the_corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("Жили-были дед да баба.\n" * 20, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run(top_rung, *tiny_flags(top_rung), "--data", path, "--prompt", "дед", env=environment)
    assert done.returncode == 0, done.stderr
    assert "???" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_a_run_without_a_traceback(corpus):
    flags = [*tiny_flags(v6_fast, max_iters=10**9), "--data", str(corpus)]
    process = subprocess.Popen(  # later ones save and sample first
        [sys.executable, "-u", "v6_fast.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert LOSS.match(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
