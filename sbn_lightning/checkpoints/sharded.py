"""``consolidate``: a sharded checkpoint, a folder that ``ModelParallelStrategy`` writes, as one file.

Any strategy continues from the file. A command of its own, because torch.distributed.checkpoint unpickles a folder's
metadata: reading one runs what it contains, while checkpoint files are read as plain data.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import atomic_file

SHARDS, REST = ".metadata", "meta.pt"  # of torch.distributed.checkpoint, and Lightning's


def what_is_missing(folder: Path) -> str:
    """The file that a sharded checkpoint lacks; empty if it is complete."""
    return next((name for name in (SHARDS, REST) if not (folder / name).is_file()), "")


def consolidate(checkpoint: str, output: str) -> None:
    """Makes one checkpoint file of a folder of shards. Only for checkpoints that you trust.

    Args:
        checkpoint: The folder.
        output: The file to write; it must not exist.

    Raises:
        ConfigError: If the output exists.
        DataError: If the folder is no sharded checkpoint, or a part of it is missing or damaged.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder, target = Path(checkpoint), Path(output)
    if missing := what_is_missing(folder):
        raise DataError(f"{folder} is no sharded checkpoint, or not complete: there is no {folder / missing}")
    if target.exists():
        raise ConfigError(f"{target} exists; give another --output")
    logging.disable(logging.WARNING)  # torch logs tracebacks of what it tries
    try:
        with atomic_file(target) as aside:
            dcp_to_torch_save(folder, aside)
            whole = torch.load(aside, map_location="cpu", weights_only=True)
            rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
            count = sum(key.startswith("optimizer_") for key in whole)
            if count:
                whole["optimizer_states"] = [whole.pop(f"optimizer_{i}") for i in range(count)]
            torch.save(whole | rest, aside)
    except CheckpointException as error:  # no Exception
        failure, _ = next(iter(error.failures.values()))
        raise DataError(f"{folder} is damaged ({failure})") from error
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make torch raise anything
        raise DataError(f"{folder} is damaged ({str(error).splitlines()[0]})") from error
    finally:
        logging.disable(logging.NOTSET)
    print(f"wrote {target}")
