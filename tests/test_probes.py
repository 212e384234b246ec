"""lab/probes.py: a model without a component stays above its floor, one with it gets below."""

import math
import re

import matplotlib.image
import pytest
import torch
from conftest import refused

import data
from lab import probes
from lab.ladder import ROOT


def cell(task, script, what="", without=()):
    """The index of a cell."""
    for i, c in enumerate(probes.CELLS):
        if (c.task, c.script, c.what, c.without) == (task, script, what, without):
            return i
    raise AssertionError("no such cell")


def losses(index, max_iters, seeds=(1337, 1338)):
    """The losses of a cell's runs on the first test."""
    return [probes.run(index, seed, max_iters, "cpu").losses[0] for seed in seeds]


def model_of(index):
    torch.manual_seed(1)
    return probes.make_model(probes.CELLS[index], "cpu").eval()


# ---- The order of the losses: parent above its floor, child below


def test_a_table_can_not_look_back_and_a_head_can():
    floor = math.log(16)
    noise = 0.002  # the test draws 15,000 symbols
    assert min(losses(cell("look_back", "bigram"), 100)) > floor - noise
    assert max(losses(cell("look_back", "v2_single_head"), 150)) < floor / 2


def test_one_head_can_not_compute_xor_and_two_heads_can():
    floor = math.log(2) / 2
    assert min(losses(cell("xor", "v2_single_head"), 400)) > floor
    assert min(losses(cell("xor", "v3_multi_head", "2 heads"), 400)) < floor / 2


def test_without_positions_a_head_does_not_know_the_order():
    floor = math.log(2)
    assert min(losses(cell("order", "v2_single_head", without=("positions",)), 150)) > floor
    assert max(losses(cell("order", "v2_single_head"), 150)) < floor / 2


# ---- The floors


def one_head(f, g, u, v):
    """The loss of logits (f(a) + g(b)) / (u(a) + v(b)) on (a + b) mod n: float (n, n), (n,)."""
    n = len(u)
    logits = (f[:, None] + g[None]) / (u[:, None] + v[None])[..., None]  # (n, n, n)
    answers = (torch.arange(n)[:, None] + torch.arange(n)) % n  # (n, n)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten()).item()


def test_the_floor_of_xor_is_as_high_as_it_can_be():
    # a = 0 has so much weight that b doesn't show; if a is 1, the answer is read off b.
    f = torch.zeros(2, 2)
    g = torch.tensor([[0.0, 20], [20, 0]])
    u, v = torch.tensor([1e6, 0]), torch.tensor([1.0, 1])
    assert one_head(f, g, u, v) == pytest.approx(math.log(2) / 2, abs=1e-4)


def test_no_weights_found_by_training_get_below_the_floors():
    for n in (2, 5):
        torch.manual_seed(n)
        best = math.inf
        for _ in range(200):
            f, g = 9 * torch.randn(2, n, n)
            u, v = (4 * torch.randn(2, n)).exp()
            best = min(best, one_head(f * u[:, None], g * v[:, None], u, v))
        assert best > math.log(n) / n


def test_the_entropy_of_draws():
    assert probes.entropy_of_draws(1) == pytest.approx(0)
    assert probes.entropy_of_draws(2) == pytest.approx(15 / 16 * math.log(2))
    draws = torch.randint(16, (2000, 40))  # (2000, 40)
    shares = torch.nn.functional.one_hot(draws, 16).float().mean(dim=1)  # (2000, 16)
    mean = torch.special.entr(shares).sum(dim=1).mean().item()
    assert probes.entropy_of_draws(40) == pytest.approx(mean, abs=0.01)


# ---- The tasks


def test_look_back_asks_for_the_symbol_before():
    x, y = probes.look_back(7, 12, n_scored=5)
    assert (y[:, :7] == probes.IGNORED).all()
    assert torch.equal(y[:, 7:], x[:, 6:-1])
    assert x.unique().tolist() == list(range(16))


def test_the_short_tasks_have_every_input_once():
    for windows, count, answer in (
        (probes.xor, 4, lambda a, b: a ^ b),
        (probes.add, 25, lambda a, b: (a + b) % 5),
        (probes.order, 56, lambda a, b: a),
    ):
        x, y = windows()
        assert len(x) == len(x.unique(dim=0)) == count
        assert (y[:, :2] == probes.IGNORED).all()
        assert torch.equal(y[:, 2], answer(x[:, 0], x[:, 1]))
        assert len(x[:, 2].unique()) == 1
        assert x[0, 2] > x[:, :2].max()
    x, _ = probes.order()
    assert (x[:, 0] != x[:, 1]).all()


