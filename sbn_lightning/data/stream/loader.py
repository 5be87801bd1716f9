"""Batches of token blocks, and a position in them that survives anything.

``TokenLoader`` is litdata's ``StreamingDataLoader`` with the gaps of its resume closed:

* litdata keeps its "I am resuming" flag until the epoch's iterator is exhausted. Lightning may end an epoch without
  exhausting it (``limit_train_batches``; a checkpoint saved after validation), and the epoch after a resumed one
  would then replay the resumed tail. Here the flag belongs to one call of ``load_state_dict`` and is spent by the
  next epoch that starts.
* with worker processes, the epoch number in the main process is wrong after a resume, so a second resume in the
  same epoch would shuffle as another epoch does. Here the loader's own epoch number is the one that counts.
* loading a state twice leaves litdata's worker turn at the wrong worker. Here it may be loaded any number of times.
* litdata's state holds absolute paths and refuses to resume when the folder has moved. Here it holds a
  fingerprint of the data instead, and refuses when the *data* differ.

It has a length, which matters beyond progress bars: Lightning fetches one batch ahead of a loader without one, and
then saves a position that is one batch too far.
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
    """Stack blocks into a ``torch.long`` tensor [batch, block], checking ids against the vocabulary.

    An id beyond the embedding table is a crash without a message on a GPU; here it costs one maximum a batch, in
    the worker.
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

    Build it late, in the process and rank that read it: litdata notes the rank when the dataset is made.

    Args:
        path: Folder or URL of the split.
        block_size: Tokens a block.
        shuffle: Another order every epoch.
        drop_last: Leave out what does not fill a batch on every rank; None does so on several ranks only.
        seed: Of the order.
        cache_dir: Where remote shards are kept.
        max_cache_size: How much of them, like ``"50GB"``.
    """
    dataset = StreamingDataset(
        path,
        cache_dir=cache_dir,
        item_loader=TokensLoader(block_size=block_size),
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        max_cache_size=max_cache_size,
        # litdata's default permutes inside windows of 256 neighbouring blocks, made for records that decode
        # together. Neighbouring blocks of text are one document: a batch would be all alike.
        item_shuffle_window=0,
    )
    profile = dataset.posix_fast
    if isinstance(profile, PosixFastProfile) and profile.window_shuffle:
        # On network file systems litdata deals out whole chunks instead, which gives another order than a local
        # disk does, and nothing at all to some ranks when there are fewer chunks than ranks.
        dataset.posix_fast = replace(profile, kind="posix")
    return dataset


class TokenLoader(StreamingDataLoader):  # type: ignore[misc, unused-ignore]
    """A ``StreamingDataLoader`` over one split that resumes to the exact sample, under Lightning or by hand.

    Args:
        dataset: From ``open_split``.
        fingerprint: Identifies the data; a state of other data is refused.
        **kwargs: As of ``torch.utils.data.DataLoader``.

    Attributes:
        epoch_batches: Batches after which the trainer ends an epoch, if that is before the data end
            (``limit_train_batches``): a position there means the next epoch, not the rest of this one.
    """

    def __init__(self, dataset: StreamingDataset, *, fingerprint: str = "", **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.fingerprint = fingerprint
        self.epoch_batches: int | None = None
        self._resume_next_epoch = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        # A generator: this runs at the first batch, not when Lightning makes an iterator it may never use.
        self.restore = self._resume_next_epoch
        self._resume_next_epoch = False
        yield from super().__iter__()

    def _get_iterator(self) -> Any:
        return end_with_this_process(super()._get_iterator())

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from, in plain types (loads with ``weights_only=True``)."""
        state = dict(super().state_dict())
        state["dataset"] = {
            **{key: value for key, value in state["dataset"].items() if key not in _PATH_KEYS},
            "current_epoch": self.current_epoch,
        }
        batches = self._num_samples_yielded_streaming // self.batch_size
        limit = len(self) if self.epoch_batches is None else min(self.epoch_batches, len(self))
        # After a resume with other workers or ranks litdata counts from there; `sample_in_epoch` is the whole.
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
        # litdata winds this on from where it stands: loading twice (Lightning's copy and ours) would wind twice.
        self._worker_idx = None
        super().load_state_dict({**obj, "dataset": {**saved, **paths}})
        self._resume_next_epoch = True


def keep_working(worker: int) -> None:
    """Makes a loader process ignore SIGTERM and Ctrl-C; for loaders whose iterators went through :func:`end_with_this_process`.

    A preempted job gets the signal in every process. The main one saves a checkpoint first, and needs batches until the
    end of its optimiser step; it ends its workers itself.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


_Iterator = TypeVar("_Iterator")
_workers: WeakSet[BaseProcess] = WeakSet()
_workers_of = 0  # the process that started them


def end_with_this_process(iterator: _Iterator) -> _Iterator:
    """Ends the worker processes of a loader's iterator before Python, at its exit, waits for those that are left."""
    global _workers_of
    if _workers_of != os.getpid():
        _workers.clear()  # in a fork: those of its parent
        _workers_of = os.getpid()
        Finalize(None, _end_workers, exitpriority=0)
    _workers.update(getattr(iterator, "_workers", ()))
    return iterator


def _end_workers() -> None:
    for process in list(_workers):
        with suppress(ValueError):  # closed
            process.kill()


_OPTION = {"seed": "seed", "shuffle": "shuffle", "block": "sequence_length"}


def _shown(name: str, value: Any) -> Any:
    return value - 1 if name == "block" else value


def check_same_data(state: dict[str, Any], fingerprint: str) -> None:
    """Refuse a position in other data.

    Raises:
        ConfigError: The state was saved with another fingerprint.
    """
    if state.get("fingerprint") != fingerprint:
        raise ConfigError(
            "the checkpoint was written while training on other data (the prepared folder has changed since, or "
            "the path has); use the same data to resume, or load only the weights"
        )
