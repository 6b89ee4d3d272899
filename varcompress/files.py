"""Atomic file writes, and disk errors as one line. Whatever writes, writes through here."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from varcompress.errors import InputError

DIGEST_CHUNK_BYTES = 1 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends well and is removed when not.

    It lies in a folder of its own beside `path`, because libraries write through temporary files of theirs. What a
    killed process left there goes with the next attempt. The new file has the mode that any new file gets.
    """
    _remove_of_the_dead(path.parent, f".{path.name}.*.tmp")
    folder = path.with_name(f".{path.name}.{_writer()}.tmp")
    folder.mkdir(exist_ok=True)
    try:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; a library may write its own file with another
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file that is whole or not there."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Digest of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(DIGEST_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Remove what writers left in a folder that were killed before they had finished; no other may be at work there.

    That is a folder of `replacing`, and, from versions before it, a file NAME.tmp or safetensors' own .tmpXXXXXX.
    """
    for pattern in ("*.tmp", ".tmp??????"):
        for left in folder.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's temporary directory for the block; those of processes that were killed go too."""
    _remove_of_the_dead(Path(tempfile.gettempdir()), "varcompress.*.tmp")
    with tempfile.TemporaryDirectory(prefix="varcompress.", suffix=f".{_writer()}.tmp") as folder:
        yield Path(folder)


def _remove_of_the_dead(folder: Path, pattern: str) -> None:
    """Remove the folders NAME.WRITER.tmp that fit a pattern and whose writer, a process of this machine, is no more."""
    for left in folder.glob(pattern):
        machine, _, process = left.name.split(".")[-2].rpartition("-")
        if machine == _machine() and process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _writer() -> str:
    """This process, among those of all machines that may share a disk."""
    return f"{_machine()}-{os.getpid()}"


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", platform.node()) or "host"


def _is_alive(process: int) -> bool:
    """Whether a process of this machine is alive; where that cannot be asked, it is."""
    if os.name != "posix":  # the same call would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def room_bytes(path: Path) -> int:
    """What is free on the disk that a path lies on, or would."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an InputError: why, and how much room there is where that is the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises its own when it cannot write
        told = re.search(r"os error (\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        line = f"{path}: could not be written ({os.strerror(number) if number else error})"
        if number in NO_ROOM:
            line += f"; {room_bytes(path) / 2**20:,.0f} MiB are free there"
        raise InputError(line) from error