def test_two_hops_asks_for_what_followed_the_last_occurrence():
    x, y = probes.two_hops(100)
    assert x.shape == y.shape == (100, 32)
    periods = set()
    for symbols, targets in zip(x.tolist(), y.tolist(), strict=True):
        period = targets.count(probes.IGNORED)
        periods.add(period)
        assert len(set(symbols)) == len(set(symbols[:period])) == period
        for t in range(32):
            if t < period:
                assert targets[t] == probes.IGNORED
            else:
                assert symbols[t - period] == symbols[t]
                assert targets[t] == symbols[t - period + 1]
    assert periods == set(range(5, 17))


def test_every_model_is_tested_on_the_same_windows_and_draws_its_own():
    windows = probes.TASKS["look_back"].tests[""]
    torch.manual_seed(3)
    first, _ = probes.draw_test(windows, "cpu")
    drawn = torch.randint(10**6, (9,))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randint(10**6, (9,)))
    second, _ = probes.draw_test(windows, "cpu")
    assert torch.equal(first, second)


# ---- The models and what is measured inside them


def test_without_positions_the_order_of_the_symbols_does_not_matter():
    x, _ = probes.order()
    swapped = x[:, [1, 0, 2]]
    without = model_of(cell("order", "v2_single_head", without=("positions",)))
    complete = model_of(cell("order", "v2_single_head"))
    assert torch.allclose(without(x)[0][:, 2], without(swapped)[0][:, 2], atol=1e-6)
    assert not torch.allclose(complete(x)[0][:, 2], complete(swapped)[0][:, 2], atol=1e-2)
    assert not without.position_embedding.weight.requires_grad


