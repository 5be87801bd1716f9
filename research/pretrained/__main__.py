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
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from research.pretrained.corpus import (
    KINDS,
    held_out_documents,
    load_tokenizer,
    make_corpus,
    pack_corpus,
    read_corpus,
    write_held_out,
)
from research.pretrained.heads import copying_by_part
from research.pretrained.items import make_items, read_items, write_tasks
from research.pretrained.plan import work
from research.pretrained.questions import ask, probe_short
from research.pretrained.report import copying as report_copying
from research.pretrained.report import report
from research.pretrained.report import tasks as report_tasks
from research.pretrained.speed import measure_speed, random_weights
from research.pretrained.train import Setting
from research.pretrained.trials import SHORT, WAYS, Trial, lengthy, options
from research.queue import append_row, read_all_rows
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import find_eos
from sbn_lightning.evaluation.probes import make_tasks
from sbn_lightning.formats.load import load_model

# The number of sequences at the beginning of each held-out text that are read. Fewer of them are measured.
HELD_OUT_ROWS = 80


def run_corpus(args: argparse.Namespace) -> None:
    """Find text, and write it and the model."""
    make_corpus(args.weights, args.output, args.kinds, args.max_bytes, args.folders, args.packages, args.package_bytes)


def run_held_out(args: argparse.Namespace) -> None:
    """Write the beginning of the held-out text to a folder that is small enough to carry."""
    write_held_out(args.corpus, args.output, args.tokens)


def run_tasks(args: argparse.Namespace) -> None:
    """Make tasks of the held-out text."""
    documents = held_out_documents(args.corpus, load_tokenizer(args.weights))
    write_tasks(make_items(documents, args.items), Path(args.output))


def run_pack(args: argparse.Namespace) -> None:
    """Pack the training text into parts to carry."""
    pack_corpus(args.corpus, args.output, args.parts, args.max_bytes, args.tokens, args.preset)


def run_copying(args: argparse.Namespace) -> None:
    """Convert one part of a model after the other, and measure what is left of copying."""
    tokenizer = load_tokenizer(args.weights)
    copied = make_tasks(tokenizer, args.length, args.rows, names=("copy",))
    model = load_model(args.weights).model.to(choose_device()).eval()
    for row in copying_by_part(model, copied, find_eos(tokenizer, None)[1], args.pattern):
        append_row(Path(args.output) / "copying.jsonl", row)
        right = [round(one["accuracy"], 3) for one in row["probe"]]
        print(row["converted"], row["variant"], right, row["heads"][0], flush=True)


def run_speed(args: argparse.Namespace) -> None:
    """Time a few steps of each kind of trial."""
    torch.set_float32_matmul_precision("high")
    weights = args.weights or random_weights(Path(args.output, "random.ckpt"))
    setting = Setting(
        weights, torch.zeros(0), {}, Path(args.output), choose_device(), args.length, compile=args.compile,
        graphs=args.graphs, gradients=args.gradients,
    )  # fmt: skip
    trials = [
        Trial(f"{way} {p}", 0, p, distillation=WAYS[way], rounding=0.5) for p in args.patterns for way in args.ways
    ]
    measure_speed(setting, trials, args.batches, time.monotonic() + args.seconds, args.steps, args.top)


def run_report(args: argparse.Namespace) -> None:
    """Print the tables."""
    print(report(read_all_rows(args.results)))
    for make, files in ((report_tasks, args.answers), (report_copying, args.copying)):
        if files:
            print("\n" + make(read_all_rows(files)))


def run_work(args: argparse.Namespace) -> None:
    """Train until the time is up."""
    trials = choose_trials(args)
    if args.together:
        trials = [trial_of_this_process(trials)]
    torch.set_float32_matmul_precision("high")
    setting = read_setting(args)
    print(
        f"{len(setting.train):,} tokens to train on; held out: { {k: len(v) for k, v in setting.held_out.items()} }",
        flush=True,
    )
    # Imports may have taken a while, so a time is safer than a number of seconds.
    seconds = args.seconds if args.until is None else args.until - time.time()
    # Nobody may leave a trial out that others wait for.
    later = math.inf if args.together else args.later
    work(setting, seconds, args.workers, args.short_tokens, args.tokens, trials, later)
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_trials(args: argparse.Namespace) -> list[Trial] | None:
    """Return the trials that the command line asks for. None means the short trials, and the long ones after these."""
    if args.trials is not None:
        trials = [Trial(**values) for values in json.loads(Path(args.trials).read_text(encoding="utf-8"))]
    elif args.options is not None:
        if len(args.options) > 2:
            raise ConfigError(f"--options takes one or two numbers of tokens, not {len(args.options)}")
        trials = options(*args.options)
    elif args.lengthy is not None:
        trials = lengthy(*args.lengthy)
    elif args.only is not None:
        raise ConfigError("--only chooses among the trials of --options, --lengthy or --trials; give one of them")
    else:
        return None
    chosen = [trial for trial in trials if args.only is None or any(text in trial.name for text in args.only)]
    if not chosen:
        names = ", ".join(trial.name for trial in trials)
        raise ConfigError(f"--only {' '.join(args.only or [])}: no trial has such a name; there are {names}")
    return chosen


