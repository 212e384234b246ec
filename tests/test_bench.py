"""The bench: what a turn measures, the table of medians, and its command line."""

import pytest
import torch
from conftest import TEXT
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import v2_single_head
from lab import bench
from lab.ladder import load
from part2_training import v6b_fast
from part4_gpt2 import v8a_byte_pairs
from support import hardware

SHAPE = {"batch_size": 3, "block_size": 8, "n_embd": 24, "n_head": 2, "n_layer": 2}
FLAGS = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
FLAGS += ["--device", "cpu", "--rounds", "1", "--steps", "2"]


def config(**changes):
    return bench.Config(**SHAPE | {"device": "cpu", "steps": 2, "compile": False} | changes)


@pytest.mark.parametrize("name", bench.MODELS)
def test_a_turn_counts_the_steps_after_the_first(name, monkeypatch):
    """On a clock that goes on by a second for each step of an optimizer, and by no other time."""
    now = [0.0]

    def clock():
        now[0] += 1e-9
        return now[0]

    def step_takes_a_second(optimizer, *_):
        if not isinstance(optimizer, torch.optim.AdamW):
            return  # v10a has another one before it
        now[0] += 1 if steps else 100  # the first one, as a warm-up does, takes longer
        steps.append(1)

    steps = []
    hook = register_optimizer_step_post_hook(step_takes_a_second)
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    monkeypatch.setattr(bench, "flops_per_token", lambda model, name, cfg: 100.0)
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype, device: 1000.0)
    turn = bench.take_turn(name, config())
    hook.remove()
    assert len(steps) == 3
    assert turn.tokens_per_second == pytest.approx(3 * 8 * 2 / 2, rel=1e-3)
    assert turn.dtype == "float32"
    assert turn.utilisation == pytest.approx(turn.tokens_per_second * 100 / 1000)


@pytest.fixture
def matmul_dtypes(monkeypatch):
    """The dtypes that linear layers compute in, on hardware that supports bfloat16."""
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: True)
    dtypes = set()

    def note(module, _, out):
        if type(module).__name__ in ("Linear", "Conv1D"):  # transformers has the latter
            dtypes.add(str(out.dtype).removeprefix("torch."))

    hook = register_module_forward_hook(note)
    yield dtypes
    hook.remove()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("v5_gpt", "float32"), ("v6b_fast", "bfloat16"), ("v7b_kv_cache", "bfloat16"),
        ("v8c_gpt2", "bfloat16"), ("v9d_gqa", "bfloat16"), ("transformers", "float32"),
        ("transformers_autocast", "bfloat16"),
    ],
)  # fmt: skip
def test_the_dtype_of_a_turn_is_that_of_its_matmuls(name, dtype, matmul_dtypes, monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype, device: 1000.0)
    turn = bench.take_turn(name, config(n_embd=128))
    assert {turn.dtype} == matmul_dtypes == {dtype}


@pytest.mark.parametrize("name", bench.WRITERS)
def test_texts_are_generated_in_float32(name, matmul_dtypes):
    bench.write_turn(name, config(n_embd=128), 1)
    assert matmul_dtypes == {"float32"}


def test_flops_are_counted_as_the_paper_does():
    cfg = bench.Config(device="cpu", compile=False)  # full size
    with torch.device("meta"):
        model = v6b_fast.LanguageModel(bench.config_of(v6b_fast, cfg), 65)
        single_head = v2_single_head.LanguageModel(bench.config_of(v2_single_head, cfg), 65)
    n_weights = 6 * 12 * 384**2 + 384 * 65
    expected = 6 * n_weights + 12 * 6 * 384 * 256
    assert bench.flops_per_token(model, "v6b_fast", cfg) == expected
    assert bench.flops_per_token(None, "transformers", cfg) == expected
    expected = 6 * (3 * 384**2 + 384 * 65) + 12 * 384 * 256
    assert bench.flops_per_token(single_head, "v2_single_head", cfg) == expected


