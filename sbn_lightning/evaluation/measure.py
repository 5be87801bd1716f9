"""Measure a model for ``sbn evaluate``: perplexity, a report of the layers, tasks of the lm-evaluation-harness.

Results are printed and saved part by part. A task that fails does not take the perplexity with it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from sbn_lightning.checkpoints.tokenizers import difference
from sbn_lightning.core.errors import ConfigError, DataError, SBNError
from sbn_lightning.core.files import write_text
from sbn_lightning.data.folders import load_meta, load_tokenizer_of
from sbn_lightning.evaluation.layer_report import as_table, layer_reports
from sbn_lightning.evaluation.sliding import perplexity
from sbn_lightning.evaluation.texts import Text, text_of_files, text_of_folder
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference.head import HeadBits, use_head
from sbn_lightning.inference.opening import BackendName, DTypeName, open_model

HEAD_TOKENS = 64  # How many tokens show the error of an 8-bit head; the logits of a whole window would take memory.


def measure(
    checkpoint: str | LoadedModel,
    *,
    data: str | None,
    files: list[str],
    split: str,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    tasks: list[str],
    tasks_folder: str | None,
    num_fewshot: int | None,
    limit: int | None,
    output: str | None,
    batch_size: int,
    tokenizer: str | None,
    device: str,
    dtype: DTypeName,
    backend: BackendName,
    head_bits: HeadBits = 16,
) -> dict[str, Any]:
    """Measure a model; the arguments are those of :func:`~sbn_lightning.cli.evaluate.evaluate`.

    In place of a path, ``checkpoint`` can be a model that is loaded and ready to run.

    Returns:
        The results, as they are written to ``output``.
    """
    if isinstance(checkpoint, str):
        checkpoint = open_model(checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, backend=backend)
    loaded = checkpoint
    results: dict[str, Any] = {
        "model": {"path": str(loaded.path), "format": loaded.format, "config": loaded.config.to_dict()},
        "device": str(loaded.model.embed.weight.device),
        "torch": torch.__version__,
    }
    source = _text(loaded, data, files, split, max_tokens) if data is not None or files else None
    if head_bits != 16:
        results["head"] = _use_head(loaded, head_bits, source, window, stride, max_tokens, batch_size)
    if source is not None:
        results["perplexity"] = _perplexity(loaded, source, window, stride, max_tokens, batch_size)
        if "head" in results:
            before = results["head"]["perplexity_before"]
            results["head"]["perplexity_change"] = results["perplexity"]["perplexity"] / before - 1
            print(_lines(results["head"]), end="\n\n")
        print(_lines(results["perplexity"]), end="\n\n")
        _save(output, results)
    elif not tasks:
        print("no perplexity without a text: give --data FOLDER (of `prepare`) or --text FILE", end="\n\n")
    reports = layer_reports(loaded.model)
    results["layers"] = [vars(report) | {"follows_pattern": report.follows_pattern} for report in reports]
    print(as_table(reports))
    if any(report.natural is None for report in reports):
        print("natural, enforced: packed weights do not tell zeros of the mask from rounded ones; the checkpoint does")
    _save(output, results)
    if tasks:
        results["tasks"] = _run_tasks(loaded, tasks, tasks_folder, num_fewshot, limit, batch_size)
        _save(output, results)
    return results


run = measure  # Version 0.1 exported the function under this name.


def _text(loaded: LoadedModel, data: str | None, files: list[str], split: str, max_tokens: int | None) -> Text:
    """Read the text whose perplexity is wanted."""
    if data is None:
        return text_of_files(files, loaded.need_tokenizer(), max_tokens)
    source = text_of_folder(data, split, max_tokens)
    _check_tokenizer(loaded, data)
    return source


def _use_head(
    loaded: LoadedModel,
    head_bits: HeadBits,
    source: Text | None,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Give the model a head of fewer bits, and measure the model as it was before and the error of the logits."""
    if source is None:
        use_head(loaded.model, head_bits)
        return {"head_bits": head_bits}
    before = _perplexity(loaded, source, window, stride, max_tokens, batch_size)
    tokens = torch.from_numpy(source.tokens[: before["window"]].astype("int64")).unsqueeze(0)
    with torch.no_grad():
        hidden = loaded.model.hidden(tokens.to(loaded.model.embed.weight.device))[0, -HEAD_TOKENS:]
        expected = loaded.model.lm_head(hidden).float()
        use_head(loaded.model, head_bits)
        error = (loaded.model.lm_head(hidden).float() - expected).square().mean().sqrt()
    return {
        "head_bits": head_bits,
        "logits_error": float(error / expected.square().mean().sqrt()),
        "perplexity_before": before["perplexity"],
    }


