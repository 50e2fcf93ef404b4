"""A folder that is whole or not there, whoever is killed and however many processes want it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".incomplete-"
_LOCK = ".lock"


@contextlib.contextmanager
def whole_folder(folder: Path, waiting: Callable[[], None]) -> Iterator[Path | None]:
    """Builds a folder beside its final place and moves it there when the body is through and all is on disk.

    Where the body fails, nothing stays behind; where its process is killed, the remains are removed by the next
    call for the same folder, or for one in a sibling of its parent (`NAME/FINGERPRINT/FOLDER` share a NAME).

    Args:
      folder: the folder to make; its parent is made as needed, and belongs to this function.
      waiting: called once if another process is at work on the same folder, before waiting for it.

    Yields:
      An empty folder to fill, or None if `folder` is there, from before or by the process that was waited for.

    Raises:
      OSError: whatever the disk says.
    """
    parent = folder.parent
    with _created(parent), _lock(parent, waiting) as locked:
        if folder.exists():
            yield None
            return
        if locked:
            _remove_leftovers(parent)
        with _temporary_folder(parent) as building:
            yield building
            _sync(building)
            _move(building, folder)


@dataclass(frozen=True)
class Workspace:
    """Where a folder is being built."""

    result: Path
    """The folder to fill; it becomes the final one."""
    work: Path
    """A folder for files on the way there, which goes away at the end."""


@contextlib.contextmanager
def resumable_folder(folder: Path, waiting: Callable[[], None]) -> Iterator[Workspace | None]:
    """`whole_folder` for work that takes long: what an interrupted call has done is found again by the next.

    Where the body fails with an `Exception`, nothing stays behind, as with `whole_folder`. Where its process is killed
    or interrupted (`KeyboardInterrupt`), the workspace stays as it was left; the next call for the same folder is given
    it again, and one for a sibling of its parent removes it. On a file system without locks every call starts anew.

    Args:
      folder: as for `whole_folder`.
      waiting: as for `whole_folder`.

    Yields:
      The workspace, whose folders exist, or None if `folder` is there.
    """
    parent = folder.parent
    with _created(parent), _lock(parent, waiting) as locked:
        if folder.exists():
            yield None
            return
        resumed = f"{_TEMPORARY}work"
        if locked:
            _remove_leftovers(parent, but=resumed)
        building = parent / (resumed if locked else f"{_TEMPORARY}{secrets.token_hex(8)}")
        space = Workspace(building / "result", building / "work")
        space.result.mkdir(parents=True, exist_ok=True)
        space.work.mkdir(exist_ok=True)
        try:
            yield space
            _sync(space.result)
            _move(space.result, folder)
        except Exception:
            shutil.rmtree(building, ignore_errors=True)
            raise
        shutil.rmtree(building, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises the `OSError` that making `folder`, or a file in it if it is there, would; leaves nothing behind."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    # Permissions alone would not tell: the superuser's, and file systems that are mounted to be read.
    os.rmdir(tempfile.mkdtemp(prefix=_TEMPORARY, dir=there))


@contextlib.contextmanager
def _created(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; if the body fails, those that are new and empty go away again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # Not empty: another process works there.
            for path in new:
                path.rmdir()
        raise


@contextlib.contextmanager
def _lock(folder: Path, waiting: Callable[[], None] | None) -> Iterator[bool]:
    """Holds the lock of a folder, which the system frees when its process dies.

    Args:
      folder: an existing folder.
      waiting: called once if another process holds the lock; None to not wait.

    Yields:
      Whether the lock is held: not if the file system has no locks, or it is busy and `waiting` is None.
    """
    path = folder / _LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # Whoever held the lock before may have tidied up.
        with path.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is None:
                    yield False
                    return
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                path.unlink(missing_ok=True)
                yield False
                return
            if not _is_at(file, path):
                continue  # The holder before removed the file; its lock protects nothing any more.
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_leftovers(folder: Path, but: str = "") -> None:
    """Removes what killed processes left unfinished: in `folder`, whose lock is held, and in its siblings.

    In `folder` itself what is called `but` stays.
    """
    for leftover in folder.parent.glob(f"*/{_TEMPORARY}*"):
        if leftover.parent == folder:
            if leftover.name != but:
                shutil.rmtree(leftover)
            continue
        with _lock(leftover.parent, None) as locked:
            if locked:
                shutil.rmtree(leftover)
        with contextlib.suppress(OSError):  # Not empty: a finished dataset is there, or another process.
            leftover.parent.rmdir()


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    folder = parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # After a success it is no longer there.


def _move(building: Path, folder: Path) -> None:
    """Gives a finished dataset its name; if another process did so first, that one stays."""
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync_file(folder.parent)


def _sync(folder: Path) -> None:
    """Waits until a folder and all it holds are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_file(path)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
