"""Show a model of this project to the lm-evaluation-harness (EleutherAI), under the name ``sbn_lightning``.

From Python: ``lm_eval.simple_evaluate(model=HarnessModel(checkpoint), tasks=[...])``. From the command line:
``sbn evaluate --tasks``, or the harness's own command with all its options, started by this module::

    python -m sbn_lightning.evaluation.harness run --model sbn_lightning --model_args checkpoint=DIR --device cpu ...

The harness looks a model's name up in a registry. Only this module adds the name, so the plain ``lm-eval`` command does
not know the name. The harness always passes a device, and takes a GPU if no ``--device`` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import find_eos, vocab_size_of
from sbn_lightning.evaluation.scoring import score_ends
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference.loop import generate
from sbn_lightning.inference.opening import BackendName, DTypeName, open_model
from sbn_lightning.inference.sampling import Sampling


@register_model("sbn_lightning")
class HarnessModel(TemplateLM):
    """Score and continue texts for the harness.

    Args:
        checkpoint: A model in any format that ``sbn evaluate`` reads, or a loaded model.
        batch_size: The number of sequences at a time.
        max_length: The number of tokens that the model sees at most; its ``max_sequence_length`` if not given.
        max_gen_toks: The number of new tokens, for tasks that do not say how many.
        add_special_tokens: Whether the tokenizer adds special tokens, such as one that begins a text.
        device: The device, as for ``sbn evaluate``.
        dtype: The dtype, as for ``sbn evaluate``.
        backend: The backend, as for ``sbn evaluate``.
        tokenizer: A ``tokenizer.json`` or a folder with one, if there is none with the model.
        max_batch_size: An argument that the harness passes; not used.

    Raises:
        ConfigError: If an option is out of range.
        DataError: If there is no such model, or no tokenizer with the model.
    """

    def __init__(
        self,
        checkpoint: str | LoadedModel,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_special_tokens: bool = False,
        device: str = "auto",
        dtype: DTypeName = "auto",
        backend: BackendName = "auto",
        tokenizer: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Load the model, unless it was loaded before."""
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r} is not a number from 1 upwards")
        if isinstance(checkpoint, str):
            checkpoint = open_model(checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, backend=backend)
        self.loaded = checkpoint
        self.model = checkpoint.model
        self.tokenizer = checkpoint.need_tokenizer()
        if (tokens := vocab_size_of(self.tokenizer)) > checkpoint.config.vocab_size:
            raise ConfigError(
                f"{checkpoint.tokenizer_path} has {tokens} tokens, the model's vocab_size is "
                f"{checkpoint.config.vocab_size}; give the model's own with tokenizer"
            )
        limit = checkpoint.config.max_sequence_length
        self.max_length = limit if max_length is None else max_length
        if not 2 <= self.max_length <= limit:
            raise ConfigError(f"max_length={max_length} is outside 2 to the model's max_sequence_length={limit}")
        self.batch_size = int(batch_size)
        self.max_gen_toks = max_gen_toks
        self.add_special_tokens = add_special_tokens
        self._device = self.model.embed.weight.device
        # The seed of the next text. With one seed for all texts, equal prompts would draw alike.
        self._texts_drawn = 0

    @property
    def eot_token_id(self) -> int:
        """The id of the token that ends a document."""
        return find_eos(self.tokenizer, None)[1]

    @property
    def tokenizer_name(self) -> str:
        """The file of the tokenizer, for the harness's cache of prompts."""
        return str(self.loaded.tokenizer_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Turn a text into token ids."""
        special = self.add_special_tokens if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special).ids
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows: list[list[int]] = []
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens: 1 to max_length={self.max_length} can be scored"
                )
            # The last token is predicted and not read, so one more fits. A text that is too long loses its beginning.
            rows.append((context + continuation)[-(self.max_length + 1) :])
        results: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        # Rows are sorted by length, longest first. Neighbours then need little padding, and if memory does not suffice,
        # the first batch shows it.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with tqdm(total=len(rows), desc="loglikelihood", disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                scores = score_ends(self.model, [rows[i] for i in batch], [len(requests[i][2]) for i in batch])
                for i, result in zip(batch, scores, strict=True):
                    results[i] = result
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                bar.update(len(batch))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-likelihood of whole texts. Their first token follows the end-of-document token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to the first of a task's stop strings, which is left out."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for members in groups.values():
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    contexts = [requests[i].args[0] for i in batch]
                    for i, text in zip(batch, self._continue(contexts, requests[batch[0]].args[1]), strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return texts

    def _continue(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        new = next(
            (options[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in options), self.max_gen_toks
        )
        room = self.max_length - int(new)
        if room < 1:
            raise ConfigError(
                f"a task asks for {new} new tokens, the model's max_length={self.max_length} leaves no context"
            )
        prompts = [self.tok_encode(context)[-room:] or [self.eot_token_id] for context in contexts]
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0
        sampling = Sampling(temperature, float(options.get("top_p", 1.0)), options.get("top_k") or None)
        rows = generate(
            self.model,
            prompts,
            max_new_tokens=int(new),
            sampling=sampling,
            seed=self._texts_drawn,
            stop_tokens=[self.eot_token_id],
        )
        self._texts_drawn += len(prompts)
        until = options.get("until") or []
        return [_cut(self.tokenizer.decode(row), [until] if isinstance(until, str) else until) for row in rows]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