def _perplexity(
    loaded: LoadedModel,
    source: Text,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    batch_size: int,
) -> dict[str, Any]:
    if window is None:
        window = min(loaded.config.max_sequence_length, 1024)
    result = perplexity(
        loaded.model,
        source.tokens,
        window=window,
        stride=max(1, window // 2) if stride is None else stride,
        batch_size=batch_size,
        progress=True,
    )
    values = {
        "text": source.name,
        "perplexity": result.perplexity,
        "loss": result.loss,
        "bits_per_byte": None if source.bytes is None else result.bits_per_byte(source.bytes),
        "tokens": result.tokens,
        "scored": result.scored,
        "bytes": source.bytes,
        "window": result.window,
        "stride": result.stride,
    }
    if source.bytes is None:
        values["note"] = (
            f"bits_per_byte is not known: max_tokens={max_tokens} cut the text, and how many bytes were read is unknown"
        )
    return values


def _check_tokenizer(loaded: LoadedModel, data: str) -> None:
    if loaded.tokenizer is None:  # The tokens of the folder are scored as they are.
        return
    found = difference(loaded.tokenizer, load_tokenizer_of(data), load_meta(data, None)["eos_id"])
    if found is not None:
        raise ConfigError(
            f"{loaded.path} has the tokenizer {loaded.tokenizer_path}, {data} was prepared with another one ({found}); "
            "give the text itself with --text"
        )


def _run_tasks(
    loaded: LoadedModel,
    names: list[str],
    folder: str | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from sbn_lightning.evaluation.harness import HarnessModel

    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"tasks_folder {folder} is not a folder")
    known = TaskManager(include_path=folder, include_defaults=False) if folder is not None else TaskManager()
    if folder is not None and not set(names) <= set(known.all_tasks):
        known = TaskManager(include_path=folder)
    missing = sorted(set(names) - set(known.all_tasks))
    if missing:
        raise ConfigError(
            f"no task {', '.join(missing)}; `lm-eval ls tasks` lists those there are, and see tasks_folder"
        )
    model = HarnessModel(loaded, batch_size=batch_size)
    try:
        results = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=known, num_fewshot=num_fewshot, limit=limit, log_samples=False
        )
    except SBNError:
        raise
    except Exception as error:  # The harness, datasets and task templates raise their own classes.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"tasks {', '.join(names)} failed in the lm-evaluation-harness: {reason}") from error
    print("\n" + make_table(results))
    return {name: dict(values) for name, values in results["results"].items()}


def _lines(values: dict[str, Any]) -> str:
    shown = {key: f"{value:.4f}" if isinstance(value, float) else str(value) for key, value in values.items()}
    width = max(map(len, shown))
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in shown.items())


def _save(output: str | None, results: dict[str, Any]) -> None:
    if output is not None:
        text = json.dumps(_without_nan(results), indent=2, default=str, allow_nan=False)
        try:
            write_text(output, text + "\n")
        except OSError as error:
            raise DataError(f"cannot write output {output}: {error.strerror or error}") from error


def _without_nan(value: Any) -> Any:
    """The value with None in the place of infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
