"""Files that are whole or not there, whatever happens while they are written."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data.flags import InputError


def replace_file(path: Path, write: Callable, flag: str, ending: str = "unfinished") -> None:
    """Call write on a temporary file and, once it is complete, rename that to path.

    Raises InputError, naming flag, if it can't be written; then the old file stays as it was.
    ending: that of the temporary file, if other programs may be writing the same file.
    """
    unfinished = path.with_name(f"{path.name}.{ending}")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the new name
        rename(unfinished, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports some write errors as RuntimeError
        reason = "the disk is full" if is_full(path.parent) else str(error)
        why = f"can't save {path.name} ({reason}); the files that were there are intact"
        raise InputError(f"{flag} {path.parent}: {why}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def rename(old: Path, new: Path) -> None:
    """Rename a file, also to a name that is there already.

    On Windows, a virus scanner or a program that copies files to a cloud may be reading one of the
    two, which only takes a moment. So try for a second. Raises OSError if it isn't possible.
    """
    for _ in range(10):
        try:
            old.replace(new)
            return
        except PermissionError:
            time.sleep(0.1)
    old.replace(new)


def is_full(folder: Path) -> bool:
    """Whether the disk that holds a folder has less than a megabyte left."""
    try:
        return shutil.disk_usage(folder).free < 2**20
    except OSError:
        return False
