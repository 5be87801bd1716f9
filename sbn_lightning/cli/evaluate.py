"""The command line of ``sbn evaluate``. The work is in :mod:`sbn_lightning.evaluation.measure`, which imports torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.install import how_to_install


def evaluate(
    checkpoint: str,
    data: str | None = None,
    text: str | list[str] | None = None,
    split: str = "val",
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    tasks: str | list[str] | None = None,
    tasks_folder: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    output: str | None = None,
    batch_size: int = 8,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    backend: Literal["auto", "reference", "int8", "sparse"] = "auto",
    head_bits: Literal[8, 16] = 16,
) -> dict[str, Any]:
    """Measure a model: perplexity of a text, sparsity of its layers, tasks of the lm-evaluation-harness.

    Args:
        checkpoint: A .ckpt, the folder of a run, a packed folder, a Hugging Face folder, or a GGUF file.
        data: A folder that `prepare` wrote, for the perplexity of one of its splits.
        text: Text files in UTF-8, for the perplexity of all of them, end to end.
        split: The split of data: val or train.
        window: How many tokens the model sees at a time. The default is its max_sequence_length, at most 1024.
        stride: How many tokens lie between the starts of two windows. The default is half a window.
        max_tokens: The largest number of tokens to take, from the beginning of data or text.
        tasks: Names of tasks of the lm-evaluation-harness; needs pip install -e ".[eval]".
        tasks_folder: A folder with tasks of your own, as YAML.
        num_fewshot: How many examples the prompts of tasks have. The default is each task's own number.
        limit: The largest number of examples of each task, for a quick trial.
        output: A JSON file to write the results to.
        batch_size: How many sequences run at a time.
        tokenizer: A tokenizer.json, or a folder that holds one, if there is none with the model.
        device: "auto" takes a GPU if there is one; or cpu, cuda, cuda:1.
        dtype: The dtype of everything but ternary weights; "auto" is bfloat16 on a GPU and float32 on a CPU.
        backend: The kernels for ternary layers. "auto" measures on a GPU, and is the reference on a CPU.
        head_bits: 8 rounds the rows of the head to 8 bits, and measures the error of the logits (relative RMS) and the
            change of the perplexity.

    Returns:
        The results, as they are written to ``output``.
    """
    named = [tasks] if isinstance(tasks, str) else list(tasks or [])
    if data is not None and text is not None:
        raise ConfigError("give --data or --text, not both: they are different texts")
    if named and find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs the lm-evaluation-harness: {how_to_install('eval')}")
    for option, value in {"tasks_folder": tasks_folder, "num_fewshot": num_fewshot, "limit": limit}.items():
        if value is not None and not named:
            raise ConfigError(f"{option}={value} is for tasks, and none is asked for; name them with --tasks")
    for option, number, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("max_tokens", max_tokens, 2)):
        if number is not None and number < least:
            raise ConfigError(f"{option}={number} is below {least}")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"output {output}: there is no folder {Path(output).parent}")
    if output is not None and Path(output).is_dir():
        raise ConfigError(f"output {output} is a folder; name a file in it, like {Path(output) / 'results.json'}")

    from sbn_lightning.evaluation.measure import measure
    from sbn_lightning.integrations.opening import open_any

    loaded = open_any(checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, backend=backend)
    return measure(
        loaded,
        files=[text] if isinstance(text, str) else list(text or []),
        data=data,
        split=split,
        window=window,
        stride=stride,
        max_tokens=max_tokens,
        tasks=named,
        tasks_folder=tasks_folder,
        num_fewshot=num_fewshot,
        limit=limit,
        output=output,
        batch_size=batch_size,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        backend=backend,
        head_bits=head_bits,
    )
