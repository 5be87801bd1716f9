"""Several prepared folders as one, drawn by weight, with an exact position.

litdata's ``CombinedStreamingDataset`` has no length, and resumes exactly only with at most one worker. The mixture here
has a length and resumes exactly with any number of workers. The source of the i-th sample of a worker is a function of
(seed, epoch, rank, worker, i), so a resume draws the same numbers and skips the same samples. The price is that a
resume reads what it skips, at some ten microseconds a sample.

An epoch has as many samples as all sources together. A source that is used up begins again, in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from litdata import StreamingDataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data.stream.loader import check_same_data, end_with_this_process

# The most times that a source is read in one epoch. Each reading gets a number of its own, (epoch - 1) * _CYCLES +
# cycle, so that no two readings have the same order.
_CYCLES = 1 << 16


class MixedTokens(IterableDataset[np.ndarray]):
    """An endless stream of samples of several datasets, drawn by weight. The loader ends the stream after an epoch.

    Args:
        datasets: The datasets that ``open_split`` returned.
        weights: The weight of each dataset, above zero; the weights need not sum to one.
        seed: The seed of the draws.
        rank: The number of this process among the data-parallel ones.
    """

    def __init__(self, datasets: Sequence[StreamingDataset], weights: Sequence[float], seed: int, rank: int) -> None:
        self.datasets = list(datasets)
        self.weights = np.asarray(weights, dtype=np.float64) / float(np.sum(weights))
        self.seed, self.rank = seed, rank
        self.epoch = 1
        self.skip = 0  # The number of samples that each worker passes over.

    def __iter__(self) -> Iterator[np.ndarray]:
        worker = get_worker_info()
        seed = [self.seed, self.epoch, self.rank, worker.id if worker else 0]
        streams = [_cycle(dataset, self.epoch) for dataset in self.datasets]
        borders = np.cumsum(self.weights)
        borders[-1] = np.inf
        generator = np.random.Generator(np.random.PCG64(seed))
        skip = self.skip
        while True:
            for source in np.searchsorted(borders, generator.random(4096), side="right"):
                sample = next(streams[source])
                if skip:
                    skip -= 1
                else:
                    yield sample


def _cycle(dataset: StreamingDataset, epoch: int) -> Iterator[np.ndarray]:
    for cycle in range(_CYCLES):
        dataset.reset_state_dict()
        dataset.set_epoch((epoch - 1) * _CYCLES + cycle + 1)
        empty = True
        for sample in dataset:
            empty = False
            yield sample
        if empty:
            raise DataError(f"{dataset.input_dir.path} has fewer blocks than there are workers; use fewer workers")
    raise DataError(f"{dataset.input_dir.path} was repeated {_CYCLES} times in one epoch; lower its weight")


class MixedTokenLoader(DataLoader[torch.Tensor]):
    """Batches mixed from several splits by weight, with a length and an exact position.

    Args:
        datasets: The datasets that ``open_split`` returned, with ``drop_last=True``.
        weights: The weight of each dataset.
        batch_size: The number of samples in a batch.
        num_workers: The number of loader processes.
        seed: The seed of the draws.
        rank: The number of this process among the data-parallel ones.
        world_size: The number of data-parallel processes.
        fingerprint: The identity of the data and the weights. A state that was saved with others is refused.
        **kwargs: The arguments of ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self,
        datasets: Sequence[StreamingDataset],
        weights: Sequence[float],
        *,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        fingerprint: str = "",
        **kwargs: Any,
    ) -> None:
        # The sources count in samples; batches are put together here.
        samples = sum(dataset.get_len(num_workers, 1) for dataset in datasets)
        self._batches = samples // batch_size
        self._settings = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "world_size": world_size,
            "seed": seed,
            "shuffle": datasets[0].shuffle,
            "sequence_length": datasets[0].item_loader.state_dict()["block_size"] - 1,
        }
        self.fingerprint = fingerprint
        self.epoch_batches: int | None = None
        self.current_epoch = 0
        self._yielded = 0
        self._resume_next_epoch = False
        mixed = MixedTokens(datasets, weights, seed, rank)
        super().__init__(cast(Any, mixed), batch_size=batch_size, num_workers=num_workers, drop_last=True, **kwargs)

    def __len__(self) -> int:
        return self._batches

    def _get_iterator(self) -> Any:
        return end_with_this_process(super()._get_iterator())

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        if not self._resume_next_epoch:
            self.current_epoch += 1
            self._yielded = 0
        self._resume_next_epoch = False
        # Workers take turns. Each worker starts where it was when the first worker had its last turn. The batches of
        # the turn that was under way are read and thrown away.
        turns, started = divmod(self._yielded, max(1, self.num_workers))
        mixed = cast(MixedTokens, self.dataset)
        mixed.epoch, mixed.skip = self.current_epoch, turns * cast(int, self.batch_size)
        batches = super().__iter__()
        for _ in range(started):
            next(batches)
        while self._yielded < self._batches:
            batch = next(batches)
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, in plain types."""
        return {
            "epoch": self.current_epoch,
            "batches": self._yielded,
            "epoch_done": self._yielded >= min(self._batches, self.epoch_batches or self._batches),
            "settings": dict(self._settings),
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position saved by ``state_dict``, at the next epoch that starts.

        Raises:
            ConfigError: The position was saved with other data, weights, or settings that change the order of samples.
        """
        check_same_data(state, self.fingerprint)
        for name, value in self._settings.items():
            if state["settings"][name] != value:
                raise ConfigError(
                    f"the checkpoint was written with {name} {state['settings'][name]}, this run has {value}; a "
                    "mixture resumes only with the same, otherwise load only the weights"
                )
        self.current_epoch, self._yielded = state["epoch"], state["batches"]
        self._resume_next_epoch = self._yielded > 0 and not state["epoch_done"]


class Chained(IterableDataset[np.ndarray]):
    """Several datasets one after the other, for the validation of a mixture. It is read without worker processes."""

    def __init__(self, datasets: Sequence[StreamingDataset], batch_size: int) -> None:
        self.datasets = list(datasets)
        self._length = sum(dataset.get_len(0, batch_size) for dataset in datasets)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[np.ndarray]:
        for dataset in self.datasets:
            yield from dataset
