"""data/loading.py: Ctrl-C while PyTorch is imported ends a program without a traceback."""

import importlib
import os
import signal
import subprocess
import sys
import threading

import data

import pytest
from conftest import tiny_flags

import v5_gpt
from lab.ladder import ROOT

# Runs a script, and presses Ctrl-C when the module named first is about to be imported.
CTRL_C_BEFORE_AN_IMPORT = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == module:
            sys.stderr.write("Ctrl-C")
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
module, script, *sys.argv[1:] = sys.argv[1:]
sys.meta_path.insert(0, Finder())
sys.path.insert(0, os.getcwd())
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("module", ["torch", "torch._C", "torch.nn.functional"])
def test_ctrl_c_during_the_import_ends_the_program_quietly(corpus, module):
    command = [sys.executable, "-c", CTRL_C_BEFORE_AN_IMPORT, module, "v5_gpt.py"]
    command += [*tiny_flags(v5_gpt, max_iters=0), "--data", str(corpus)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.endswith("Ctrl-C"), "no traceback and no abort"


@pytest.fixture
def set_handler():
    """Sets the handler for Ctrl-C during a test."""
    old = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, old)


def own_handler(*_):
    pass


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN, own_handler])
def test_ctrl_c_works_as_before_once_pytorch_is_there(set_handler, handler):
    set_handler(handler)
    importlib.reload(data.loading)
    assert signal.getsignal(signal.SIGINT) == handler


def test_pytorch_can_be_loaded_in_any_thread(set_handler):
    set_handler(signal.default_int_handler)
    handlers = []

    def load():
        importlib.reload(data.loading)
        handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
