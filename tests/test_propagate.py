"""lab/propagate.py, on a small tree of its own in a repository of its own."""

import subprocess

import pytest

import data
from lab import propagate

# first -> second -> third, and first -> other
TREE = {"first": None, "second": "first", "third": "second", "other": "first"}
CODE = """
import math


def one():
    # The first of a few functions.
    return 1


def two():
    # Far enough from the others that git merges a change to each of them alone.
    return 2


def three():
    # The last of those that all scripts have.
    return 3


def main():
    print(one(), two(), three())
"""
TEXTS = {
    "first": '"""The first lesson."""\n' + CODE,
    "second": '"""Another lesson."""\n' + CODE.replace("return 2", "return 22"),
    "third": '"""A third lesson,\non two lines."""\n' + CODE.replace("return 2", "return 222"),
    "other": '"""One more."""\n' + CODE + "\n\ndef four():\n    return 4\n",
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with the small tree, committed, that the program takes for the course."""
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8", newline="\n")
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(propagate, "ROOT", tmp_path)
    monkeypatch.setattr(propagate, "PARENTS", TREE)
    return tmp_path


def edit(root, name, old, new):
    path = root / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8", newline="\n")


def texts(root):
    return {name: (root / f"{name}.py").read_text(encoding="utf-8") for name in TREE}


def refused(capsys, *argv):
    """The one line of a run that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        propagate.main(list(argv))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_change_reaches_every_descendant(root, capsys):
    edit(root, "first", "return 1", "# why\n    return 1")
    edit(root, "first", "import math", "import sys")
    propagate.main(["first.py"])
    changed = {"return 1": "# why\n    return 1", "import math": "import sys"}
    for name, text in texts(root).items():
        expected = TEXTS[name]
        for old, new in changed.items():
            expected = expected.replace(old, new)
        assert text == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}.py: +2 -1 lines" for name in ("second", "third", "other")]


def test_a_change_stays_in_its_branch(root, capsys):
    edit(root, "second", "return 3", "return 33")
    propagate.main(["second"])
    after = texts(root)
    assert after["third"] == TEXTS["third"].replace("return 3", "return 33")
    assert after["first"] == TEXTS["first"]
    assert after["other"] == TEXTS["other"]
    assert capsys.readouterr().out == "third.py: +1 -1 lines\n"


def test_module_docstrings_stay_as_they_are(root, capsys):
    edit(root, "first", "The first lesson.", "A better one.\n\nWith a second paragraph.")
    edit(root, "first", "return 3", "return 33")
    propagate.main(["first"])
    for name in ("second", "third", "other"):
        assert texts(root)[name] == TEXTS[name].replace("return 3", "return 33")


def test_a_conflict_names_the_place_and_writes_nothing(root, capsys):
    edit(root, "first", "return 2", "return 2.0")
    edit(root, "first", "return 3", "return 33")
    before = texts(root)
    line = refused(capsys, "first")
    number = before["second"].splitlines().index("    return 22") + 1
    assert f"second.py, lines {number}-{number}: in conflict with the change in first.py" in line
    assert "nothing was written" in line
    assert texts(root) == before


def test_every_conflict_is_named(root, capsys):
    edit(root, "second", "return 1", "return 11")
    edit(root, "first", "return 2", "return 2.0")
    edit(root, "first", "return 1", "return 1.0")
    lines = texts(root)["second"].splitlines()
    first, last = lines.index("    return 11") + 1, lines.index("    return 22") + 1
    assert f"lines {first}-{first}, {last}-{last}: " in refused(capsys, "first")


def test_a_conflict_further_down_writes_nothing_either(root, capsys):
    edit(root, "third", "return 3", "return 333")
    edit(root, "first", "return 3", "return 33")
    before = texts(root)
    number = before["third"].splitlines().index("    return 333") + 1
    assert f"third.py, lines {number}-{number}: " in refused(capsys, "first")
    assert texts(root) == before


