"""Text together with what a teacher says about each next token, as a folder that :class:`TokenDataModule` streams.

Running the teacher in every step of a distillation costs about a quarter of the step, and the same again in each epoch.
:func:`write_teacher_rows` asks the teacher once. Such a folder is like one of ``prepare``: litdata shards of integers,
which any machine streams, shuffles and resumes. Only the blocks differ. A block is a row of

* ``sequence_length + 1`` token ids,
* ``sequence_length * top_k`` token ids: the teacher's most likely next tokens after each token, the likeliest first,
* ``sequence_length * top_k`` natural log-probabilities, each as the 16 bits of a float16.

A row is a window of the text with the teacher's context of that window. So a run must have the row's sequence length,
and ``meta.json`` says which one that is, under ``teacher``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import sync, write_text
from sbn_lightning.data import folders, shards
from sbn_lightning.data.tokenization.options import LOCK, check_output
from sbn_lightning.data.tokenizer import token_dtype

# Token ids int64 [rows, sequence_length] -> ids of likely next tokens and their log-probabilities, both
# [rows, sequence_length, top_k].
Teach = Callable[[Tensor], tuple[Tensor, Tensor]]
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class TeacherRows:
    """The form of a row.

    Attributes:
        sequence_length: The number of inputs of the window.
        top_k: How many next tokens of the teacher are stored for each input.
        vocab_size: The vocabulary size of the teacher. The vocabulary of the text may be smaller.
        teacher: The teacher's path, for messages.
    """

    sequence_length: int
    top_k: int
    vocab_size: int
    teacher: str = ""

    @property
    def tokens(self) -> int:
        """The number of token ids of the text."""
        return self.sequence_length + 1

    @property
    def ids(self) -> int:
        """The number of integers at the start of a row that are token ids."""
        return self.tokens + self.sequence_length * self.top_k

    @property
    def size(self) -> int:
        """The number of integers of a row."""
        return self.ids + self.sequence_length * self.top_k

    def join(self, tokens: Tensor, classes: Tensor, log_probabilities: Tensor) -> NDArray[np.int32]:
        """Return rows ``[rows, size]``.

        Args:
            tokens: The token ids, ``[rows, sequence_length + 1]``.
            classes: The likely next tokens, ``[rows, sequence_length, top_k]``.
            log_probabilities: Their log-probabilities, of the same shape.
        """
        bits = log_probabilities.to(torch.float16).cpu().contiguous().view(torch.int16).int() & 0xFFFF
        parts = (tokens.int().cpu(), classes.flatten(1).int().cpu(), bits.flatten(1))
        joined: NDArray[np.int32] = torch.cat(parts, 1).numpy()
        return joined

    def split(self, rows: NDArray[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens, int64; the likely next tokens, int64; and their log-probabilities, float16.

        Args:
            rows: The rows, ``[rows, size]``.
        """
        tokens = torch.from_numpy(rows[:, : self.tokens].astype(np.int64))
        classes = torch.from_numpy(rows[:, self.tokens : self.ids].astype(np.int64))
        bits = np.ascontiguousarray(rows[:, self.ids :].astype(np.uint16)).view(np.float16)
        shape = (len(rows), self.sequence_length, self.top_k)
        return tokens, classes.view(shape), torch.from_numpy(bits).view(shape)


