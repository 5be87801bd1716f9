"""Let only one process write a run. :class:`RunLock` refuses a second process, and names the first and its host.

The lock is a file beside the run's folder of checkpoints. The process that trains holds a POSIX record lock on that
file, which the kernel gives up when the process ends, also after ``kill -9``. What the file says (process, host, since
when) is for people: a file without a living holder is stale, and the next start takes it over.

Record locks work between hosts on the usual network file systems. Where a file system has none, the process id tells
whether a holder on this host still lives, and a holder on another host is believed to live.

Children of ``fork`` do not inherit a record lock, so a loader process that outlives its parent holds nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from sbn_lightning.core.errors import ConfigError, DataError


class RunIsBusy(ConfigError):
    """Another process writes the run."""


class RunLock:
    """The right to write into one run's folder of checkpoints. Holds at most one run at a time."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._file: Path | None = None
        self._descriptor = -1
        self._made: list[Path] = []  # The folders that did not exist before, the inner ones first.

    def acquire(self, folder: Path) -> None:
        """Take the run that saves to ``folder``, and release the run that this lock held.

        Args:
            folder: The folder of checkpoints. The folder above it is made if it is not there.

        Raises:
            RunIsBusy: If a living process has the run.
            DataError: If the lock cannot be written there.
        """
        if self.folder == folder:
            return
        self.release()
        file = folder.with_name(f"{folder.name}.lock")
        try:
            self._made = [one for one in (folder.parent, *folder.parent.parents) if not one.exists()]
            while True:
                folder.parent.mkdir(parents=True, exist_ok=True)
                # The file, or the folder, may be removed by another process while this process opens the file.
                with suppress(FileNotFoundError):
                    if self._take(file, folder):
                        break
        except OSError as error:
            raise DataError(
                f"cannot write to {folder.parent}: {error.strerror or error}; give another folder, such as "
                "--trainer.logger.init_args.save_dir FOLDER"
            ) from error
        self.folder, self._file = folder, file

    def _take(self, file: Path, folder: Path) -> bool:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = _is_held(descriptor)
            holder = _read(descriptor)
            if held or (held is None and _may_live(holder)):
                raise RunIsBusy(
                    f"{folder} is being written by process {holder.get('pid', '(unknown)')} on "
                    f"{holder.get('host', '(unknown)')} since {holder.get('since', '(unknown)')}: wait until it ends, "
                    "or give this run a folder of its own (leave out --ckpt_path last, or set another version, name "
                    f"or checkpoint.dirpath). If no such process lives, delete {file}"
                )
            with suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == file.stat().st_ino:
                    mine = {"pid": os.getpid(), "host": socket.gethostname()}
                    mine |= {"since": datetime.now().astimezone().isoformat(timespec="seconds")}  # type: ignore[dict-item]
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(mine).encode() + b"\n", 0)
                    self._descriptor = descriptor
                    return True
            return False
        finally:
            if self._descriptor != descriptor:
                os.close(descriptor)

    def release(self) -> None:
        """Give the run up, so that another process can take it. Do nothing if this lock holds no run.

        The folders that this lock made are removed if nobody wrote into them.
        """
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()
            os.close(self._descriptor)
            with suppress(OSError):  # A folder with files in it is not removed, and neither are those above.
                for folder in self._made:
                    folder.rmdir()
        self.folder, self._file, self._descriptor = None, None, -1


def _is_held(descriptor: int) -> bool | None:
    """Try to lock an open file; return whether another process has it, or None if that cannot be told."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return False


def _read(descriptor: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:  # The file is only half written.
        return {}
    return holder if isinstance(holder, dict) else {}


def _may_live(holder: dict[str, object]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # The process lives, and belongs to another user.
        return True
    return pid != os.getpid()
