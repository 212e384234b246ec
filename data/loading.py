"""Import the slow libraries in such a way that Ctrl-C during the import ends the program quietly.

With Python's own handler, it would end in a traceback, or even in an abort of PyTorch's C++ code.
"""

import signal
import threading

in_main_thread = threading.current_thread() is threading.main_thread()  # no other sets handlers
handler = signal.getsignal(signal.SIGINT)
is_python_handler = in_main_thread and handler is signal.default_int_handler
if is_python_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import filelock  # noqa: E402, F401
import numpy  # noqa: E402, F401, ICN001
import torch  # noqa: E402, F401
import tqdm  # noqa: E402, F401

if is_python_handler:
    signal.signal(signal.SIGINT, handler)
