"""Files that are whole or not there, whatever happens while they are written."""

import os
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
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch reports some write errors as RuntimeError
        why = f"can't save {path.name} ({error}); the files that were there are intact"
        raise InputError(f"{flag} {path.parent}: {why}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