def test_the_matmul_rate_is_that_of_the_fastest(monkeypatch):
    times = iter([0, 2.0, 10, 11.0, 20, 23.0, 30, 34.0, 40, 45.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    assert bench.matmul_rate("float32", "cpu") == 2 * 1024**3 / 1.0


def test_the_reference_has_the_shape_of_the_scripts():
    model = bench.Reference(v6b_fast.Config(**SHAPE, dropout=0.0), 65)
    ids = torch.zeros(3, 8, dtype=torch.int64)
    logits, loss = model(ids, ids)
    assert logits.shape == (3, 8, 65)
    assert loss.shape == ()
    ours = v6b_fast.LanguageModel(v6b_fast.Config(**SHAPE, device="cpu"), 65)
    # GPT-2 has a bias for queries, keys and values, and no weights of its own in the output layer
    more = 2 * 3 * 24 - 65 * 24 - 65
    count = sum(p.numel() for p in ours.parameters()) + more
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_the_table_has_medians_and_ratios():
    def turn(speed, gb):
        return bench.Turn(speed, speed / 1000, 0.5, gb, "float32")

    turns = {
        "v5_gpt": [turn(100.0, 1.0), turn(900.0, 2.0), turn(200.0, 2.5)],
        "v6b_fast": [turn(500.0, 0.75), turn(400.0, 1.0), turn(1.0, 1.25)],
    }
    rows = bench.table(turns, config()).splitlines()[-2:]
    assert rows == [
        "| `v5_gpt` | float32 | 200 | 100 to 900 | 1.00 | 20% | 2.00 GB |",
        "| `v6b_fast` | float32 | 400 | 1 to 500 | 2.00 | 40% | 0.75 GB |",
    ]
    del turns["v5_gpt"]
    turns["v6b_fast"][-1].gb_after = None  # as on Windows
    row = bench.table(turns, config()).splitlines()[-1]
    assert row == "| `v6b_fast` | float32 | 400 | 1 to 500 | - | 40% | - |"


def test_a_run_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    more = ["--models", "v5_gpt, v5_gpt", "--writers", "v7b_kv_cache", "--out", str(out)]
    bench.main([*FLAGS, *more])
    printed, err = capsys.readouterr()
    written = (out / "bench.md").read_text(encoding="utf-8")
    assert written in printed
    rows = [row for row in written.splitlines() if "`" in row]
    starts = ["| `v5_gpt` | float32 | ", "| 1 | `v7b_kv_cache` | ", "| 16 | `v7b_kv_cache` | "]
    assert len(rows) == 3
    assert all(row.startswith(start) for row, start in zip(rows, starts, strict=True))
    assert "3/3" in err


@pytest.mark.parametrize("name", bench.WRITERS)
def test_a_turn_of_writing_counts_all_tokens_but_the_first(name, monkeypatch):
    """On a clock that goes on by a second from one look to the next."""
    now, lengths = [0.0], []

    def clock():
        now[0] += 1
        return now[0]

    script = v6b_fast if name == "transformers" else load(name)
    make = bench.Reference if name == "transformers" else script.LanguageModel
    real = bench.generate

    def generate(script, model, *args):
        assert type(model) is make
        assert not model.training
        out = real(script, model, *args)
        lengths.append(tuple(out.shape))
        return out

    monkeypatch.setattr(bench, "generate", generate)
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    assert bench.write_turn(name, config(), 16) == 16 * 7
    assert lengths == [(16, 8), (16, 8)]


def test_the_table_of_writing_has_medians_and_ratios():
    turns = {
        (1, "v7a_sampling"): [10.0, 30.0, 20.0],
        (1, "v7b_kv_cache"): [140.0, 100.0, 110.0],
    }
    rows = bench.write_table(turns, config()).splitlines()[-2:]
    assert rows == [
        "| 1 | `v7a_sampling` | 20 | 10 to 30 | 1.00 |",
        "| 1 | `v7b_kv_cache` | 110 | 100 to 140 | 5.50 |",
    ]
    del turns[1, "v7a_sampling"]
    assert bench.write_table(turns, config()).splitlines()[-1].endswith(" | - |")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--models", "v5_gpt,v99"], "v99"),
        (["--writers", "v6b_fast"], "v6b_fast"),
        (["--models", ",", "--writers", ""], "all empty"),
        (["--vocabularies", "255"], "--vocabularies 255: not a number from 256 to 65,536"),
        (["--vocabularies", "300,many"], "--vocabularies many: not a number"),
        (["--block_size", "20000"], "--block_size 20000"),
        (["--dtype", "half"], "--dtype: invalid choice: 'half'"),
        (["--rounds", "0"], "--rounds 0"),
        (["--out", "FILE"], "--out"),
        (["--n_head", "5"], "--n_head 5"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, said):
    blocked = tmp_path / "file"
    blocked.write_text(TEXT, encoding="utf-8")
    flags = [str(blocked) if flag == "FILE" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        bench.main([*FLAGS, "--models", "v6b_fast", "--out", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err.splitlines()[-1]
    assert "error: " in err.splitlines()[-1]


def test_no_transformers(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.main([*FLAGS, "--models", "transformers", "--out", str(tmp_path)])
    assert "requirements-dev.txt" in capsys.readouterr().err


def test_the_table_does_not_say_compiled_if_there_is_no_compiler(monkeypatch, capsys, tmp_path):
    class Here:
        """A pool whose process is this one."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, turn, *args):
            self.result = lambda: turn(*args)
            return self

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype, device: 1000.0)
    monkeypatch.setattr(hardware, "compiler_works", lambda device: False)
    bench.main([*FLAGS, "--models=v6b_fast", "--writers=", f"--out={tmp_path}", "--compile"])
    assert "torch.compile off" in capsys.readouterr().out


def test_a_process_that_dies(monkeypatch, capsys, tmp_path):
    class Dead:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def submit(self, *_):
            raise bench.BrokenProcessPool

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Dead)
    with pytest.raises(SystemExit) as stop:
        bench.main([*FLAGS, "--models", "v5_gpt", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "v5_gpt" in capsys.readouterr().err


def test_the_tokens_of_v8a_are_timed(tmp_path, capsys, monkeypatch):
    """Learning ends before encoding begins, and the text is all of Shakespeare."""
    text = "the fox and the hen " * 50
    seen = []
    learn, encode = v8a_byte_pairs.learn_merges, v8a_byte_pairs.BytePairTokenizer.encode

    def learn_merges(text, vocab_size):
        seen.append(("learn", len(text), vocab_size))
        return learn(text, vocab_size)

    def encode_text(tokenizer, text):
        seen.append(("encode", len(text), tokenizer.n_vocab))
        return encode(tokenizer, text)

    times = iter([0.0, 1.5, 1.75, 0.0, 2.5, 2.75])
    monkeypatch.setattr(data, "load_text", lambda name: text)
    monkeypatch.setattr(v8a_byte_pairs, "learn_merges", learn_merges)
    monkeypatch.setattr(v8a_byte_pairs.BytePairTokenizer, "encode", encode_text)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    turns = [bench.token_turn(258, config()) for _ in range(2)]
    assert seen == 2 * [("learn", 900, 258), ("encode", 1000, 258)]
    assert turns == [(1.5, 0.25), (2.5, 0.25)]
    rows = bench.token_table({1024: turns}, config()).splitlines()
    assert rows[-1] == "| 1,024 | 2.00 | 1.50 to 2.50 | 0.25 | 0.25 to 0.25 |"
