"""v10a_muon.py: orthogonal updates, PyTorch's own Muon, and checkpoints of two optimizers."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TEXT, build, random_tokens, refused, shaken, tiny, tiny_flags

from lab.common import generate
from part5_modern import v9d_gqa as v9d
from part6_speedrun import v10a_muon as v10a
from support import runs


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    """The dtype of matmuls."""
    return request.param


def orthogonalise(matrix, dtype):
    """As in a training step with that dtype."""
    with v10a.autocast(tiny(v10a, dtype=dtype)):
        return v10a.orthogonalise(matrix)


# ---- orthogonalising


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (96, 384)])
def test_singular_values_come_close_to_one(shape, dtype):
    """The iteration doesn't converge to 1, but all values end between 0.5 and 1.3."""
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    update = orthogonalise(matrix, dtype)
    assert (update.shape, update.dtype) == (shape, torch.float32)
    values = torch.linalg.svdvals(update)
    assert torch.linalg.svdvals(matrix).max() > 5
    small = torch.linalg.svdvals(matrix) / matrix.norm() < 0.01
    assert values.max() < 1.3
    assert values[~small].min() > 0.5


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_singular_vectors_stay(dtype, bound):
    """Only the singular values change: in the basis of u and v, the update stays diagonal.

    What rounding to bfloat16 adds beside the diagonal differs from matrix to matrix.
    """
    torch.manual_seed(2)
    beside = []
    for _ in range(300):
        u, _ = torch.linalg.qr(torch.randn(5, 5))
        v, _ = torch.linalg.qr(torch.randn(30, 5))
        matrix = u @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])) @ v.T
        update = orthogonalise(matrix, dtype)
        mixed = u.T @ update @ v
        assert (mixed.diag() - 1).abs().max() < 0.35
        assert (update - u @ mixed @ v.T).abs().max() < bound
        beside.append((mixed - torch.diag(mixed.diag())).abs().max().item())
    assert sum(beside) / len(beside) < bound


def test_a_matrix_of_zeros_stays(dtype):
    assert torch.equal(orthogonalise(torch.zeros(3, 4), dtype), torch.zeros(3, 4))


def test_the_example_at_the_top_is_true():
    lesson = " ".join(v10a.__doc__.split())
    matrix = torch.tensor([[6.0, 1.0], [7.0, 2.0]])
    u, values, vt = torch.linalg.svd(matrix)
    torch.testing.assert_close(u @ vt, torch.tensor([[0.8, -0.6], [0.6, 0.8]]))
    assert "[6 1] has the singular values {:.2f} and {:.2f},".format(*values) in lesson
    assert "and becomes [0.8 -0.6] with 1 and 1. [7 2] [0.6 0.8]" in lesson
    norm = matrix.norm()
    assert f"divided by its norm of {norm:.2f}," in lesson
    before, after = values / norm, (u.T @ v10a.orthogonalise(matrix) @ vt.T).diag()
    numbers = "has {:.3f} and {:.3f}, which become {:.2f} and {:.2f}".format(*before, *after)
    assert numbers in lesson
    for _ in range(5):
        before = 3.4445 * before - 4.7750 * before**3 + 2.0315 * before**5
    torch.testing.assert_close(after, before)


# ---- the optimizer


def train_with(make_optimizer, n_steps=10, dtype="float32"):
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
        with v10a.autocast(tiny(v10a, dtype=dtype)):
            optimizer.step()
    return first.detach(), second.detach()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_ten_steps_equal_those_of_pytorch(dtype):
    """PyTorch always rounds to bfloat16, by up to 0.4% each time; ten steps add up to below 3%."""
    settings = {"lr": 0.02, "weight_decay": 0.1}
    ours = train_with(lambda matrices: v10a.Muon(matrices, **settings), dtype=dtype)
    theirs = train_with(
        lambda matrices: torch.optim.Muon(
            matrices, adjust_lr_fn="match_rms_adamw", momentum=0.95, **settings
        )
    )
    start = train_with(lambda matrices: v10a.Muon(matrices, **settings), 0)
    for mine, other, before in zip(ours, theirs, start, strict=True):
        change = (other - before).norm()
        assert change > 0.5
        assert (mine - other).norm() < 0.03 * change


def test_weight_decay_is_decoupled():
    """A parameter without a gradient shrinks by lr * weight_decay, and nothing else happens."""
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(4, 6)
    v10a.Muon([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.1 * 0.5))


