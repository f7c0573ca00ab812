"""Where a converted file goes: checked first, written in a folder beside it, moved when it is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fxrep.errors import Unusable

LEAST_FREE = 1 << 16
"""Bytes; where less is left after a failure to write, that is why."""


def check_target(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise Unusable(f"there is no folder {path.parent} (looked from {Path.cwd()}); make it first")
    if path.is_dir():
        raise Unusable(f"{path} is a folder; name the file in it")
    with _folder_beside(path):  # whether it can be made is not for the permissions alone to say
        pass
    _check_free([path], force)


def _folder_beside(path: Path) -> TemporaryDirectory[str]:
    try:
        return TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise Unusable(f"the folder {path.parent} cannot be written to: {error.strerror}") from None


def _check_free(paths: Sequence[Path], force: bool) -> None:
    taken = [str(p) for p in paths if p.exists()]
    if taken and not force:
        raise Unusable(f"{', '.join(taken)} is there already; give another name, or force=True (--force)")


@contextmanager
def moved_when_done(path: Path, force: bool) -> Iterator[Path]:
    """A path of the same name in a folder beside it; what is there at the end is moved, the file itself last."""
    with _folder_beside(path) as folder:
        scratch = Path(folder) / path.name
        yield scratch
        others = [path.parent / f.name for f in Path(folder).iterdir() if f.name != path.name]
        _check_free([path, *others], force)
        try:
            if others:
                path.unlink(missing_ok=True)  # an old file beside new weights would be no network at all
            for each in (*others, path):
                _give_usual_mode(Path(folder) / each.name)
                os.replace(Path(folder) / each.name, each)
        except BaseException:
            for each in others:
                each.unlink(missing_ok=True)
            raise


def _give_usual_mode(path: Path) -> None:
    """That of any new file: some libraries write for the owner's eyes alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def cannot_be_stored(error: Exception, path: Path) -> str:
    """Why the disk is at fault and not the network, or nothing; not all libraries raise an OSError then."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    no_space = os.strerror(errno.ENOSPC)
    is_full = no_space in str(error) or shutil.disk_usage(path.parent).free < LEAST_FREE
    return no_space if is_full else ""
