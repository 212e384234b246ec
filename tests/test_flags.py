"""data/flags.py: settings and their flags, --help, devices, and errors in one line."""

import dataclasses
import shlex
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import refused, tiny_flags

import bigram
import data
from data import flags, setting
from lab.ladder import ROOT, SCRIPTS, load


@dataclasses.dataclass
class Config:
    """One setting of each kind."""

    size: int = setting("a size", gpu=64, cpu=24, least=1)
    rate: float = setting("a rate", 0.5, below=1)
    name: str = setting("a name", gpu="g", cpu="c")
    kind: str = setting("a kind", "one", choices=["one", "two"])
    switch: bool = setting("a switch", gpu=True, cpu=False)
    device: str = setting("a device", gpu="cuda", cpu="cpu")


SAVED = {"size": 7, "rate": 0.25, "name": "s", "kind": "two", "switch": True, "device": "cpu"}


def read(*argv, saved=None, fixed=()):
    return data.read_flags(Config, "The lesson.", list(argv), saved, fixed)


def pretend(monkeypatch, cuda=False, mps=False):
    """Make PyTorch say which accelerators it has, and compute on the CPU all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    real = torch.ones

    def ones(*shape, device):
        return real(*shape, device="cpu" if device in ("cuda", "mps") else device)

    monkeypatch.setattr(torch, "ones", ones)


def test_the_cpu_gets_its_own_defaults():
    for device in ("cpu", "cpu:0"):
        cfg = read("--device", device, "--rate", "0.25")
        assert cfg == Config(24, 0.25, "c", "one", False, device)


@pytest.mark.parametrize("gpus", [{"cuda": True}, {"mps": True}, {"cuda": True, "mps": True}])
def test_without_flags_a_run_starts_beside_a_gpu_that_pytorch_can_not_use(monkeypatch, gpus):
    """One that is too old for this version, for example, is there all the same."""
    pretend(monkeypatch, **gpus)

    def ones(*shape, device):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", ones)
    assert flags.best_device() == "cpu"
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(1))
    assert flags.best_device() == next(iter(gpus))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_gpu_gets_its_own_defaults(monkeypatch, device):
    pretend(monkeypatch, **{device: True})
    assert read() == Config(64, 0.5, "g", "one", True, device)
    assert read("--device", "cpu").size == 24


def test_flags_of_every_type():
    cfg = read("--device", "cpu", "--size", "7", "--name", "x y", "--kind", "two", "--switch")
    assert cfg == Config(7, 0.5, "x y", "two", True, "cpu")
    assert read("--device", "cpu", "--no-switch").switch is False


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--size", "0"], "--size 0: must be at least 1 and below 2147483648"),
        (["--size", "-3"], "--size -3"),
        (["--size", str(10**30)], f"--size {10**30}"),
        (["--size", "many"], "argument --size: invalid int value: 'many'; see --help"),
        (["--size", "2.5"], "argument --size"),
        (["--size", ""], "argument --size"),
        (["--size"], "argument --size"),
        (["--rate", "-0.1"], "--rate -0.1: must be at least 0 and below 1"),
        (["--rate", "1"], "--rate 1.0"),
        (["--rate", "nan"], "--rate nan"),
        (["--rate", "inf"], "--rate inf"),
        (["--rate", "half"], "argument --rate"),
        (["--kind", "three"], "argument --kind: invalid choice: 'three'"),
        (["--nonsense", "1"], "unrecognized arguments: --nonsense 1; see --help"),
        (["word"], "unrecognized arguments: word"),
    ],
)
def test_values_that_are_refused(argv, said):
    with pytest.raises(data.InputError) as error:
        read("--device", "cpu", *argv)
    assert str(error.value).startswith(said)


def test_the_largest_value_may_itself_be_allowed():
    @dataclasses.dataclass
    class Share:
        share: float = setting("a share", 1.0, most=1)
        device: str = setting("a device", gpu="cuda", cpu="cpu")

    def read_share(value):
        return data.read_flags(Share, "", ["--device", "cpu", "--share", value]).share

    assert read_share("1") == 1.0
    for value in ("1.0001", "inf", "nan", "-0.5"):
        said = f"^--share {float(value)}: must be at least 0 and at most 1$"
        with pytest.raises(data.InputError, match=said):
            read_share(value)


def test_saved_settings_take_the_place_of_the_defaults():
    assert read(saved=SAVED) == Config(**SAVED)
    cfg = read("--size", "8", "--no-switch", saved=SAVED)
    assert cfg == Config(**SAVED | {"size": 8, "switch": False})
    cfg = read("--device", "cpu", saved={"rate": 0.75})
    assert cfg == Config(24, 0.75, "c", "one", False, "cpu")


def test_saved_settings_of_another_script_are_left_out():
    assert read(saved=SAVED | {"temperature": 0.8, "top_k": "many"}) == Config(**SAVED)
    assert flags.check_saved(Config, {"temperature": 0.8}) == {}


def test_a_saved_device_that_is_not_there_gives_way_to_one_that_is(monkeypatch):
    monkeypatch.setattr(flags, "best_device", lambda: "cpu")
    assert read(saved=SAVED | {"device": "warp:3"}) == Config(**SAVED)
    with pytest.raises(data.InputError, match="^--device warp:4: "):
        read("--device", "warp:4", saved=SAVED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 7.0),
        ("size", "7"),
        ("size", True),
        ("size", None),
        ("rate", "0.5"),
        ("rate", False),
        ("name", 7),
        ("switch", 1),
        ("device", None),
    ],
)
def test_a_saved_setting_of_another_type_is_refused(name, value):
    with pytest.raises(data.InputError, match=f"setting {name} is {value!r}; it is damaged"):
        read(saved=SAVED | {name: value})


def test_a_saved_whole_number_may_stand_for_a_float():
    rate = read(saved=SAVED | {"rate": 0}).rate
    assert (rate, type(rate)) == (0.0, float)


def test_a_saved_setting_out_of_range_is_refused():
    with pytest.raises(data.InputError, match="^--size 0: must be at least 1"):
        read(saved=SAVED | {"size": 0})


def test_a_fixed_setting_can_be_repeated_but_not_changed():
    fixed = ["size", "kind"]
    assert read("--size", "7", "--rate", "0.5", saved=SAVED, fixed=fixed).rate == 0.5
    said = "^--size 8: the checkpoint has 7, which can't be changed; leave the flag out$"
    with pytest.raises(data.InputError, match=said):
        read("--size", "8", saved=SAVED, fixed=fixed)
    with pytest.raises(data.InputError, match="^--kind one: the checkpoint has 'two', "):
        read("--kind", "one", saved=SAVED, fixed=fixed)


def test_a_checkpoint_without_a_fixed_setting_is_refused():
    with pytest.raises(data.InputError, match="size"):
        read(saved={"rate": 0.25}, fixed=["size"])


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "mps", "warp", "", "meta"])
def test_devices_that_are_not_there(device):
    if device in ("cuda", "mps") and flags.best_device() == device:
        pytest.skip("this machine has one")
    with pytest.raises(data.InputError, match=f"^--device {device}: .*; try --device cpu"):
        read("--device", device)


def help_of(config_class, capsys):
    with pytest.raises(SystemExit) as stop:
        data.read_flags(config_class, "The lesson.\n\n    a formula", ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_lesson_and_the_defaults_in_force(monkeypatch, capsys):
    pretend(monkeypatch)
    text = help_of(Config, capsys)
    assert text.startswith("The lesson.\n\n    a formula\n")
    text = " ".join(text.split())
    assert "--size int a size (default: 24; on a GPU: 64)" in text
    assert "--rate float a rate (default: 0.5)" in text
    assert "--name str a name (default: 'c'; on a GPU: 'g')" in text
    assert "--kind {one,two} a kind (default: 'one')" in text
    assert "--switch, --no-switch a switch (default: False; on a GPU: True)" in text
    assert "--device str a device (default: 'cpu')" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_its_lesson_and_its_settings(script, capsys):
    module = load(script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(module.__doc__.splitlines()[0])
    for field in dataclasses.fields(module.Config):
        assert f"\n  --{field.name}" in text
        assert " ".join(field.metadata["text"].split()[:2]) in " ".join(text.split())


def test_help_on_a_machine_with_a_gpu(monkeypatch, capsys):
    pretend(monkeypatch, mps=True)
    text = " ".join(help_of(Config, capsys).split())
    assert "--size int a size (default: 64; on the CPU: 24)" in text
    assert "--device str a device (default: 'mps')" in text


def test_a_mistake_ends_in_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop, data.command_line():
        raise data.InputError("--data two\nlines: not there")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --data two lines: not there\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_too_little_memory(capsys, error):
    with pytest.raises(SystemExit) as stop, data.command_line():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory; try a smaller --batch_size")


def test_a_tensor_that_no_machine_can_hold(capsys):
    """PyTorch's own message for it is recognised."""
    with pytest.raises(SystemExit), data.command_line():
        torch.empty(2**50)  # 4 PiB
    assert "out of memory" in capsys.readouterr().err


