"""``sbn probe``: small tasks beyond perplexity. :mod:`sbn_lightning.evaluation.probes` has the tasks."""

from __future__ import annotations

import json as json_text
import sys
from typing import Literal

from sbn_lightning.core.errors import ConfigError, DataError


def probe(
    checkpoint: str,
    data: str | list[str] | None = None,
    tasks: list[Literal["copy", "induction", "sums", "identifiers"]] | None = None,
    length: int = 512,
    rows: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    split: str = "val",
    json: bool = False,
    tokenizer: str | None = None,
    device: str = "auto",
    backend: Literal["auto", "int8", "sparse", "reference"] = "auto",
) -> None:
    """Ask a model small tasks that perplexity does not show: copying, induction, sums of two digits, rare identifiers.

    Each number comes with its standard error over rows (+-). Log-probabilities are means over the asked tokens. Two
    models differ where their numbers differ by more than about twice the root of the summed squares of both errors.

    Args:
        checkpoint: A .ckpt, the folder of a run, a packed or a Hugging Face folder, or a GGUF file.
        data: Held-out text for `identifiers`: a text file in UTF-8 or several, or a folder that `prepare` wrote.
            Without it this task is left out.
        tasks: The tasks to ask; default: all that can be asked.
        length: The number of tokens in a row.
        rows: The number of rows of each task.
        batch_size: The number of rows that the model sees at once.
        seed: The seed of the random tokens and numbers. Compare models with equal seeds.
        split: The split of a folder: val or train.
        json: Print JSON in place of a table.
        tokenizer: A tokenizer.json, or a folder that holds one, if there is none with the model.
        device: "auto" takes a GPU if there is one; or cpu, cuda, cuda:1.
        backend: What ternary layers run on: auto, int8, sparse, reference.

    Raises:
        ConfigError: If an option cannot work.
        DataError: If the model or the text cannot be read, the text is shorter than a row, or the tokenizer is
            not the model's.
    """
    for option, number, least in (("rows", rows, 2), ("batch_size", batch_size, 1)):
        if number < least:
            raise ConfigError(f"{option}={number} is below {least}")
    if data is None and tasks is not None and "identifiers" in tasks:
        raise ConfigError("the task identifiers needs held-out text: give --data")
    import torch

    from sbn_lightning.core.tables import format_table
    from sbn_lightning.evaluation.probes import TASKS, as_records, make_tasks
    from sbn_lightning.evaluation.probes import probe as ask
    from sbn_lightning.evaluation.texts import text_of
    from sbn_lightning.integrations.opening import open_any

    loaded = open_any(checkpoint, tokenizer=tokenizer, device=device, backend=backend)
    if length > loaded.config.max_sequence_length:
        raise ConfigError(
            f"length={length} is above the model's max_sequence_length={loaded.config.max_sequence_length}"
        )
    text = None
    if data is not None:
        read = text_of(data, loaded, split, rows * length)
        if len(read.tokens) < length:
            raise DataError(f"{read.name} has {len(read.tokens)} tokens, fewer than a row of {length}")
        text = torch.from_numpy(read.tokens.astype("int64"))
    made = make_tasks(loaded.need_tokenizer(), length, rows, text, seed, tasks or TASKS)
    if (largest := max(int(task.tokens.max()) for task in made)) >= loaded.config.vocab_size:
        raise DataError(
            f"the rows have a token id {largest}, beyond the model's vocab_size={loaded.config.vocab_size}: give the "
            "model's own tokenizer, and a text that was prepared with it"
        )
    where = loaded.model.embed.weight.device
    with torch.inference_mode():
        results = ask(lambda tokens: loaded.model(tokens.to(where)), made, batch_size)
    if left_out := sorted({task.name for task in made} - {result.task for result in results}):
        print(f"left out, because rows of {length} tokens have nothing to ask: {', '.join(left_out)}", file=sys.stderr)
    if json:
        about = {"model": str(loaded.path), "length": length, "seed": seed}
        print(json_text.dumps(about | {"results": as_records(results)}, indent=2))
        return
    header = ["task", "setting", "accuracy", "+-", "log-probability", "+-", "items", "rows"]
    cells = []
    for one in results:
        numbers = (one.accuracy, one.error, one.log_probability, one.log_probability_error)
        cells.append([one.task, one.setting, *(f"{x:.3f}" for x in numbers), str(one.items), str(one.rows)])
    print(format_table(header, cells, left=(0, 1)))
