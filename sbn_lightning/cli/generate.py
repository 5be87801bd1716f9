"""``sbn generate``: text in, text out."""

from __future__ import annotations

import json as json_format
import sys
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
    stream: bool = True,
    json: bool = False,
    batch_size: int = 64,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    backend: Literal["auto", "reference", "int8", "sparse"] = "auto",
    compile: bool = False,
    chat: bool = False,
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
        seed: The seed of the draws.
        stop_token: Special tokens that end a text. The default is the tokens that the model's own config names. If the
            config names none, it is the end-of-document and end-of-turn tokens of the tokenizer.
        stream: Whether to print the text of a single prompt while it is generated.
        json: Whether to print a JSON list. An entry has the prompt, the text, the number of tokens and what ended it.
        batch_size: How many prompts run at a time.
        tokenizer: A tokenizer.json, or a folder that holds one, if there is none with the model.
        device: "auto" takes a GPU if there is one; or cpu, cuda, cuda:1.
        dtype: The dtype of everything but ternary weights; "auto" is bfloat16 on a GPU and float32 on a CPU.
        backend: The kernels for ternary layers. "auto" measures on a GPU, and is the reference on a CPU.
        compile: Whether to compile blocks with torch.compile. The start is slower, and steps on a GPU are faster.
        chat: Whether prompts are messages to a chat model. They are then written with the model's chat template.
    """
    prompts = _prompts(prompt, prompts_file)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is below 1")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed={seed} is outside 0 to 2^63 - 1")

    from sbn_lightning.inference.opening import open_model
    from sbn_lightning.inference.prompts import encode_prompt, stop_ids
    from sbn_lightning.inference.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k)
    opened = open_model(checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, backend=backend, compile=compile)
    words = opened.need_tokenizer()
    stops = stop_ids(opened, stop_token)
    ids = [encode_prompt(opened, text, chat=chat) for text in prompts]
    limit = opened.config.max_sequence_length
    # All prompts are checked before the first batch runs, so that a bad prompt does not lose earlier results.
    for i, given in enumerate(ids, start=1):
        if len(given) >= limit:
            raise ConfigError(
                f"prompt {i} of {len(ids)} has {len(given)} tokens, which leaves no room in the model's context of "
                f"{limit} (max_sequence_length): shorten it"
            )
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop_tokens": stops}

    from sbn_lightning.inference.loop import Speed, generate
    from sbn_lightning.inference.loop import stream as stream_ids
    from sbn_lightning.inference.text import TextStream

    speed = Speed()
    if stream and len(prompts) == 1 and not json:
        text = TextStream(words)
        for token in stream_ids(opened.model, ids[0], seed=seed, speed=speed, **options):  # type: ignore[arg-type]
            print(text.push(token), end="", flush=True)
        print(text.finish())
        print(speed, file=sys.stderr)
        return
    results = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        this = Speed()
        # Each batch has a seed of its own. With one seed for all batches, every batch would draw alike.
        new = generate(opened.model, ids[part], seed=seed + start, speed=this, **options)  # type: ignore[arg-type]
        for before, given, tokens in zip(prompts[part], ids[part], new, strict=True):
            room = min(max_new_tokens, limit - len(given))
            finish = "length" if len(tokens) == room else "stop"
            row = {"prompt": before, "text": words.decode(tokens), "tokens": len(tokens), "finish": finish}
            results.append(row)
            if not json and len(prompts) > 1:
                print(f"=== prompt {len(results)}: {before}\n{row['text']}\n", flush=True)
            elif not json:
                print(row["text"])
        speed += this
        if len(results) < len(prompts):
            print(f"{len(results)} of {len(prompts)} prompts", file=sys.stderr)
    if json:
        print(json_format.dumps(results, ensure_ascii=False, indent=2))
    print(speed, file=sys.stderr)


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
    except ValueError as error:
        raise DataError(f"prompts_file {file} is not JSON: {error}") from error
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"prompts_file {file} is not a JSON list of strings")
    return values
