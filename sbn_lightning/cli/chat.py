"""``sbn chat``: a conversation with a chat model in the terminal."""

from __future__ import annotations

from typing import Any, Literal

from sbn_lightning.core.text import read_text


def chat(
    checkpoint: str,
    system: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    speed: bool = False,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    backend: Literal["auto", "reference", "int8", "sparse"] = "auto",
    compile: bool = False,
    head_bits: Literal[8, 16] = 16,
) -> None:
    """Talk with a chat model in the terminal.

    A line is a message. /reset forgets the conversation, and /quit or Ctrl-D ends. Ctrl-C stops an answer, not the
    program. A conversation that outgrows the context loses its oldest turns.

    Args:
        checkpoint: A .ckpt, the folder of a run, a packed folder, a Hugging Face folder, or a GGUF file.
        system: A message to the model that comes before the conversation.
        template: A Jinja file with a chat template, for a model that has none or in place of its own.
        max_new_tokens: The largest number of tokens of an answer.
        temperature: 0 takes the most likely token; 1 draws from the model's distribution.
        top_p: A probability. Tokens are drawn from the most likely ones whose probabilities sum to this value.
        top_k: The number of most likely tokens to draw from. By default there is no limit.
        seed: The seed of the draws of the first answer. The second answer has the seed after it, and so on.
        max_length: The number of tokens of the context. The default is the model's own, at most 4096.
        speed: Whether to print the speed of each answer to stderr.
        tokenizer: A tokenizer.json, or a folder that holds one, if there is none with the model.
        device: "auto" takes a GPU if there is one; or cpu, cuda, cuda:1.
        dtype: The dtype of everything but ternary weights; "auto" is bfloat16 on a GPU and float32 on a CPU.
        backend: The kernels for ternary layers. "auto" measures on a GPU, and is the reference on a CPU.
        compile: Whether to compile blocks with torch.compile. The start is slower, and steps on a GPU are faster.
        head_bits: 8 rounds the rows of the head to 8 bits. Steps read less memory, and the logits move a little.
    """
    written = None if template is None else read_text(template, "template")

    from sbn_lightning.cli.terminal import talk
    from sbn_lightning.inference.conversation import Conversation
    from sbn_lightning.inference.generator import Generator
    from sbn_lightning.inference.head import use_head
    from sbn_lightning.inference.request import Limits
    from sbn_lightning.integrations.opening import open_any

    limits: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
    }
    Limits(seed=seed, **limits)  # A bad value must not wait for the first message.
    opened = open_any(checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, backend=backend, compile=compile)
    use_head(opened.model, head_bits)
    with Generator(opened, batch_size=1, max_length=max_length, keep_prefixes=True) as generator:
        conversation = Conversation(generator, opened, system=system, template=written)
        talk(conversation, generator, limits, seed, speed=speed)
