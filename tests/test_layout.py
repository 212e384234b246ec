"""Folders: scripts run from anywhere, and the helpers load only what is needed."""

import ast
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from conftest import TEXT, tiny_flags

from lab.ladder import ROOT, SCRIPTS, load, part_of, path_of

MODULES = {}  # the modules of the two packages, and the text of each
for folder in ("data", "support"):
    for path in (ROOT / folder).glob("*.py"):
        name = folder if path.stem == "__init__" else f"{folder}.{path.stem}"
        MODULES[name] = path.read_text(encoding="utf-8")


def is_installed() -> bool:
    """Whether pip install -e . was run, as requirements.txt does."""
    try:
        distribution("learn-gpt")
    except PackageNotFoundError:
        return False
    return True


def imported(name: str) -> set[str]:
    """The modules of data and support that a module imports, also within its functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & MODULES.keys() or {node.module}
    return found & MODULES.keys()


def test_data_imports_nothing_of_support():
    for name in MODULES:
        if name.split(".")[0] == "data":
            assert {other.split(".")[0] for other in imported(name)} <= {"data"}, name


def test_no_module_needs_itself():
    """Whatever order they are imported in, each finds the others complete."""
    done = set()
    while len(done) < len(MODULES):
        ready = {name for name in MODULES if imported(name) <= done} - done
        assert ready, f"a circle: {sorted(MODULES.keys() - done)}"
        done |= ready


def test_part_1_loads_nothing_of_what_comes_later():
    scripts = [script for script in SCRIPTS if part_of(script) == 1]
    later = [name for name in MODULES if name not in ("data", "data.corpora", "data.flags")]
    program = f"import sys, {', '.join(scripts)}; sys.exit(sys.modules.keys() & {later} or 0)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not is_installed(), reason="needs pip install -e .")
@pytest.mark.parametrize("script", ["v5_gpt", "v9b_rope"])
def test_a_script_runs_from_a_folder_with_data_of_its_own(script, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "novel.txt").write_text(TEXT, encoding="utf-8")
    flags = tiny_flags(load(script), data="data/novel.txt", out_dir="run")
    command = [sys.executable, ROOT / path_of(script), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "step 3: train loss " in done.stdout
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["novel.txt"]


def test_the_scripts_in_the_root_run_without_installing_the_course(tmp_path, corpus):
    """Without site.py, Python reads no .pth file, which is how pip installs the course."""
    flags = tiny_flags(load("v5_gpt"), data=corpus)
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    python = [sys.executable, "-S"]
    find = subprocess.run(
        [*python, "-c", "import data"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert find.returncode == 1, "the course is found even here"
    command = [*python, ROOT / "v5_gpt.py", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "step 3: train loss " in done.stdout