def trial_of_this_process(trials: list[Trial] | None) -> Trial:
    """Return what this process trains, when all processes train at the same time with one teacher.

    Raises:
        ConfigError: If there are no such processes, or fewer trials than processes.
    """
    if trials is None or "RANK" not in os.environ:
        raise ConfigError("--together needs torchrun, and --options, --lengthy or --trials")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if len(trials) < ranks:
        raise ConfigError(f"--together: {ranks} processes, but {len(trials)} trials")
    if rank == 0:
        print(f"left out: {', '.join(trial.name for trial in trials[ranks:]) or 'nothing'}", flush=True)
    return trials[rank]


def read_setting(args: argparse.Namespace) -> Setting:
    """Return what all trials share, with the text on the device."""
    device = choose_device()
    text, held_out = read_corpus(args.corpus, device, HELD_OUT_ROWS * (args.length + 1))
    tokenizer = load_tokenizer(args.weights)
    items = {} if args.tasks is None else read_items(Path(args.tasks))
    # Rows of the probe are short, because a small model copies little in a long row of random tokens.
    short = min(args.length, 256)
    tasks = make_tasks(tokenizer, short, rows=64, text=held_out["code"].cpu().long())
    return Setting(
        args.weights, text, held_out, Path(args.output), device, args.length, args.batch,
        held_out_rows=args.held_out_rows, compile=args.compile, graphs=args.graphs, gradients=args.gradients,
        together=args.together, expected_speed=args.expected_speed,
        probe=functools.partial(probe_short, tasks=tasks, short=short, length=args.length, batch=args.batch),
        ask=functools.partial(ask, items=items, tokenizer=tokenizer, length=args.length),
    )  # fmt: skip


def choose_device() -> torch.device:
    """Return the GPU of this process, and make it the current one; the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def make_parser() -> argparse.ArgumentParser:
    """Return the command line. Each command has the function that runs it in ``run``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_texts(commands)
    _add_work(commands)
    _add_speed(commands)
    copying = commands.add_parser("copying")
    copying.set_defaults(run=run_copying)
    copying.add_argument("--weights", required=True, help="the checkpoint that `corpus` wrote")
    copying.add_argument("--output", default="results/pretrained")
    copying.add_argument("--pattern", default="2:4")
    copying.add_argument("--length", type=int, default=256)
    copying.add_argument("--rows", type=int, default=64)
    table = commands.add_parser("report")
    table.set_defaults(run=run_report)
    table.add_argument("results", nargs="+", help="files of rows that `work` wrote")
    table.add_argument("--answers", nargs="*", default=[], help="files of answers that `work` wrote")
    table.add_argument("--copying", nargs="*", default=[], help="files that `copying` wrote")
    return parser