def test_a_skipped_script_and_those_below_it_are_left_out(root, capsys):
    edit(root, "first", "return 2", "return 2.0")
    propagate.main(["first", "--skip", "second.py"])
    after = texts(root)
    assert after["other"] == TEXTS["other"].replace("return 2", "return 2.0")
    assert (after["second"], after["third"]) == (TEXTS["second"], TEXTS["third"])


def test_a_change_that_is_there_already_is_not_made_twice(root, capsys):
    for name in TREE:
        edit(root, name, "return 1", "return 1.0")
    before = texts(root)
    propagate.main(["first"])
    assert texts(root) == before
    assert capsys.readouterr().out == "no descendant needed a change\n"


def test_windows_line_endings_are_kept(root):
    path = root / "second.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    edit(root, "first", "return 3", "return 33")
    propagate.main(["first"])
    expected = TEXTS["second"].replace("return 3", "return 33").replace("\n", "\r\n")
    assert path.read_bytes() == expected.encode()
    assert b"\r" not in (root / "third.py").read_bytes()


def test_mixed_line_endings_become_those_of_unix(root):
    path = root / "second.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n", 3))
    edit(root, "first", "return 3", "return 33")
    propagate.main(["first"])
    assert path.read_bytes() == TEXTS["second"].replace("return 3", "return 33").encode()


def test_what_can_not_be_carried(root, capsys, tmp_path_factory):
    assert "first.py: the same as in the last commit" in refused(capsys, "first")
    said = "v99: not a script here; give its name (first, second, third, other)"
    assert said in refused(capsys, "v99")
    assert "v99" in refused(capsys, "first", "--skip", "v99")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "first.py"
    assert "not a script here; give its name" in refused(capsys, str(elsewhere))
    assert "the following arguments are required" in refused(capsys)


def test_what_git_has_not_seen(root, capsys):
    subprocess.run(["git", "rm", "-q", "--cached", "first.py"], cwd=root, check=True)
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    subprocess.run(["git", *identity, "commit", "-qm", "gone"], cwd=root, check=True)
    assert "first.py: no committed version to compare with (" in refused(capsys, "first")
    (root / ".git").rename(root / "git")
    assert "not a git repository" in refused(capsys, "first")


def test_files_that_can_not_be_merged(root, capsys, monkeypatch):
    edit(root, "first", "return 3", "return 33")
    before = texts(root)
    for name in ("first", "third"):
        for text in ("def broken(:\n", "", "x = 1\n", "\0"):
            path = root / f"{name}.py"
            path.write_text(text, encoding="utf-8")
            assert f"{name}.py: " in refused(capsys, "first")
            path.write_bytes(b'"""\xff"""\n')
            assert f"{name}.py: not UTF-8 text" in refused(capsys, "first")
            path.unlink()
            assert f"{name}.py" in refused(capsys, "first")
            path.write_text(before[name], encoding="utf-8", newline="\n")
    assert texts(root) == before
    monkeypatch.setenv("PATH", "")
    assert "'git'" in refused(capsys, "first")


def test_a_disk_that_is_full_harms_no_file(root, capsys, monkeypatch):
    edit(root, "first", "return 3", "return 33")
    before = texts(root)
    real = propagate.Path.write_text

    def fail(path, *args, **kwargs):
        if path.name.startswith("third.py"):
            raise OSError(28, "No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(propagate.Path, "write_text", fail)
    assert "No space left" in refused(capsys, "first")
    monkeypatch.undo()
    assert texts(root) == before
    assert {path.name for path in root.glob("*.py*")} == {f"{name}.py" for name in TREE}


def test_merge_is_that_of_git():
    assert propagate.merge("a\nb\nc\nd\n", "a\nb\nc\n", "A\nb\nc\n") == ("A\nb\nc\nd\n", [])
    with pytest.raises(data.InputError):
        propagate.merge("\0", "\0", "\0x")  # git takes it for a binary file
