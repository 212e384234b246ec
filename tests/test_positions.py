"""positions.py: the loss at each position of a window."""

import numpy as np
import pytest
import torch
from conftest import TEXT, tiny_flags

import data
from lab import positions
from lab.common import whole_loss
from part2_training import v6d_checkpoints as v6d
from support import checkpoints


@pytest.fixture
def run(corpus, tmp_path, capsys):
    """The folder of a short run."""
    folder = tmp_path / "run"
    v6d.main([*tiny_flags(v6d, out_dir=folder), "--data", str(corpus)])
    capsys.readouterr()
    return folder


def test_their_mean_is_the_loss_of_the_whole_split(run):
    label, losses = positions.measure(str(run))
    saved = checkpoints.read_checkpoint(run / "best.pt")
    cfg = data.read_flags(v6d.Config, "", [], saved["config"])
    tokenizer = data.CharTokenizer(saved["characters"])
    model = v6d.LanguageModel(cfg, tokenizer.n_vocab)
    checkpoints.load_weights(model, saved)
    _, val_data = data.split(tokenizer.encode(TEXT), cfg.block_size)
    assert len(losses) == cfg.block_size
    assert losses.mean() == pytest.approx(whole_loss(model, val_data, cfg), abs=1e-5)
    assert label.startswith("v6d_checkpoints.py, ")


def test_a_position_has_the_loss_of_its_own_targets():
    class Guesser(torch.nn.Module):
        """Is sure of the right target at position 1, which is the token itself, and of no other."""

        def forward(self, idx):
            logits = torch.zeros(*idx.shape, 5)
            logits[:, 1] = 100 * torch.nn.functional.one_hot(idx[:, 1], 5).float()
            return logits, None

    tokens = np.array([0, 1, 1, 2, 3, 3, 4, 2, 2, 4], dtype=np.uint16)
    losses = positions.losses_by_position(Guesser(), tokens, block_size=3, batch_size=2)
    assert losses[1] == pytest.approx(0, abs=1e-5)
    assert losses[[0, 2]] == pytest.approx(np.log(5))


def test_it_prints_a_table_and_draws(run, tmp_path, capsys):
    picture = tmp_path / "positions.png"
    positions.main([str(run), "--picture", str(picture)])
    out = capsys.readouterr().out
    assert "positions 1 " in out
    assert "whole split" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ranges_of_positions_cover_the_window():
    assert positions.table(np.arange(6.0)).split() == [
        "positions", "1", "0.0000", "positions", "2", "1.0000", "positions", "3", "to", "4",
        "2.5000", "positions", "5", "to", "6", "4.5000",
    ]


@pytest.mark.parametrize("where", ["nothing", "picture"])
def test_what_cannot_be_used_is_refused(run, tmp_path, capsys, where):
    flags = [str(tmp_path / "none")]
    if where == "picture":
        flags = [str(run), "--picture", str(tmp_path / "no folder" / "x.png")]
    with pytest.raises(SystemExit) as stop:
        positions.main(flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
