"""data/files.py: a write that doesn't succeed leaves the old file as it was."""

from pathlib import Path

import pytest

import data
from data import files
from data.files import replace_file


@pytest.fixture
def path(tmp_path):
    """A file with something in it."""
    (tmp_path / "latest.pt").write_bytes(b"the old state")
    return tmp_path / "latest.pt"


def test_a_write_that_fails_leaves_the_old_file_as_it_was(path):
    before = path.read_bytes()
    for error in (OSError(28, "No space left on device"), RuntimeError("unexpected pos 64")):

        def write(file, error=error):
            file.write(b"the first half")
            raise error

        with pytest.raises(data.InputError) as stop:
            replace_file(path, write, "--out_dir")
        assert str(stop.value).startswith(f"--out_dir {path.parent}: can't save latest.pt (")
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_the_old_file_as_it_was(path):
    before = path.read_bytes()

    def write(file):
        file.write(b"the first half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, write, "--out_dir")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_called_that(path, monkeypatch):
    """PyTorch reports it with the line of its C++ code at which it noticed."""

    def write(file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    usage = files.shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(data.InputError) as stop:
        replace_file(path, write, "--out_dir")
    why = "can't save latest.pt (the disk is full); the files that were there are intact"
    assert str(stop.value) == f"--out_dir {path.parent}: {why}"


@pytest.mark.parametrize("n_refused", [1, 10, 11])
def test_a_file_that_another_program_is_reading_is_replaced_a_moment_later(
    path, monkeypatch, n_refused
):
    waited = []
    refused = iter([True] * n_refused)
    real = Path.replace

    def replace(old, new):
        if next(refused, False):
            raise PermissionError(13, "Access is denied")
        return real(old, new)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", waited.append)
    if n_refused > 10:
        with pytest.raises(data.InputError, match="Access is denied"):
            replace_file(path, lambda file: file.write(b"new"), "--out_dir")
        assert path.read_bytes() == b"the old state"
    else:
        replace_file(path, lambda file: file.write(b"new"), "--out_dir")
        assert path.read_bytes() == b"new"
    assert sum(waited) == pytest.approx(0.1 * min(n_refused, 10))