def test_the_deep_models_lack_what_their_label_says():
    for without in ((), ("norms",), ("residuals", "norms")):
        model = model_of(cell("depth", "v5_gpt", "12 layers", without))
        has_norms = any(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
        assert has_norms == ("norms" not in without)
        for parameter in model.blocks.parameters():
            torch.nn.init.zeros_(parameter)
        adds = bool(model.blocks(torch.ones(1, 2, 32)).any())
        assert adds == ("residuals" not in without)
        assert len(model.blocks) == 12


def test_the_start_is_measured_on_the_cpu(monkeypatch):
    """In float64, which MPS doesn't have."""
    moved = []
    to_cpu, to_float64 = torch.nn.Module.cpu, torch.nn.Module.double

    def double(module):
        assert moved == [module]
        return to_float64(module)

    monkeypatch.setattr(torch.nn.Module, "cpu", lambda m: moved.append(m) or to_cpu(m))
    monkeypatch.setattr(torch.nn.Module, "double", double)
    model = model_of(cell("depth", "v5_gpt", "12 layers"))
    x, _ = probes.order()
    measures = probes.measure_start(model, x, x)
    assert all(value > 0 for value in measures.values())
    assert next(model.parameters()).dtype == torch.float32


def test_the_attention_weights_are_those_of_the_model():
    model = model_of(cell("two_hops", "v5_gpt", "2 layers"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seen = []
    for block in model.blocks:
        for head in block.attention.heads:
            head.register_forward_hook(lambda head, args, out: seen.append((head, args[0], out)))
    x, _ = probes.two_hops(3)
    model(x)
    n_calls = len(seen)
    layers = probes.attention_weights(model, x)
    assert n_calls == 4
    for (head, read, out), weights in zip(
        seen[:n_calls], torch.cat(layers), strict=True
    ):
        torch.testing.assert_close(weights @ head.value(read), out)


def test_the_scores_of_perfect_heads_are_1(monkeypatch):
    x, y = probes.two_hops(300)
    T = x.shape[1]
    uniform = torch.ones(300, T, T).tril() / torch.arange(1, T + 1)[:, None]
    previous = torch.eye(T).roll(-1, dims=1).expand(300, T, T)
    induction = torch.zeros(300, T, T)
    for window, targets in enumerate(y.tolist()):
        period = targets.count(probes.IGNORED)
        for t in range(period, T):  # half of the weight on each end of the text
            induction[window, t, t + 1 - period] += 0.5
            induction[window, t, t % period + 1] += 0.5
    layers = [torch.stack((uniform, previous)), torch.stack((induction, uniform))]
    monkeypatch.setattr(probes, "attention_weights", lambda *_: layers)
    measures, maps = probes.measure_attention(None, x, y)
    assert list(measures.values()) == pytest.approx([1, 1, 0, 0], abs=0.25)
    assert list(measures.values())[:2] == pytest.approx([1, 1])
    assert (maps[0] == previous[0].numpy()).all()
    assert maps[1][9:18].argmax(axis=1).tolist() == list(range(1, 10))
    monkeypatch.setattr(probes, "attention_weights", lambda *_: layers[::-1])
    assert max(probes.measure_attention(None, x, y)[0].values()) < 0.3


# ---- The program


def test_the_same_seed_gives_the_same_result():
    index = cell("look_back", "v2_single_head")
    first, second = probes.run(index, 1, 5, "cpu"), probes.run(index, 1, 5, "cpu")
    assert first.losses == second.losses
    assert first.losses != probes.run(index, 2, 5, "cpu").losses


def test_a_run_replaces_what_is_between_the_marks(tmp_path, capsys):
    page = tmp_path / "probes.md"
    page.write_text(f"Above.\n\n{probes.BEGIN}\nold\n{probes.END}\n\nBelow.\n", encoding="utf-8")
    flags = ["--task", "two_hops,order", "--rungs", "v2_single_head,v5_gpt", "--seeds", "2"]
    flags += ["--max_iters", "1", "--processes", "1", "--device", "cpu", "--out", str(tmp_path)]
    probes.main(flags)
    out, err = capsys.readouterr()
    written = page.read_text(encoding="utf-8")
    assert written.startswith(f"Above.\n\n{probes.BEGIN}\n\nSeeds 1337 to 1338, ")
    assert written.endswith(f"\n{probes.END}\n\nBelow.\n")
    assert "old" not in written
    assert out.rstrip("\n") in written
    rows = re.findall(r"^\| (\w+) \| `(\w+)`.*\| 0 of 2 \|$", written, flags=re.MULTILINE)
    v2, v5 = ("order", "v2_single_head"), ("order", "v5_gpt")
    assert rows == [("two_hops", "v5_gpt")] * 2 + [v2, v2, v5]
    assert "10/10" in err
    picture = matplotlib.image.imread(tmp_path / "probes.png")
    assert picture[..., :3].std() > 0.05


def test_without_matplotlib_there_is_a_table_and_no_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probes, "find_spec", lambda name: None)
    flags = ["--task", "order", "--rungs", "v2_single_head", "--seeds", "1", "--max_iters", "1"]
    probes.main([*flags, "--processes", "1", "--device", "cpu", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "| order | `v2_single_head` |" in out
    assert "notice: no picture without matplotlib; " in err
    assert [path.name for path in tmp_path.iterdir()] == ["probes.md"]


def test_the_table_has_means_and_counts():
    index = cell("xor", "v2_single_head")
    runs = [probes.Run(index, s, [0.5 - 0.1 * s], [0.75 + 0.25 * s], {}, []) for s in range(2)]
    cfg = data.read_flags(probes.Config, "", ["--device", "cpu"])
    last = probes.table(runs, cfg).splitlines()[-1]
    assert last == "| xor | `v2_single_head` | 0.3466 | 0.4500 | 0.4000 | 87.5% | 1 of 2 |"


def test_bad_flags(capsys, tmp_path):
    common = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert "--task: nand unknown" in refused(probes, capsys, *common, "--task", "xor,nand")
    assert "--rungs: v99 unknown" in refused(probes, capsys, *common, "--rungs", "v99")
    line = refused(probes, capsys, *common, "--task", "xor", "--rungs", "bigram")
    assert "--task, --rungs: " in line
    assert "--task, --rungs: " in refused(probes, capsys, *common, "--task", " ,")
    for flag, value in (("--seeds", "0"), ("--processes", "-1"), ("--max_iters", "-1")):
        assert flag in refused(probes, capsys, *common, flag, value)
    assert not (tmp_path / "out").exists()


def test_a_page_that_is_not_the_programs_own_stays_as_it_is(capsys, tmp_path):
    flags = ["--task", "xor", "--device", "cpu", "--out"]
    (tmp_path / "probes.md").write_text("mine", encoding="utf-8")
    assert "--out" in refused(probes, capsys, *flags, tmp_path)
    assert (tmp_path / "probes.md").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "probes.png").exists()
    assert "--out" in refused(probes, capsys, *flags, tmp_path / "probes.md")


def test_the_page_in_docs_is_about_the_models_and_the_floors_of_the_program():
    page = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
    _, _, rest = page.partition(probes.BEGIN)
    results, _, _ = rest.partition(probes.END)
    row = r"^\| (\w+) \| (.+) \| (\S+) \| \S+ \| \S+ \| \S+ \| \d of 5 \|$"
    found = re.findall(row, results, flags=re.MULTILINE)
    expected = []
    for c in probes.CELLS:
        for i, floor in enumerate(c.floors):
            text = "–" if floor is None else f"{floor:.4f}"
            expected.append((c.task, probes.label_of(c, i), text))
    assert found == expected
