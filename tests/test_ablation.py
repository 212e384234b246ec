"""lab/ablation.py: each variant lacks what its name says, and nothing else."""

import subprocess
import sys

import pytest
import torch
from conftest import TEXT, VOCAB_SIZE, refused, shaken, tiny_flags
from torch import nn

import data
import v5_gpt
from lab import ablation
from lab.ladder import ROOT


def config(**changes):
    flags = tiny_flags(v5_gpt, **changes)
    return data.read_flags(ablation.Config, "", flags)


def variant(name, **changes):
    torch.manual_seed(1)
    return ablation.make_model(name, config(**changes), VOCAB_SIZE)


def weights_of(model):
    return {name: weight for name, weight in model.state_dict().items() if "ln_" not in name}


@pytest.mark.parametrize("name", ["no residual connections", "no LayerNorm"])
def test_the_weights_start_as_those_of_v5(name):
    plain, changed = weights_of(variant("v5")), weights_of(variant(name))
    assert list(plain) == list(changed)
    assert all(torch.equal(plain[key], changed[key]) for key in plain)


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_every_variant_draws_the_same_batches(name):
    variant("v5")
    expected = torch.randint(10**6, (9,))
    variant(name)
    assert torch.equal(torch.randint(10**6, (9,)), expected)


def test_without_residual_connections_a_part_replaces_its_input():
    model = variant("no residual connections")
    for block in model.blocks:
        for projection in (block.attention.projection, block.feed_forward.projection):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
    assert not model.blocks(torch.randn(2, 5, 18)).any()


def test_without_layer_norm_the_scale_of_the_input_stays():
    assert not any(isinstance(m, nn.LayerNorm) for m in variant("no LayerNorm").modules())
    block = shaken(variant("no LayerNorm")).blocks[0]
    x = torch.randn(2, 5, 18)
    middle = x + block.attention(x)
    torch.testing.assert_close(block(x), middle + block.feed_forward(middle))


def test_the_default_initialisation_is_that_of_pytorch():
    model = variant("default initialisation", n_embd=96)
    assert model.token_embedding.weight.std().item() == pytest.approx(1, rel=0.1)
    bound = 96**-0.5
    weight = model.blocks[0].feed_forward.expansion.weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_small_text_is_the_start_of_the_training_split_and_dropout_is_set(monkeypatch, splits):
    seen = []

    def train(model, train_data, val_data, cfg):
        seen.append((train_data.tolist(), cfg.dropout))
        return [(0, 3.0, 3.0), (9, 1.0, 2.0)]

    monkeypatch.setattr(ablation, "SMALL_TEXT", 50)
    monkeypatch.setattr(v5_gpt, "train", train)
    for name in ("v5", "dropout 0.2", "small text", "small text with dropout 0.2"):
        first_loss, train_loss, _ = ablation.run(name, config(dropout=0.1), VOCAB_SIZE, *splits)
        assert (first_loss, train_loss) == (3.0, 1.0)
    whole, part = splits[0].tolist(), splits[0][:50].tolist()
    assert seen == [(whole, 0.1), (whole, 0.2), (part, 0.1), (part, 0.2)]


def test_the_table_has_means_and_ranges():
    runs = [(4.0, 1.0, 2.0), (5.0, 2.0, 4.0), (6.0, 3.0, 9.0)]
    last = ablation.table({"v5": runs}, config()).splitlines()[-1]
    assert last == "| v5 | 5.00 | 2.000 | 5.000 | 2.000 to 9.000 |"


def test_a_run_writes_what_it_prints(tmp_path, corpus):
    flags = [*tiny_flags(v5_gpt), "--data", str(corpus), "--seeds", "2"]
    flags += ["--variants", "v5, no LayerNorm", "--out", str(tmp_path / "new")]
    command = [sys.executable, "lab/ablation.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "new" / "ablation.md").read_text(encoding="utf-8")
    assert done.stdout.endswith(written + "\n")
    starts = ("| v5 |", "| no LayerNorm |")
    rows = [line for line in written.splitlines() if line.startswith(starts)]
    assert len(rows) == 2
    assert "v5, seed 1338" in done.stdout
    assert "4/4" in done.stderr


def test_bad_flags(capsys, tmp_path, corpus):
    flags = [*tiny_flags(v5_gpt), "--data", str(corpus), "--out", str(tmp_path)]
    line = refused(ablation, capsys, *flags, "--variants", "v5,no attention")
    assert "--variants 'no attention': choose from v5, no residual connections, " in line
    assert "--variants: empty" in refused(ablation, capsys, *flags, "--variants", " ,")
    assert "--seeds" in refused(ablation, capsys, *flags, "--seeds", "0")
    (tmp_path / "ablation.md").write_text("mine", encoding="utf-8")
    for more in (["--n_head", "5"], ["--data", "missing.txt"], ["--block_size", "999"]):
        assert more[0] in refused(ablation, capsys, *flags, *more)
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8") == "mine"
    (tmp_path / "file").write_text(TEXT, encoding="utf-8")
    assert "--out" in refused(ablation, capsys, *flags, "--out", tmp_path / "file")
