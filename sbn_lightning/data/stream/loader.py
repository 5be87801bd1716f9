"""Batches of token blocks, with a position that a run can continue from exactly.

``TokenLoader`` is litdata's ``StreamingDataLoader``. It fixes four faults in the way litdata resumes:

* litdata stays in its resuming state until the epoch's iterator is exhausted. Lightning can end an epoch earlier
  (``limit_train_batches``, a checkpoint saved after validation), and the next epoch would then replay the end of the
  resumed one. Here the resuming state belongs to one call of ``load_state_dict`` and ends with the next epoch that
  starts.
* With worker processes, the epoch number in the main process is wrong after a resume. A second resume in the same
  epoch would shuffle as another epoch does. Here the loader's own epoch number counts.
* Loading a state twice leaves litdata at the wrong worker. Here a state can be loaded any number of times.
* litdata's state holds absolute paths, and litdata refuses to resume when the folder has moved. Here the state holds a
  fingerprint of the data, and a resume is refused when the data differ.

The loader has a length, and not only for progress bars. Lightning fetches one batch ahead of a loader without a length,
and then saves a position that is one batch too far.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
from litdata.streaming.posix_fast import PosixFastProfile

from sbn_lightning.core.errors import ConfigError, DataError

_PATH_KEYS = ("input_dir_path", "input_dir_url", "cache_dir_path")


@dataclass(frozen=True)
class Collate:
    """Stack blocks into a ``torch.long`` tensor [batch, block], and check the ids against the vocabulary.

    Without the check, an id beyond the embedding table makes a GPU program crash without a clear message. The check
    costs one maximum for each batch, in the worker process.

    Attributes:
        vocab_size: The number of entries of the vocabulary.
        where: The name of the split, for the message.
    """

    vocab_size: int
    where: str

    def __call__(self, blocks: Sequence[np.ndarray]) -> torch.Tensor:
        batch = np.stack(blocks)
        low, high = int(batch.min()), int(batch.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"token id {high if high >= self.vocab_size else low} in {self.where} is outside the vocabulary of "
                f"{self.vocab_size}; the shards are damaged or belong to another meta.json: run `prepare` again"
            )
        return torch.from_numpy(batch.astype(np.int64))


def open_split(
    path: str,
    block_size: int,
    *,
    shuffle: bool,
    drop_last: bool | None,
    seed: int,
    cache_dir: str | None = None,
    max_cache_size: str | None = None,
) -> StreamingDataset:
    """Open one split of a prepared folder as a litdata dataset.

    Open it late, in the process and rank that read it: litdata stores the rank when the dataset is made.

    Args:
        path: The folder or URL of the split.
        block_size: The number of tokens in a block.
        shuffle: Whether every epoch has another order.
        drop_last: Whether to leave out blocks that do not fill a batch on every rank; None means on several ranks only.
        seed: The seed of the order.
        cache_dir: The folder where remote shards are kept; None for litdata's own.
        max_cache_size: How much of the remote shards to keep, like ``"50GB"``.
    """
    dataset = StreamingDataset(
        path,
        cache_dir=cache_dir,
        item_loader=TokensLoader(block_size=block_size),
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        max_cache_size=max_cache_size,
        # litdata's default permutes inside windows of 256 neighbouring blocks, which is meant for records that decode
        # together. Neighbouring blocks of text belong to one document, so a batch would hold the same document only.
        item_shuffle_window=0,
    )
    profile = dataset.posix_fast
    if isinstance(profile, PosixFastProfile) and profile.window_shuffle:
        # On network file systems litdata gives whole chunks to each rank. The order would differ from that on a local
        # disk, and with fewer chunks than ranks some ranks would get nothing.
        dataset.posix_fast = replace(profile, kind="posix")
    return dataset


class TokenLoader(StreamingDataLoader):  # type: ignore[misc, unused-ignore]
    """A ``StreamingDataLoader`` over one split that resumes to the exact sample, under Lightning or by hand.

    Args:
        dataset: The dataset that ``open_split`` returned.
        fingerprint: The identity of the data. A state that was saved on other data is refused.
        **kwargs: The arguments of ``torch.utils.data.DataLoader``.

    Attributes:
        epoch_batches: The number of batches after which the trainer ends an epoch, if the data hold more
            (``limit_train_batches``). A position there means the next epoch, not the rest of this one.
    """

    def __init__(self, dataset: StreamingDataset, *, fingerprint: str = "", **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.fingerprint = fingerprint
        self.epoch_batches: int | None = None
        self._resume_next_epoch = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        # In a generator this runs at the first batch, not when Lightning makes an iterator that it may never use.
        self.restore = self._resume_next_epoch
        self._resume_next_epoch = False
        yield from super().__iter__()

    def _get_iterator(self) -> Any:
        return end_with_this_process(super()._get_iterator())

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, in plain types (it loads with ``weights_only=True``)."""
        state = dict(super().state_dict())
        state["dataset"] = {
            **{key: value for key, value in state["dataset"].items() if key not in _PATH_KEYS},
            "current_epoch": self.current_epoch,
        }
        batches = self._num_samples_yielded_streaming // self.batch_size
        limit = len(self) if self.epoch_batches is None else min(self.epoch_batches, len(self))
        # After a resume with other workers or ranks litdata counts from the resume; `sample_in_epoch` counts all.
        served = state["dataset"]["sample_in_epoch"] // (self.batch_size * state["dataset"]["world_size"])
        return {**state, "epoch_done": max(batches, served) >= limit, "fingerprint": self.fingerprint}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue at a position saved by ``state_dict``, at the next epoch that starts.

        Raises:
            ConfigError: The position is in other data, or in another order or block size of the same data.
        """
        check_same_data(obj, self.fingerprint)
        saved = obj["dataset"]
        mine = {"seed": self.dataset.seed, "shuffle": self.dataset.shuffle}
        mine["block"] = self.dataset.item_loader.state_dict()["block_size"]
        theirs = {"seed": saved["seed"], "shuffle": saved["shuffle"], "block": saved["item_loader"]["block_size"]}
        for name, value in mine.items():
            if value != theirs[name]:
                raise ConfigError(
                    f"the checkpoint was written with {_OPTION[name]} {_shown(name, theirs[name])}, this run has "
                    f"{_shown(name, value)}; use the same to resume, or load only the weights"
                )
        if obj["epoch_done"] or saved["sample_in_epoch"] == 0:
            self.current_epoch = obj["current_epoch"]
            self.dataset.reset_state_dict()
            self._resume_next_epoch = False
            return
        paths = {
            "input_dir_path": self.dataset.input_dir.path,
            "input_dir_url": self.dataset.input_dir.url,
            "cache_dir_path": self.dataset.cache_dir.path,
        }
        # litdata counts this number up from its present value. A state is loaded twice, from Lightning's copy and from
        # ours, so the number has to start anew.
        self._worker_idx = None
        super().load_state_dict({**obj, "dataset": {**saved, **paths}})
        self._resume_next_epoch = True


def keep_working(worker: int) -> None:
    """Make a loader process ignore SIGTERM and Ctrl-C.

    A preempted job gets the signal in every process. The main process saves a checkpoint first, and needs batches until
    the end of its optimiser step. It ends its workers itself: use :func:`end_with_this_process` on their iterator.

    Args:
        worker: The number of the worker process.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


