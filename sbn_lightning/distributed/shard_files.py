"""The files of a sharded checkpoint, and errors that say why a rank could not write its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import override

from sbn_lightning.checkpoints.sharded import REST
from sbn_lightning.core.errors import DataError
from sbn_lightning.core.files import atomic_stream

ADVICE = "the checkpoint before it, if there is one, is intact: make room and continue with --ckpt_path last"


class ShardWriter(FileSystemWriter):
    """Writes the shards of this rank. An error has the reason of the file system, for example that the disk is full."""

    @override
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            # torch.save reports a full disk as a RuntimeError about positions in the file. The error of the write came
            # first, and it has to be found here, because other ranks get no more than the text of an error.
            before = error.__context__
            if isinstance(before, OSError):
                raise before from error
            raise


def save_shards(shards: dict[str, Any], rest: dict[str, Any], path: Path) -> None:
    """Write a sharded checkpoint. All ranks must call this together.

    Args:
        shards: The sharded states of this rank.
        rest: Everything else; rank 0 writes it, as the last file.
        path: The folder to write to. A file that is there is deleted.

    Raises:
        DataError: If a rank could not write.
    """
    with failures_named(path):
        if path.is_file():
            path.unlink(missing_ok=True)  # Another rank may have been faster.
        path.mkdir(parents=True, exist_ok=True)
        save(shards, storage_writer=ShardWriter(path))
        if dist.get_rank() == 0:
            with atomic_stream(path / REST) as stream:
                torch.save(rest, stream)


@contextmanager
def failures_named(path: str | Path) -> Iterator[None]:
    """Say why a checkpoint could not be written. If a rank could not write its shard, all ranks get its name.

    Args:
        path: The checkpoint that is being written.

    Raises:
        DataError: If this rank or another one could not write.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except CheckpointException as error:  # It is no Exception, and its text is a traceback.
        rank, (cause, _) = next(iter(error.failures.items()))
        raise cannot_write(path, cause, f"rank {rank}: ") from error


def cannot_write(path: str | Path, error: BaseException, rank: str = "") -> DataError:
    """The error that ends a run whose checkpoint cannot be written.

    Args:
        path: The checkpoint.
        error: Why it cannot be written.
        rank: The name of the rank that could not write.
    """
    if isinstance(error, OSError):
        return DataError(f"cannot write the checkpoint {path}: {rank}{error.strerror or error}; {ADVICE}")
    return DataError(f"cannot write the checkpoint {path}: {rank}{error}")
