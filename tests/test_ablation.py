"""lab/ablation.py: each variant lacks what its name says, and nothing else."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import TEXT, VOCAB_SIZE, refused, shaken, tiny, tiny_flags
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import v5_gpt
from lab import ablation
from lab.ladder import ROOT
from part2_training import v6b_fast, v6c_recipe
from part4_gpt2 import v8b_gpt2_tokens, v8c_gpt2

# ---- v5's ideas


def variant(name, **changes):
    torch.manual_seed(1)
    return ablation.make_model(name, v5_gpt, tiny(v5_gpt, **changes), VOCAB_SIZE)


def weights_of(model):
    return {name: weight for name, weight in model.state_dict().items() if "norm_" not in name}


@pytest.mark.parametrize("name", ["no residual connections", "no LayerNorm"])
def test_the_weights_start_as_those_of_v5(name):
    plain, changed = weights_of(variant("v5")), weights_of(variant(name))
    assert list(plain) == list(changed)
    assert all(torch.equal(plain[key], changed[key]) for key in plain)


@pytest.mark.parametrize("name", ablation.VARIANTS["v5_gpt"])
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
        dropouts = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        seen.append((train_data.tolist(), cfg.dropout, dropouts))
        return {0: (3.0, 3.0), 9: (1.0, 2.0)}

    monkeypatch.setattr(ablation, "SMALL_TEXT", 50)
    monkeypatch.setattr(v5_gpt, "train", train)
    cfg = tiny(v5_gpt, dropout=0.1)
    for name in ("v5", "dropout 0.2", "small text", "small text with dropout 0.2"):
        first_loss, train_loss, _ = ablation.run(name, v5_gpt, cfg, VOCAB_SIZE, *splits)
        assert (first_loss, train_loss) == (3.0, 1.0)
    whole, part = splits[0].tolist(), splits[0][:50].tolist()
    texts_and_dropouts = [(whole, 0.1), (whole, 0.2), (part, 0.1), (part, 0.2)]
    assert seen == [(text, dropout, {dropout}) for text, dropout in texts_and_dropouts]


# ---- v6c's recipe

RATE, WARMUP_ITERS, MAX_ITERS = 0.01, 2, 6
COSINE = [1.0, 0.853553, 0.5, 0.146447]  # at 0, 1/4, 1/2 and 3/4 of its way
LONG_COSINE = [1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987]  # at 0, 1/6, ... 5/6
OF_GROUPS = ("weight_decay", "betas", "eps", "fused", "amsgrad")


def notes_of_a_run(name, script, splits):
    """Train a variant; return what determines its steps, and its losses.

    The weights that are trained are so large that each gradient has a norm above 1.
    """
    notes = {"batches": [], "rates": [], "norms": [], "gradients": []}
    real_train, real_get_batch = ablation.train, data.get_batch

    def train(script, model, *args):
        notes["start"] = [weight.clone() for weight in model.state_dict().values()]
        with torch.random.fork_rng():
            torch.manual_seed(2)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=2.0)
        notes["names"] = {id(parameter): name for name, parameter in model.named_parameters()}
        return real_train(script, model, *args)

    def get_batch(*args):
        batch = real_get_batch(*args)
        notes["batches"].append(batch[0])
        return batch

    def before_step(optimizer, *_):
        gradients = {}
        for key in OF_GROUPS:
            notes[key] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter_name = notes["names"][id(parameter)]
                gradients[parameter_name] = parameter.grad.clone()
                for key in OF_GROUPS:
                    notes[key][parameter_name] = group[key]
        [rate] = {group["lr"] for group in optimizer.param_groups}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        notes["rates"].append(rate)
        notes["norms"].append(norm.item())
        notes["gradients"].append(gradients)

    cfg = tiny(
        script, learning_rate=RATE, warmup_iters=WARMUP_ITERS, max_iters=MAX_ITERS,
        weight_decay=0.5, dropout=0.1,
    )  # fmt: skip
    hook = register_optimizer_step_pre_hook(before_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "train", train)
        patch.setattr(data, "get_batch", get_batch)
        notes["losses"] = ablation.run(name, script, cfg, VOCAB_SIZE, *splits)
    hook.remove()
    return notes


@pytest.fixture
def v6c(splits):
    """What determines the steps of v6c as it is."""
    return notes_of_a_run("v6c", v6c_recipe, splits)


def of_matrices_and_vectors(names, matrices, vectors):
    """A number for each parameter: one for matrices and embeddings, one for the others."""
    is_matrix = {name: name.endswith("weight") and "norm_" not in name for name in names}
    return {name: matrices if is_matrix[name] else vectors for name in names}


def test_the_recipe_is_complete_in_v6c(v6c):
    assert v6c["rates"] == pytest.approx([RATE * x for x in (0.5, 1.0, *COSINE)], rel=1e-4)
    assert v6c["norms"] == pytest.approx([1.0] * MAX_ITERS, rel=1e-4)
    names = v6c["names"].values()
    assert v6c["weight_decay"] == of_matrices_and_vectors(names, 0.5, 0.0)
    assert set(v6c["betas"].values()) == {(0.9, 0.99)}


CHANGES = {
    "no warm-up": {"rates": [RATE * x for x in LONG_COSINE]},
    "no decay": {"rates": [RATE / 2] + [RATE] * 5},
    "no clipping": {"is_clipped": False},
    "weight decay 0.01": {"weight_decay": (0.01, 0.0)},
    "decay everything": {"weight_decay": (0.5, 0.5)},
    "beta2 0.999": {"betas": (0.9, 0.999)},
    "learning rate 2e-3": {"rates": [2e-3 * x for x in (0.5, 1.0, *COSINE)]},
}


def test_every_variant_of_v6c_has_a_test_of_what_it_changes():
    assert ["v6c", *CHANGES, "v6b"] == ablation.VARIANTS["v6c_recipe"]


@pytest.mark.parametrize("name", CHANGES)
def test_a_variant_of_v6c_changes_what_its_name_says_and_nothing_else(name, v6c, splits):
    notes = notes_of_a_run(name, v6c_recipe, splits)
    for key in ("start", "batches"):
        assert len(notes[key]) == len(v6c[key]) > 0
        assert all(map(torch.equal, notes[key], v6c[key])), key
    names = v6c["names"].values()
    unchanged = {"rates": v6c["rates"], "weight_decay": (0.5, 0.0), "betas": (0.9, 0.99)}
    expected = unchanged | {"is_clipped": True} | CHANGES[name]
    assert notes["rates"] == pytest.approx(expected["rates"], rel=1e-4)
    assert notes["weight_decay"] == of_matrices_and_vectors(names, *expected["weight_decay"])
    assert notes["betas"] == dict.fromkeys(names, expected["betas"])
    for key in ("eps", "fused", "amsgrad"):
        assert notes[key] == v6c[key]
    if expected["is_clipped"]:
        assert notes["norms"] == pytest.approx([1.0] * MAX_ITERS, rel=1e-4)
    else:
        assert min(notes["norms"]) > 1.5
    for parameter_name, gradient in v6c["gradients"][0].items():  # clipped to a norm of 1
        scaled = notes["gradients"][0][parameter_name] / notes["norms"][0]
        torch.testing.assert_close(scaled, gradient, rtol=1e-4, atol=1e-6)
    assert notes["losses"][0] == v6c["losses"][0], "the weights are the same before training"
    assert notes["losses"][1:] != v6c["losses"][1:]


def test_what_a_variant_replaces_is_back_after_it(v6c, splits):
    before = [getattr(owner, name) for owner, name, _ in ablation.REPLACEMENTS.values()]
    for name in ablation.REPLACEMENTS:
        notes_of_a_run(name, v6c_recipe, splits)
    after = [getattr(owner, name) for owner, name, _ in ablation.REPLACEMENTS.values()]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert notes_of_a_run("v6c", v6c_recipe, splits)["losses"] == v6c["losses"]


def test_v6b_is_v6b_itself(v6c, splits):
    notes = notes_of_a_run("v6b", v6b_fast, splits)
    for key in ("start", "batches"):
        assert all(map(torch.equal, notes[key], v6c[key])), key
    assert notes["rates"] == [RATE] * MAX_ITERS
    assert min(notes["norms"]) > 1.5
    names = v6c["names"].values()
    assert notes["weight_decay"] == dict.fromkeys(names, 0.01)
    assert notes["betas"] == dict.fromkeys(names, (0.9, 0.999))

    cfg = tiny(v6b_fast, dtype="float32")
    torch.manual_seed(cfg.seed)
    history = v6b_fast.train(v6b_fast.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg)
    (first_loss, _), (train_loss, _) = history[0], history[cfg.max_iters]
    losses = ablation.run("v6b", v6b_fast, cfg, VOCAB_SIZE, *splits)
    assert losses[:2] == (first_loss, train_loss)


# ---- v8c's changes to v8b


def variant_of_v8c(name):
    torch.manual_seed(1)
    return ablation.make_model(name, v8c_gpt2, tiny(v8c_gpt2), VOCAB_SIZE)


def differences(name):
    """The names of the parameters that a variant has otherwise than v8c, or lacks."""
    plain = dict(variant_of_v8c("v8c").named_parameters())
    changed = dict(variant_of_v8c(name).named_parameters())
    same = [key for key in plain if key in changed and torch.equal(plain[key], changed[key])]
    return (plain.keys() | changed.keys()) - set(same)


def test_each_variant_of_v8c_takes_back_one_change():
    assert differences("v8c") == differences("ReLU") == set()
    assert differences("untied output layer") == {"lm_head.weight"}
    parts = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention", "feed_forward")]
    projections = {f"{part}.projection.weight" for part in parts}
    assert differences("projections as large as the rest") == projections
    biases = {f"blocks.{i}.attention.query_key_value.bias" for i in (0, 1)}
    assert differences("no biases of queries, keys and values") == biases
    assert differences("a bias in the output layer") == {"lm_head.bias"}


def test_the_weights_of_the_variants_of_v8c_are_as_large_as_those_of_v8b():
    torch.manual_seed(1)
    cfg = tiny(v8c_gpt2, n_embd=96, n_layer=8)
    model = ablation.make_model("projections as large as the rest", v8c_gpt2, cfg, 99)
    weight = model.blocks[3].feed_forward.projection.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    head = ablation.make_model("untied output layer", v8c_gpt2, cfg, 99).lm_head.weight
    assert head.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ablation.VARIANTS["v8c_gpt2"][:-1])
def test_the_variants_of_v8c_train(name, splits):
    seen = []
    real = torch.nn.functional.relu

    def relu(x):
        seen.append(x)
        return real(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", relu)
        cfg = tiny(v8c_gpt2, warmup_iters=0)
        first, last, _ = ablation.run(name, v8c_gpt2, cfg, VOCAB_SIZE, *splits)
    assert last < first
    assert bool(seen) == (name == "ReLU")


def test_the_loss_of_the_whole_split_is_that_of_the_variant(splits, monkeypatch):
    models = []
    real = ablation.train

    def train(script, model, *args):
        models.append(model)
        return real(script, model, *args)

    monkeypatch.setattr(ablation, "train", train)
    cfg = tiny(v8c_gpt2, warmup_iters=0)
    _, _, val_loss = ablation.run("ReLU", v8c_gpt2, cfg, VOCAB_SIZE, *splits)
    with_gelu = ablation.whole_loss(models[0], splits[1], cfg)
    monkeypatch.setattr(torch.nn.functional, "gelu", ablation.relu)
    assert val_loss == ablation.whole_loss(models[0], splits[1], cfg) != with_gelu


def test_v8c_and_v8b_train_on_as_many_tokens_as_they_should(tmp_path, corpus, monkeypatch):
    seen = []

    def run(variant, script, cfg, vocab_size, train_data, val_data):
        seen.append((variant, script, vocab_size, int(max(train_data))))
        return 1.0, 1.0, 1.0

    monkeypatch.setattr(ablation, "run", run)
    flags = ["--script", "v8c_gpt2", "--data", str(corpus), "--out", str(tmp_path), "--seeds", "1"]
    flags += ["--device", "cpu", "--block_size", "5", "--variants", "v8c,v8b"]
    ablation.main([*flags, "--vocab_size", "270"])
    assert [row[:3] for row in seen] == [("v8c", v8c_gpt2, 270), ("v8b", v8b_gpt2_tokens, 270)]
    assert seen[0][3] == seen[1][3] < 270


# ---- the program


def test_the_table_has_means_and_ranges():
    runs = [(4.0, 1.0, 2.0), (5.0, 2.0, 4.0), (6.0, 3.0, 9.0)]
    text = ablation.table({"v5": runs, "no LayerNorm": runs[:1]}, "v5_gpt", tiny(v5_gpt))
    assert text.startswith("v5_gpt.py with batch_size 4, ")
    assert text.splitlines()[-2:] == [
        "| v5 | 3 | 5.00 | 2.000 | 5.000 | 2.000 to 9.000 |",
        "| no LayerNorm | 1 | 4.00 | 1.000 | 2.000 | 2.000 to 2.000 |",
    ]


def runs_of(monkeypatch, tmp_path, *flags):
    """The runs that the program makes: (variant, script, settings) of each."""
    runs = []

    def run(variant, script, cfg, *_):
        runs.append((variant, script, cfg))
        return 1.0, 1.0, 1.0

    monkeypatch.setattr(ablation, "run", run)
    ablation.main(["--device", "cpu", "--out", str(tmp_path), *map(str, flags)])
    return runs


@pytest.mark.parametrize(
    ("script", "rates"),
    [
        ("v5_gpt", {v5_gpt: 2e-3}), ("v6c_recipe", {v6c_recipe: 3e-3, v6b_fast: 2e-3}),
    ],
)  # fmt: skip
def test_each_script_has_its_own_defaults_unless_a_flag_says_otherwise(
    script, rates, monkeypatch, tmp_path, corpus
):
    flags = ["--script", script, "--data", corpus, "--seeds", "2", "--seed", "7"]
    runs = runs_of(monkeypatch, tmp_path, *flags)
    names = ablation.VARIANTS[script]
    assert [(name, cfg.seed) for name, _, cfg in runs] == [(n, s) for s in (7, 8) for n in names]
    for name, trained, cfg in runs:
        expected = v6b_fast if name == "v6b" else ablation.load(script)
        assert trained is expected
        assert type(cfg) is expected.Config
        assert cfg.learning_rate == rates[expected]
        assert (cfg.n_embd, cfg.max_iters) == (96, 3600)
        assert cfg.data == str(corpus)

    more = ["--learning_rate", "0.5", "--n_embd", "24", "--warmup_iters", "3", "--variants", " ,"]
    runs = runs_of(monkeypatch, tmp_path, *flags, *more)
    assert [name for name, _, _ in runs] == 2 * names
    for _, _, cfg in runs:
        assert (cfg.learning_rate, cfg.n_embd) == (0.5, 24)
        assert getattr(cfg, "warmup_iters", 3) == 3


def test_variants_are_trained_in_the_order_given(monkeypatch, tmp_path, corpus):
    names = ["--variants", "no LayerNorm,v5,", "--seeds", "1"]
    runs = runs_of(monkeypatch, tmp_path, "--data", corpus, *names)
    assert [name for name, _, _ in runs] == ["no LayerNorm", "v5"]


def test_a_run_writes_what_it_prints(tmp_path, corpus):
    flags = [*tiny_flags(v5_gpt), "--data", str(corpus), "--seeds", "2"]
    flags += ["--variants", "v5, no LayerNorm", "--out", str(tmp_path / "new")]
    command = [sys.executable, "lab/ablation.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "new" / "ablation.md").read_text(encoding="utf-8")
    assert done.stdout.endswith(written + "\n")
    starts = ("| v5 | 2 |", "| no LayerNorm | 2 |")
    rows = [line for line in written.splitlines() if line.startswith(starts)]
    assert len(rows) == 2
    assert "v5, seed 1338" in done.stdout
    assert "4/4" in done.stderr


def test_the_losses_of_v6b_in_the_table_are_those_of_its_own_command(tmp_path, corpus, capsys):
    flags = [*tiny_flags(v6b_fast), "--data", str(corpus)]
    v6b_fast.main(flags)
    estimates = re.findall(r"train loss (\S+),", capsys.readouterr().out)
    flags += ["--script", "v6c_recipe", "--variants", "v6b", "--seeds", "1"]
    ablation.main([*flags, "--out", str(tmp_path)])
    written = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert written.startswith("v6c_recipe.py with batch_size 4, ")
    row = written.splitlines()[-1]
    first_loss, train_loss = float(estimates[0]), float(estimates[-1])
    numbers = re.fullmatch(r"\| v6b \| 1 \| (\S+) \| (\S+) \| (\S+) \| \3 to \3 \|", row).groups()
    assert float(numbers[0]) == pytest.approx(first_loss, abs=0.006)
    assert float(numbers[1]) == pytest.approx(train_loss, abs=0.0006)


def test_bad_flags(capsys, tmp_path, corpus):
    flags = [*tiny_flags(v5_gpt), "--data", str(corpus), "--out", str(tmp_path)]
    line = refused(ablation, capsys, *flags, "--variants", "v5,no attention")
    assert "--variants 'no attention': choose from v5, no residual connections, " in line
    line = refused(ablation, capsys, *flags, "--variants", "no clipping")
    assert "--variants 'no clipping': choose from v5, " in line
    line = refused(ablation, capsys, *flags, "--script", "v6c_recipe", "--variants", "v5")
    assert "--variants 'v5': choose from v6c, no warm-up, " in line
    assert "--script" in refused(ablation, capsys, *flags, "--script", "v6b_fast")
    assert "--seeds" in refused(ablation, capsys, *flags, "--seeds", "0")
    (tmp_path / "ablation.md").write_text("mine", encoding="utf-8")
    for script in ablation.VARIANTS:
        for more in (["--n_head", "5"], ["--data", "missing.txt"], ["--block_size", "999"]):
            line = refused(ablation, capsys, *flags, "--script", script, *more)
            assert more[0] in line
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8") == "mine"
    (tmp_path / "file").write_text(TEXT, encoding="utf-8")
    assert "--out" in refused(ablation, capsys, *flags, "--out", tmp_path / "file")
