"""lab/released.py: what a turn measures, and the table."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lab import released

SMALL = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "hidden_size": 36, "intermediate_size": 40, "vocab_size": 97,
    "rms_norm_eps": 1e-5, "rope_theta": 10_000, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip
FLAGS = ["--device", "cpu", "--rounds", "1", "--max_new_tokens", "3"]


@pytest.mark.parametrize("program", released.PROGRAMS)
def test_a_turn_generates_the_tokens_that_count(tmp_path, program, monkeypatch):
    """On a clock that goes on by two seconds whenever it is read."""
    released.make_folder(tmp_path, SMALL)
    now = iter(range(0, 100, 2))
    monkeypatch.setattr(released.time, "perf_counter", lambda: next(now))
    cfg = released.Config(device="cpu", max_new_tokens=10)
    turn = released.take_turn(program, tmp_path, cfg)
    assert turn.tokens_per_second == 5
    assert turn.gigabytes is None or turn.gigabytes >= 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_programs_write_the_same(tmp_path, dtype, monkeypatch):
    released.make_folder(tmp_path, SMALL | {"dtype": dtype})
    texts = []
    real = torch.Tensor.__getitem__

    def note(tensor, index):
        if index == (0, 0) and tensor.ndim == 2:
            texts.append(tensor.tolist())
        return real(tensor, index)

    monkeypatch.setattr(torch.Tensor, "__getitem__", note)
    for program in released.PROGRAMS:
        released.take_turn(program, tmp_path, released.Config(device="cpu", max_new_tokens=6))
    lengths = [len(text[0]) for text in texts]
    assert lengths == [18, 22, 18, 22]
    if dtype == "float32":
        assert texts[:2] == texts[2:]


def test_a_run_prints_a_row_for_each_program(monkeypatch, capsys):
    """In threads, because each process would import transformers anew."""
    monkeypatch.setattr(released, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setitem(released.MODELS, "smollm2-135m", SMALL)
    released.main(FLAGS)
    out = capsys.readouterr().out
    assert out.startswith("smollm2-135m, 19,224 parameters in float32: 3 tokens after 16; ")
    rows = out.splitlines()[-2:]
    assert [row.split("|")[1].strip() for row in rows] == ["`v11c_llama_weights`", "`transformers`"]


def test_the_table_has_the_median_and_the_most_memory():
    speeds = [(1.0, 0.5), (4.0, 0.25), (2.0, 0.75)]
    turns = {"transformers": [released.Turn(*numbers) for numbers in speeds]}
    row = released.table(turns, 7, released.Config(device="cpu")).splitlines()[-1]
    assert row == "| `transformers` | 2.0 | 1.0 to 4.0 | 0.75 GB |"


def test_the_sizes_are_those_of_the_released_models(tmp_path):
    for name, n_parameters in (("smollm2-135m", 134_515_008), ("qwen3-0.6b", 596_049_920)):
        config = released.MODELS[name] | {"dtype": "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        flags = ["--init_from", str(tmp_path), "--device", "cpu"]
        cfg, _, read = released.v11c.read_settings(flags)
        with torch.device("meta"):
            model = released.v11c.LanguageModel(cfg, read["vocab_size"])
        assert sum(p.numel() for p in model.parameters()) == n_parameters