def test_a_full_disk(capsys):
    with pytest.raises(SystemExit) as stop, data.command_line():
        raise OSError(28, "No space left on device", "out.txt")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'out.txt'\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error), match="a bug"), data.command_line():
        raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (flags.Stopped(signal.SIGTERM), 143), (BrokenPipeError(), 141)],
)
def test_interruptions_have_the_status_that_shells_expect(error, status):
    with pytest.raises(SystemExit) as stop, data.command_line():
        raise error
    assert stop.value.code == status


def test_ctrl_c_says_that_the_first_scripts_save_nothing(capsys):
    with pytest.raises(SystemExit), data.command_line():
        raise KeyboardInterrupt
    why = "scripts before v6d_checkpoints.py save nothing of what they have trained"
    assert capsys.readouterr().err == f"stopped; {why}\n"


def test_sigterm_ends_a_program_like_ctrl_c():
    old = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop, data.command_line():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert stop.value.code == 143
    assert issubclass(flags.Stopped, KeyboardInterrupt), "what Ctrl-C cleans up is cleaned up, too"


def test_a_program_that_ignores_sigterm_goes_on_doing_so():
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with data.command_line():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, old)


def test_a_script_may_run_in_any_thread():
    before, done = signal.getsignal(signal.SIGTERM), []

    def run():
        with data.command_line():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [before]


def test_a_script_refuses_a_bad_flag_before_it_reads_anything(capsys):
    words = [*tiny_flags(bigram), "--data", "missing.txt", "--batch_size", "0"]
    line = refused(bigram, capsys, *words)
    assert line.startswith("error: --batch_size 0")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--sizes", "--size"), ("--raet=1", "--rate"), ("--no-swich", "--no-switch"),
        ("--knd", "--kind"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_one_that_was_meant(typed, meant):
    with pytest.raises(data.InputError) as stop:
        read(typed)
    assert f"; did you mean {meant}?; see --help" in str(stop.value)


def test_a_flag_unlike_all_others_is_only_refused():
    with pytest.raises(data.InputError) as stop:
        read("--zzzzz")
    assert str(stop.value) == "unrecognized arguments: --zzzzz; see --help"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
@pytest.mark.skipif(sys.platform == "win32", reason="a shell's way to close a stream")
def test_a_closed_stream_does_not_end_a_run(corpus, closed):
    flags = shlex.join(tiny_flags(bigram, data=corpus))
    command = f"{shlex.quote(sys.executable)} bigram.py {flags} {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert ("step 0: " in done.stdout) == ("1>&-" not in closed)
    assert "Traceback" not in done.stderr
