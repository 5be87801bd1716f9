"""``consolidate``: turn a sharded checkpoint into one file.

A sharded checkpoint is a folder that ``ModelParallelStrategy`` writes. Training can continue from the file with any
strategy. This is a command of its own for safety. ``torch.distributed.checkpoint`` unpickles the metadata of the
folder, and unpickling can run code that the metadata contain. Every other command reads a checkpoint file as plain
data.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import atomic_file

# torch.distributed.checkpoint describes the shards in the first file. Lightning saves everything that is not sharded
# in the second.
SHARDS, REST = ".metadata", "meta.pt"


def what_is_missing(folder: Path) -> str:
    """Return the name of the first file that a sharded checkpoint lacks; empty if it is complete."""
    return next((name for name in (SHARDS, REST) if not (folder / name).is_file()), "")


def consolidate(checkpoint: str, output: str) -> None:
    """Turn the folder of a sharded checkpoint into one file. Use it only for checkpoints that you trust.

    Args:
        checkpoint: The folder of the sharded checkpoint.
        output: The file to write; it must not exist.

    Raises:
        ConfigError: If the output exists.
        DataError: If the folder is no sharded checkpoint, one of its files is missing or damaged, or the output cannot
            be written.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder, target = Path(checkpoint), Path(output)
    if missing := what_is_missing(folder):
        raise DataError(f"{folder} is no sharded checkpoint, or not complete: there is no {folder / missing}")
    if target.exists():
        raise ConfigError(f"{target} exists; give another --output")
    logging.disable(logging.WARNING)  # torch logs the traceback of each way of reading that fails.
    try:
        with atomic_file(target) as aside:
            dcp_to_torch_save(folder, aside)
            whole = torch.load(aside, map_location="cpu", weights_only=True)
            rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
            count = sum(key.startswith("optimizer_") for key in whole)
            if count:
                whole["optimizer_states"] = [whole.pop(f"optimizer_{i}") for i in range(count)]
            torch.save(whole | rest, aside)
    except CheckpointException as error:  # It derives from BaseException, so `except Exception` misses it.
        failure, _ = next(iter(error.failures.values()))
        raise DataError(f"{folder} is damaged ({failure})") from error
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    except Exception as error:  # A damaged file can make torch raise anything.
        raise DataError(f"{folder} is damaged ({str(error).splitlines()[0]})") from error
    finally:
        logging.disable(logging.NOTSET)
    print(f"wrote {target}")
