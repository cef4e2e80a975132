# SPDX-License-Identifier: Apache-2.0
# Files and directories are written beside their final name, flushed and renamed, so a kill or a full disk leaves the
# old content. Used for checkpoints, logs, plots and model directories.
"""Atomic output."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader finds the old file or the new one, never a partial one.

    Raises:
        OSError: with the system's reason; the old file is unchanged.
    """
    replace_files(path.parent, {path.name: content})


def replace_files(directory: Path, contents: dict[str, bytes]) -> None:
    """Write all files beside their final names, flush them, then rename them in order; leave no temporary file.

    Raises:
        OSError: with the system's reason; files not yet renamed are unchanged.
    """
    pairs = [(_beside(directory / name), directory / name) for name in contents]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for (temporary, _), content in zip(pairs, contents.values(), strict=True):
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for temporary, final in pairs:
            os.replace(temporary, final)
        flush_directory(directory)
    except OSError as error:
        place = pairs[0][1] if len(pairs) == 1 else directory
        raise not_written(place, error, error.errno) from error
    finally:
        for temporary, _ in pairs:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``path``; it becomes ``path`` when the block ends without an error.

    Args:
        path: must not exist, or be an empty directory, unless ``replace``: its old content is then removed once the
            new directory is complete. NOTE: that takes two renames; a kill between them leaves the old directory
            beside ``path``, under a hidden name that ends in ``.old``.

    Raises:
        OSError: the files could not be written (also if safetensors reports it); ``path`` is unchanged.
    """
    temporary, old = _beside(path), _beside(path, "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        if replace and path.exists():
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        flush_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise not_written(path, error, error.errno) from error
    except Exception as error:
        # For a full disk safetensors raises its own type.
        if type(error).__name__ == "SafetensorError":
            raise not_written(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def not_written(path: Path, reason: Exception, number: int | None = None) -> OSError:
    """The error for a file or directory that could not be written."""
    why = getattr(reason, "strerror", None) or str(reason)
    return OSError(
        number,
        f"'{path}' could not be written ({why}); what stood there before is unchanged. Free space or choose another "
        "place, and run it again",
    )


def flush_directory(path: Path) -> None:
    """Make renames in ``path`` durable, if the system can flush a directory."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(path: Path, ending: str = "tmp") -> Path:
    # In the same directory, because a rename is atomic only within a file system; unique, because two processes may be
    # told to write to one place by mistake.
    return path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.{ending}"
