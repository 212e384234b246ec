"""Import PyTorch, which takes a second or more, so that Ctrl-C meanwhile doesn't look like a bug.

PyTorch would answer with a traceback, or with an abort from its C++ code. With the system's own
handler, the program simply ends.
"""

import signal

handler = signal.getsignal(signal.SIGINT)
try:
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
except ValueError:  # only the main thread can set a handler
    handler = None

import torch  # noqa: E402, F401

if handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, handler)
