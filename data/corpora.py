"""Where a text comes from: Tiny Shakespeare, Python's own library, or a file of your own."""

import socket
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.flags import InputError

SHAKESPEARE = Path(__file__).parent / "tinyshakespeare.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 10  # seconds that the server may take to answer
PYTHON_LENGTH = 1_100_000  # characters, about as many as Shakespeare has


def load_text(name: str | Path, flag: str = "--data") -> str:
    """Return the corpus "shakespeare" or "python", or the contents of a UTF-8 text file.

    Line endings become "\\n". If Shakespeare can't be downloaded, a notice says so and Python's
    library takes its place. Raises InputError, naming flag, for a file that isn't readable text.
    """
    if name == "shakespeare" and not SHAKESPEARE.exists():
        try:
            download_shakespeare()
        except Exception as error:  # no network, no permission, a wrong checksum, ...
            print(
                f"notice: couldn't download Tiny Shakespeare ({error}); training on the source "
                f"code of Python's library instead. To fix this, save {URL} as {SHAKESPEARE}.",
                file=sys.stderr,
            )
            name = "python"
    if name == "shakespeare":
        return read_text_file(SHAKESPEARE, flag)
    if name == "python":
        return python_library()
    check_name(name, flag)
    return read_text_file(Path(name), flag)


def check_name(name: str | Path, flag: str) -> None:
    """Raise InputError, naming flag, for what can't be a text file or never ends."""
    remedy = "give the path of a text file"
    if str(name) == "":
        raise InputError(f"{flag}: empty; {remedy}")
    if "://" in str(name):
        raise InputError(f"{flag} {name}: an address; download the text and {remedy}")
    with reading(Path(name), flag):
        if Path(name).is_char_device() and not is_terminal(Path(name)):
            raise InputError(f"{flag} {name}: a device, which may never end; {remedy}")


def is_terminal(path: Path) -> bool:
    """Whether path is a terminal, in which someone can type a text and end it."""
    with path.open("rb", buffering=0) as file:
        return file.isatty()


def download_shakespeare() -> None:
    """Download Tiny Shakespeare with a progress bar; keep it only if its checksum is right."""
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        torch.hub.download_url_to_file(URL, SHAKESPEARE, SHA256)
    finally:
        socket.setdefaulttimeout(previous_timeout)


def python_library() -> str:
    """Return about 1.1 million characters of the source code of Python's standard library.

    They are the same each time with the same version of Python.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.name for path in folder.glob("*.py"))
    modules = []
    for name in names:
        text = (folder / name).read_text(encoding="latin-1")  # any bytes are valid Latin-1
        if text.isascii():
            modules.append(text)
    return "".join(modules)[:PYTHON_LENGTH]


def read_text_file(path: Path, flag: str) -> str:
    """Return the contents of a UTF-8 text file; raises InputError, naming flag, if it isn't one."""
    with reading(path, flag):
        # utf-8-sig skips the byte order mark that Windows programs may put at the start.
        text = path.read_text(encoding="utf-8-sig")
    if not text:
        raise InputError(f"{flag} {path}: the file is empty; use a text with characters in it")
    if "\0" in text:
        raise InputError(f"{flag} {path}: a binary file, or text that isn't UTF-8; give UTF-8 text")
    return text


@contextmanager
def reading(path: Path, flag: str) -> Iterator[None]:
    """Run the block, which reads a text file; turn its errors into InputError, naming flag."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError:
        raise InputError(f"{flag} {path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:  # not there, a folder, no permission, ...
        why = error.strerror.lower()
        raise InputError(f"{flag} {path}: {why}; give the path of a text file") from None
    except ValueError as error:  # a path that no system allows
        raise InputError(f"{flag} {path}: {error}; give the path of a text file") from None
