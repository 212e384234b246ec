"""Import the libraries, which takes a second or more, so that Ctrl-C meanwhile isn't a traceback.

PyTorch might even end with an abort in its C++ code. With the system's own handler, the program
simply ends.
"""

import signal

handler = signal.getsignal(signal.SIGINT)
try:
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
except ValueError:  # only the main thread can set a handler
    handler = None

import filelock  # noqa: E402, F401
import numpy  # noqa: E402, F401, ICN001
import torch  # noqa: E402, F401
import tqdm  # noqa: E402, F401

if handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, handler)
