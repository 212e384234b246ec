"""lab/compare.py: the runs of the scripts' own commands, in a table and a picture."""

import json
import math
import re

import matplotlib.image
import pytest
from conftest import TEXT, losses_and_sample, tiny_flags

from lab import compare
from lab.ladder import SCRIPTS, load
from part4_gpt2 import v8a_byte_pairs
from part5_modern import v9d_gqa


def test_the_comparison_of_all_scripts(tmp_path, corpus, capsys, monkeypatch):
    drawn = []  # the arguments of each call: to draw takes longer than to train at this size
    draw = compare.draw
    monkeypatch.setattr(compare, "draw", lambda *arguments: drawn.append(arguments))
    flags = [*tiny_flags(v9d_gqa), "--data", str(corpus), "--prompt", "The "]
    compare.main([*flags, "--out", str(tmp_path / "new" / "out")])
    out = capsys.readouterr().out
    written = (tmp_path / "new" / "out" / "compare.md").read_text(encoding="utf-8")
    assert written in out
    rows = re.findall(r"^\| `(\w+)\.py` \|(.*)\|$", written, flags=re.MULTILINE)
    names = compare.ON_CHARACTERS.split(",")
    assert [name for name, _ in rows] == names
    assert names == [name for name in SCRIPTS if not name.startswith(("v8", "v12"))]
    assert f"on {3 * 4 * 5} tokens" in written

    for name in names:  # each run is the one of the script's own command
        script = load(name)
        script.main([*tiny_flags(script), "--data", str(corpus), "--prompt", "The "])
        lines = losses_and_sample(capsys.readouterr().out).splitlines()
        losses = [line for line in lines if line.startswith("step")]
        assert len(losses) == 3
        assert "\n".join(losses) in losses_and_sample(out)

    assert len(drawn) == len(names)  # after each script
    draw(*drawn[-1])
    picture = matplotlib.image.imread(tmp_path / "new" / "out" / "compare.png")
    assert picture.shape[:2] == (600, 1200)
    assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scripts", "v5_gpt,v99"], "v99"),
        (["--prompt", "é"], "--prompt"),
        (["--n_head", "5"], "--n_head"),
        (["--grad_accum_steps", "2"], "--grad_accum_steps"),
        (["--resume"], "--resume"),
        (["--scripts", ","], "--scripts and --logs: both empty"),
    ],
)
def test_bad_flags(corpus, tmp_path, capsys, flags, said):
    common = [*tiny_flags(v9d_gqa), "--scripts", "bigram,v5_gpt", "--data", str(corpus)]
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
    common = [*tiny_flags(v9d_gqa), "--scripts", "bigram", "--data", str(corpus)]
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
    flags = [*tiny_flags(v9d_gqa), "--data", str(corpus), "--out", str(out), "--scripts", ""]
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


def test_other_tokens_are_compared_in_bits_per_byte(tmp_path, corpus, capsys):
    """v8a has tokens of its own, v5 has characters, each of which is a byte here."""
    flags = [*tiny_flags(v9d_gqa), "--data", str(corpus), "--prompt", "The "]
    compare.main([*flags, "--out", str(tmp_path), "--scripts", "v5_gpt,v8a_byte_pairs"])
    written = (tmp_path / "compare.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.py` \| \S+ \| \S+ \| (\S+) \| (\S+) \|", written, re.MULTILINE)
    (name, loss, bits), (other, other_loss, other_bits) = rows
    assert (name, other) == ("v5_gpt", "v8a_byte_pairs")
    assert float(bits) == pytest.approx(float(loss) / math.log(2), abs=2e-3)
    n_train = len(TEXT) * 9 // 10
    tokenizer = v8a_byte_pairs.make_tokenizer({}, TEXT[:n_train], 1024)
    tokens_per_byte = len(tokenizer.encode(TEXT[n_train:])) / len(TEXT[n_train:])
    expected = float(other_loss) / math.log(2) * tokens_per_byte
    assert float(other_bits) == pytest.approx(expected, abs=2e-3)
    assert written.count("The ") >= 2, "samples"