def test_an_update_is_as_large_as_one_of_adamw():
    """Its root mean square is about 0.2 times the learning rate, whatever the shape."""
    for shape in ((64, 64), (64, 256), (256, 64)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape)
        v10a.Muon([parameter], lr=1.0, weight_decay=0.0).step()
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = build(v10a)
    muon, adamw = v10a.make_optimizers(model, tiny(v10a, weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_muon, embeddings, vectors = (
        {names[id(p)] for p in group["params"]} for group in muon.param_groups + adamw.param_groups
    )
    assert in_muon == {
        name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")
    }
    assert embeddings == {"token_embedding.weight", "lm_head.weight"}
    assert vectors == set(names.values()) - in_muon - embeddings
    decays = [group["weight_decay"] for group in muon.param_groups + adamw.param_groups]
    assert decays == [0.3, 0.3, 0.0]


# ---- the model


def test_the_model_is_that_of_v9d():
    old, new = shaken(build(v9d)), build(v10a)
    new.load_state_dict(old.state_dict())
    idx, targets = random_tokens(2, 5), random_tokens(2, 5)
    for expected, actual in zip(old(idx, targets), new(idx, targets), strict=True):
        assert torch.equal(actual, expected)
    texts = []
    for script, model in ((v9d, old), (v10a, new)):
        torch.manual_seed(5)
        texts.append(generate(script, model, idx[:, :2], 20, tiny(script)))
    assert torch.equal(*texts)


# ---- training


def test_both_optimizers_follow_the_schedule(splits):
    cfg = tiny(v10a, dtype="float32", max_iters=4, warmup_iters=2)
    model = build(v10a)
    optimizers = v10a.make_optimizers(model, cfg)
    rates = []
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(
            lambda o, *_: rates.append({group["lr"] for group in o.param_groups})
        )
    for step in range(4):
        v10a.train_step(model, optimizers, splits[0], step, cfg)
    expected = [{v10a.learning_rate_at(step, cfg)} for step in range(4)]
    assert rates[::2] == rates[1::2] == expected


def test_muon_multiplies_in_the_dtype_of_all_matmuls(splits, dtype, monkeypatch):
    """Weights and averages stay float32."""
    dtypes = set()
    real = torch.Tensor.__matmul__

    def note(a, b):
        product = real(a, b)
        dtypes.add(str(product.dtype).removeprefix("torch."))
        return product

    cfg = tiny(v10a, dtype=dtype)
    model = build(v10a)
    optimizers = v10a.make_optimizers(model, cfg)
    monkeypatch.setattr(torch.Tensor, "__matmul__", note)
    v10a.train_step(model, optimizers, splits[0], 0, cfg)
    assert dtypes == {dtype}
    averages = [state["average"] for state in optimizers[0].state.values()]
    assert len(averages) == 2 * 7, "layers, matrices in a block"
    assert {tensor.dtype for tensor in [*averages, *model.parameters()]} == {torch.float32}


def test_a_step_does_not_add_to_the_gradients_of_the_last_one(splits):
    """Of no parameter, whichever optimizer it belongs to."""
    cfg = tiny(v10a, dtype="float32")
    models = [build(v10a), build(v10a)]
    for parameter in models[0].parameters():
        parameter.grad = torch.full_like(parameter, 1000.0)
    for model in models:
        v10a.train_step(model, v10a.make_optimizers(model, cfg), splits[0], 0, cfg)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one.grad, other.grad)


# ---- checkpoints


def saved(folder):
    return torch.load(folder / "latest.pt", weights_only=True)


def train_a_run(corpus, folder, **changes):
    """Train in a folder; return the last checkpoint."""
    v10a.main([*tiny_flags(v10a, out_dir=folder, **changes), "--data", str(corpus)])
    return saved(folder)


def test_a_resumed_run_ends_with_the_same_weights_and_averages(corpus, tmp_path, monkeypatch):
    changes = {"max_iters": 5, "eval_interval": 4, "warmup_iters": 1, "dropout": 0.3}
    expected = train_a_run(corpus, tmp_path / "whole", **changes)
    real = v10a.train_step

    def train_step(model, optimizers, tokens, step, cfg):
        real(model, optimizers, tokens, step, cfg)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(v10a, "train_step", train_step)
        train_a_run(corpus, tmp_path / "half", **changes)
    assert saved(tmp_path / "half")["step"] == 3
    v10a.main(["--resume", "--out_dir", str(tmp_path / "half")])
    resumed = saved(tmp_path / "half")
    assert set(expected["optimizer"]) == {"muon", "adamw"}
    assert [len(expected["optimizer"][name]) for name in ("muon", "adamw")] == [14, 7]
    for part in ("model", "optimizer", "step", "history"):
        torch.testing.assert_close(resumed[part], expected[part], rtol=0, atol=0)


def test_a_run_that_is_resumed_before_its_first_step_has_no_averages_yet(splits):
    cfg = tiny(v10a)
    model = shaken(build(v10a))
    run = runs.UnsavedRun()
    run.is_new = False
    run.saved = v10a.checkpoint(model, v10a.make_optimizers(model, cfg), 0) | {"path": ""}
    new = build(v10a)
    assert v10a.restore(new, v10a.make_optimizers(new, cfg), run) == 0
    torch.testing.assert_close(new.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a tiny run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    train_a_run(folder / "corpus.txt", folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    ("optimizer", "change", "problem"),
    [
        ("muon", lambda averages: averages[0].update(average=torch.zeros(3, 3)),
         "average has shape (3, 3)"),
        ("muon", lambda averages: averages[0].clear(), "'average'"),
        ("muon", lambda averages: averages.pop(13), "'average'"),
        ("adamw", lambda averages: averages[6].update(exp_avg=torch.zeros(3)),
         "exp_avg has shape (3,)"),
        ("adamw", lambda averages: averages.clear(), "'step'"),
    ],
)  # fmt: skip
def test_averages_that_do_not_fit_are_refused(
    finished_run, tmp_path, capsys, optimizer, change, problem
):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    state = saved(folder)
    change(state["optimizer"][optimizer])
    torch.save(state, folder / "latest.pt")
    line = refused(v10a, capsys, "--resume", "--out_dir", folder, "--max_iters", "5")
    path = folder / "latest.pt"
    assert line.startswith(f"error: {path}: its averages don't fit ({problem}): damaged, or ")


def test_a_run_of_v9d_can_not_be_resumed(corpus, tmp_path, capsys):
    """Its model has the same weights, but its optimizer has other averages."""
    v9d.main([*tiny_flags(v9d, out_dir=tmp_path), "--data", str(corpus)])
    line = refused(v10a, capsys, "--resume", "--out_dir", tmp_path, "--max_iters", "5")
    assert line.startswith(f"error: {tmp_path / 'latest.pt'}: its averages don't fit ")
    path = Path("part5_modern", "v9d_gqa.py")
    assert line.endswith(f"or written with another optimizer by {path}; use that script")
