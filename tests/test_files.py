"""data/files.py: a write that doesn't succeed leaves the old file as it was."""

import pytest

import data
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
