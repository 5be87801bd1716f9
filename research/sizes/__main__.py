"""The study of sizes: train its models, measure how fast steps are, and write the report.

    python -m research.sizes corpus --output data/sizes
    python -m research.sizes work --corpus data/sizes --output results/sizes --seconds 600 --workers 6
    python -m research.sizes bench --corpus data/sizes
    python -m research.sizes report results/sizes/results.jsonl

Several processes may work in one folder, on one GPU or on several, and may join late. Each takes the first trial of the
round that nobody has taken and that fits into its time. A trial that was cut off continues on the same machine.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from research.queue import append_row, claim, read_all_rows, read_rows
from research.sizes.rates import AT_15M, best_rates, is_complete, resolve
from research.sizes.rounds import ROUNDS
from research.sizes.train import FILE, Setting, Training
from research.sizes.trials import Trial, tokens_of
from research.training import STATE
from sbn_lightning.core.errors import ConfigError

SUFFIXES = [".py", ".md", ".rst", ".txt"]
OVERHEAD = 12.0  # seconds of a trial besides its steps
PATIENCE = 150.0  # seconds that a worker waits for the sweep of learning rates
# About the tokens a second of an H200 for each size, until rows say more.
ALONE = {"2M": 12e6, "5M": 5.4e6, "9M": 4e6, "15M": 3.1e6, "31M": 1.9e6, "63M": 0.95e6, "150M": 0.38e6}
Row = dict[str, Any]


def make_corpus(output: str, folders: Sequence[str], max_bytes: str | None) -> None:
    """Write code and English of this machine's packages, and of ``folders``, as tokens of a BPE of 8,192."""
    from research.reproduce.corpus import interpreter_folders, reproduce_corpus

    roots = [*interpreter_folders(), "/usr/share/doc", *folders]
    reproduce_corpus(
        [root for root in roots if os.path.isdir(root)],
        output,
        suffix=SUFFIXES,
        val_fraction=0.04,
        max_bytes=max_bytes,
        num_workers=min(48, os.cpu_count() or 1),
    )


def read_setting(args: argparse.Namespace) -> Setting:
    """Return the setting of the command line, with the text on the device."""
    from sbn_lightning.evaluation.texts import text_of_folder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    if args.corpus is None:
        train = torch.randint(8192, (2**21,), device=device, dtype=torch.int32)
        held_out = train
    else:
        texts = [text_of_folder(str(Path(args.corpus, "tokens")), split, None).tokens for split in ("train", "val")]
        train, held_out = (torch.from_numpy(tokens.astype("int32")).to(device) for tokens in texts)
    return Setting(
        train, held_out, Path(args.output), device, length=args.length, batch=args.batch, compile=args.compile,
        graphs=args.graphs, gradients=args.gradients, backend=args.backend, processes=args.workers,
    )  # fmt: skip


def work(setting: Setting, trials: Sequence[Trial], seconds: float) -> None:
    """Do one trial after the other until the time is up or nothing is left that fits.

    Trials whose learning rate comes from the rule wait until the sweep is done, or for :data:`PATIENCE` seconds.

    Args:
        setting: What all trials share.
        trials: The trials, the most valuable first.
        seconds: The number of seconds until a running trial is saved.
    """
    begun = time.monotonic()
    left_out: set[str] = set()
    while time.monotonic() < begun + seconds:
        rows = read_rows(setting.output / FILE)
        known = all(trial.lr for trial in trials) or is_complete(rows) or time.monotonic() > begun + PATIENCE
        ready = [resolve(trial, best_rates(rows)) for trial in trials if trial.lr or known]
        done = {row["name"] for row in rows} | left_out
        if any(_try(trial, setting, begun + seconds, rows, left_out) for trial in ready if trial.name not in done):
            continue
        if known:
            return
        time.sleep(1.0)


