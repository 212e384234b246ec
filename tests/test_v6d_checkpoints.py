"""v6d_checkpoints.py: runs that are stopped, killed and resumed, and samples from what they saved.

How files are read and written is tested in test_checkpoints.py.
"""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TEXT, TINY, VOCAB_SIZE, refused, tiny, tiny_flags
from filelock import FileLock

import data
from part2_training import v6d_checkpoints as v6d
from support import checkpoints, runs

# Dropout draws random numbers too, and a resumed run must draw the same.
LONG = {"max_iters": 6, "dropout": 0.3, "warmup_iters": 2}


def flags(corpus, **changes):
    return [*tiny_flags(v6d, **changes), "--data", str(corpus)]


def saved(folder, name="latest.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def log_of(folder):
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def edit(path, **changes):
    """Change what a checkpoint holds."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


def assert_same_run(a, b):
    """Check that two runs have the same weights and optimizer, bit for bit, and the same losses."""
    for file in ("latest.pt", "best.pt"):
        a_state, b_state = saved(a, file), saved(b, file)
        assert a_state["step"] == b_state["step"]
        assert a_state["model"].keys() == b_state["model"].keys()
        for name, tensor in a_state["model"].items():
            assert torch.equal(tensor, b_state["model"][name]), name
        a_averages, b_averages = a_state["optimizer"], b_state["optimizer"]
        assert a_averages.keys() == b_averages.keys()
        for number, averages in a_averages.items():
            for name, tensor in averages.items():
                assert torch.equal(tensor, b_averages[number][name]), name
        assert a_state["history"] == b_state["history"]
    assert log_of(a) == log_of(b)


def sample_of(output):
    """The sample, without the lines of losses above it."""
    return re.sub(r"^step \d+: .*\n", "", output, flags=re.MULTILINE)


def fake_losses(monkeypatch, *losses):
    """Let the validation losses of the next estimates be these."""
    pairs = iter([loss for val_loss in losses for loss in (1.0, val_loss)])
    monkeypatch.setattr(v6d, "estimate_loss", lambda *_: next(pairs))


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    """The folder of an uninterrupted run with LONG. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    v6d.main(flags(folder / "corpus.txt", out_dir=folder / "run", **LONG))
    return folder / "run"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a tiny run that has ended. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    v6d.main(flags(folder / "corpus.txt", out_dir=folder / "run"))
    return folder / "run"


@pytest.fixture
def trained(finished_run, tmp_path):
    """A copy of the finished run, for one test to use as it likes."""
    return shutil.copytree(finished_run, tmp_path / "trained")


# ---- runs that are killed or stopped, and then resumed


def killed_at(event, words):
    """Run v6d in a process of its own, and kill it at the given event of saving; count from 0.

    Each file that is replaced makes three events: its first half is written, all of it is, and it
    has the name of the old one. Returns whether the run got that far.
    """
    process = os.fork()
    if process == 0:
        events = itertools.count()

        def note_event():
            if next(events) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        class Half:
            """A file, after which only the first half of each write is still to come."""

            def __init__(self, file):
                self.file = file

            def write(self, content):
                middle = len(content) // 2
                self.file.write(content[:middle])
                self.file.flush()
                note_event()
                self.file.write(content[middle:])

        def replace_file(path, write, flag):
            def write_in_halves(file):
                whole = io.BytesIO()
                write(whole)
                Half(file).write(whole.getvalue())

            real_replace_file(path, write_in_halves, flag)

        def replace(path, target):
            note_event()
            real_replace(path, target)
            note_event()

        real_replace_file, real_replace = runs.replace_file, Path.replace
        runs.replace_file, Path.replace = replace_file, replace
        sys.stdout = sys.stderr = io.StringIO()
        v6d.main(words)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


# Four estimates replace three files each, except that not all of them are the best.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can't fork")
@pytest.mark.parametrize("event", range(27))
def test_a_run_killed_while_it_saves_goes_on_as_if_nothing_had_happened(
    corpus, straight_run, tmp_path, event
):
    folder = tmp_path / "run"
    assert killed_at(event, flags(corpus, out_dir=folder, **LONG))
    for name in ("latest.pt", "best.pt"):
        if (folder / name).exists():
            assert checkpoints.is_intact(folder / name)
    if not (folder / "latest.pt").exists():
        assert event < 6, "only the first estimate may find no latest.pt to go on from"
        return
    v6d.main(["--resume", "--out_dir", str(folder)])
    assert_same_run(folder, straight_run)
    assert not list(folder.glob("*.unfinished"))


# The estimate before step 0 takes the batches 1 to 4, the steps 0 and 1 take one each, and so on.
@pytest.mark.parametrize(
    ("name", "n_batches", "last_step"),
    [
        pytest.param("SIGINT", 2, 0, id="Ctrl-C in the first estimate"),
        pytest.param("SIGINT", 5, 1, id="Ctrl-C in a step"),
        pytest.param("SIGINT", 6, 2, id="Ctrl-C in the last step before an estimate"),
        pytest.param("SIGINT", 8, 2, id="Ctrl-C in an estimate"),
        pytest.param("SIGINT", 10, 2, id="Ctrl-C in the last batch of an estimate"),
        pytest.param("SIGINT", 20, 6, id="Ctrl-C in the last estimate"),
        pytest.param("SIGTERM", 5, 1, id="SIGTERM in a step"),
        pytest.param("SIGTERM", 8, 2, id="SIGTERM in an estimate"),
        pytest.param("SIGHUP", 5, 1, id="SIGHUP in a step"),
    ],
)
def test_a_stopped_run_saves_and_goes_on_as_if_nothing_had_happened(
    corpus, straight_run, tmp_path, capsys, monkeypatch, name, n_batches, last_step
):
    if not hasattr(signal, name):
        pytest.skip("Windows has no SIGHUP")
    number = getattr(signal, name)
    real, batches = data.get_windows, []

    def get_windows(*args):
        batches.append(1)
        if len(batches) == n_batches:
            signal.raise_signal(number)
        return real(*args)

    folder = tmp_path / "the run"
    with monkeypatch.context() as patch:
        patch.setattr(data, "get_windows", get_windows)
        with pytest.raises(SystemExit) as stop:
            v6d.main(flags(corpus, out_dir=folder, **LONG))
    assert stop.value.code == 128 + number, "the status that shells expect"
    command = f'python "part2_training/v6d_checkpoints.py" --resume --out_dir "{folder}"'
    assert capsys.readouterr().err.endswith(f"\nstopped and saved; to continue: {command}\n")
    assert saved(folder)["step"] == last_step
    v6d.main(["--resume", "--out_dir", str(folder)])
    assert_same_run(folder, straight_run)


def test_a_run_goes_on_from_its_best_weights_if_they_are_copied(straight_run, tmp_path, capsys):
    """They come without averages, so the optimizer starts anew, and says so."""
    folder = shutil.copytree(straight_run, tmp_path / "run")
    best = saved(folder, "best.pt")
    assert best["optimizer"] == {}
    (folder / "latest.pt").write_bytes(b"damaged")
    shutil.copy(folder / "best.pt", folder / "latest.pt")
    end = best["step"] + 2
    v6d.main(["--resume", "--out_dir", str(folder), "--max_iters", str(end)])
    notice = f"notice: {folder / 'latest.pt'}: has weights and no averages, so the optimizer starts"
    assert notice in capsys.readouterr().err
    ended = saved(folder)
    assert ended["step"] == end
    assert {step: ended["history"][step] for step in best["history"]} == best["history"]
    assert {averages["step"].item() for averages in ended["optimizer"].values()} == {2}


def test_the_best_weights_take_a_third_of_the_disk(trained):
    sizes = {name: (trained / name).stat().st_size for name in ("best.pt", "latest.pt")}
    n_bytes = 4 * sum(weight.numel() for weight in saved(trained)["model"].values())
    assert sizes["latest.pt"] - sizes["best.pt"] > 2 * n_bytes


def test_a_finished_run_that_is_resumed_ends_in_the_same_way(trained, capsys):
    v6d.main(["--resume", "--out_dir", str(trained)])
    resumed = capsys.readouterr()
    assert "step 2:" not in resumed.out
    v6d.main(["--sample_only", "--out_dir", str(trained)])
    assert sample_of(resumed.out) == capsys.readouterr().out


def test_no_flags_but_resume_continue_the_newest_run(corpus, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"seed": 5, "weight_decay": 0.3, "dropout": 0.2, "prompt": "dog", "out_dir": ""}
    v6d.main(flags(corpus, **changes))
    ended = capsys.readouterr().out
    [folder] = Path("out").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_v6d_checkpoints", folder.name)
    assert set(files_of(folder)) >= {"latest.pt", "best.pt", "log.jsonl"}
    config = saved(folder)["config"]
    v6d.main(["--resume"])
    assert sample_of(capsys.readouterr().out) == sample_of(ended)
    assert saved(folder)["config"] | {"resume": False} == config
    assert list(Path("out").iterdir()) == [folder]
    v6d.main(["--sample_only"])
    assert capsys.readouterr().out.startswith("dog")


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "2025-01-02_03-04-05")
    for seed in (5, 6, 7):
        v6d.main(flags(corpus, out_dir="", seed=seed))
    names = ["v6d_checkpoints", "v6d_checkpoints_2", "v6d_checkpoints_3"]
    folders = [Path("out", f"2025-01-02_03-04-05_{name}") for name in names]
    assert sorted(Path("out").iterdir()) == folders
    assert [saved(folder)["config"]["seed"] for folder in folders] == [5, 6, 7]
    v6d.main(["--resume", "--max_iters", "4"])
    assert [saved(folder)["step"] for folder in folders] == [3, 3, 4]


