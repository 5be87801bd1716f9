"""``prepare``: turn any text into a folder of litdata shards.

The work has four steps. Each can be interrupted at any moment and continued later:

1. plan: list the inputs, compute a fingerprint of inputs and options, choose the side of text files (``splits``), and
   cut the inputs into segments (``sources``);
2. tokenizer: take the given one, or train one on a sample of the training split;
3. tokenize: one segment after the other, in several processes (``segments``);
4. assemble: lay the segments end to end and cut them into litdata chunks (``shards``).

Everything unfinished lies in ``DIR/.work``. When the new data are whole, they are renamed into place, ``meta.json``
last, so a folder with a ``meta.json`` is a finished one. What an earlier ``prepare`` wrote stays usable until then, and
comes back if the process dies between the renames. The price is disk space: the tokens are on the disk twice (2 bytes
a token) until the end, and the replaced data beside them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import file_crc32, sync, write_text
from sbn_lightning.data import shards
from sbn_lightning.data.tokenization import hub, readers, sources
from sbn_lightning.data.tokenization.options import LOCK, check_options, check_output, default_workers, parse_bytes
from sbn_lightning.data.tokenization.segments import SPLITS, describe_os_error, tokenize
from sbn_lightning.data.tokenization.sources import Part
from sbn_lightning.data.tokenization.splits import assign_splits
from sbn_lightning.data.tokenization.summary import skipped_records, summary
from sbn_lightning.data.tokenizer import (
    EOS_TOKEN,
    byte_tokenizer,
    find_eos,
    load_tokenizer,
    token_dtype,
    train_bpe,
    vocab_size_of,
)

DEFAULT_VOCAB_SIZE = 4096
# What a finished folder holds.
RESULTS = ("meta.json", "tokenizer.json", "train", "val")
# A file with this name says that all of the old data have been moved away.
_WHOLE = "whole"
# The version of the files in the work folder. Unfinished work of another version is dropped.
_WORK_VERSION = 3


def prepare(
    input: str | list[str] = "stdlib",
    output: str = "data/stdlib",
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    eos_token: str | None = None,
    text_key: str = "text",
    pattern: str = "*",
    subset: str | None = None,
    split: str = "train",
    val_fraction: float = 0.05,
    max_bytes: int | str | None = None,
    chunk_bytes: int | str = "64MB",
    segment_bytes: int | str = "8MB",
    bpe_sample_bytes: int | str = "8MB",
    num_workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turn text into token shards for training.

    The same command continues after an interruption. The result depends only on the input and the options, not on the
    number of workers. Files and records without text are left out, and named at the end.

    Args:
        input: The input: text, JSON, JSONL, CSV, TSV or Parquet files, which may be packed (.gz, .bz2, .xz, .zst);
            folders or globs of them; 'stdlib' for the Python sources of the running interpreter's standard library
            (about 30 MB); 'hf:NAME' or 'hf:FOLDER' for a Hugging Face dataset. Several: --input A B.
        output: The folder to write.
        tokenizer: The tokenizer: 'byte' (256 bytes and an end-of-document token), 'bpe' (byte-level BPE, trained
            here), or the path of a tokenizer.json.
        vocab_size: The vocabulary size of 'bpe'; default 4096.
        eos_token: The end-of-document token of a tokenizer.json, if it is not one of the usual ones.
        text_key: The key (JSON) or column (CSV, Parquet, Hugging Face) that holds the text.
        pattern: The glob that the files of a folder must match.
        subset: The subset (configuration) of a Hugging Face dataset.
        split: The split of a Hugging Face dataset to read.
        val_fraction: The share of files, or of records, to hold out for validation.
        max_bytes: About how much input to read; a number of bytes, or like '10MB'.
        chunk_bytes: The size of a shard.
        segment_bytes: The size of a piece of work. An interruption loses at most one piece for each worker.
        bpe_sample_bytes: How much text to train 'bpe' on.
        num_workers: The number of processes; default one for each CPU, at most 16.
        overwrite: Whether to replace what an earlier `prepare` wrote from other input or options. The old data stay
            until the new ones are whole.

    Returns:
        The contents of ``meta.json``.

    Raises:
        ConfigError: An option or input cannot work, or the output folder holds something else.
        DataError: An input file is damaged, or a file that was named itself is not text.
    """
    out = Path(output)
    sizes = {
        "max_bytes": None if max_bytes is None else parse_bytes(max_bytes, "max_bytes"),
        "chunk_bytes": parse_bytes(chunk_bytes, "chunk_bytes"),
        "segment_bytes": parse_bytes(segment_bytes, "segment_bytes"),
        "bpe_sample_bytes": parse_bytes(bpe_sample_bytes, "bpe_sample_bytes"),
    }
    check_options(tokenizer, vocab_size, val_fraction, num_workers)
    if tokenizer == "bpe" and vocab_size is None:
        vocab_size = DEFAULT_VOCAB_SIZE
    options = {
        "input": [input] if isinstance(input, str) else list(input),
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "eos_token": eos_token,
        "text_key": text_key,
        "pattern": pattern,
        "subset": subset,
        "split": split,
        "val_fraction": val_fraction,
        **sizes,
    }
    check_output(out)
    out.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    # torchrun starts several processes at once: one prepares, and the others find the folder finished.
    with FileLock(str(out / LOCK)):
        return _Preparation(out, options, num_workers or default_workers(), overwrite).run()


