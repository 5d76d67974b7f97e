"""Writing: text on one line, files whole or not at all; what the system refuses is a UserError."""
from __future__ import annotations

from common import UserError  # before torch: see there

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def printable(text: str) -> str:
    """One line without control codes: file names and annotations from elsewhere may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A block that does nothing but write `path`: what the system refuses there is a UserError, whose sentence holds
    for every file of ours."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed: see cli
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); what was saved before is untouched. "
                        "Make room or mend the permissions, and start the same command again") from error


class _File(io.FileIO):
    """Remembers what the system refused, which torch.save reports as a fault of its own."""
    refused: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.refused = error
            raise


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Any]:
    """A file to write, which takes the place of `path` when it is whole and on the disk; what was there before is kept
    as `previous`. Missing folders are made. UserError: see writing."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _File(temporary, "w")
        try:
            with io.BufferedWriter(raw) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            temporary.unlink(missing_ok=True)  # the disk may be full
            if raw.refused and isinstance(error, Exception):
                raise raw.refused from error
            raise
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        if os.name == "posix":  # the names too, not the contents alone
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to disk, rename: a reader sees the old file or the new, never half of one."""
    with replacing(path) as file:
        file.write(content)


def save_picture(picture: Any, path: str | Path) -> None:
    """A PIL image as PNG, all or nothing."""
    with replacing(Path(path)) as file:
        picture.save(file, format="PNG")


def plain(obj: Any) -> Any:
    """JSON's own types: arrays and numpy scalars become lists and numbers, nan and infinities null."""
    if isinstance(obj, dict):
        return {str(k): plain(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(v) for v in obj]
    if isinstance(obj, (np.ndarray, np.generic, Tensor)):
        return plain(obj.tolist())
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` at `path`, all or nothing. nan becomes null; missing folders are made."""
    write_atomic(Path(path), (json.dumps(plain(obj), indent=1, default=str, allow_nan=False) + "\n").encode())
