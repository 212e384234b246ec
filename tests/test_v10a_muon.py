"""v10a_muon.py: orthogonal updates, PyTorch's own Muon, and checkpoints of two optimizers."""

from pathlib import Path

import pytest
import torch
from conftest import build, random_tokens, refused, shaken, stacked, tiny, tiny_flags

from lab.common import generate
from part5_modern import v9d_gqa as v9d
from part6_speedrun import v10a_muon as v10a
from part7_released import v11a_llama as v11a
from support import hardware
from support.old import runs


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def bfloat16(request, monkeypatch):
    """Whether the hardware has bfloat16."""
    monkeypatch.setattr(hardware, "supports_bfloat16", lambda device: request.param)
    return request.param


# ---- orthogonalising


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 16, 40), (3, 40, 16), (2, 96, 384)])
def test_singular_values_come_close_to_one(shape, bfloat16):
    """The iteration doesn't converge to 1, but all values end between 0.5 and 1.3."""
    torch.manual_seed(1)
    matrices = torch.randn(shape)
    values = torch.linalg.svdvals(v10a.orthogonalise(matrices))
    assert values.shape == (shape[0], min(shape[1:]))
    assert torch.linalg.svdvals(matrices).max() > 5
    small = torch.linalg.svdvals(matrices) / matrices.norm(dim=(1, 2))[:, None] < 0.01
    assert values.max() < 1.3
    assert values[~small].min() > 0.5


def test_singular_vectors_stay(bfloat16):
    """Only the singular values change: in the basis of u and v, the update stays diagonal."""
    torch.manual_seed(2)
    u, _ = torch.linalg.qr(torch.randn(5, 5))
    v, _ = torch.linalg.qr(torch.randn(30, 5))
    matrix = u @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])) @ v.T
    (update,) = v10a.orthogonalise(matrix[None])
    mixed = u.T @ update @ v
    assert (mixed.diag() - 1).abs().max() < 0.35
    assert (mixed - torch.diag(mixed.diag())).abs().max() < 0.02
    assert (update - u @ mixed @ v.T).abs().max() < 0.02