class _Preparation:
    """One call of ``prepare``, while it holds the folder's lock."""

    def __init__(self, out: Path, options: dict[str, Any], num_workers: int, overwrite: bool) -> None:
        self.out = out
        self.work = out / ".work"
        self.options = options
        self.num_workers = num_workers
        self.overwrite = overwrite
        self._tokenizer_kind = options["tokenizer"] if options["tokenizer"] in ("byte", "bpe") else "file"

    def run(self) -> dict[str, Any]:
        self._undo_exchange()
        parts, skipped, description = self._plan()
        # `description` says what the inputs are. Where they lie does not matter.
        choices = {key: value for key, value in self.options.items() if key not in ("input", "tokenizer")}
        choices["tokenizer"] = self._tokenizer_kind
        fingerprint = f"{shards.FORMAT_VERSION}-{sources.digest(json.dumps([choices, description]))}"
        meta = shards.read_meta(self.out)
        if meta is not None:
            if meta["fingerprint"] == fingerprint:
                shutil.rmtree(self.work, ignore_errors=True)
                _say(f"{self.out} is already prepared: {summary(meta)}")
                return meta
            if not self.overwrite:
                raise ConfigError(
                    f"{self.out} was prepared from other inputs or options; pass --overwrite to replace it, "
                    "or another --output"
                )
        self._open_work_folder(fingerprint)
        try:
            segments = sources.group(assign_splits(parts, self.options), self.options["segment_bytes"])
            vocab_size, eos_token, eos_id = self._take_tokenizer(segments)
            self._tokenize(segments, eos_id)
            meta = self._assemble(len(segments), fingerprint, skipped, vocab_size, eos_token, eos_id)
        except KeyboardInterrupt:
            _say(f"interrupted; run the same command again to continue in {self.out}")
            raise
        except OSError as error:
            raise DataError(describe_os_error(error)) from error
        _say(f"prepared {self.out}: {summary(meta)}")
        return meta

    def _plan(self) -> tuple[list[Part], dict[str, str], list[Any]]:
        inputs: list[str] = self.options["input"]
        files = [text for text in inputs if not text.startswith("hf:")]
        datasets = [text.removeprefix("hf:") for text in inputs if text.startswith("hf:")]
        limit, size = self.options["max_bytes"], self.options["segment_bytes"]
        if not inputs:
            raise ConfigError("input is empty; give files, folders, 'stdlib' or 'hf:NAME'")
        parts, skipped = sources.plan_files(
            files,
            self.options["pattern"],
            self.out,
            text_key=self.options["text_key"],
            max_bytes=limit,
            segment_bytes=size,
        )
        for name in datasets:
            left = None if limit is None else limit - sum(part.size for part in parts)
            if left is None or left > 0:
                parts += hub.plan_hf(name, self.options, left, size)
        if not parts:
            why = "".join(f"; {name} {reason}" for name, reason in list(skipped.items())[:1])
            raise ConfigError(f"input {inputs} holds no text{why}; give files that are not empty")
        description: list[Any] = sources.describe_files(parts) + [hub.describe_hf(n, self.options) for n in datasets]
        if self._tokenizer_kind == "file":
            description.append(file_crc32(self.options["tokenizer"]))
        return parts, skipped, description

    def _open_work_folder(self, fingerprint: str) -> None:
        """Keep the work of an interrupted run with the same fingerprint; drop any other."""
        journal, entry = self.work / "journal.json", {"fingerprint": fingerprint, "version": _WORK_VERSION}
        if journal.is_file() and json.loads(journal.read_text(encoding="utf-8")) == entry:
            return
        if self.work.exists():
            _say(f"discarding unfinished work in {self.out}: it was for other inputs or options")
            shutil.rmtree(self.work)
        self.work.mkdir()
        write_text(journal, json.dumps(entry))

    def _take_tokenizer(self, segments: list[list[Part]]) -> tuple[int, str, int]:
        kind, file = self.options["tokenizer"], self.work / "tokenizer.json"
        if not file.is_file():
            if kind == "bpe":
                parts = [part for segment in segments for part in segment]
                size = self.options["vocab_size"]
                _say(
                    f"training a BPE tokenizer of {size} entries on at most {self.options['bpe_sample_bytes']:,} bytes"
                )
                made = train_bpe(readers.sample_texts(parts, self.options), size)
            else:
                made = byte_tokenizer() if kind == "byte" else load_tokenizer(kind)
            write_text(file, made.to_str(pretty=True))
        tokenizer = load_tokenizer(file)
        # The tokenizers made here have one end token. One from elsewhere may have several.
        wanted = self.options["eos_token"] or (EOS_TOKEN if kind in ("byte", "bpe") else None)
        return vocab_size_of(tokenizer), *find_eos(tokenizer, wanted)

    def _tokenize(self, segments: list[list[Part]], eos_id: int) -> None:
        from tqdm import tqdm

        plan = {
            "options": self.options,
            "eos_id": eos_id,
            "segments": [[part.to_json() for part in segment] for segment in segments],
        }
        write_text(self.work / "plan.json", json.dumps(plan))
        sizes = [sum(part.size for part in segment) for segment in segments]
        todo = [i for i in range(len(segments)) if not (self.work / f"{i:06d}.json").is_file()]
        start = sum(sizes) - sum(sizes[i] for i in todo)
        # Only a terminal shows the bar. A log file gets the lines of `_say`.
        with tqdm(
            total=sum(sizes),
            initial=start,
            unit="B",
            unit_scale=True,
            desc="tokenizing",
            file=sys.stderr,
            disable=None,
        ) as bar:
            tokenize(self.work, todo, self.num_workers, lambda i: (bar.update(sizes[i]), None)[1])

    def _assemble(
        self, count: int, fingerprint: str, skipped: dict[str, str], vocab_size: int, eos_token: str, eos_id: int
    ) -> dict[str, Any]:
        stats = [json.loads((self.work / f"{i:06d}.json").read_text(encoding="utf-8")) for i in range(count)]
        tallies = [one["tally"] for one in stats]
        keys = ("tokens", "documents", "bytes")
        splits = {split: {key: sum(one[split][key] for one in stats) for key in keys} for split in SPLITS}
        left_out = skipped_records(tallies)
        self._check_splits(splits, left_out)
        dtype = token_dtype(vocab_size)
        assembled = self.work / "shards"
        shutil.rmtree(assembled, ignore_errors=True)
        for split in SPLITS:
            if splits[split]["tokens"]:
                files = [self.work / f"{i:06d}.{split}.bin" for i in range(count)]
                shards.write_shards(assembled / split, files, dtype, self.options["chunk_bytes"])
        shutil.copyfile(self.work / "tokenizer.json", assembled / "tokenizer.json")
        names = [p.relative_to(assembled).as_posix() for p in assembled.rglob("*") if p.is_file()]
        meta = {
            "format": shards.FORMAT,
            "format_version": shards.FORMAT_VERSION,
            "fingerprint": fingerprint,
            "options": self.options,
            "tokenizer": self._tokenizer_kind,
            "vocab_size": vocab_size,
            "eos_token": eos_token,
            "eos_id": eos_id,
            "dtype": dtype.name,
            "splits": {name: counts for name, counts in splits.items() if counts["tokens"]},
            "replaced": sum(tally["replaced"] for tally in tallies),
            "skipped": skipped,
            "skipped_records": left_out,
            "files": shards.checksums(assembled, names),
        }
        write_text(assembled / "meta.json", json.dumps(meta, indent=1, sort_keys=True))
        for path in assembled.rglob("*"):
            sync(path)
        self._put_in_place(assembled)
        return meta

    def _put_in_place(self, assembled: Path) -> None:
        """Exchange what an earlier ``prepare`` wrote for the new data, which are whole on the disk by now."""
        old = self.work / "old"
        old.mkdir(exist_ok=True)
        for name in RESULTS:  # meta.json moves first, so that the folder does not count as finished meanwhile.
            if (self.out / name).exists():
                (self.out / name).replace(old / name)
        (old / _WHOLE).touch()
        for name in reversed(RESULTS):  # The new meta.json comes last, and makes the folder a finished one.
            if (assembled / name).exists():
                (assembled / name).replace(self.out / name)
        sync(self.out)
        shutil.rmtree(self.work, ignore_errors=True)

    def _undo_exchange(self) -> None:
        """Bring the old data back if an earlier process died while it exchanged old for new."""
        old = self.work / "old"
        if (self.out / "meta.json").exists() or not (old / "meta.json").exists():
            return
        if (old / _WHOLE).exists():  # Without this file no new data were put in place.
            for name in RESULTS:
                new = self.out / name
                shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)
            (old / _WHOLE).unlink()
        for name in reversed(RESULTS):
            if (old / name).exists():
                (old / name).replace(self.out / name)

    def _check_splits(self, splits: dict[str, dict[str, int]], left_out: dict[str, Any] | None) -> None:
        empty = [s for s in SPLITS if not splits[s]["bytes"]]
        if self.options["val_fraction"] == 0 and empty == ["val"]:
            return
        if empty:
            total = sum(counts["documents"] for counts in splits.values())
            why = f"; {left_out['count']} records were left out, such as {left_out['named'][0]}" if left_out else ""
            raise DataError(
                f"no text fell into {empty[0]} ({total} in all, val_fraction {self.options['val_fraction']}){why}; "
                "change --val_fraction (0 for no validation) or give more documents"
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
