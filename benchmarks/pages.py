"""Writes the benchmark pages of the documentation from ``benchmarks/results/*.csv``.

    python benchmarks/pages.py            # writes docs/benchmarks/*.md
    python benchmarks/pages.py --check    # changes nothing; fails if a page differs from its CSV

A table in the documentation is never typed by hand. The continuous integration runs ``--check``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from modes import table as modes
from render import read, render, summarize, summarize_gradients

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "benchmarks"
NOTE = "<!-- Written by `python benchmarks/pages.py` from benchmarks/results/{csv}.csv. Do not edit. -->"


@dataclass(frozen=True)
class Page:
    """One page: a title, what the table shows, and how the table is made from the CSV.

    Attributes:
        csv: The CSV's name, which is the benchmark script's name as well.
        title: The page's title.
        about: What was measured, and what a reader has to know to read the table.
        table: The function that makes the Markdown table from the CSV.
        options: Options of the benchmark command.
        file: The name of the page's file if it differs from the CSV's.
    """

    csv: str
    title: str
    about: str
    table: Callable[[Path], str]
    options: str = ""
    file: str = ""

    @property
    def name(self) -> str:
        """The name of the page's file, without its ending."""
        return self.file or self.csv

    def text(self) -> str:
        """The page as Markdown."""
        where, _, table = self.table(RESULTS / f"{self.csv}.csv").partition("\n\n")
        parts = [
            f"# {self.title}",
            NOTE.format(csv=self.csv),
            self.about,
            f"Measured on: {where}.",
            table,
            f"Measure again: `python benchmarks/{self.csv}.py{self.options}`. The command checks its results before it "
            f"measures time. All rows: `benchmarks/results/{self.csv}.csv` in the repository.",
        ]
        return "\n\n".join(parts) + "\n"