def test_a_flag_overrides_the_checkpoint(trained, capsys, monkeypatch):
    made = []
    real = v6d.make_optimizer

    def make_optimizer(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(v6d, "make_optimizer", make_optimizer)
    new = {"max_iters": 6, "learning_rate": 0.5, "weight_decay": 0.7, "warmup_iters": 0}
    typed = [word for name, value in new.items() for word in (f"--{name}", str(value))]
    v6d.main(["--resume", "--out_dir", str(trained), *typed, "--prompt", "The "])
    assert sample_of(capsys.readouterr().out).startswith("The ")
    decayed, others = made[-1].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.7, 0.0)
    rate = v6d.learning_rate_at(5, tiny(v6d, **new))
    assert decayed["lr"] == others["lr"] == rate
    assert all(averages["step"] == 6 for averages in made[-1].state.values())
    assert saved(trained)["step"] == 6
    assert saved(trained)["config"].items() >= new.items()


def test_other_sizes_are_refused_by_name(trained, capsys):
    for name, value in {"block_size": 4, "n_embd": 24, "n_head": 2, "n_layer": 1}.items():
        for mode in ("--resume", "--sample_only"):
            line = refused(v6d, capsys, mode, "--out_dir", trained, f"--{name}", value)
            assert line.startswith(f"error: --{name} {value}: the checkpoint has {TINY[name]}, ")


