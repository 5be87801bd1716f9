"""An interrupted run sees exactly the samples of an undisturbed run."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data import TokenDataModule
from tests.data.helpers import prepare_small, write_corpus

BATCH, LENGTH = 4, 63


def mark(batch: torch.Tensor) -> int:
    return zlib.crc32(batch.numpy().tobytes())


class Recorder(LightningModule):
    """Records each batch that it trains on."""

    def __init__(self, asks_for_steps: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.asks_for_steps = asks_for_steps
        self.seen: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        assert batch.dtype == torch.long
        assert batch.shape == (BATCH, LENGTH + 1)
        self.seen.append(mark(batch))
        return self.weight.sum() + batch.float().mean()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.validated.append(mark(batch))

    def configure_optimizers(self) -> Any:
        if self.asks_for_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAfter(Callback):
    """An interruption: the training stops with an error right after an optimiser step and its checkpoint."""

    class Down(Exception):
        pass

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.steps:
            raise self.Down


def fit(
    folder: Path | dict[str, float],
    root: Path,
    steps: int,
    resume: Path | None = None,
    down_after: int | None = None,
    num_workers: int = 0,
    asks_for_steps: bool = False,
    save_each_step: bool = True,
    **trainer: Any,
) -> Recorder:
    where = {"paths": folder} if isinstance(folder, dict) else {"path": str(folder)}
    data = TokenDataModule(**where, batch_size=BATCH, sequence_length=LENGTH, num_workers=num_workers, seed=3)
    module = Recorder(asks_for_steps)
    when = {"every_n_train_steps": 1} if save_each_step else {"save_on_train_epoch_end": False}
    saver = ModelCheckpoint(dirpath=root, filename="{step}", save_top_k=-1, **when)
    callbacks: list[Callback] = [saver] + ([StopAfter(down_after)] if down_after is not None else [])
    options = {"max_epochs": -1, "num_sanity_val_steps": 1, "val_check_interval": 7, "check_val_every_n_epoch": None}
    runner = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**options, **trainer},
    )
    try:
        runner.fit(module, data, ckpt_path=resume, weights_only=True)
    except StopAfter.Down:
        assert down_after is not None
    return module


@pytest.fixture(scope="module")
def per_epoch(prepared: Path) -> int:
    data = TokenDataModule(str(prepared), BATCH, LENGTH, num_workers=0)
    return len(data.train_dataloader())


@pytest.fixture(scope="module")
def straight(prepared: Path, per_epoch: int, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """The samples of uninterrupted runs, by number of workers."""
    steps = 3 * per_epoch + 2
    return {w: fit(prepared, tmp_path_factory.mktemp("r"), steps, num_workers=w).seen for w in (0, 2)}


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_are_whole_and_differ(straight: dict[int, list[int]], per_epoch: int, workers: int) -> None:
    seen = straight[workers]
    epochs = [seen[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    assert all(len(set(epoch)) == per_epoch for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize(
    ("where", "workers"),
    [(where, 0) for where in ("first", "middle", "odd", "last", "end", "next")]
    + [(where, 2) for where in ("middle", "odd", "last", "end")],
)
def test_resume_is_exact(
    prepared: Path, tmp_path: Path, straight: dict[int, list[int]], per_epoch: int, where: str, workers: int
) -> None:
    at = {
        "first": 1,
        "middle": per_epoch // 2,
        "odd": per_epoch // 2 + 1,
        "end": per_epoch,
        "next": per_epoch + 1,
        "last": per_epoch - 1,
    }[where]
    steps = 3 * per_epoch + 2
    head = fit(prepared, tmp_path, steps, down_after=at, num_workers=workers)
    tail = fit(prepared, tmp_path, steps, resume=tmp_path / f"step={at}.ckpt", num_workers=workers)
    assert head.seen + tail.seen == straight[workers]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_twice_in_one_epoch(
    prepared: Path, tmp_path: Path, straight: dict[int, list[int]], per_epoch: int, workers: int
) -> None:
    steps = 3 * per_epoch + 2
    first, second = per_epoch + 3, per_epoch + 6
    seen = fit(prepared, tmp_path, steps, down_after=first, num_workers=workers).seen
    resume = tmp_path / f"step={first}.ckpt"
    seen = seen + fit(prepared, tmp_path, steps, resume, down_after=second, num_workers=workers).seen
    seen = seen + fit(prepared, tmp_path, steps, tmp_path / f"step={second}.ckpt", num_workers=workers).seen
    assert seen == straight[workers]


@pytest.mark.parametrize("at", [2, 3])
def test_resume_with_accumulated_gradients(
    prepared: Path, tmp_path: Path, straight: dict[int, list[int]], per_epoch: int, at: int
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 4}
    whole = fit(prepared, tmp_path / "a", 9, **options).seen
    assert whole == straight[0][: len(whole)]
    head = fit(prepared, tmp_path / "b", 9, down_after=at, **options).seen
    tail = fit(prepared, tmp_path / "b", 9, tmp_path / "b" / f"step={at}.ckpt", **options).seen
    assert head + tail == whole


def test_resume_when_the_schedule_asks_for_the_number_of_steps(
    prepared: Path, tmp_path: Path, straight: dict[int, list[int]], per_epoch: int
) -> None:
    at, steps = per_epoch // 2, per_epoch + 3
    # Lightning makes the loader early, and loses its state, only if the number of epochs is limited.
    options: dict[str, Any] = {"asks_for_steps": True, "max_epochs": 10}
    head = fit(prepared, tmp_path, steps, down_after=at, **options).seen
    tail = fit(prepared, tmp_path, steps, tmp_path / f"step={at}.ckpt", **options).seen
    assert head + tail == straight[0][:steps]


def test_resume_from_a_checkpoint_saved_after_validation(
    prepared: Path, tmp_path: Path, straight: dict[int, list[int]], per_epoch: int
) -> None:
    steps = per_epoch + 9
    fit(prepared, tmp_path, steps, save_each_step=False)
    saved = sorted(int(file.stem.split("=")[1]) for file in tmp_path.glob("*.ckpt"))
    assert saved[:2] == [7, 14]
    for at in (7, saved[-1]):
        tail = fit(prepared, tmp_path, steps, tmp_path / f"step={at}.ckpt", save_each_step=False).seen
        assert tail == straight[0][at:steps]


@pytest.mark.parametrize("at", [4, 5, 6])
def test_resume_when_the_trainer_shortens_epochs(prepared: Path, tmp_path: Path, at: int) -> None:
    whole = fit(prepared, tmp_path / "a", 12, limit_train_batches=5).seen
    head = fit(prepared, tmp_path / "b", 12, down_after=at, limit_train_batches=5).seen
    tail = fit(prepared, tmp_path / "b", 12, tmp_path / "b" / f"step={at}.ckpt", limit_train_batches=5).seen
    assert head + tail == whole


def test_validation_is_the_same_each_time_and_whole(prepared: Path, tmp_path: Path) -> None:
    module = fit(prepared, tmp_path, 10, num_sanity_val_steps=0, val_check_interval=5)
    half = len(module.validated) // 2
    data = TokenDataModule(str(prepared), BATCH, LENGTH, num_workers=2)
    expected = sorted(row.tolist() for batch in data.val_dataloader() for row in batch)
    data = TokenDataModule(str(prepared), BATCH, LENGTH, num_workers=0)
    assert module.validated[:half] == module.validated[half:] == [mark(b) for b in data.val_dataloader()]
    assert expected == sorted(row.tolist() for batch in data.val_dataloader() for row in batch)


def test_the_folder_may_move_but_not_change(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    prepare_small(corpus, moved)
    data = TokenDataModule(str(prepared), BATCH, LENGTH, num_workers=0)
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    expected = mark(next(batches))

    loader = TokenDataModule(str(moved), BATCH, LENGTH, num_workers=0).train_dataloader()
    loader.load_state_dict(state)
    assert mark(next(iter(loader))) == expected
    prepare_small(write_corpus(tmp_path / "c", seed=1), moved, overwrite=True)
    changed = TokenDataModule(str(moved), BATCH, LENGTH, num_workers=0).train_dataloader()
    with pytest.raises(ConfigError, match="other data"):
        changed.load_state_dict(state)
    for option, message in (({"seed": 1}, "seed 42, this run has 1"), ({"shuffle": False}, "shuffle True, this run")):
        other = TokenDataModule(str(prepared), BATCH, LENGTH, 0, **option).train_dataloader()
        with pytest.raises(ConfigError, match=message):
            other.load_state_dict(state)
    longer = TokenDataModule(str(prepared), BATCH, LENGTH + 1, 0).train_dataloader()
    with pytest.raises(ConfigError, match="sequence_length 63, this run has 64"):
        longer.load_state_dict(state)


def test_resume_with_other_workers_sees_the_same_set(prepared: Path, per_epoch: int) -> None:
    loader = TokenDataModule(str(prepared), BATCH, LENGTH, num_workers=0).train_dataloader()
    batches = iter(loader)
    seen = [tuple(row.tolist()) for _ in range(4) for row in next(batches)]
    state = loader.state_dict()
    rest = [tuple(row.tolist()) for batch in batches for row in batch]
    loader = TokenDataModule(str(prepared), BATCH, LENGTH, num_workers=2).train_dataloader()
    loader.load_state_dict(state)
    other = [tuple(row.tolist()) for batch in loader for row in batch]
    assert set(other) <= set(rest)
    assert len(rest) - len(other) < 2 * BATCH
    assert not set(other) & set(seen)
    assert len(list(loader)) == per_epoch


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> dict[str, float]:
    other = tmp_path_factory.mktemp("mix")
    prepare_small(write_corpus(other / "text", files=6, seed=9), other / "small")
    return {str(prepared): 1.0, str(other / "small"): 3.0}


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_of_a_mixture_is_exact(two: dict[str, float], tmp_path: Path, workers: int) -> None:
    data = TokenDataModule(paths=two, batch_size=BATCH, sequence_length=LENGTH, num_workers=workers)
    per_epoch = len(data.train_dataloader())
    steps = 2 * per_epoch + 2
    whole = fit(two, tmp_path / "a", steps, num_workers=workers).seen
    assert len(set(whole)) > 2 * per_epoch - 2
    for at in (7, per_epoch) if workers else (6, per_epoch, per_epoch + 1):
        head = fit(two, tmp_path / f"b{at}", steps, down_after=at, num_workers=workers).seen
        resume = tmp_path / f"b{at}" / f"step={at}.ckpt"
        assert head + fit(two, tmp_path / f"b{at}", steps, resume, num_workers=workers).seen == whole


def test_a_mixture_follows_its_weights_and_validates_on_everything(two: dict[str, float]) -> None:
    data = TokenDataModule(paths=two, batch_size=BATCH, sequence_length=LENGTH, num_workers=0)
    big = TokenDataModule(next(iter(two)), BATCH, LENGTH, num_workers=0)
    rows = {tuple(r.tolist()) for batch in big.train_dataloader() for r in batch}
    mixed = [tuple(r.tolist()) for _ in range(3) for batch in data.train_dataloader() for r in batch]
    share = sum(row in rows for row in mixed) / len(mixed)
    assert 0.1 < share < 0.4
    alone = [sum(len(b) for b in TokenDataModule(p, BATCH, LENGTH, 0).val_dataloader()) for p in two]
    loader = data.val_dataloader()
    batches = list(loader)
    assert sum(map(len, batches)) == sum(alone)
    assert len(batches) == len(loader)