@dataclass(frozen=True)
class CollateRows:
    """Stack rows into a batch of three tensors: tokens, likely next tokens, log-probabilities. Ids are checked.

    Attributes:
        rows: The form of the rows.
        where: The name of the split, for the message.
    """

    rows: TeacherRows
    where: str

    def __call__(self, blocks: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, classes, log_probabilities = self.rows.split(np.stack(blocks))
        largest = max(int(tokens.max()), int(classes.max()))
        if largest >= self.rows.vocab_size or min(int(tokens.min()), int(classes.min())) < 0:
            raise DataError(
                f"token id {largest} in {self.where} is outside the vocabulary of {self.rows.vocab_size}; the shards "
                "are damaged: run `teacher-logits` again"
            )
        return tokens, classes, log_probabilities


def rows_of(meta: dict[str, Any]) -> TeacherRows | None:
    """Return the form of the rows of a folder; None for a folder that holds text alone."""
    found = meta.get("teacher")
    return None if found is None else TeacherRows(**found)


def write_teacher_rows(
    teach: Teach, source: str, output: str, rows: TeacherRows, batch_size: int, overwrite: bool = False
) -> dict[str, Any]:
    """Ask a teacher about each window of a prepared folder, and write both as a new folder.

    An interrupted call continues after the last batch that it wrote, if teacher and text are the same. The windows are
    those that a run with the same sequence length reads. Text at the end of a shard that fills no window is left out.

    Args:
        teach: The teacher.
        source: The folder that ``prepare`` wrote.
        output: The folder to write.
        rows: The form of the rows.
        batch_size: The number of windows that the teacher sees at a time.
        overwrite: Whether to replace a finished folder.

    Returns:
        The contents of the new ``meta.json``.

    Raises:
        ConfigError: The source is not on this machine, or holds teacher's rows already. Or the output is there, or
            holds something else.
        DataError: The source is no prepared folder, or holds no window.
    """
    if folders.is_remote(source) or folders.is_remote(output):
        raise ConfigError("teacher-logits reads and writes folders on this machine; copy the folder here first")
    meta = folders.load_meta(source, None)
    if rows_of(meta) is not None:
        raise ConfigError(f"{source} holds a teacher's logits already; give the folder of the text")
    out = Path(output)
    if out.resolve() == Path(source).resolve():
        raise ConfigError(f"output {output} is the folder of the text; name another folder")
    check_output(out)
    out.mkdir(parents=True, exist_ok=True)
    shards.verify(Path(source), meta, checksum=False)
    from filelock import FileLock

    with FileLock(str(out / LOCK)):
        if shards.read_meta(out) is not None and not overwrite:
            raise ConfigError(f"{output} is there already; give --overwrite to replace it")
        return _write(teach, source, out, meta, rows, batch_size)


def _write(
    teach: Teach, source: str, out: Path, meta: dict[str, Any], rows: TeacherRows, batch_size: int
) -> dict[str, Any]:
    """Do the work of :func:`write_teacher_rows` while the output is locked."""
    work = out / ".work"
    teacher = Path(rows.teacher)
    # Rows of a teacher that was written anew meanwhile are not continued.
    written = teacher.stat().st_mtime_ns if rows.teacher and teacher.exists() else None
    journal = json.dumps({"rows": asdict(rows), "files": meta["files"], "teacher_written": written}, sort_keys=True)
    if not (work / "journal.json").is_file() or (work / "journal.json").read_text(encoding="utf-8") != journal:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_text(work / "journal.json", journal)
    dtype = token_dtype(rows.vocab_size)
    counts = {
        split: _write_split(teach, source, split, work / f"{split}.bin", rows, dtype, batch_size)
        for split in meta["splits"]
    }
    return _assemble(out, work, Path(source), meta, rows, counts)


def _write_split(
    teach: Teach, source: str, split: str, file: Path, rows: TeacherRows, dtype: np.dtype[Any], batch_size: int
) -> int:
    """Append the rows that a file lacks, and return how many rows the file has in the end."""
    row_bytes = rows.size * dtype.itemsize
    done = file.stat().st_size // row_bytes if file.is_file() else 0
    with file.open("ab") as stream:
        stream.truncate(done * row_bytes)
        for batch in _batches(_windows(source, split, rows.tokens, done), batch_size):
            tokens = torch.from_numpy(batch.astype(np.int64))
            classes, log_probabilities = teach(tokens[:, :-1])
            joined = rows.join(tokens, classes, log_probabilities)
            stream.write(joined.astype(dtype).tobytes())
            done += len(joined)
    if not done:
        raise DataError(
            f"{source} ({split}) holds no window of {rows.tokens} tokens; lower --sequence_length or prepare more text"
        )
    return done


def _windows(source: str, split: str, size: int, skip: int) -> Iterator[NDArray[Any]]:
    from sbn_lightning.data.stream.loader import open_split

    dataset = open_split(folders.join(source, split), size, shuffle=False, drop_last=False, seed=0)
    for index in range(skip, len(dataset)):
        yield np.asarray(dataset[index])


def _batches(windows: Iterator[NDArray[Any]], batch_size: int) -> Iterator[NDArray[Any]]:
    batch: list[NDArray[Any]] = []
    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _assemble(
    out: Path, work: Path, source: Path, meta: dict[str, Any], rows: TeacherRows, counts: dict[str, int]
) -> dict[str, Any]:
    """Cut the rows into shards, and put them in place, ``meta.json`` last."""
    dtype = token_dtype(rows.vocab_size)
    assembled = work / "shards"
    shutil.rmtree(assembled, ignore_errors=True)
    for split in counts:
        shards.write_shards(assembled / split, [work / f"{split}.bin"], dtype, CHUNK_BYTES, item=rows.size)
    shutil.copyfile(source / "tokenizer.json", assembled / "tokenizer.json")
    names = [path.relative_to(assembled).as_posix() for path in assembled.rglob("*") if path.is_file()]
    new = {
        **meta,
        "teacher": asdict(rows),
        "fingerprint": f"{meta['fingerprint']}-teacher",  # `prepare` must not take the folder for its own.
        "dtype": dtype.name,
        "splits": {split: {**meta["splits"][split], "tokens": count * rows.tokens} for split, count in counts.items()},
        "files": shards.checksums(assembled, names),
    }
    write_text(assembled / "meta.json", json.dumps(new, indent=1, sort_keys=True))
    for path in assembled.rglob("*"):
        sync(path)
    (out / "meta.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "train", "val", "meta.json"):
        old = out / name
        if old.is_dir():
            shutil.rmtree(old)
        if (assembled / name).exists():
            (assembled / name).replace(old)
    sync(out)
    shutil.rmtree(work)
    return new