def table_of(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def decode(path: Path) -> str:
    """The newest measurement of each layer, number of tokens and variant: one row a layer and number of tokens."""
    rows, where = read(path)
    variants = ("bf16 F.linear", "decode, 2:4", "decode, dense ternary")
    newest: dict[tuple[int, int, int], dict[str, tuple[str, str]]] = {}
    for row in sorted(rows, key=lambda row: row["measured"]):
        if row["variant"] in variants:
            shape = (int(row["in"]), int(row["out"]), int(row["tokens"]))
            newest.setdefault(shape, {})[row["variant"]] = (row["us"], row["vs_bf16"])
    lines = []
    for (width, out, tokens), cells in sorted(newest.items()):
        values = [f"{float(cells[variants[0]][0]):.1f}"]
        values += [f"{float(us):.1f} ({float(ratio):.2f}x)" for us, ratio in (cells[name] for name in variants[1:])]
        lines.append([f"{width:,} to {out:,}", str(tokens), *values])
    return f"{where}\n\n" + table_of(["layer", "tokens", "bf16", "2:4", "any pattern"], lines)


YOUR_GPU = (ROOT / "benchmarks" / "your_gpu.md").read_text().strip()

ALL = (
    Page(
        "training_step",
        "What you get on your GPU",
        YOUR_GPU,
        modes,
        file="your_gpu",
    ),
    Page(
        "layer_forward",
        "One layer, forward",
        "Milliseconds of one linear layer. The bold columns are whole layers: from bfloat16 tokens to bfloat16 "
        "output, with the quantisation of the activations included. The ratio is to bf16 in the same run. The "
        "cuSPARSELt column is a product without scales. The last two columns are the products that are written for "
        "Ampere and Ada, here on Hopper: from quantised tokens to bfloat16 output. They were timed in a run of their "
        "own, the last row. Noise is about 5 %.",
        summarize,
    ),
    Page(
        "training_step",
        "Whole training steps",
        "Whole optimiser steps of 32,768 tokens in sequences of 2,048: head, loss and AdamW included. Every row but "
        '"eager" runs under `torch.compile`. Each cell shows tokens a second, the ratio to bf16 in the same run, and '
        "the peak of GPU memory. A row that was measured several times shows its newest run, so ratios in one column "
        "can belong to different bf16 runs.",
        summarize,
    ),
    Page(
        "generation",
        "Prefill and decoding",
        "Tokens a second of whole models with random weights in the loop of `sbn generate`. Prefill reads 2,048 tokens "
        "of each prompt, or the number in the row; decoding is measured after 256 tokens of context. The ratio is to "
        "bf16 in the same loop and the same run. A row can hold cells of different runs, so compare a cell with its "
        "own ratio and not with the bf16 cell beside it. One prompt and four prompts are read from a CUDA graph, "
        "and 16 prompts of the 1.5B by fused kernels without one. Other prefill of 16 and 64 prompts was measured "
        "before there were such graphs and before prompts had fused kernels. Rows of 29 November, 07:39 and later, "
        "have the attention kernel for short prompts, also those of bf16 dense. "
        '"one kernel" is the persistent decode step. An empty cell was not measured.',
        summarize,
    ),
    Page(
        "decode",
        "One layer, decoding",
        "Microseconds of one linear layer for 1 to 64 tokens, with weights read from memory and not from the cache. "
        "The ratio is to bf16 in the same run.",
        decode,
    ),
    Page(
        "decode_step",
        "A decode step as one kernel",
        "Microseconds of a whole decode step, embedding to logits, as one persistent kernel: "
        '`Decoder(step="persistent")`. The weights are random, and the choice of a token is not part of the time. '
        "There is no ratio, because BF16 was not measured in the same run. The page of prefill and decoding has "
        "ratios, with the choice of a token. `--timeline` prints where a step spends its time.",
        render,
    ),
    Page(
        "first_token",
        "The first token of a process",
        "One prompt in a fresh process, random weights. `start_up_s` is the time until the model is ready, without "
        "reading a file. `cold_ms` is the first prompt to its first token, `graph_ms` the second one, which captures "
        "the CUDA graph of its length, and `warm_ms` the median of the prompts after that. With `empty_cache` the "
        "process finds no compiled kernels on disk.",
        render,
    ),
    Page(
        "drawn_tokens",
        "The choice of a token",
        "Milliseconds of a decode step with the choice of the next token behind it, at 2:4 with random weights, after "
        "256 tokens of context. `choice_us` is what the choice takes, in microseconds: the difference to the step "
        "alone in the same run. Choices are in the CUDA graph of the step. `behind` is the draw of `temperature` "
        "launched behind the graph, and `multinomial` is `torch.multinomial` of a softmax there. The persistent step "
        "makes the greedy choice itself, also where nothing is chosen.",
        render,
    ),
    Page(
        "gradients",
        "One layer, backward",
        "Milliseconds of one layer's backward pass. Exact gradients use bfloat16 products; int8 gradients round the "
        "gradient of the layer's output stochastically. The four columns after them are the parts of the "
        "int8 backward.",
        summarize_gradients,
    ),
    Page(
        "prepare",
        "Weight preparation",
        "What happens to a weight once in each optimiser step: gamma, mask, codes and packed words. `of_copy` compares "
        "the time with one read of the weight at copy speed; `passes_of_copy` counts the two reads that a mean over "
        "the whole weight needs.",
        render,
    ),
    Page(
        "quantize",
        "Activation quantisation",
        "Quantisation of activations to int8 with one scale a token. `of_copy` is the share of the GPU's copy "
        "bandwidth.",
        render,
    ),
    Page(
        "scaling",
        "Several GPUs",
        "Training steps on two and on four GPUs, all measured on the same host within a quarter of an hour.\n\n"
        "- `sequences` is the number of sequences of 2,048 tokens in a micro-batch of one GPU, and `accumulate` the "
        "number of micro-batches in an optimiser step. `ms` is the time of the optimiser step.\n"
        "- `scaling` is the throughput of each GPU divided by the throughput of a single GPU in the same run. GPUs of "
        "one host differ: here by up to 2 %, on another host most likely by up to 5 %. GPUs that average their "
        "gradients wait for the slowest. So each GPU trains the rows `one` for itself, side by side with the others, "
        "and the slowest counts. The rows on four GPUs are from a run of their own. There the slowest GPU took "
        "466.0 ms without graphs, 469.1 with graphs, and 664.6 for the dense model.\n"
        "- `peak_gib` is the peak memory of one GPU. With CUDA graphs it is the peak of the whole run.\n"
        "- `wire_mib` is what a rank receives in a step of the smallest number of micro-batches, counted as the "
        "collectives run. Rows with CUDA graphs were not counted: they send what the rows without graphs send.\n"
        "- `same_masks` says whether all ranks had the same masks at the end.\n"
        "- `link_gb_per_s` is the bus bandwidth of an all-reduce of 1 GiB.\n"
        "- `bf16` and `float8` at the start of a strategy mean a dense model. The column `gradients` does not apply to "
        "these rows.\n"
        "- `ddp` is the strategy `sbn_ddp`, `ddp bfloat16` sums gradients in bfloat16, and `ddp in 25 mb` is torch's "
        "DDP with its usual buffers. `fsdp2 packed` is the strategy `sbn_fsdp2`, with gradients that travel in "
        "bfloat16. `fsdp2 step` sends them once a step (`reduce: step`), and `fsdp2 layer` gathers words for each "
        "block (`gather: packed_layer`).\n"
        "- `graphs` means that micro-batches were replayed as CUDA graphs. These rows are compared with one GPU that "
        "does the same.\n\n"
        "0.5B without CUDA graphs waits for the host, so these rows differ most between hosts. With int8 gradients two "
        "micro-batches took 213 to 276 ms on one GPU, 238 to 333 ms under `sbn_ddp`, and 347 to 404 ms under "
        "`sbn_fsdp2`, on several hosts.",
        render,
    ),
    Page(
        "loss_curves",
        "Losses of every backend",
        "300 steps of a small model on real text. `distance` is the mean distance of the loss from the loss of the "
        "float32 reference of the same pattern. A run with another seed shows what noise alone does.",
        render,
    ),
)


def stale() -> list[Page]:
    """The pages whose text on disk differs from what their CSV says."""
    files = ((page, PAGES / f"{page.name}.md") for page in ALL)
    return [page for page, file in files if not file.is_file() or file.read_text() != page.text()]


def main(arguments: list[str]) -> int:
    """Writes the pages, or checks them; returns the exit status."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    pages = stale()
    for page in pages:
        if arguments:
            print(f"docs/benchmarks/{page.name}.md is stale: run python benchmarks/pages.py", file=sys.stderr)
        else:
            PAGES.mkdir(parents=True, exist_ok=True)
            (PAGES / f"{page.name}.md").write_text(page.text())
            print(f"docs/benchmarks/{page.name}.md")
    return 1 if arguments and pages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
