"""The comparison: the same runs as the rungs' own, in a table and a picture."""

import json
import re
import subprocess
import sys

import matplotlib.image
import pytest
from conftest import TEXT, losses_and_sample, tiny_flags

import v7_training
from lab import compare
from lab.ladder import ROOT, RUNGS


def test_the_comparison_of_all_rungs(tmp_path, corpus, capsys):
    flags = [*tiny_flags(v7_training), "--data", str(corpus), "--prompt", "The "]
    command = [sys.executable, "lab/compare.py", *flags, "--out", str(tmp_path / "new" / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "new" / "out" / "compare.md").read_text(encoding="utf-8")
    assert written in done.stdout
    rows = re.findall(r"^\| `(\w+)\.py` \|(.*)\|$", written, flags=re.MULTILINE)
    assert [name for name, _ in rows] == RUNGS
    assert f"on {3 * 4 * 5} tokens" in written

    for rung in RUNGS:  # each run is the rung's own
        names = {flag[2:] for flag in flags if flag.startswith("--")}
        module = __import__(rung)
        own = [*tiny_flags(module), "--data", str(corpus), "--prompt", "The "]
        more = {flag[2:] for flag in own if flag.startswith("--")} - names
        assert more <= {"tokenizer"}, "which compare.py, whose tokens are characters, needs not"
        module.main(own)
        lines = losses_and_sample(capsys.readouterr().out).splitlines()
        losses = [line for line in lines if line.startswith("step")]
        assert len(losses) == 3
        assert "\n".join(losses) in losses_and_sample(done.stdout)

    picture = matplotlib.image.imread(tmp_path / "new" / "out" / "compare.png")
    assert picture.shape[:2] == (600, 1200)
    assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rungs", "v5_gpt,v99"], "v99"),
        (["--prompt", "é"], "--prompt"),
        (["--n_head", "5"], "--n_head"),
        (["--grad_accum_steps", "2"], "--grad_accum_steps"),
        (["--resume"], "--resume"),
        (["--rungs", ","], "--rungs and --logs: both empty"),
    ],
)
def test_bad_flags(corpus, tmp_path, capsys, flags, said):
    common = [*tiny_flags(v7_training), "--rungs", "bigram,v5_gpt", "--data", str(corpus)]
    with pytest.raises(SystemExit) as stop:
        compare.main([*common, "--out", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("blocked", ["out", "out/compare.md", "out/compare.png"])
def test_a_place_that_can_not_be_written(corpus, tmp_path, capsys, blocked):
    path = tmp_path / blocked
    if blocked == "out":
        path.write_text(TEXT, encoding="utf-8")
    else:
        path.mkdir(parents=True)
    common = [*tiny_flags(v7_training), "--rungs", "bigram", "--data", str(corpus)]
    with pytest.raises(SystemExit) as stop:
        compare.main([*common, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: --out {tmp_path / 'out'}")
    assert err.count("\n") == 1
    if blocked == "out":
        assert path.read_text(encoding="utf-8") == TEXT


def test_logs_are_drawn_too(tmp_path, capsys, corpus):
    log = tmp_path / "log.jsonl"
    entries = [{"step": s, "train_loss": 4 - s, "val_loss": 5 - s, "seconds": s} for s in range(3)]
    log.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    assert compare.read_log(str(log)) == [(0, 4.0, 5.0), (1, 3.0, 4.0), (2, 2.0, 3.0)]
    out = tmp_path / "out"
    flags = [*tiny_flags(v7_training), "--data", str(corpus), "--out", str(out), "--rungs", ""]
    compare.main([*flags, "--logs", str(log)])
    picture = matplotlib.image.imread(out / "compare.png")
    assert picture[..., :3].std() > 0.02
    capsys.readouterr()
    wrong = ["", "no JSON", "{}", "[1]", "[" * 10**5]
    for loss in ('"x"', "NaN", "1e999"):
        wrong.append(f'{{"step": 1, "train_loss": {loss}, "val_loss": 1}}')
    wrong.append('{"step": "one", "train_loss": 1, "val_loss": 1}')
    for text in wrong:
        log.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            compare.main([*flags, "--logs", str(log)])
        assert stop.value.code == 2
        assert f"--logs {log}" in capsys.readouterr().err