def _try(trial: Trial, setting: Setting, deadline: float, rows: Sequence[Row], left_out: set[str]) -> bool:
    """Do a trial unless somebody else does it or it does not fit. Return whether the time was spent.

    A failure does not end the others. The trial is left out from then on.
    """
    started = (setting.output / "states" / trial.name / STATE).is_file()
    if not started and deadline - time.monotonic() < OVERHEAD + trial.tokens / speed(trial, rows, setting.processes):
        return False
    with claim(setting.output / "claims" / trial.name) as mine:
        # Another process may have ended the trial just now.
        if not mine or trial.name in {row["name"] for row in read_rows(setting.output / FILE)}:
            return False
        since = time.monotonic()
        try:
            said = "done" if Training(trial, setting).run(deadline) else "saved"
        except Exception:
            traceback.print_exc()
            left_out.add(trial.name)
            said = "failed"
        print(f"{time.strftime('%H:%M:%S')} {trial.name} {said}, {time.monotonic() - since:.0f} s", flush=True)
        gc.collect()
        torch.compiler.reset()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def speed(trial: Trial, rows: Sequence[Row], processes: int) -> float:
    """Return about how many tokens a second a trial will have.

    Args:
        trial: The trial.
        rows: What is done. Trials of the same size count, if as many processes shared the GPU.
        processes: The number of processes that share the GPU.
    """
    alike = [row for row in rows if row["trial"]["size"] == trial.size and row["processes"] == processes]
    found = sorted(row["tokens_per_second"] for row in alike if row["tokens_per_second"] > 0)
    return float(found[len(found) // 2]) if found else ALONE[trial.size] / processes


# What `bench` measures: size, family, pattern, gradients, graphs, backend.
BENCHES = [
    ("15M", "ternary", "2:4", "bf16", True, "auto"),
    ("15M", "bf16", "8:8", "bf16", True, "auto"),
    ("2M", "ternary", "2:4", "bf16", True, "auto"),
    ("15M", "ternary", "2:4", "int8", True, "auto"),
    ("2M", "bf16", "2:4", "bf16", True, "auto"),
    ("63M", "ternary", "2:4", "bf16", True, "auto"),
    ("15M", "ternary", "2:4", "bf16", False, "auto"),
    ("5M", "ternary", "8:8", "bf16", True, "auto"),
    ("15M", "ternary", "2:4", "bf16", True, "reference"),
    ("63M", "bf16", "8:8", "bf16", True, "auto"),
    ("31M", "ternary", "2:4", "bf16", True, "auto"),
    ("2M", "ternary", "2:4", "bf16", True, "reference"),
    ("150M", "ternary", "2:4", "bf16", True, "auto"),
    ("150M", "bf16", "8:8", "bf16", True, "auto"),
]
BENCHED = list(dict.fromkeys(case[0] for case in BENCHES))


def bench(setting: Setting, seconds: float, steps: int, sizes: Sequence[str] | None = None) -> None:
    """Measure the time of a step for some models, one after the other on a GPU of their own.

    Args:
        setting: What all models share.
        seconds: The number of seconds after which no further model is begun.
        steps: The number of timed steps of each model.
        sizes: The sizes to measure; None for all.
    """
    deadline = time.monotonic() + seconds
    for size, family, pattern, gradients, graphs, backend in BENCHES:
        if sizes is not None and size not in sizes:
            continue
        if time.monotonic() > deadline:
            return
        setting.gradients, setting.graphs, setting.backend = gradients, graphs, backend
        since = time.monotonic()
        label = f"{size} {family} {pattern} gradients {gradients} graphs {graphs} backend {backend}"
        try:
            trial = Trial(size, family, pattern, tokens_of(size, 20), AT_15M[family])  # type: ignore[arg-type, index]
            training = Training(trial, setting)
            training.advance(10)
            warm = time.monotonic() - since
            training.advance(steps)
            each = training.seconds / training.timed
            row = {
                "what": label,
                "ms": round(1000 * each, 2),
                "tokens_per_second": round(setting.tokens_of_step / each),
                "until_the_tenth_step": round(warm, 1),
            }
            append_row(setting.output / "bench.jsonl", row)
            print(row, flush=True)
        except Exception:
            print(f"{label} failed", flush=True)
            traceback.print_exc()
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("--output", default="data/sizes")
    corpus.add_argument("--folders", nargs="*", default=[], help="more folders to search")
    corpus.add_argument("--max_bytes")
    for name in ("work", "bench"):
        command = commands.add_parser(name)
        command.add_argument("--corpus", help="the folder that `corpus` wrote; without it, random tokens")
        command.add_argument("--output", default="results/sizes")
        command.add_argument("--seconds", type=float, default=math.inf)
        command.add_argument("--workers", type=int, default=1, help="the processes on this GPU")
        command.add_argument("--length", type=int, default=512)
        command.add_argument("--batch", type=int, default=64)
        command.add_argument("--gradients", default="bf16")
        command.add_argument(
            "--backend", help="the backend of ternary layers; default: sparse for 2:4, int8 for the others"
        )
        command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
        command.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    commands.choices["work"].add_argument("--until", type=float, help="instead of --seconds: a time in Unix seconds")
    commands.choices["work"].add_argument("--round", nargs="+", choices=list(ROUNDS), default=["main"])
    commands.choices["work"].add_argument("--names", nargs="*", help="the trials to do; default: all of the round")
    commands.choices["work"].add_argument(
        "--shrink_tokens", type=int, default=1, help="for a trial run: divides the tokens of each trial"
    )
    commands.choices["bench"].add_argument("--steps", type=int, default=60)
    commands.choices["bench"].add_argument("--sizes", nargs="+", choices=BENCHED, help="default: all of them")
    table = commands.add_parser("report")
    table.add_argument("results", nargs="+", help="files of rows that `work` wrote")
    table.add_argument("--output", default="docs/sizes.md", help="the page to write; what stands above its mark stays")
    table.add_argument("--images", default="docs/images")
    args = parser.parse_args()
    if args.command == "report":
        from research.sizes.report import write_report

        try:
            rows = read_all_rows(args.results)
        except ConfigError as error:
            parser.error(str(error))
        write_report(rows, Path(args.output), Path(args.images))
        return
    if args.command == "corpus":
        make_corpus(args.output, args.folders, args.max_bytes)
        return
    setting = read_setting(args)
    print(f"{len(setting.train):,} tokens to train on, {len(setting.held_out):,} held out", flush=True)
    if args.command == "bench":
        bench(setting, args.seconds, args.steps, args.sizes)
        return
    wanted = [one for name in args.round for one in ROUNDS[name]]
    chosen = [one for one in wanted if args.names is None or one.name in args.names]
    chosen = [replace(one, tokens=one.tokens // args.shrink_tokens) for one in chosen]
    # Imports and the corpus may have taken a while, so a time is safer than a number of seconds.
    work(setting, chosen, args.seconds if args.until is None else args.until - time.time())


if __name__ == "__main__":
    main()
