# SPDX-License-Identifier: Apache-2.0
# Files and directories are written beside their final name, flushed and renamed, so a kill or a full disk leaves the
# old content; a sealed directory also lists its files with checksums. Used for checkpoints, logs, plots and models.
# A symbolic link is written through: "beside" is where it leads to.
"""Atomic output."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

SEAL_NAME = "checksums.json"


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
    finals = [real(directory / name) for name in contents]
    pairs = [(_beside(final), final) for final in finals]
    try:
        real(directory).mkdir(parents=True, exist_ok=True)
        for (temporary, _), content in zip(pairs, contents.values(), strict=True):
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for temporary, final in pairs:
            os.replace(temporary, final)
        flush_directory(directory)
    except OSError as error:
        place = directory / next(iter(contents)) if len(pairs) == 1 else directory
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
            beside ``path``, under a hidden name that ends in ``.old``. A mount point cannot be renamed: there the
            new files are moved into it one by one, config.json last, by which a model is known.

    Raises:
        OSError: the files could not be written (also if safetensors reports it); ``path`` is unchanged.
    """
    final = real(path)
    mounted = os.path.ismount(final)
    temporary = _beside(final / final.name if mounted else final)
    try:
        with explained(path):
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            if mounted:
                _fill(temporary, final, replace=replace)
            else:
                move_directory(temporary, final, replace=replace)
    finally:
        remove_directory(temporary)


@contextlib.contextmanager
def new_files(directory: Path) -> Iterator[Path]:
    """Yield an empty directory; its files replace those of ``directory`` when the block ends without an error.

    Raises:
        OSError: the files could not be written, whoever reports it; those of ``directory`` are unchanged.
    """
    inside = real(directory)
    temporary = _beside(inside / "new")
    try:
        with explained(directory):
            inside.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            _flush_files(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    final = real(inside / file.relative_to(temporary))
                    final.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, final)
            flush_directory(inside)
    finally:
        remove_directory(temporary)


def move_directory(source: Path, path: Path, *, replace: bool) -> None:
    """Flush the files of ``source`` and rename it to ``path``, on one file system; see :func:`new_directory`."""
    old = _beside(path, "old")
    _flush_files(source)
    try:
        if replace and path.exists():
            os.rename(path, old)
        os.rename(source, path)
    except BaseException:  # an interrupt too
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    flush_directory(path.parent)
    remove_directory(old)


def _fill(source: Path, directory: Path, *, replace: bool) -> None:
    """Move what is in ``source``, a directory inside, to ``directory``; config.json goes first and comes last."""
    _flush_files(source)
    before = [entry for entry in directory.iterdir() if entry != source]
    if before and not replace:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    for entry in sorted(before, key=lambda entry: entry.name != "config.json"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name == "config.json"):
        os.rename(entry, directory / entry.name)
    flush_directory(directory)


def _flush_files(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())


def remove_directory(path: Path) -> None:
    """Delete a directory, if it is there, also where an interrupt comes while it does."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(path, ignore_errors=True)
        raise


def real(path: Path) -> Path:
    """Where a path leads to through symbolic links; the last of them may lead to nothing yet."""
    return Path(os.path.realpath(path))


def seal(directory: Path) -> None:
    """List the directory's files with their lengths and checksums in its ``checksums.json``."""
    files = {str(file.relative_to(directory)): _checksum(file) for file in directory.rglob("*") if file.is_file()}
    replace_file(directory / SEAL_NAME, json.dumps(files, indent=1).encode())


def damage(directory: Path) -> str | None:
    """What differs from the directory's seal, as a part of a sentence; None if nothing does, or it has no seal."""
    try:
        files = json.loads((directory / SEAL_NAME).read_bytes())
        for name, expected in files.items():
            if _checksum(directory / name) != expected:
                return f"its {name} was cut short or changed"
    except FileNotFoundError as error:
        missing = Path(error.filename)
        return None if missing.name == SEAL_NAME else f"its {missing.name} is missing"
    except (ValueError, AttributeError):
        return f"its {SEAL_NAME} was cut short or changed"
    return None


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure to write in the block, whoever reports it, into an OSError that says so of ``path``."""
    try:
        yield
    except ConnectionError:  # between processes
        raise
    except OSError as error:
        # One that is explained already names a temporary file; its cause is the system's own.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise not_written(path, cause, error.errno) from cause
    except Exception as error:
        # safetensors' writer raises a type of its own for a full disk, torch's zip writer one of several RuntimeErrors.
        if type(error).__name__ == "SafetensorError":
            raise not_written(path, error) from error
        if any(words in str(error) for words in ("inline_container", "PytorchStreamWriter", "iostream error")):
            raise not_written(path, OSError("the disk is full, or failed")) from error
        raise


def not_written(path: Path, reason: Exception, number: int | None = None) -> OSError:
    """The error for a file or directory that could not be written."""
    why = getattr(reason, "strerror", None) or str(reason)
    text = (
        f"'{path}' could not be written ({why}); what stood there before is unchanged. Free space or choose another "
        "place, and run it again"
    )
    return OSError(text) if number is None else OSError(number, text)


def flush_directory(path: Path) -> None:
    """Make renames in ``path`` durable, if the system can flush a directory."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checksum(file: Path) -> list[int | str]:
    digest, length = hashlib.sha256(), 0
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
            length += len(chunk)
    return [length, digest.hexdigest()]


def _beside(path: Path, ending: str = "tmp") -> Path:
    # In the same directory, because a rename is atomic only within a file system; unique, because two processes may be
    # told to write to one place by mistake.
    return path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.{ending}"
