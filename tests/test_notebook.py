"""The scripts in a real notebook kernel."""

import pytest
from conftest import TEXT, tiny_flags

from lab.ladder import ROOT, load

pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[str]:
    """What each cell printed, in the order of the cells."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    flags = tiny_flags(load("v5_gpt"), data=folder / "corpus.txt")
    calls = [f"main({flags})", "main()", "main(['--heads', '3'])"]
    cells = [f"import v5_gpt; v5_gpt.{call}" for call in calls]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=100, allow_errors=True, resources=resources).execute()
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]


def test_a_script_trains_and_writes_with_a_progress_bar(outputs):
    assert "step 3: train loss " in outputs[0]
    assert "training: 100%" in outputs[0]
    assert "error" not in outputs[0]


def test_main_says_that_it_needs_a_list_of_flags(outputs):
    said = 'in a notebook, the flags are a list; call main([]) or main(["--max_iters", "500"])'
    assert f"error: main(): {said}\n" in outputs[1]


def test_a_flag_that_does_not_exist_is_named(outputs):
    meant = "did you mean --n_head?"
    assert f"error: unrecognized arguments: --heads 3; {meant}; see --help\n" in outputs[2]
