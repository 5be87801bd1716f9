"""``python -m research.pretrained``: make the corpus, work on the trials until the time is up, or print tables.

    python -m research.pretrained corpus --weights SmolLM2-135M-Instruct.Q4_1.gguf --output data/pretrained
    python -m research.pretrained work --weights data/pretrained/model.ckpt --corpus data/pretrained --seconds 900
    python -m research.pretrained report results/pretrained/results.jsonl

Several processes, one for each GPU, may work in the same folder: each takes the next trial that nobody has taken. The
trials that are not at their end when the time is up are saved, and the same command continues them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from research.pretrained.corpus import (
    KINDS,
    held_out_documents,
    load_tokenizer,
    make_corpus,
    pack_corpus,
    read_corpus,
    write_held_out,
)
from research.pretrained.heads import SPAN, best_heads, copying_by_part
from research.pretrained.items import Item, make_items, read_items, score_items, write_tasks
from research.pretrained.report import copying as report_copying
from research.pretrained.report import report
from research.pretrained.report import tasks as report_tasks
from research.pretrained.speed import measure_speed, random_weights
from research.pretrained.train import FILE, Setting, Training
from research.pretrained.trials import SHORT, WAYS, Trial, lengthy, long, options, short, untrained
from research.queue import append_row, claim, read_rows
from research.training import STATE
from sbn_lightning.core.files import write_text
from sbn_lightning.data.tokenizer import find_eos
from sbn_lightning.evaluation.probes import make_tasks, probe
from sbn_lightning.formats.load import load_model
from sbn_lightning.models.transformer import TernaryTransformer

LENGTHS = [million * 1_000_000 for million in (200, 100, 50, 40, 30, 25, 20, 15, 12, 10, 8, 6, 5, 4, 3, 2)]
# The number of sequences at the beginning of each held-out text that are read. Fewer of them are measured.
HELD_OUT_ROWS = 80
# Seconds that a trial takes besides its steps: loading, compiling, measuring.
OVERHEAD = 15.0
# The beginnings of the samples.
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a text file."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "The configuration file is read when the program starts. If the file does not exist,",
)
# Seconds that the first process waits for the short trials of the others.
PATIENCE = 60.0


def ask(model: TernaryTransformer, items: dict[str, list[Item]], tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Return what a model answers: its best induction heads (block, head, score), tasks, and greedy samples."""
    from sbn_lightning.evaluation.scoring import score_ends
    from sbn_lightning.inference.loop import generate

    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in PROMPTS]
    room = min(64, length - max(map(len, prompts)))
    new = generate(model, prompts, max_new_tokens=room, cuda_graph=False) if room > 0 else []
    return {
        "induction_heads": best_heads(model, find_eos(tokenizer, None)[1], min(SPAN, length // 2 - 1)),
        "tasks": score_items(items, tokenizer, functools.partial(score_ends, model), length),
        "samples": [[prompt, tokenizer.decode(tokens)] for prompt, tokens in zip(PROMPTS, new, strict=False)],
    }


def work(
    setting: Setting,
    seconds: float,
    workers: int,
    short_tokens: int,
    tokens: int | None,
    trials: Sequence[Trial] | None = None,
    later: float = 0.0,
) -> None:
    """Do one trial after the other until the time is up.

    Args:
        setting: What all trials share.
        seconds: The number of seconds until running trials are saved.
        workers: The number of processes that work in the folder.
        short_tokens: The number of tokens of the short trials.
        tokens: The number of tokens of the long trials; None takes what the measured speeds allow.
        trials: The trials to do in place of the short and long ones.
        later: How many seconds a later call on this machine will have for trials that are not at their end.
    """
    deadline = time.monotonic() + seconds
    if trials is not None:
        for trial in trials:
            _try(trial, setting, deadline, later)
        return
    first = short(short_tokens)
    for trial in [*first, *untrained()]:
        _try(trial, setting, deadline)
    for trial in _plan(setting, [trial.name for trial in first], deadline, workers, tokens):
        _try(trial, setting, deadline)


def _plan(setting: Setting, first: Sequence[str], deadline: float, workers: int, tokens: int | None) -> list[Trial]:
    """Return the long trials. The first process decides, when the short trials are over; the others read its plan."""
    from filelock import FileLock

    file = setting.output / "plan.json"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            until = min(time.monotonic() + PATIENCE, deadline)
            while time.monotonic() < until:
                ends = [row for row in read_rows(setting.output / FILE) if row["finished"]]
                if set(first) <= {row["trial"]["name"] for row in ends}:
                    break
                time.sleep(1.0)
            ends = [row for row in read_rows(setting.output / FILE) if row["finished"]]
            speeds = _speeds(ends)
            if tokens is None:
                # Few processes do the most valuable trials at a length that says something.
                wanted = long(1, ends)[: max(6, 2 * workers)]
                tokens = longest(speeds, max(0.0, deadline - time.monotonic()), wanted, workers)
            print(f"long trials have {tokens:,} tokens; tokens a second: {speeds}", flush=True)
            write_text(file, json.dumps([asdict(trial) for trial in long(tokens, ends)]))
        return [Trial(**values) for values in json.loads(file.read_text(encoding="utf-8"))]


def longest(speeds: dict[str, float], seconds: float, trials: Sequence[Trial], workers: int) -> int:
    """Return the largest of :data:`LENGTHS` with which all trials fit; the smallest if none does.

    Args:
        speeds: The tokens a second of a process, for trials with and without a teacher.
        seconds: The number of seconds that each process has.
        trials: The trials, in their order. Each process takes the next one when it is free.
        workers: The number of processes.
    """
    for tokens in LENGTHS:
        busy = [0.0] * workers
        for trial in trials:
            busy[busy.index(min(busy))] += OVERHEAD + tokens / _speed_of(trial, speeds)
        if max(busy) <= seconds:
            return tokens
    return LENGTHS[-1]


def _speeds(rows: Sequence[dict[str, object]]) -> dict[str, float]:
    """Return the middle of the measured tokens a second, by whether a trial has a teacher."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["tokens_per_second"]:
            kind = "plain" if row["trial"]["distillation"] is None else "distilled"  # type: ignore[index]
            found.setdefault(kind, []).append(float(row["tokens_per_second"]))  # type: ignore[arg-type]
    return {kind: sorted(values)[len(values) // 2] for kind, values in found.items()}


def _speed_of(trial: Trial, speeds: dict[str, float], expected: float = 100_000.0) -> float:
    return speeds.get("plain" if trial.distillation is None else "distilled", expected)


def _try(trial: Trial, setting: Setting, deadline: float, later: float | None = None) -> None:
    """Do a trial unless it is done, somebody else does it, or it fits no more. A failure does not end the others.

    Args:
        trial: What to train.
        setting: What all trials share.
        deadline: The moment of the monotonic clock at which a trial is saved.
        later: The seconds of a later call. None means that half of a trial is worth its start.
    """
    rows = read_rows(setting.output / FILE)
    if _is_done(trial, rows):
        return
    started = (setting.output / trial.folder / STATE).is_file()
    left = deadline - time.monotonic()
    needed = OVERHEAD + trial.tokens / _speed_of(trial, _speeds(rows), setting.expected_speed)
    enough = 0.5 * needed if later is None else needed - later
    if left < 2 * OVERHEAD or (not started and left < enough):
        return
    with claim(setting.output / "claims" / trial.folder) as mine:
        # Another process may have ended the trial just now.
        if not mine or _is_done(trial, read_rows(setting.output / FILE)):
            return
        print(f"{time.strftime('%H:%M:%S')} {trial.name}", flush=True)
        try:
            Training(trial, setting).run(deadline)
        except Exception:  # The other trials are worth having.
            traceback.print_exc()
            if setting.together:  # The other processes wait for this one.
                raise
        if setting.device.type == "cuda":
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()


def _is_done(trial: Trial, rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["finished"] and row["trial"]["name"] == trial.name for row in rows)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("--weights", required=True, help="a GGUF file or a Hugging Face folder")
    corpus.add_argument("--output", default="data/pretrained")
    corpus.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), help="none: the model alone")
    corpus.add_argument("--max_bytes", help="about how much text of each kind; like 100MB")
    corpus.add_argument("--folders", nargs="+", help="the folders to search; default: those of the interpreter")
    corpus.add_argument("--packages", help="a folder with wheels and source distributions to read")
    corpus.add_argument("--package_bytes", help="about how much text of each kind to take from a package; like 10MB")
    held = commands.add_parser("held_out")
    held.add_argument("--corpus", required=True, help="the folder that `corpus` wrote")
    held.add_argument("--output", required=True, help="the folder to carry")
    held.add_argument("--tokens", type=int, default=400_000, help="of each kind")
    asked = commands.add_parser("tasks")
    asked.add_argument("--corpus", required=True, help="the folder that `held_out` wrote")
    asked.add_argument("--weights", required=True, help="the checkpoint or tokenizer that `corpus` wrote")
    asked.add_argument("--output", required=True, help="the folder of tasks to write")
    asked.add_argument("--items", type=int, default=200, help="the largest number of items of a task")
    packed = commands.add_parser("pack")
    packed.add_argument("--corpus", required=True, help="the folder that `corpus` wrote")
    packed.add_argument("--output", required=True, help="the folder that `held_out` wrote")
    packed.add_argument("--parts", type=int, default=2)
    packed.add_argument("--max_bytes", default="60MB", help="the largest size of a part")
    train = commands.add_parser("work")
    train.add_argument("--weights", required=True, help="the checkpoint that `corpus` wrote")
    train.add_argument("--corpus", default="data/pretrained")
    train.add_argument("--output", default="results/pretrained")
    train.add_argument("--seconds", type=float, default=math.inf)
    train.add_argument("--until", type=float, help="in place of --seconds: a time, in seconds since 1970")
    train.add_argument("--workers", type=int, default=1, help="processes that work in the folder")
    train.add_argument("--tokens", type=int, help="tokens of a long trial; default: what the time allows")
    train.add_argument("--short_tokens", type=int, default=SHORT)
    train.add_argument("--trials", help="a JSON file with other trials: a list of the fields of Trial")
    train.add_argument("--length", type=int, default=1024)
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--held_out_rows", type=int, default=64)
    train.add_argument("--lengthy", nargs=2, type=int, metavar=("LONGEST", "TOKENS"), help="do the long comparison")
    train.add_argument(
        "--options", nargs="+", type=int, metavar="TOKENS",
        help="compare options of the distillation; a second number is for longer trials of learned scales",
    )  # fmt: skip
    train.add_argument("--only", nargs="+", help="of the given trials only those whose names hold one of these texts")
    train.add_argument("--later", type=float, default=0.0, help="seconds of a later call on this machine")
    train.add_argument("--expected_speed", type=float, default=1e5, help="tokens a second, until some are measured")
    train.add_argument(
        "--together", action="store_true",
        help="under torchrun: each process does one of the first trials, at the same time, and they share a teacher",
    )  # fmt: skip
    train.add_argument("--tasks", help="a folder that the command `tasks` wrote")
    train.add_argument("--gradients", default="bf16")
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    train.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs, on a GPU")
    speed = commands.add_parser("speed")
    speed.add_argument("--weights", help="the checkpoint that `corpus` wrote; default: random weights of SmolLM2-135M")
    speed.add_argument("--output", default="results/pretrained")
    speed.add_argument("--ways", nargs="+", choices=list(WAYS), default=["both"])
    speed.add_argument("--patterns", nargs="+", default=["2:4"])
    speed.add_argument("--batches", nargs="+", type=int, default=[16, 32, 64])
    speed.add_argument("--length", type=int, default=1024)
    speed.add_argument("--steps", type=int, default=12, help="timed steps before and after the end of the warm-up")
    speed.add_argument("--seconds", type=float, default=math.inf)
    speed.add_argument("--top", type=int, default=0, help="how many of the longest kernels to write")
    speed.add_argument("--gradients", default="bf16")
    speed.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    speed.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs, on a GPU")
    copying = commands.add_parser("copying")
    copying.add_argument("--weights", required=True, help="the checkpoint that `corpus` wrote")
    copying.add_argument("--output", default="results/pretrained")
    copying.add_argument("--pattern", default="2:4")
    copying.add_argument("--length", type=int, default=256)
    copying.add_argument("--rows", type=int, default=64)
    table = commands.add_parser("report")
    table.add_argument("results", nargs="+", help="files of rows that `work` wrote")
    table.add_argument("--answers", nargs="*", default=[], help="files of answers that `work` wrote")
    table.add_argument("--copying", nargs="*", default=[], help="files that `copying` wrote")
    args = parser.parse_args()
    if args.command == "report":
        print(report([row for file in args.results for row in read_rows(Path(file))]))
        for make, files in ((report_tasks, args.answers), (report_copying, args.copying)):
            if files:
                print("\n" + make([row for file in files for row in read_rows(Path(file))]))
        return
    if args.command == "corpus":
        make_corpus(
            args.weights, args.output, args.kinds, args.max_bytes, args.folders, args.packages, args.package_bytes
        )
        return
    if args.command == "held_out":
        write_held_out(args.corpus, args.output, args.tokens)
        return
    if args.command == "tasks":
        write_tasks(
            make_items(held_out_documents(args.corpus, load_tokenizer(args.weights)), args.items), Path(args.output)
        )
        return
    if args.command == "pack":
        pack_corpus(args.corpus, args.output, args.parts, args.max_bytes)
        return
    place = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.command == "copying":
        tokenizer = load_tokenizer(args.weights)
        copied = make_tasks(tokenizer, args.length, args.rows, names=("copy",))
        model = load_model(args.weights).model.to(device).eval()
        for row in copying_by_part(model, copied, find_eos(tokenizer, None)[1], args.pattern):
            append_row(Path(args.output) / "copying.jsonl", row)
            right = [round(one["accuracy"], 3) for one in row["probe"]]
            print(row["converted"], row["variant"], right, row["heads"][0], flush=True)
        return
    torch.set_float32_matmul_precision("high")
    if args.command == "speed":
        weights = args.weights or random_weights(Path(args.output, "random.ckpt"))
        setting = Setting(
            weights, torch.zeros(0), {}, Path(args.output), device, args.length, compile=args.compile,
            graphs=args.graphs, gradients=args.gradients,
        )  # fmt: skip
        trials = [
            Trial(f"{way} {p}", 0, p, distillation=WAYS[way], rounding=0.5) for p in args.patterns for way in args.ways
        ]
        measure_speed(setting, trials, args.batches, time.monotonic() + args.seconds, args.steps, args.top)
        return
    text, held_out = read_corpus(args.corpus, device, HELD_OUT_ROWS * (args.length + 1))
    # Rows of the probe are short, because a small model copies little in a long row of random tokens.
    length = min(args.length, 256)
    text_of_probe = held_out["code"].cpu().long()
    tokenizer = load_tokenizer(args.weights)
    items = {} if args.tasks is None else read_items(Path(args.tasks))
    tasks = make_tasks(tokenizer, length, rows=64, text=text_of_probe)

    def probe_tasks(logits: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
        def of_short(tokens: Tensor) -> Tensor:
            # What follows a token does not change its logits, and a compiled model has one shape.
            return logits(torch.nn.functional.pad(tokens, (0, args.length - length)))[:, :length]

        return [asdict(result) for result in probe(of_short, tasks, args.batch)]

    setting = Setting(
        args.weights, text, held_out, Path(args.output), device, args.length, args.batch,
        held_out_rows=args.held_out_rows, compile=args.compile, graphs=args.graphs, gradients=args.gradients,
        together=args.together, probe=probe_tasks, expected_speed=args.expected_speed,
        ask=functools.partial(ask, items=items, tokenizer=tokenizer, length=args.length),
    )  # fmt: skip
    print(f"{len(text):,} tokens to train on; held out: { {k: len(v) for k, v in held_out.items()} }", flush=True)
    chosen = None if args.lengthy is None else lengthy(*args.lengthy)
    if args.options is not None:
        chosen = options(*args.options)
    if args.trials is not None:
        chosen = [Trial(**values) for values in json.loads(Path(args.trials).read_text(encoding="utf-8"))]
    if chosen is not None and args.only is not None:
        chosen = [trial for trial in chosen if any(text in trial.name for text in args.only)]
    if args.together:
        if chosen is None or "RANK" not in os.environ:
            parser.error("--together needs torchrun, and --lengthy or --trials")
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if len(chosen) < ranks:
            parser.error(f"--together: {ranks} processes, but {len(chosen)} trials")
        if rank == 0:
            print(f"left out: {', '.join(trial.name for trial in chosen[ranks:]) or 'nothing'}", flush=True)
        chosen = [chosen[rank]]
    # Imports may have taken a while, so a time is safer than a number of seconds.
    seconds = args.seconds if args.until is None else args.until - time.time()
    # Nobody may leave a trial out that others wait for.
    later = math.inf if args.together else args.later
    work(setting, seconds, args.workers, args.short_tokens, args.tokens, chosen, later)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