def test_a_run_can_not_be_shortened_to_less_than_it_has_done(trained, capsys):
    before = files_of(trained)
    line = refused(v6d, capsys, "--resume", "--out_dir", trained, "--max_iters", 2)
    assert line.startswith("error: --max_iters 2: the run is at step 3 already;")
    assert files_of(trained) == before


def test_a_run_goes_on_with_the_same_text_only(trained, corpus, capsys):
    before = files_of(trained)
    for text in (TEXT + TEXT, TEXT.replace("q", "Q"), TEXT.upper()):
        corpus.write_text(text, encoding="utf-8")
        line = refused(v6d, capsys, "--resume", "--out_dir", trained, "--data", corpus)
        assert line.startswith(f"error: --data {corpus}: not the text that this run was trained on")
    assert files_of(trained) == before
    copy = corpus.with_name("copy.txt")
    copy.write_text(TEXT, encoding="utf-8")
    v6d.main(["--resume", "--out_dir", str(trained), "--data", str(copy)])


@pytest.mark.parametrize("name", ["latest.pt", "best.pt"])
def test_a_new_run_never_replaces_another(trained, corpus, tmp_path, capsys, name):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained / name, folder)
    before = files_of(folder)
    line = refused(v6d, capsys, *flags(corpus, out_dir=folder, seed=5))
    assert line.startswith(f"error: --out_dir {folder}: already holds a run; ")
    assert files_of(folder) == before