def _add_texts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that make texts."""
    corpus = commands.add_parser("corpus")
    corpus.set_defaults(run=run_corpus)
    corpus.add_argument("--weights", required=True, help="a GGUF file or a Hugging Face folder")
    corpus.add_argument("--output", default="data/pretrained")
    corpus.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), help="none: the model alone")
    corpus.add_argument("--max_bytes", help="about how much text of each kind; like 100MB")
    corpus.add_argument("--folders", nargs="+", help="the folders to search; default: those of the interpreter")
    corpus.add_argument("--packages", help="a folder with wheels and source distributions to read")
    corpus.add_argument("--package_bytes", help="about how much text of each kind to take from a package; like 10MB")
    held = commands.add_parser("held_out")
    held.set_defaults(run=run_held_out)
    held.add_argument("--corpus", required=True, help="the folder that `corpus` wrote")
    held.add_argument("--output", required=True, help="the folder to carry")
    held.add_argument("--tokens", type=int, default=400_000, help="of each kind")
    asked = commands.add_parser("tasks")
    asked.set_defaults(run=run_tasks)
    asked.add_argument("--corpus", required=True, help="the folder that `held_out` wrote")
    asked.add_argument("--weights", required=True, help="the checkpoint or tokenizer that `corpus` wrote")
    asked.add_argument("--output", required=True, help="the folder of tasks to write")
    asked.add_argument("--items", type=int, default=200, help="the largest number of items of a task")
    packed = commands.add_parser("pack")
    packed.set_defaults(run=run_pack)
    packed.add_argument("--corpus", required=True, help="the folder that `corpus` wrote")
    packed.add_argument("--output", required=True, help="the folder that `held_out` wrote")
    packed.add_argument("--parts", type=int, default=2)
    packed.add_argument("--max_bytes", default="60MB", help="the largest size of a part")
    packed.add_argument("--tokens", nargs=len(KINDS), type=int, metavar=("CODE", "ENGLISH"), help="default: all")
    packed.add_argument("--preset", type=int, default=6, help="how hard to compress, from 0 to 9; 2 is much faster")


def _add_work(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser("work")
    train.set_defaults(run=run_work)
    train.add_argument("--weights", required=True, help="the checkpoint that `corpus` wrote")
    train.add_argument("--corpus", default="data/pretrained")
    train.add_argument("--output", default="results/pretrained")
    train.add_argument("--seconds", type=float, default=math.inf)
    train.add_argument("--until", type=float, help="in place of --seconds: a time, in seconds since 1970")
    train.add_argument("--workers", type=int, default=1, help="processes that work in the folder")
    train.add_argument("--tokens", type=int, help="tokens of a long trial; default: what the time allows")
    train.add_argument("--short_tokens", type=int, default=SHORT)
    train.add_argument("--length", type=int, default=1024)
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--held_out_rows", type=int, default=64)
    trials = train.add_mutually_exclusive_group()
    trials.add_argument("--trials", help="a JSON file with other trials: a list of the fields of Trial")
    trials.add_argument("--lengthy", nargs=2, type=int, metavar=("LONGEST", "TOKENS"), help="do the long comparison")
    trials.add_argument(
        "--options", nargs="+", type=int, metavar="TOKENS",
        help="compare options of the distillation; a second number is for longer trials of learned scales",
    )  # fmt: skip
    train.add_argument("--only", nargs="+", help="of the given trials only those whose names hold one of these texts")
    train.add_argument(
        "--later", type=float, default=0.0,
        help="seconds of a later call on this machine: a given trial that fits into both calls begins in this one",
    )  # fmt: skip
    train.add_argument("--expected_speed", type=float, default=1e5, help="tokens a second, until some are measured")
    train.add_argument(
        "--together", action="store_true",
        help="under torchrun: each process does one of the first trials, at the same time, and they share a teacher",
    )  # fmt: skip
    train.add_argument("--tasks", help="a folder that the command `tasks` wrote")
    _add_computing(train)


def _add_speed(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    speed = commands.add_parser("speed")
    speed.set_defaults(run=run_speed)
    speed.add_argument("--weights", help="the checkpoint that `corpus` wrote; default: random weights of SmolLM2-135M")
    speed.add_argument("--output", default="results/pretrained")
    speed.add_argument("--ways", nargs="+", choices=list(WAYS), default=["both"])
    speed.add_argument("--patterns", nargs="+", default=["2:4"])
    speed.add_argument("--batches", nargs="+", type=int, default=[16, 32, 64])
    speed.add_argument("--length", type=int, default=1024)
    speed.add_argument("--steps", type=int, default=12, help="timed steps before and after the end of the warm-up")
    speed.add_argument("--seconds", type=float, default=math.inf)
    speed.add_argument("--top", type=int, default=0, help="how many of the longest kernels to write")
    _add_computing(speed)


def _add_computing(command: argparse.ArgumentParser) -> None:
    """Add the options of how steps are computed."""
    command.add_argument("--gradients", default="bf16")
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    command.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs, on a GPU")


def main() -> None:
    """Run the command of the command line."""
    parser = make_parser()
    args = parser.parse_args()
    try:
        args.run(args)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
