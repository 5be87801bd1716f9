"""``sbn inspect``: what a conversion would do to a model. :mod:`sbn_lightning.evaluation.inspection` does the work."""

from __future__ import annotations

import json as json_text
import sys
from typing import Any, Literal

from sbn_lightning.core.errors import ConfigError, DataError


def inspect(
    checkpoint: str,
    data: str | list[str],
    pattern: str = "6:8",
    activation_bits: int | None = 8,
    gamma_over: Literal["dense", "kept", "masked", "nonzero"] = "dense",
    by: list[Literal["whole", "parts", "blocks", "cumulative"]] | None = None,
    max_tokens: int = 1024,
    window: int = 128,
    split: str = "val",
    json: bool = False,
    tokenizer: str | None = None,
    device: str = "auto",
) -> None:
    """Show what a conversion to ternary N:M weights does to a model before training: as a whole, by part and by block.

    The losses are for comparison with each other: they are means over short windows, each from its own first token.
    `sbn evaluate` has the perplexity that one reports. A model that is ternary already is inspected as the dense model
    that its latent weights are.

    Args:
        checkpoint: A .ckpt, the folder of a run, a Hugging Face folder, or a GGUF file.
        data: A text file in UTF-8 or several, or a folder that `prepare` wrote.
        pattern: The pattern N:M to convert to.
        activation_bits: The bits of a quantised token: 8, 4, or null.
        gamma_over: The weights whose mean magnitude is gamma.
        by: The tables to make: whole (all layers), parts (q, k, v, o, gate, up, down, each alone; a model of
            transformers has its own names for them), blocks (each alone), cumulative (the first blocks). The default is
            all four.
        max_tokens: How many tokens to score at most, from the beginning.
        window: How many tokens the model sees at a time.
        split: The split of a folder: val or train.
        json: Print JSON in place of tables.
        tokenizer: A tokenizer.json, or a folder that holds one, if there is none with the model.
        device: "auto" takes a GPU if there is one; or cpu, cuda, cuda:1.

    Raises:
        ConfigError: If an option cannot work, or the model has no latent weights.
        DataError: If the model or the text cannot be read, or the text is too short.
    """
    for option, number, least in (("max_tokens", max_tokens, 1), ("window", window, 1)):
        if number < least:
            raise ConfigError(f"{option}={number} is below {least}")
    import torch

    from sbn_lightning.evaluation.inspection import SECTIONS, Inspection, as_records, as_tables, dense_twin
    from sbn_lightning.evaluation.texts import text_of
    from sbn_lightning.integrations.opening import open_any
    from sbn_lightning.models.transformer import TernaryTransformer
    from sbn_lightning.sparsity.config import SparsityConfig

    sparsity = SparsityConfig(pattern, activation_bits=activation_bits, gamma_over=gamma_over)
    loaded = open_any(checkpoint, tokenizer=tokenizer, device=device, dtype="float32", backend="reference")
    inspect_with: Any = Inspection
    if isinstance(loaded.model, TernaryTransformer):
        model: Any = dense_twin(loaded.model)
    else:
        from sbn_lightning.integrations.huggingface.inspection import NetworkInspection, dense_network

        model, inspect_with = dense_network(loaded.model), NetworkInspection
    window = min(window, loaded.config.max_sequence_length)
    wanted = max_tokens + -(-max_tokens // window)  # A row of tokens has one more token than it has targets.
    text = text_of(data, loaded, split, wanted)
    count = len(text.tokens) // (window + 1)
    if not count:
        raise DataError(f"{text.name} has {len(text.tokens)} tokens, fewer than a window of {window} and one more")
    rows = torch.from_numpy(text.tokens[: count * (window + 1)].astype("int64")).view(count, -1)
    if int(rows.max()) >= loaded.config.vocab_size:
        raise DataError(f"{text.name} has token ids beyond the model's vocab_size={loaded.config.vocab_size}")
    results = []
    with torch.inference_mode():
        inspection = inspect_with(model, rows.to(model.embed.weight.device), sparsity)
        for one in inspection.measure(by or SECTIONS):
            results.append(one)
            if sys.stderr.isatty():
                print(f"{one.section}: {one.converted} {one.variant or ''} {one.loss:.3f}", file=sys.stderr)
    if json:
        about = {"model": str(loaded.path), "text": text.name, "tokens": count * window, "window": window}
        print(json_text.dumps(about | {"conversion": sparsity.to_dict(), "results": as_records(results)}, indent=2))
        return
    print(f"{loaded.path} to {sparsity.pattern}, on {count * window} tokens of {text.name}, {window} at a time\n")
    print(as_tables(results))