def test_a_matrix_of_zeros_stays():
    assert torch.equal(v10a.orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_float32_is_used_without_bfloat16_hardware(monkeypatch):
    dtypes = set()
    real = torch.Tensor.__matmul__

    def note(a, b):
        dtypes.add(a.dtype)
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", note)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(hardware, "supports_bfloat16", lambda device, answer=supported: answer)
        dtypes.clear()
        assert v10a.orthogonalise(torch.randn(1, 4, 6)).dtype == torch.float32
        assert dtypes == {dtype}


# ---- the optimizer


def train_with(make_optimizer, n_steps=10):
    """Fit two matrices to a target with an optimizer made of them; return what they become."""
    torch.manual_seed(3)
    first = torch.nn.Parameter(torch.randn(24, 12) / 5)
    second = torch.nn.Parameter(torch.randn(12, 24) / 5)
    x, y = torch.randn(50, 12), torch.randn(50, 12)
    optimizer = make_optimizer([first, second])
    for _ in range(n_steps):
        loss = (torch.relu(x @ first.T) @ second.T - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first.detach(), second.detach()


def test_ten_steps_equal_those_of_pytorch(bfloat16):
    """PyTorch always rounds to bfloat16, by up to 0.4% each time; ten steps add up to below 3%."""
    settings = {"lr": 0.02, "weight_decay": 0.1}
    ours = train_with(lambda parameters: v10a.Muon([{"params": parameters}], **settings))
    theirs = train_with(
        lambda parameters: torch.optim.Muon(
            parameters, adjust_lr_fn="match_rms_adamw", momentum=0.95, **settings
        )
    )
    start = train_with(lambda parameters: v10a.Muon([{"params": parameters}], **settings), 0)
    for mine, other, before in zip(ours, theirs, start, strict=True):
        change = (other - before).norm()
        assert change > 0.5
        assert (mine - other).norm() < 0.03 * change


def test_weight_decay_is_decoupled():
    """A parameter without a gradient shrinks by lr * weight_decay, and nothing else happens."""
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(4, 6)
    v10a.Muon([{"params": [parameter]}], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.1 * 0.5))


def test_an_update_is_as_large_as_one_of_adamw():
    """Its root mean square is about 0.2 times the learning rate, whatever the shape."""
    for shape in ((64, 64), (64, 256), (256, 64)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape)
        v10a.Muon([{"params": [parameter]}], lr=1.0, weight_decay=0.0).step()
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_queries_keys_and_values_are_matrices_of_their_own():
    """As if each were a parameter by itself."""
    torch.manual_seed(4)
    together = torch.nn.Parameter(torch.randn(12 + 6 + 6, 12))
    together.grad = torch.randn(24, 12)
    apart = [torch.nn.Parameter(part.clone()) for part in together.detach().split([12, 6, 6])]
    for part, gradient in zip(apart, together.grad.split([12, 6, 6]), strict=True):
        part.grad = gradient.clone()
    how = {"lr": 0.1, "weight_decay": 0.1}
    v10a.Muon([{"params": [together], "rows": [12, 6, 6]}], **how).step()
    v10a.Muon([{"params": apart}], **how).step()
    torch.testing.assert_close(together.detach(), torch.cat(apart).detach(), atol=1e-3, rtol=1e-2)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = build(v10a)
    muon, adamw = v10a.make_optimizers(model, tiny(v10a))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    in_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert in_muon | in_adamw == set(names.values())
    assert in_muon & in_adamw == set()
    assert in_muon == {
        name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")
    }
    assert muon.param_groups[0]["rows"] == [18, 6, 6]
    assert [names[id(p)] for p in muon.param_groups[0]["params"]] == [
        f"blocks.{i}.attention.query_key_value.weight" for i in range(2)
    ]
    assert [group["weight_decay"] for group in adamw.param_groups][1] == 0


# ---- the model


def make_pair(**changes):
    """A v9d and a v10a with the same weights."""
    old, new = shaken(build(v9d, **changes)).eval(), build(v10a, **changes).eval()
    weights = stacked(old.state_dict()).items()
    new.load_state_dict({name.replace("norm_", "ln_"): weight for name, weight in weights})
    return old, new


def in_pieces(model, caches, idx, lengths):
    """The logits of idx, if it comes to the caches of a model in pieces of these lengths."""
    return torch.cat([model(piece, caches=caches)[0] for piece in idx.split(lengths, 1)], 1)


def test_the_model_is_that_of_v9d():
    old, new = make_pair()
    idx, targets = random_tokens(2, 5), random_tokens(2, 5)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.manual_seed(5)
    expected = generate(v9d, old, idx[:, :2], 20, tiny(v9d))
    torch.manual_seed(5)
    assert torch.equal(new.generate(idx[:, :2], 20), expected)


@pytest.mark.parametrize("lengths", [[24], [1] * 24, [10, 1, 1, 12], [3, 4, 1, 9, 7], [1, 23]])
def test_tokens_may_come_to_the_cache_in_pieces_of_any_length(lengths):
    _, model = make_pair(block_size=24)
    idx = random_tokens(3, 24)
    torch.testing.assert_close(in_pieces(model, model.make_caches(3), idx, lengths), model(idx)[0])


@pytest.mark.parametrize("lengths", [[2, 5] + [1] * 18, [3, 1, 4] + [1] * 17])
def test_a_full_cache_slides_as_that_of_v9d(lengths):
    old, new = make_pair(block_size=8)
    idx = random_tokens(3, 25)
    caches = [v9d.KVCache(tiny(v9d, block_size=8), 3, idx.device) for _ in old.blocks]
    expected = in_pieces(old, caches, idx, [8] + [1] * 17)
    actual = in_pieces(new, new.make_caches(3), idx, lengths)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


# ---- training


def run(folder, corpus, *flags):
    v10a.main([*flags, "--out_dir", str(folder), "--data", str(corpus)])
    return torch.load(folder / "latest.pt", weights_only=True)


def test_both_optimizers_follow_the_schedule(splits, monkeypatch):
    cfg = tiny(v10a, max_iters=4, warmup_iters=2)
    rates = []
    real = v10a.make_optimizers

    def make_optimizers(model, cfg):
        optimizers = real(model, cfg)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(
                lambda o, *_: rates.append({group["lr"] for group in o.param_groups})
            )
        return optimizers

    monkeypatch.setattr(v10a, "make_optimizers", make_optimizers)
    v10a.train(build(v10a), *splits, cfg)
    expected = [{v10a.learning_rate_at(step, cfg)} for step in range(4)]
    assert rates[::2] == rates[1::2] == expected


def test_a_resumed_run_ends_with_the_same_weights_and_averages(corpus, tmp_path):
    flags = tiny_flags(v10a, max_iters=4, warmup_iters=1)
    expected = run(tmp_path / "whole", corpus, *flags)
    half = tiny_flags(v10a, max_iters=4, warmup_iters=1)
    stop_at = {"step": 2}
    real = runs.stop_requested
    calls = []

    def stop_requested():
        calls.append(1)
        return len(calls) > stop_at["step"] * 4 or real()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs, "stop_requested", stop_requested)
        run(tmp_path / "half", corpus, *half)
    first = torch.load(tmp_path / "half" / "latest.pt", weights_only=True)
    assert 0 < first["step"] < 4
    v10a.main(["--resume", "--out_dir", str(tmp_path / "half")])
    resumed = torch.load(tmp_path / "half" / "latest.pt", weights_only=True)
    for name, weight in expected["model"].items():
        assert torch.equal(resumed["model"][name], weight), name
    assert set(expected["optimizer"]) == {0, 1}
    for part in (0, 1):
        for i, averages in expected["optimizer"][part].items():
            for name, average in averages.items():
                assert torch.equal(resumed["optimizer"][part][i][name], average)