_Iterator = TypeVar("_Iterator")
_workers: WeakSet[BaseProcess] = WeakSet()
_workers_of = 0  # The id of the process that started the workers.


def end_with_this_process(iterator: _Iterator) -> _Iterator:
    """End the worker processes of a loader's iterator when this process ends, before Python waits for them."""
    global _workers_of
    if _workers_of != os.getpid():
        _workers.clear()  # This process is a fork, and these are the workers of its parent.
        _workers_of = os.getpid()
        Finalize(None, _end_workers, exitpriority=0)
    _workers.update(getattr(iterator, "_workers", ()))
    return iterator


def _end_workers() -> None:
    for process in list(_workers):
        with suppress(ValueError):  # The process is closed already.
            process.kill()


_OPTION = {"seed": "seed", "shuffle": "shuffle", "block": "sequence_length"}


def _shown(name: str, value: Any) -> Any:
    return value - 1 if name == "block" else value


def check_same_data(state: dict[str, Any], fingerprint: str) -> None:
    """Refuse a position in other data.

    Args:
        state: The saved position.
        fingerprint: The identity of the data of this run.

    Raises:
        ConfigError: The state was saved with another fingerprint.
    """
    if state.get("fingerprint") != fingerprint:
        raise ConfigError(
            "the checkpoint was written while training on other data (the prepared folder has changed since, or "
            "the path has); use the same data to resume, or load only the weights"
        )
