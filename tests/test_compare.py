"""The comparison: the same runs as the rungs' own, in a table and a picture."""

import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import TEXT, VOCAB_SIZE, tiny, tiny_flags, without_timings

import data
import v5_gpt
import v6_fast
from lab import compare
from lab.ladder import ROOT, RUNGS, whole_loss


def test_the_whole_loss_is_that_of_every_window_once():
    tokenizer = data.CharTokenizer(TEXT)
    tokens = np.array(tokenizer.encode(TEXT * 2), dtype=np.uint16)
    model = v5_gpt.LanguageModel(tiny(v5_gpt), VOCAB_SIZE)
    model.eval()
    losses = []
    for start in range(0, len(tokens) - 5, 5):
        window = torch.from_numpy(tokens[start : start + 6].astype(np.int64))[None]
        losses.append(model(window[:, :-1], window[:, 1:])[1].item())
    assert len(losses) > 64  # more than one batch of windows, and the last batch not a full one
    assert len(losses) % 64
    model.train()
    assert whole_loss(model, tokens, 5, "cpu") == pytest.approx(np.mean(losses), rel=1e-5)
    assert model.training


def test_the_comparison_of_all_rungs(tmp_path, corpus, capsys):
    flags = [*tiny_flags(v6_fast), "--data", str(corpus), "--prompt", "The "]
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
        assert names >= {flag[2:] for flag in own if flag.startswith("--")}
        module.main(own)
        lines = without_timings(capsys.readouterr().out).splitlines()
        losses = [line for line in lines if line.startswith("step")]
        assert len(losses) == 3
        assert "\n".join(losses) in without_timings(done.stdout)

    picture = matplotlib.image.imread(tmp_path / "new" / "out" / "compare.png")
    assert picture.shape[:2] == (600, 960)
    assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rungs", "v5_gpt,v99"], "v99"),
        (["--prompt", "é"], "--prompt"),
        (["--n_head", "5"], "--n_head"),
    ],
)
def test_bad_flags(corpus, tmp_path, capsys, flags, said):
    common = [*tiny_flags(v6_fast), "--rungs", "bigram,v5_gpt", "--data", str(corpus)]
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
    common = [*tiny_flags(v6_fast), "--rungs", "bigram", "--data", str(corpus)]
    with pytest.raises(SystemExit) as stop:
        compare.main([*common, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: --out {tmp_path / 'out'}")
    assert err.count("\n") == 1
    if blocked == "out":
        assert path.read_text(encoding="utf-8") == TEXT
