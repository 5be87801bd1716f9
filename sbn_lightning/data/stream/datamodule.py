"""``TokenDataModule``: prepared folders, local or remote, as the data of a ``Trainer``.

The constructor is flat and takes plain values, so that it reads well in a recipe. Nothing is opened there: litdata
notes the rank when a dataset is made, and in the constructor there are no ranks yet.

The position in the training data is saved twice: with the loader, where Lightning keeps it, and with this module.
With a limit on epochs, Lightning drops its copy when something asks for ``trainer.estimated_stepping_batches`` (a
learning-rate schedule, usually) before the checkpoint is loaded, and training begins the epoch again without a word;
the copy here is handed to the loader as soon as there is one.
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
from sbn_lightning.data import folders, shards
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
    ``batch[:, 1:]``. An interrupted run resumes at the next sample, with nothing to do for it.

    Args:
        path: Folder written by ``prepare``, or its URL (s3://, gs://, ...). The default is prepared on first use.
        batch_size: Blocks a batch, on each rank.
        sequence_length: Tokens a block, less one; chosen here, not when preparing.
        num_workers: Loader processes for training on each rank; 0 loads in the training process.
        seed: Of the order of samples.
        shuffle: Read the training data in another order every epoch.
        val_batch_size: Of validation, test and prediction; default ``batch_size``.
        paths: Mix several folders instead of reading ``path``: folder to weight, like ``{data/a: 3, data/b: 1}``.
            All must have been prepared with the same tokenizer.
        corpus: Prepare this corpus into ``path`` if nothing is there; ``stdlib`` is the only one. Not needed
            for the default ``path``.
        corpus_tokenizer: Tokenizer of the corpus: ``byte`` or ``bpe``.
        corpus_vocab_size: Vocabulary of the corpus with ``bpe``.
        corpus_max_bytes: Take only about this much of the corpus, like ``5MB``.
        meta_path: Where ``meta.json`` is, if not in ``path``.
        verify: Check local shards before training: their checksums up to 2 GiB in all and their sizes above
            (``auto``), ``checksum`` always, ``size`` only, or ``none``.
        cache_dir: Where remote shards are kept; default litdata's.
        max_cache_size: How much of remote shards to keep, like ``50GB``.

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
        """Sequences in a validation batch: ``batch_size``, also after that was changed, if not given."""
        return self._val_batch_size or self.batch_size

    # What the data are.

    @property
    def meta(self) -> dict[str, Any]:
        """``meta.json`` of the folder (of the first one, in a mixture). Prepares the default corpus if need be."""
        return next(iter(self._load_metas().values()))

    @property
    def vocab_size(self) -> int:
        """Rows the embedding table needs."""
        return int(self.meta["vocab_size"])

    @property
    def eos_id(self) -> int:
        """Id of the token between documents."""
        return int(self.meta["eos_id"])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the data were prepared with."""
        if self._tokenizer is None:
            self._load_metas()
            self._tokenizer = folders.load_tokenizer_of(next(iter(self.sources)))
        return self._tokenizer

    @property
    def fingerprint(self) -> str:
        """Identifies the data: the checksums of all their files, and the weights of a mixture."""
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
        """Prepare the default corpus if it is not there; one process on each node does, the others wait.

        Raises:
            DataError: The folder is not there and is not the default corpus, or was prepared in another way.
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
        for source, meta in metas.items():
            for split in splits:
                if split in meta["splits"] and not folders.is_remote(source):
                    self._check_enough(source, split)

    def _wants_checksum(self, meta: dict[str, Any]) -> bool:
        if self.verify != "auto":
            return self.verify == "checksum"
        # One process a node reads every byte; it stops the others too when it finds damage.
        first_here = self.trainer is None or self.trainer.local_rank == 0
        return first_here and shards.total_bytes(meta) <= shards.CHECKSUM_LIMIT

    def _check_enough(self, source: str, split: str) -> None:
        world = self.trainer.world_size if self.trainer is not None else 1
        training = split == "train"
        batch = self.batch_size if training else self.val_batch_size
        # Only a lone rank validates on a batch that is not full.
        needed = batch * world if training or world > 1 else 1
        blocks = folders.count_blocks(Path(source, split), self.sequence_length)
        if blocks < needed:
            raise DataError(
                f"{Path(source, split)} has {blocks} blocks of {self.sequence_length + 1} tokens, one batch needs "
                f"{needed} ({batch} on {world} ranks); lower data.{'' if training else 'val_'}batch_size or "
                "data.sequence_length, or prepare more text"
            )

    def train_dataloader(self) -> TokenLoader | MixedTokenLoader:
        """Batches [batch_size, sequence_length + 1] of the training split, without the last incomplete one."""
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
        """Tell the loader what only the trainer knows of epochs."""
        trainer = self.trainer
        if trainer is None:
            return
        limit = trainer.limit_train_batches
        if limit is not None:
            loader.epoch_batches = limit if isinstance(limit, int) else int(len(loader) * limit)
        # A loader made for epoch n, in a second fit for example, would shuffle as the first epoch did.
        loader.current_epoch = trainer.current_epoch

    def val_dataloader(self) -> Any:
        """Batches of the validation split, in order; none if it was prepared without one.

        On one rank every block is there. On several, each gets the same number of full batches. No worker processes
        (one for a remote folder): several would each start elsewhere in the split, and ``limit_val_batches`` would
        pick other text for every ``num_workers``.
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
        """The validation batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """The validation batches."""
        return self.val_dataloader()

    def _open(self, source: str, split: str) -> Any:
        from sbn_lightning.data.stream.loader import open_split

        # Lightning's advice for any iterable dataset; this one's length is exact.
        warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined.*")
        training = split == "train"
        return open_split(
            folders.join(source, split),
            self.sequence_length + 1,
            # Lightning shuffles nothing either when the same batches are to be learned by heart.
            shuffle=self.shuffle and training and not getattr(self.trainer, "overfit_batches", 0),
            drop_last=True if training else None,
            seed=self.seed,
            **self._cache,
        )

    def _loader_options(self, split: str, num_workers: int) -> dict[str, Any]:
        from sbn_lightning.data.stream.loader import Collate, keep_working

        where = " or ".join(folders.join(source, split) for source in self.sources)
        return {
            "num_workers": num_workers,
            "worker_init_fn": keep_working,
            "collate_fn": Collate(self.vocab_size, where),
            "pin_memory": torch.cuda.is_available(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue training at a saved position; validation of a checkpoint leaves the position alone."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._position = state_dict.get("train")
        if self._train_loader is not None and self._position is not None:
            # Sharded strategies load a checkpoint after the optimizers, and so maybe after the loader, were made.
            self._train_loader.load_state_dict(self._position)
