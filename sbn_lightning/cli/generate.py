"""``sbn generate``: text in, text out."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import replace
from typing import Literal

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.text import read_text


def generate_text(
    checkpoint: str,
    prompt: str | list[str] | None = None,
    prompts_file: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: str | list[str] | None = None,
    stop_string: str | list[str] | None = None,
    stream: bool = True,
    json: bool = False,
    batch_size: int = 64,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    backend: Literal["auto", "reference", "int8", "sparse"] = "auto",
    compile: bool = False,
    chat: bool = False,
    prefill_chunk: int = 2048,
    head_bits: Literal[8, 16] = 16,
    decode_step: Literal["graph", "persistent", "auto"] = "auto",
) -> None:
    """Continue prompts with a trained model.

    The text of a single prompt is printed as it is generated. Several prompts are printed in blocks. The speed goes to
    stderr.

    Args:
        checkpoint: A .ckpt, the folder of a run, a packed folder, a Hugging Face folder, or a GGUF file.
        prompt: The text to continue; more than one with --prompt again, or as a JSON list. "" begins a new document.
        prompts_file: A file with prompts: one a line, or a JSON list in a file that ends in .json.
        max_new_tokens: The largest number of tokens to add to each prompt.
        temperature: 0 takes the most likely token; 1 draws from the model's distribution.
        top_p: A probability. Tokens are drawn from the most likely ones whose probabilities sum to this value.
        top_k: The number of most likely tokens to draw from. By default there is no limit.
        seed: The seed of the draws. The second prompt has the seed after it, and so on.
        stop_token: Special tokens that end a text. The default is the tokens that the model's own config names. If the
            config names none, it is the end-of-document and end-of-turn tokens of the tokenizer.
        stop_string: Strings that end a text. They are not printed.
        stream: Whether to print the text of a single prompt while it is generated.
        json: Whether to print a JSON list. An entry has the prompt, the text, the number of tokens and what ended it.
        batch_size: How many prompts run at a time.
        tokenizer: A tokenizer.json, or a folder that holds one, if there is none with the model.
        device: "auto" takes a GPU if there is one; or cpu, cuda, cuda:1.
        dtype: The dtype of everything but ternary weights; "auto" is bfloat16 on a GPU and float32 on a CPU.
        backend: The kernels for ternary layers. "auto" measures on a GPU, and is the reference on a CPU.
        compile: Whether to compile blocks with torch.compile. The start is slower, and steps on a GPU are faster.
        chat: Whether prompts are messages to a chat model. They are then written with the model's chat template.
        prefill_chunk: The largest number of prompt tokens that are read at a time. A smaller number takes less memory.
        head_bits: 8 rounds the rows of the head to 8 bits. Steps read less memory, and the logits move a little.
        decode_step: "persistent" computes a whole decode step as one kernel, on Hopper GPUs only. "graph" runs the
            layers of the model. "auto" measures which is faster; the choice is printed to stderr.
    """
    prompts = _prompts(prompt, prompts_file)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is below 1")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed={seed} is outside 0 to 2^63 - 1")

    if temperature == 0 and (top_p != 1 or top_k not in (None, 1)):
        print(
            "note: top_p and top_k have no effect at temperature 0, where the most likely token is taken; pass "
            "--temperature 1",
            file=sys.stderr,
        )
    strings = [stop_string] if isinstance(stop_string, str) else list(stop_string or [])

    from sbn_lightning.inference.head import use_head
    from sbn_lightning.inference.prompts import encode_prompt, stop_ids
    from sbn_lightning.inference.request import Limits
    from sbn_lightning.integrations.opening import open_any

    limits = Limits(max_new_tokens, temperature, top_p, top_k, seed, strings)
    opened = open_any(checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, backend=backend, compile=compile)
    use_head(opened.model, head_bits)
    opened.need_tokenizer()
    limits = replace(limits, stop_tokens=sorted(stop_ids(opened, stop_token)))
    ids = [encode_prompt(opened, text, chat=chat) for text in prompts]
    limit = opened.config.max_sequence_length
    # All prompts are checked before the first one runs, so that a bad prompt does not lose earlier results.
    for i, given in enumerate(ids, start=1):
        if len(given) >= limit:
            raise ConfigError(
                f"prompt {i} of {len(ids)} has {len(given)} tokens, which leaves no room in the model's context of "
                f"{limit} (max_sequence_length): shorten it"
            )

    from sbn_lightning.cli.continue_prompts import continue_prompts

    continue_prompts(
        opened,
        prompts,
        ids,
        limits,
        batch_size=batch_size,
        prefill_chunk=prefill_chunk,
        decode_step=decode_step,
        stream=stream,
        json=json,
    )


def _prompts(prompt: str | list[str] | None, prompts_file: str | None) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if prompts_file is not None:
        text = read_text(prompts_file, "prompts_file")
        prompts += _listed(text, prompts_file) if prompts_file.endswith(".json") else _lines(text)
    if not prompts:
        raise ConfigError("there is no prompt; pass --prompt TEXT or --prompts_file FILE")
    for i, text in enumerate(prompts, start=1):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # Python marks bytes of an argument that are not UTF-8.
            raise ConfigError(f"prompt {i} of {len(prompts)} is not UTF-8: {error.reason}") from error
    return prompts


def _lines(text: str) -> list[str]:
    # splitlines() would also cut at a form feed and at U+2028, in the middle of a prompt.
    return text.removesuffix("\n").split("\n") if text else []


def _listed(text: str, file: str) -> list[str]:
    try:
        values = json_format.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"prompts_file {file} is not JSON: {error}") from error
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"prompts_file {file} is not a JSON list of strings")
    return values
