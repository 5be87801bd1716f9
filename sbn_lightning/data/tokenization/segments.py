"""Tokenize segments, in this process or in worker processes.

A finished segment is three files: ``<n>.train.bin`` and ``<n>.val.bin`` (token ids back to back, no header) and
``<n>.json`` (counts). Each file is renamed into place when it is whole. ``<n>.json`` comes last, so a segment with
that file is done.

Workers are plain Python processes. A worker gets segment numbers on stdin and answers each with a line on stdout.
``multiprocessing`` would either fork a process that has threads (the tokenizer's, torch's) or import the user's main
script again. These workers do neither, and a worker whose parent was killed reads the end of its stdin and exits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import numpy as np

from sbn_lightning.core.errors import ConfigError, DataError, SBNError
from sbn_lightning.core.files import atomic_stream, write_text
from sbn_lightning.data.tokenization.readers import PIECE, read_part
from sbn_lightning.data.tokenization.sources import Part
from sbn_lightning.data.tokenization.tally import Tally
from sbn_lightning.data.tokenizer import Encoder, load_tokenizer

SPLITS = ("train", "val")


def describe_os_error(error: OSError) -> str:
    """Return one line for an error such as a full disk or a file that went away, with the way out."""
    return f"{error.strerror or error}: {error.filename or 'while writing'}; mend that, then run the same command again"


class SegmentTokenizer:
    """Turn segments, given by number, into token files.

    Args:
        work: The work folder. It holds ``plan.json`` and ``tokenizer.json``, and receives the segments.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        plan = json.loads((work / "plan.json").read_text(encoding="utf-8"))
        self._options: dict[str, Any] = plan["options"]
        self._segments: list[list[Part]] = [[Part(**part) for part in parts] for parts in plan["segments"]]
        self._eos_id: int = plan["eos_id"]
        self._encoder = Encoder(load_tokenizer(work / "tokenizer.json"), self._options["tokenizer"] == "byte")

    def __call__(self, index: int) -> None:
        """Tokenize one segment.

        Args:
            index: The number of the segment.

        Raises:
            DataError: An input is damaged; the message names the file and the line.
        """
        tally = Tally()
        stats: dict[str, Any] = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
        batch: list[tuple[str, str, bool]] = []
        held = 0
        with ExitStack() as stack:
            streams = {
                split: stack.enter_context(atomic_stream(self.work / f"{index:06d}.{split}.bin")) for split in SPLITS
            }
            for part in self._segments[index]:
                for piece in read_part(part, self._options, tally):
                    batch.append(piece)
                    held += len(piece[1])
                    if held >= PIECE:
                        self._flush(batch, streams, stats)
                        batch, held = [], 0
            self._flush(batch, streams, stats)
        stats["tally"] = tally.to_json()
        write_text(self.work / f"{index:06d}.json", json.dumps(stats))

    def _flush(
        self, batch: Sequence[tuple[str, str, bool]], streams: dict[str, BinaryIO], stats: dict[str, Any]
    ) -> None:
        eos = np.array([self._eos_id], dtype=self._encoder.dtype)
        for (split, text, ends), ids in zip(batch, self._encoder([t for _, t, _ in batch]), strict=True):
            streams[split].write(ids.tobytes())
            if ends:
                streams[split].write(eos.tobytes())
            stats[split]["tokens"] += len(ids) + ends
            stats[split]["documents"] += ends
            stats[split]["bytes"] += len(text) if text.isascii() else len(text.encode("utf-8"))


def tokenize(work: Path, todo: Sequence[int], num_workers: int, done: Callable[[int], None]) -> None:
    """Tokenize segments.

    Args:
        work: The work folder.
        todo: The numbers of the segments.
        num_workers: The number of processes; 1 works in this one.
        done: The function to call with the number of each finished segment, in this thread.

    Raises:
        DataError: An input is damaged, or a worker process died.
    """
    num_workers = min(num_workers, len(todo))
    if num_workers <= 1:
        run = SegmentTokenizer(work) if todo else None
        for index in todo:
            assert run is not None
            run(index)
            done(index)
        return

    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": search_path}
    command = [sys.executable, "-c", f"from {__name__} import main; main()", str(work)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(num_workers)
    ]
    finished: SimpleQueue[int | SBNError | None] = SimpleQueue()
    pending = list(reversed(todo))

    def drive(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            while pending:
                try:
                    index = pending.pop()
                except IndexError:
                    break
                worker.stdin.write(f"{index}\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    raise DataError(
                        f"a worker process ended with status {worker.wait()} in segment {index}; run the same "
                        "command again to continue (fewer --num_workers if memory ran out)"
                    )
                answer = json.loads(line)
                if "error" in answer:
                    raise (ConfigError if answer["kind"] == "ConfigError" else DataError)(answer["error"])
                finished.put(index)
            worker.stdin.close()
        except SBNError as error:
            finished.put(error)
        except (OSError, ValueError) as error:
            finished.put(DataError(f"a worker process broke off ({error}); run the same command again to continue"))

    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for worker in workers:
                pool.submit(drive, worker)
            for _ in todo:
                result = finished.get()
                if isinstance(result, SBNError):
                    raise result
                assert result is not None
                done(result)
        finally:
            pending.clear()
            for worker in workers:
                if worker.stdin is not None and not worker.stdin.closed and worker.poll() is None:
                    worker.terminate()
    for worker in workers:
        worker.wait()
        if worker.stdout is not None:
            worker.stdout.close()


def main() -> None:
    """Run a worker: read segment numbers, and answer each with one line of JSON."""
    # Ctrl-C reaches the whole process group. The parent prints the message and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run: SegmentTokenizer | None = None
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            run = run or SegmentTokenizer(Path(sys.argv[1]))
            run(int(line))
            answer = {"done": int(line)}
        except SBNError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except OSError as error:
            answer = {"error": describe_os_error(error), "kind": "DataError"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