def test_a_run_from_before_the_script_had_this_name_goes_on(corpus, tmp_path):
    v10a.main([*tiny_flags(v10a, out_dir=tmp_path), "--data", str(corpus)])
    for name in ("latest.pt", "best.pt"):
        state = torch.load(tmp_path / name, weights_only=True)
        torch.save(state | {"script": "v9e_muon"}, tmp_path / name)
    v10a.main(["--sample_only", "--out_dir", str(tmp_path)])
    v10a.main(["--resume", "--out_dir", str(tmp_path), "--max_iters", "4"])
    state = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert (state["step"], state["script"]) == (4, "v10a_muon")


def test_averages_of_the_wrong_shape_are_refused(corpus, tmp_path, capsys):
    state = run(tmp_path, corpus, *tiny_flags(v10a))
    state["optimizer"][0][0]["average"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "latest.pt")
    line = refused(v10a, capsys, "--resume", "--out_dir", tmp_path, "--max_iters", "5")
    assert "the optimizer's averages don't fit (average has shape (3, 3))" in line


def test_a_run_of_v9d_can_not_be_resumed(corpus, tmp_path, capsys):
    v9d.main([*tiny_flags(v9d, out_dir=tmp_path), "--data", str(corpus)])
    line = refused(v10a, capsys, "--resume", "--out_dir", tmp_path, "--max_iters", "5")
    path = Path("part5_modern", "v9d_gqa.py")
    assert line.endswith(f"latest.pt: written by {path} in another format; use that script")


def test_a_run_with_adamw_alone_can_not_be_resumed(corpus, tmp_path, capsys):
    v11a.main([*tiny_flags(v11a, out_dir=tmp_path), "--data", str(corpus)])
    line = refused(v10a, capsys, "--resume", "--out_dir", tmp_path, "--max_iters", "5")
    assert line.startswith(f"error: {tmp_path / 'latest.pt'}: ")
    path = Path("part7_released", "v11a_llama.py")
    assert line.endswith(f"or written by a script with another optimizer; use {path}")