def test_two_runs_can_not_use_one_folder_at_a_time(trained, corpus, capsys):
    before = files_of(trained)
    with FileLock(trained / "lock"):
        line = refused(v6d, capsys, "--resume", "--out_dir", trained, "--max_iters", 6)
    assert line.startswith(f"error: --out_dir {trained}: another run is using it; ")
    assert {name: (trained / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_unusable_folder_is_refused_before_any_work(
    corpus, tmp_path, capsys, monkeypatch, place
):
    (tmp_path / "file").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(v6d, "estimate_loss", lambda *_: pytest.fail("too late"))
    line = refused(v6d, capsys, *flags(corpus, out_dir=tmp_path / place))
    assert line.startswith(f"error: --out_dir {tmp_path / place}: can't write there (")
    assert (tmp_path / "file").read_text(encoding="utf-8") == TEXT


# ---- what is saved


def test_the_log_has_a_line_for_each_estimate(trained, capsys):
    v6d.main(["--resume", "--out_dir", str(trained), "--max_iters", "7"])
    out, log = capsys.readouterr().out, log_of(trained)
    assert [entry["step"] for entry in log] == sorted({entry["step"] for entry in log})
    assert [entry["step"] for entry in log][-3:] == [4, 6, 7]
    for entry in log[-3:]:
        losses = f"train loss {entry['train_loss']:.4f}, val loss {entry['val_loss']:.4f}"
        assert re.search(rf"^step {entry['step']}: {losses}(,|$)", out, flags=re.MULTILINE)


def test_the_best_weights_are_kept_beside_the_latest(corpus, tmp_path, monkeypatch):
    fake_losses(monkeypatch, 5.0, 4.0, 2.0, 2.0, 4.5)
    v6d.main(flags(corpus, max_iters=8, out_dir=tmp_path / "run"))
    assert saved(tmp_path / "run", "best.pt")["step"] == 6, "the later of two that are equal"
    assert saved(tmp_path / "run")["step"] == 8
    assert [entry["val_loss"] for entry in log_of(tmp_path / "run")] == [5.0, 4.0, 2.0, 2.0, 4.5]


def test_a_longer_run_still_knows_its_best_loss(corpus, tmp_path, monkeypatch):
    fake_losses(monkeypatch, 5.0, 4.0, 2.0, 3.5, 3.0)
    v6d.main(flags(corpus, out_dir=tmp_path / "run"))
    v6d.main(["--resume", "--out_dir", str(tmp_path / "run"), "--max_iters", "6"])
    assert saved(tmp_path / "run", "best.pt")["step"] == 3


def test_a_sample_comes_from_the_best_weights(corpus, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        fake_losses(patch, 5.0, 2.0, 2.5, 3.0)
        changes = {"max_iters": 6, "learning_rate": 0.1, "max_new_tokens": 40}
        v6d.main(flags(corpus, out_dir=folder, warmup_iters=0, **changes))
    out, err = capsys.readouterr()
    sample = sample_of(out)
    assert err.endswith("sampling with the weights after step 2\n")
    corpus.unlink()  # sampling doesn't need it
    v6d.main(["--sample_only", "--out_dir", str(folder)])
    out, err = capsys.readouterr()
    assert out == sample
    assert err.endswith("sampling with the weights after step 2\n")
    shutil.copy(folder / "latest.pt", folder / "best.pt")
    v6d.main(["--sample_only", "--out_dir", str(folder)])
    assert capsys.readouterr().out != sample


def test_a_sample_depends_on_the_sampling_flags_and_nothing_else(trained, capsys):
    def sample(*typed):
        v6d.main(["--sample_only", "--out_dir", str(trained), *typed])
        return capsys.readouterr().out

    before = files_of(trained)
    first = sample("--prompt", "The ", "--max_new_tokens", "40")
    assert first.startswith("The ")
    assert len(first) == 45
    assert sample("--prompt", "The ", "--max_new_tokens", "40", "--batch_size", "9") == first
    assert sample("--prompt", "The ", "--max_new_tokens", "40", "--seed", "4") != first
    assert files_of(trained) == before


def test_a_character_that_the_run_never_saw_is_refused(trained, capsys):
    line = refused(v6d, capsys, "--sample_only", "--out_dir", trained, "--prompt", "é")
    assert line.startswith("error: --prompt: the model's alphabet has no 'é';")


def test_a_run_without_a_folder_saves_nothing(splits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tiny(v6d)
    history = v6d.train(v6d.LanguageModel(cfg, VOCAB_SIZE), *splits, cfg, runs.UnsavedRun())
    assert list(history) == [0, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_leaves_the_best_weights(corpus, tmp_path, capsys, monkeypatch):
    fake_losses(monkeypatch, 5.0, math.nan)
    line = refused(v6d, capsys, *flags(corpus, out_dir=tmp_path / "run"))
    assert line == "error: the loss is not finite; try a smaller --learning_rate"
    assert saved(tmp_path / "run", "best.pt")["step"] == 0
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [0]


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(
    corpus, tmp_path, capsys, monkeypatch
):
    fake_losses(monkeypatch, 5.0, math.nan)
    refused(v6d, capsys, *flags(corpus, out_dir=tmp_path / "run"))
    assert saved(tmp_path / "run")["step"] == 0


def test_a_save_that_fails_leaves_all_files_as_they_were(trained, capsys, monkeypatch):
    before = files_of(trained)

    def save(state, file):
        file.write(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    line = refused(v6d, capsys, "--resume", "--out_dir", trained, "--max_iters", 6)
    assert line.startswith(f"error: --out_dir {trained}: can't save ")
    assert "No space left on device" in line
    assert files_of(trained) == before


# ---- checkpoints that can't be used


def test_without_a_run_there_is_nothing_to_continue(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mode in ("--resume", "--sample_only"):
        line = refused(v6d, capsys, mode)
        assert line.startswith(f"error: no run in {tmp_path / 'out'}; train first")
        line = refused(v6d, capsys, mode, "--out_dir", "elsewhere")
        assert line.startswith("error: --out_dir elsewhere: no such folder;")
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_newest_run_without_a_checkpoint_is_named(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    trained.rename("out/2025-01-02_03-04-05_v6d_checkpoints")
    newest = Path("out/2025-01-02_03-04-06_v6d_checkpoints")
    newest.mkdir()
    for mode, name in {"--resume": "latest.pt", "--sample_only": "best.pt"}.items():
        line = refused(v6d, capsys, mode)
        assert line.startswith(f"error: {newest / name}: no such file; either the run ended before")


def bigger(tensors):
    return {name: torch.zeros(*tensor.shape, 2) for name, tensor in tensors.items()}


def damage(folder, what):
    """Damage a checkpoint; return what the message must say."""
    path = folder / "latest.pt"
    state = saved(folder)
    if what == "half a file":
        path.write_bytes(path.read_bytes()[:9999])
        return f"error: {path}: damaged, or not a checkpoint at all (File is not a zip file)"
    if what == "renamed weights":
        weights = {f"x.{name}": tensor for name, tensor in state["model"].items()}
        edit(path, model=weights)
        return "damaged: its weights don't fit its settings"
    if what == "weights of another script":
        weights = {f"x.{name}": tensor for name, tensor in state["model"].items()}
        edit(path, model=weights, script="v8c_gpt2")
        name = Path("part4_gpt2", "v8c_gpt2.py")
        return f"written by {name}, whose model has other weights; use that script"
    if what == "an older format":
        edit(path, random_state=torch.get_rng_state(), log=[])
        return "v6d_checkpoints.py in another format, which commit 3b6abd2 of it can read"
    if what == "other sizes":
        edit(path, config=state["config"] | {"n_layer": 1})
        return "damaged: its weights don't fit its settings"
    if what == "indivisible sizes":
        edit(path, config=state["config"] | {"n_head": 4})
        return "--n_embd 18: not a multiple of --n_head 4"
    if what == "setting out of range":
        edit(path, config=state["config"] | {"batch_size": 0})
        return "--batch_size 0: must be at least 1"
    if what == "setting of another type":
        edit(path, config=state["config"] | {"batch_size": "four"})
        return "the checkpoint's setting batch_size is 'four'; it is damaged"
    if what == "other characters":
        edit(path, characters=state["characters"] + "0123")
        return "damaged: its weights don't fit its settings"
    if what == "averages of other shapes":
        averages = {i: bigger(a) for i, a in state["optimizer"].items()}
        edit(path, optimizer=averages)
        return f"error: {path}: its averages don't fit (step has shape (2,)): damaged, or "
    if what == "averages that share their numbers":
        averages = {i: a | {"exp_avg": a["exp_avg"][:1].expand_as(a["exp_avg"])} for i, a in
                    state["optimizer"].items()}
        edit(path, optimizer=averages)
        return f"error: {path}: its averages don't fit (exp_avg isn't contiguous)"
    if what == "weights that are no numbers":
        edit(path, model={name: tensor * math.nan for name, tensor in state["model"].items()})
        return f"error: {path}: damaged: some of its weights aren't finite numbers"
    assert what == "averages without numbers"
    edit(path, optimizer={0: "none"})
    return f"error: {path}: its averages don't fit ("


@pytest.mark.parametrize(
    "what",
    [
        "half a file", "renamed weights", "weights of another script",
        "an older format", "other sizes",
        "indivisible sizes", "setting out of range", "setting of another type",
        "other characters", "averages of other shapes", "averages without numbers",
        "averages that share their numbers", "weights that are no numbers",
    ],
)
def test_a_damaged_checkpoint_is_refused(trained, capsys, what):
    said = damage(trained, what)
    before = files_of(trained)
    line = refused(v6d, capsys, "--resume", "--out_dir", trained)
    assert said in line
    assert files_of(trained) == before


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"history": {}}, id="no history"),
        pytest.param({"history": {"0": (1.0, 1.0)}}, id="history with steps of text"),
        pytest.param({"history": {0: 1.0}}, id="history with one loss"),
        pytest.param({"history": {0: (1.0, math.nan)}}, id="history with a loss that isn't one"),
        pytest.param({"step": -1}, id="negative step"),
        pytest.param({"config": {}}, id="no settings"),
    ],
)
def test_a_checkpoint_edited_by_hand_is_refused(trained, capsys, changes):
    edit(trained / "latest.pt", **changes)
    refused(v6d, capsys, "--resume", "--out_dir", trained, "--max_iters", 6)
