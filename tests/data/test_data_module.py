"""``TokenDataModule``: the batches of each rank, local and remote data, and the errors for bad data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.tuner import Tuner

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import TokenDataModule, prepare
from tests.data.helpers import prepare_small, write_corpus
from tests.helpers import quiet_trainer
from tests.preloaded import Preloaded


def module(path: Path | str, **options: Any) -> TokenDataModule:
    return TokenDataModule(str(path), **{"batch_size": 4, "sequence_length": 63, "num_workers": 0, **options})


def rows(loader: Any) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in loader for row in batch]


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_batches(prepared: Path) -> None:
    data = module(prepared)
    data.setup("fit")
    assert (data.vocab_size, data.eos_id) == (257, 256)
    assert data.tokenizer.decode([104, 105]) == "hi"
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(b.shape == (4, 64) and b.dtype == torch.long for b in batches)
    assert len(set(rows(batches))) == 4 * len(batches)
    unshuffled = module(prepared, shuffle=False)
    assert sorted(rows(unshuffled.train_dataloader()))[:1]
    assert rows(unshuffled.train_dataloader()) != rows(batches)
    # The whole validation split, with the last, incomplete batch.
    index = json.loads((prepared / "val" / "index.json").read_text())
    blocks = sum(chunk["dim"] // 64 for chunk in index["chunks"])
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert len(rows(loader)) == blocks
    assert module(prepared, val_batch_size=2).val_dataloader().batch_size == 2


class Seen(LightningModule):
    """Keeps the samples of its batches. Its one parameter is there only so that the Trainer has something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_batches: list[int] = []
        self.val_sizes: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.train_batches.append(hash(tuple(batch.flatten().tolist())))
        return self.weight * 1.0

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.val_sizes.append(len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_same_batches_in_every_epoch_if_they_are_to_be_learned_by_heart(prepared: Path) -> None:
    seen = Seen()
    quiet_trainer(overfit_batches=3, max_steps=-1, max_epochs=2).fit(seen, module(prepared))
    assert len(set(seen.train_batches)) == 3
    assert seen.train_batches[:3] == seen.train_batches[3:]


def test_a_second_fit_goes_on_with_the_next_epoch(prepared: Path) -> None:
    whole, parts = Seen(), Seen()
    options: dict[str, Any] = {"limit_train_batches": 3, "max_steps": -1, "limit_val_batches": 0}
    quiet_trainer(max_epochs=2, **options).fit(whole, module(prepared))
    trainer, data = quiet_trainer(max_epochs=1, **options), module(prepared)
    trainer.fit(parts, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(parts, data)
    assert parts.train_batches == whole.train_batches
    assert len(set(whole.train_batches)) == 6


def test_the_tuner_finds_a_batch_size_of_validation(prepared: Path) -> None:
    seen, data = Seen(), module(prepared)
    Tuner(quiet_trainer()).scale_batch_size(
        seen, datamodule=data, method="validate", max_trials=3, steps_per_trial=1, init_val=2
    )
    assert set(seen.val_sizes) == {2, 4, 8}
    assert data.batch_size == data.val_batch_size


def test_shuffling_mixes_distant_blocks(tmp_path: Path) -> None:
    prepare_small(write_corpus(tmp_path / "in", files=30, size=4000), tmp_path / "out", chunk_bytes="64MB")
    ordered = rows(module(tmp_path / "out", shuffle=False).train_dataloader())
    places = {row: place for place, row in enumerate(ordered)}
    shuffled = [places[row] for row in rows(module(tmp_path / "out").train_dataloader()) if row in places]
    # Four blocks that were drawn together are, on average, far from each other in the text.
    spread = sum(max(shuffled[i : i + 4]) - min(shuffled[i : i + 4]) for i in range(0, len(shuffled) - 4, 4))
    assert len(ordered) > 512
    assert spread / (len(shuffled) // 4) > 0.4 * len(ordered)


def print_shares(paths: list[Path]) -> None:
    """Print the share of this rank in each data set, one JSON line each."""
    for path in paths:
        data = TokenDataModule(str(path), batch_size=4, sequence_length=63, num_workers=0)
        train, val = data.train_dataloader(), data.val_dataloader()
        shares = [[r.tolist() for b in loader for r in b] for loader in (train, val)]
        print(json.dumps([len(train), *shares]), flush=True)


def test_ranks_share_the_data_evenly(tmp_path: Path) -> None:
    # litdata takes a path with "vast" in it for a network file system, and would hand out whole chunks: with one
    # chunk and two ranks, everything to the first.
    paths = [tmp_path / "plain", tmp_path / "vast"]
    prepare_small(write_corpus(tmp_path / "in"), paths[0], chunk_bytes="64MB", val_fraction=0.3)
    shutil.copytree(paths[0], paths[1])
    files = [tmp_path / f"rank{rank}.txt" for rank in (0, 1)]
    ranks = [
        Preloaded(print_shares, [paths], tmp_path, file, {"WORLD_SIZE": "2", "GLOBAL_RANK": str(rank)})
        for rank, file in enumerate(files)
    ]
    assert [rank.wait(100) for rank in ranks] == [0, 0]
    answers = [[json.loads(line) for line in file.read_text().splitlines() if line.startswith("[")] for file in files]
    for path, (one, other) in zip(paths, zip(*answers, strict=True), strict=True):
        assert one[0] == other[0] == len(one[1]) // 4
        for split, loader in ((1, module(path).train_dataloader()), (2, module(path).val_dataloader())):
            alone = rows(loader)
            shares = [[tuple(row) for row in answer[split]] for answer in (one, other)]
            assert len(shares[0]) == len(shares[1]) > 0
            assert len(shares[0]) % 4 == 0
            assert len(set(shares[0] + shares[1])) == 2 * len(shares[0]) > len(alone) - 8
    assert answers[0][0] == answers[0][1]
    assert answers[1][0] == answers[1][1]


def test_data_prepared_anew_are_not_read_from_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    out, cache = tmp_path / "out", str(tmp_path / "cache")
    for seed in (0, 1):
        prepare_small(write_corpus(tmp_path / f"in{seed}", seed=seed), out, overwrite=True)
        local = module(out, shuffle=False)
        remote = module(f"local:{out}", shuffle=False, cache_dir=cache)
        for data in (local, remote):
            data.setup("fit")
            first = next(iter(data.train_dataloader()))
            text = data.tokenizer.decode(first[0].tolist())
            assert any(text in f.read_text("utf-8") for f in (tmp_path / f"in{seed}").rglob("*.txt"))
        assert rows(local.train_dataloader()) == rows(remote.train_dataloader())
        assert remote.vocab_size == 257
    assert not (tmp_path / "home").exists(), "a local folder was copied to a cache"
    assert module(f"local:{out}", cache_dir=cache, meta_path=str(out / "meta.json")).eos_id == 256
    with pytest.raises(DataError, match=r"cannot get local:.*nowhere/meta.json|nowhere/meta.json does not exist"):
        module(f"local:{tmp_path}/nowhere").setup("fit")


def damage(copy: Path, how: str) -> str:
    shard = copy / "train" / "chunk-0-1.bin"
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "damaged":
        data = bytearray(shard.read_bytes())
        data[1000] ^= 1
        shard.write_bytes(bytes(data))
    elif how == "index":
        file = copy / "train" / "index.json"
        file.write_text(file.read_text().replace("chunk-0-1", "chunk-0-2"))
    elif how == "meta":
        (copy / "meta.json").write_text("{")
    elif how == "foreign":
        (copy / "meta.json").write_text('{"tokens": 5}')
    elif how == "version":
        file = copy / "meta.json"
        file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    elif how == "unfinished":
        (copy / "meta.json").unlink()
        (copy / ".work").mkdir()
    elif how == "no meta":
        (copy / "meta.json").unlink()
    elif how == "gone":
        shutil.rmtree(copy)
    return how


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"shard .*chunk-0-1.bin is missing; .*prepare"),
        ("truncated", r"shard .*chunk-0-1.bin has \d+ bytes instead of \d+ .*prepare"),
        ("damaged", r"shard .*chunk-0-1.bin is damaged: .*prepare"),
        ("index", r"shard .*train/index.json is damaged"),
        ("meta", r"meta.json is not JSON"),
        ("foreign", r"meta.json was not written by `prepare`"),
        ("version", r"meta.json has format version 2, this code reads 1"),
        ("unfinished", r"is not finished: `prepare` was interrupted; run the same"),
        ("no meta", r"has no meta.json; write it with: python cli.py prepare --input FILES --output"),
        ("gone", r"copy does not exist; write it with: python cli.py prepare"),
    ],
)
def test_bad_folders_are_one_clear_line(copy: Path, how: str, message: str) -> None:
    damage(copy, how)
    with pytest.raises(DataError, match=message) as caught:
        module(copy).setup("fit")
    assert "\n" not in str(caught.value)
    if how == "damaged":
        module(copy, verify="size").setup("fit")
    if how == "missing":
        module(copy, verify="none").setup("fit")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sequence_length": 10**6}, DataError, r"longest shard has \d+ tokens, a block needs 1000001; lower"),
        (
            {"batch_size": 10**4},
            DataError,
            r"has \d+ blocks of 64 tokens, one batch needs 10000 .*lower data.batch_size",
        ),
        ({"batch_size": 0}, ConfigError, r"data.batch_size is 0; give 1 or more"),
        ({"num_workers": -1}, ConfigError, r"data.num_workers is -1"),
        ({"paths": {"a": 1.0, "b": 0.0}}, ConfigError, r"weight 0.0 of b is not above zero"),
    ],
)
def test_bad_values_are_one_clear_line(
    prepared: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        module(prepared, **options).setup("fit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_beyond_the_vocabulary(copy: Path, workers: int) -> None:
    meta = copy / "meta.json"
    meta.write_text(meta.read_text().replace('"vocab_size": 257', '"vocab_size": 110'))
    data = module(copy, num_workers=workers)
    data.setup("fit")
    with pytest.raises(DataError, match=r"token id \d+ in .*copy/train is outside the vocabulary of 110"):
        next(iter(data.train_dataloader()))


def test_mixtures_need_one_tokenizer(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    prepare_small(corpus, tmp_path / "bpe", tokenizer="bpe", vocab_size=270)
    with pytest.raises(
        ConfigError, match=r"bpe has vocab_size 270, .* has 257; prepare both with the same --tokenizer"
    ):
        TokenDataModule(paths={str(prepared): 1, str(tmp_path / "bpe"): 1}).setup("fit")


def test_no_validation_split(corpus: Path, tmp_path: Path) -> None:
    prepare_small(corpus, tmp_path / "out", val_fraction=0)
    data = module(tmp_path / "out")
    data.setup("fit")
    assert data.val_dataloader() == []


def test_the_default_corpus_is_prepared_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = TokenDataModule(corpus_tokenizer="byte", corpus_max_bytes="50KB", num_workers=0, sequence_length=15)
    assert data.vocab_size == 257
    data.prepare_data()
    data.setup("fit")
    assert next(iter(data.train_dataloader())).shape == (16, 16)
    with pytest.raises(DataError, match=r"does not exist; write it with"):
        TokenDataModule("data/other").prepare_data() or TokenDataModule("data/other").setup("fit")
    chosen = TokenDataModule("data/other", corpus="stdlib", corpus_tokenizer="byte", corpus_max_bytes="20KB")
    chosen.prepare_data()
    with pytest.raises(
        DataError, match=r"prepared with tokenizer byte, the run asks for bpe; change data.corpus_tokenizer"
    ):
        TokenDataModule("data/other", corpus="stdlib").prepare_data()
    assert prepare("stdlib", "data/other", "byte", max_bytes="20KB")["vocab_size"] == 257


def test_the_first_validation_batches_do_not_depend_on_the_workers(prepared: Path) -> None:
    firsts = []
    for num_workers in (0, 2):
        data = TokenDataModule(str(prepared), batch_size=2, sequence_length=31, num_workers=num_workers)
        data.setup("fit")
        firsts.append(next(iter(data.val_dataloader())))
    assert torch.equal(*firsts)
