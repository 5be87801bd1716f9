"""``TokenDataModule``: prepared folders, local or remote, as the data of a ``Trainer``.

The constructor is flat and takes plain values, so that it reads well in a recipe. It opens nothing: litdata stores the
rank when a dataset is made, and in the constructor there are no ranks yet.

The position in the training data is saved twice: with the loader, where Lightning keeps it, and with this module.
Lightning can lose its copy. With a limit on epochs this happens when something (usually a learning-rate schedule) asks
for ``trainer.estimated_stepping_batches`` before the checkpoint is loaded. Training would then begin the epoch again
without a word. The module gives its copy to the loader as soon as there is a loader.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import CHECKSUM_LIMIT
from sbn_lightning.data import folders, shards
from sbn_lightning.data.stream.teacher_rows import CollateRows, TeacherRows, rows_of
from sbn_lightning.data.tokenization.prepare import prepare
from sbn_lightning.data.tokenization.sources import digest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sbn_lightning.data.stream.loader import TokenLoader
    from sbn_lightning.data.stream.mixture import MixedTokenLoader

DEFAULT_PATH = "data/stdlib"


class TokenDataModule(LightningDataModule):
    """Stream blocks of tokens from folders written by ``prepare``.

    Batches are ``torch.long`` tensors [batch, sequence_length + 1]: inputs are ``batch[:, :-1]``, targets
    ``batch[:, 1:]``. An interrupted run resumes at the next sample. A folder that ``teacher-logits`` wrote gives tuples
    of such a tensor, likely next tokens and their log-probabilities (:mod:`sbn_lightning.data.stream.teacher_rows`).

    Args:
        path: The folder that ``prepare`` wrote, or its URL (s3://, gs://, ...). The default is prepared on first use.
        batch_size: The number of blocks in a batch, on each rank.
        sequence_length: The number of inputs in a block. A block has one token more. Prepared data work with any
            sequence length.
        num_workers: The number of loader processes for training, on each rank; 0 loads in the training process.
        seed: The seed of the order of samples.
        shuffle: Whether the training data have another order in every epoch.
        val_batch_size: The batch size of validation, test and prediction; default ``batch_size``.
        paths: The folders to mix instead of reading ``path``, each with its weight, like ``{data/a: 3, data/b: 1}``.
            All of them must be prepared with the same tokenizer.
        corpus: The corpus to prepare into ``path`` if nothing is there; ``stdlib`` is the only one. The default
            ``path`` does not need it.
        corpus_tokenizer: The tokenizer of the corpus: ``byte`` or ``bpe``.
        corpus_vocab_size: The vocabulary size of the corpus with ``bpe``.
        corpus_max_bytes: About how much of the corpus to take, like ``5MB``.
        meta_path: The path of ``meta.json``, if it is not in ``path``.
        verify: How local shards are checked before training. ``auto`` compares checksums up to 2 GiB in all and sizes
            above; ``checksum`` always compares checksums, ``size`` only sizes, ``none`` nothing.
        cache_dir: The folder where remote shards are kept; default litdata's own.
        max_cache_size: How much of the remote shards to keep, like ``50GB``.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self,
        path: str = DEFAULT_PATH,
        batch_size: int = 16,
        sequence_length: int = 256,
        num_workers: int = 2,
        seed: int = 42,
        shuffle: bool = True,
        val_batch_size: int | None = None,
        paths: dict[str, float] | None = None,
        corpus: Literal["stdlib"] | None = None,
        corpus_tokenizer: Literal["byte", "bpe"] = "bpe",
        corpus_vocab_size: int = 4096,
        corpus_max_bytes: int | str | None = None,
        meta_path: str | None = None,
        verify: Literal["auto", "checksum", "size", "none"] = "auto",
        cache_dir: str | None = None,
        max_cache_size: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("sequence_length", sequence_length, 1),
            ("num_workers", num_workers, 0),
            ("val_batch_size", 1 if val_batch_size is None else val_batch_size, 1),
        ):
            if value < least:
                raise ConfigError(f"data.{name} is {value}; give {least} or more")
        for folder, weight in (paths or {}).items():
            if not weight > 0:
                raise ConfigError(f"data.paths: weight {weight} of {folder} is not above zero; leave the folder out")
        if paths and meta_path is not None:
            raise ConfigError("data.meta_path is for one data.path; with data.paths keep each meta.json in its folder")
        self.sources: dict[str, float] = dict(paths) if paths else {path: 1.0}
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle = shuffle
        self._val_batch_size = val_batch_size
        self.verify = verify
        self.meta_path = meta_path
        self._corpus = corpus or ("stdlib" if not paths and path == DEFAULT_PATH else None)
        self._corpus_is_chosen = corpus is not None
        self._corpus_options: dict[str, Any] = {
            "tokenizer": corpus_tokenizer,
            "vocab_size": corpus_vocab_size if corpus_tokenizer == "bpe" else None,
            "max_bytes": corpus_max_bytes,
        }
        self._cache = {"cache_dir": cache_dir, "max_cache_size": max_cache_size}
        self._metas: dict[str, dict[str, Any]] | None = None
        self._tokenizer: Tokenizer | None = None
        self._is_verified = False
        self._train_loader: TokenLoader | MixedTokenLoader | None = None
        self._position: dict[str, Any] | None = None

    @property
    def val_batch_size(self) -> int:
        """The number of blocks in a validation batch: the value given, or else the present ``batch_size``."""
        return self._val_batch_size or self.batch_size

    # What the data are.

    @property
    def meta(self) -> dict[str, Any]:
        """The ``meta.json`` of the folder, or of the first one of a mixture. A missing default corpus is prepared."""
        return next(iter(self._load_metas().values()))

    @property
    def vocab_size(self) -> int:
        """The number of rows that the embedding table needs."""
        return int(self.meta["vocab_size"])

    @property
    def eos_id(self) -> int:
        """The id of the token between documents."""
        return int(self.meta["eos_id"])

    @property
    def teacher_rows(self) -> TeacherRows | None:
        """The form of the rows of text with a teacher's logits; None for text alone. ``setup`` checks it."""
        return rows_of(self.meta)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data were prepared with."""
        if self._tokenizer is None:
            self._load_metas()
            self._tokenizer = folders.load_tokenizer_of(next(iter(self.sources)))
        return self._tokenizer

    @property
    def fingerprint(self) -> str:
        """The identity of the data: a hash of the checksums of all files, and of the weights of a mixture."""
        metas = self._load_metas()
        content = [[meta["files"], weight] for meta, weight in zip(metas.values(), self.sources.values(), strict=True)]
        return digest(json.dumps(content, sort_keys=True))

    def _load_metas(self) -> dict[str, dict[str, Any]]:
        if self._metas is None:
            self.prepare_data()
            metas = {source: folders.load_meta(source, self.meta_path) for source in self.sources}
            folders.check_same_tokenizer(metas)
            self._metas = metas
        return self._metas

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Prepare the default corpus if it is not there. One process on each node prepares it, and the others wait.

        Raises:
            DataError: The folder was prepared with another tokenizer or vocabulary size than the run asks for.
        """
        if self._corpus is None or len(self.sources) != 1:
            return
        (path,) = self.sources
        meta = None if folders.is_remote(path) else shards.read_meta(Path(path))
        if meta is None:
            prepare(input=self._corpus, output=path, **self._corpus_options)
        elif self._corpus_is_chosen:
            for name in ("tokenizer", "vocab_size"):
                have, want = meta["options"][name], self._corpus_options[name]
                if have != want:
                    raise DataError(
                        f"{path} was prepared with {name} {have}, the run asks for {want}; change "
                        f"data.corpus_{name}, give another data.path, or delete the folder"
                    )

    def setup(self, stage: str | None = None) -> None:
        """Check the data before anything is trained on them.

        Raises:
            DataError: A folder or shard is missing, truncated or damaged, or there are too few tokens for a batch.
        """
        metas = self._load_metas()
        if not self._is_verified:
            for source, meta in metas.items():
                if self.verify != "none" and not folders.is_remote(source):
                    shards.verify(Path(source), meta, self._wants_checksum(meta))
            self._is_verified = True
        splits = {"fit": ["train", "val"], None: ["train", "val"]}.get(stage, ["val"])
        self._check_rows(metas)
        for source, meta in metas.items():
            for split in splits:
                if split in meta["splits"] and not folders.is_remote(source):
                    self._check_enough(source, split)

    def _check_rows(self, metas: dict[str, dict[str, Any]]) -> None:
        """Refuse a sequence length that is not the rows', and mixtures of rows of different forms."""
        forms = {
            source: None if rows is None else (rows.sequence_length, rows.top_k, rows.vocab_size)
            for source, rows in ((source, rows_of(meta)) for source, meta in metas.items())
        }
        (first, form), *others = forms.items()
        for other, its in others:
            if its != form:
                raise ConfigError(
                    f"data.paths: {first} and {other} hold different things: a teacher's logits need the same "
                    "sequence_length, top_k and vocabulary in all folders, and text alone does not mix with them"
                )
        if form is not None and self.sequence_length != form[0]:
            raise ConfigError(
                f"data.sequence_length={self.sequence_length}, but the teacher's logits in {first} are of windows of "
                f"{form[0]} tokens: set data.sequence_length to {form[0]}, or run teacher-logits again"
            )

    @property
    def _block_size(self) -> int:
        rows = self.teacher_rows
        return self.sequence_length + 1 if rows is None else rows.size

    def _wants_checksum(self, meta: dict[str, Any]) -> bool:
        if self.verify != "auto":
            return self.verify == "checksum"
        # One process on each node reads every byte. If it finds damage, the others stop too.
        first_here = self.trainer is None or self.trainer.local_rank == 0
        return first_here and shards.total_bytes(meta) <= CHECKSUM_LIMIT

    def _check_enough(self, source: str, split: str) -> None:
        world = self.trainer.world_size if self.trainer is not None else 1
        training = split == "train"
        batch = self.batch_size if training else self.val_batch_size
        # Only a run with one rank validates on a batch that is not full.
        needed = batch * world if training or world > 1 else 1
        blocks = folders.count_blocks(Path(source, split), self.sequence_length, self._block_size)
        if blocks < needed:
            raise DataError(
                f"{Path(source, split)} has {blocks} blocks of {self.sequence_length + 1} tokens, one batch needs "
                f"{needed} ({batch} on {world} ranks); lower data.{'' if training else 'val_'}batch_size or "
                "data.sequence_length, or prepare more text"
            )

    def train_dataloader(self) -> TokenLoader | MixedTokenLoader:
        """Return batches [batch_size, sequence_length + 1] of the training split, without the last incomplete one."""
        from sbn_lightning.data.stream.loader import TokenLoader
        from sbn_lightning.data.stream.mixture import MixedTokenLoader

        common: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "batch_size": self.batch_size,
            **self._loader_options("train", self.num_workers),
        }
        datasets = [self._open(source, "train") for source in self.sources]
        loader: TokenLoader | MixedTokenLoader
        if len(datasets) == 1:
            loader = TokenLoader(datasets[0], drop_last=True, **common)
        else:
            env = datasets[0].distributed_env
            loader = MixedTokenLoader(
                datasets,
                list(self.sources.values()),
                seed=self.seed,
                rank=env.global_rank,
                world_size=env.world_size,
                **common,
            )
        if len(loader) == 0:
            raise DataError(
                f"{', '.join(self.sources)}: too few tokens for one batch of {self.batch_size} on every rank; lower "
                "data.batch_size or data.sequence_length, or prepare more text"
            )
        self._follow_trainer(loader)
        if self._position is not None:
            loader.load_state_dict(self._position)
            self._position = None
        self._train_loader = loader
        return loader

    def _follow_trainer(self, loader: TokenLoader | MixedTokenLoader) -> None:
        """Tell the loader what only the trainer knows about epochs."""
        trainer = self.trainer
        if trainer is None:
            return
        limit = trainer.limit_train_batches
        if limit is not None:
            loader.epoch_batches = limit if isinstance(limit, int) else int(len(loader) * limit)
        # A loader made for epoch n, in a second fit for example, would shuffle as the first epoch did.
        loader.current_epoch = trainer.current_epoch

    def val_dataloader(self) -> Any:
        """Return batches of the validation split, in order; an empty list if the folder has none.

        One rank gets every block. Several ranks get the same number of full batches each. There are no worker
        processes, or one for a remote folder: each of several would start at another place of the split, and
        ``limit_val_batches`` would select other text for every ``num_workers``.
        """
        from sbn_lightning.data.stream.loader import TokenLoader
        from sbn_lightning.data.stream.mixture import Chained

        metas = self._load_metas()
        datasets = [self._open(source, "val") for source in self.sources if "val" in metas[source]["splits"]]
        if not datasets:
            return []
        if len(datasets) == 1:
            (source,) = self.sources
            options = self._loader_options("val", min(self.num_workers, 1) if folders.is_remote(source) else 0)
            return TokenLoader(datasets[0], batch_size=self.val_batch_size, **options)
        chained = Chained(datasets, self.val_batch_size)
        return DataLoader(chained, batch_size=self.val_batch_size, **self._loader_options("val", 0))

    def test_dataloader(self) -> Any:
        """Return the validation batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the validation batches."""
        return self.val_dataloader()

    def _open(self, source: str, split: str) -> Any:
        from sbn_lightning.data.stream.loader import open_split

        # Lightning gives this advice for any iterable dataset. The length here is exact.
        warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined.*")
        training = split == "train"
        return open_split(
            folders.join(source, split),
            self._block_size,
            # `overfit_batches` trains on the same batches again and again, so nothing may be shuffled.
            shuffle=self.shuffle and training and not getattr(self.trainer, "overfit_batches", 0),
            drop_last=True if training else None,
            seed=self.seed,
            **self._cache,
        )

    def _loader_options(self, split: str, num_workers: int) -> dict[str, Any]:
        from sbn_lightning.data.stream.loader import Collate, keep_working

        where = " or ".join(folders.join(source, split) for source in self.sources)
        rows = self.teacher_rows
        collate = Collate(self.vocab_size, where) if rows is None else CollateRows(rows, where)
        return {
            "num_workers": num_workers,
            "worker_init_fn": keep_working,
            "collate_fn": collate,
            "pin_memory": torch.cuda.is_available(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue training at a saved position. Validating a checkpoint leaves the position as it is."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._position = state_dict.get("train")
        if self._train_loader is not None and self._position is not None:
            # Sharded strategies load a checkpoint after the optimisers are made, so the loader may exist already.
            self._train_loader.load_state_dict(self._position)
