"""The reference of the persistent step agrees with the model's own decoder; and which models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sbn_kernels.decode.step import pack, reference
from sbn_kernels.decode.step.planner import make_plan

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.assemble import cast_model
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference import Decoder, Generator, choice, generate
from sbn_lightning.inference import decoder as decoder_module
from sbn_lightning.inference.persistent import gather_weights, persistent_step, refusal
from sbn_lightning.inference.sampling import GREEDY, Sampling
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer

Caches = list[tuple[torch.Tensor, torch.Tensor]]
CASES = {"biases, tied, 2:4": {"qkv_bias": True, "pattern": "2:4"}, "untied, 6:8": {"tie_embeddings": False}}
SHAPE = {"vocab_size": 512, "d_model": 256, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ffn": 512}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_continues_as_the_decoder_does(name: str) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(**SHAPE, max_sequence_length=64, init_std=0.08, **CASES[name])
    model = TernaryTransformer(config)
    for block in model.blocks:
        if block.attention.qkv.bias is not None:
            block.attention.qkv.bias.data.normal_(0, 0.1)
    cast_model(model, torch.bfloat16)
    decoder = Decoder(model.eval().requires_grad_(False), 2, 32)
    tokens = decoder.prefill([[1, 2, 3, 4, 5], [7, 8, 9]]).argmax(-1)
    weights = gather_weights(model)
    layers = list(weights.layers)
    lengths = decoder.lengths.clone()
    caches = [(layer.keys.clone(), layer.values.clone()) for layer in decoder._layers]
    for _ in range(10):
        expected = decoder.step(tokens).float()
        logits = reference.decode_step(weights, layers, tokens, lengths, caches)
        # The decoder rounds the result of the SwiGLU to bfloat16, which changes some of the integers after it.
        assert float((logits - expected).norm() / expected.norm()) < 0.05
        # The most likely token is that of the decoder, or about as likely.
        chosen = expected.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
        assert bool((expected.max(-1).values - chosen <= 0.1 * expected.std()).all())
        lengths, tokens = lengths + 1, expected.argmax(-1)
    assert torch.equal(caches[0][0], decoder._layers[0].keys)


class ReferenceStep:
    """Takes the place of the kernel on a CPU: the reference, on the caches and lengths of the decoder."""

    made = checks = 0

    def __init__(self, model: TernaryTransformer, caches: Caches, max_length: int, lengths: torch.Tensor) -> None:
        ReferenceStep.made += 1
        self.weights, self.caches, self.max_length, self.lengths = gather_weights(model), caches, max_length, lengths
        self.layers, self.chosen = list(self.weights.layers), torch.zeros_like(lengths)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        now = self.lengths.clamp(max=self.max_length - 1)
        logits = reference.decode_step(self.weights, self.layers, tokens, now, self.caches)
        self.lengths.add_(1).clamp_(max=self.max_length)
        self.chosen.copy_(logits.argmax(-1))
        return logits

    def check(self) -> None:
        ReferenceStep.checks += 1


def test_a_decoder_steps_on_with_the_persistent_step_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ReferenceStep.made = 0
    monkeypatch.setattr(decoder_module, "persistent_step", ReferenceStep)
    monkeypatch.setattr(decoder_module, "refusal", lambda model, batch_size: None)
    torch.manual_seed(0)
    model = make(qkv_bias=True, init_std=0.08).requires_grad_(False)
    cast_model(model, torch.bfloat16)
    theirs, ours = Decoder(model, 2, 12), Decoder(model, 2, 12, step="persistent")
    for prompts in ([[1, 2, 3, 4, 5], [7, 8, 9]], [[3], [4, 5]]):
        tokens = theirs.prefill(prompts).argmax(-1)
        ours.prefill(prompts)
        for _ in range(9):  # the cache of the first sequence becomes full
            expected, logits = theirs.step(tokens).float(), ours.step(tokens)
            assert float((logits - expected).norm() / expected.norm()) < 0.05
            tokens = expected.argmax(-1)
        for sampling in (GREEDY, Sampling(0.7), Sampling(0.7, top_p=0.9)):
            ours.sampler.set_all(sampling, 5)
            start = ours.lengths - 1
            ours.lengths.copy_(start)
            logits = ours.step(tokens)
            expected = ours.sampler.choose(logits, ours.lengths)
            ours.lengths.copy_(start)
            assert torch.equal(ours.step_next(tokens), expected)
        assert torch.equal(ours.lengths, theirs.lengths)
    assert ReferenceStep.made == 2  # each prefill forgets the step, which has copies of weights
    ReferenceStep.checks = 0
    assert len(generate(model, [[1, 2]], max_new_tokens=20, decode_step="persistent")[0]) == 20
    assert ReferenceStep.checks == 1


def test_gathered_weights_are_packed() -> None:
    packed = pack(gather_weights(make(qkv_bias=True)))
    plan = make_plan(packed.shape, 1, 8)
    assert packed.words.shape == (3, plan.layer_bytes // 4)
    assert packed.norms.shape == (7, 256)
    assert {t.dtype for t in (packed.norms, packed.embedding, packed.head)} == {torch.bfloat16}


def make(**changes: object) -> TernaryTransformer:
    options: dict[str, Any] = SHAPE | {"max_sequence_length": 64} | changes
    return TernaryTransformer(TransformerConfig(**options)).eval()


@pytest.mark.parametrize(
    ("changes", "batch", "reason"),
    [
        ({}, 1, "needs a model on a CUDA GPU, not on the CPU"),
        ({}, 17, "takes 1 to 16 sequences, not 17"),
        ({"linear": "dense"}, 1, "needs ternary layers, not linear='dense'"),
        ({"activation_bits": 4}, 1, "needs activation_bits=8, not 4"),
        ({"qk_norm": "head"}, 1, "does not compute qk_norm='head'"),
        ({"post_norm": True}, 1, "does not compute post_norm=True"),
        ({"sliding_window": 16}, 1, "does not compute sliding_window=16"),
    ],
    ids=str,
)
def test_a_decoder_says_why_it_cannot_use_the_persistent_step(
    changes: dict[str, object], batch: int, reason: str
) -> None:
    model = make(**changes)
    assert refusal(model, batch) == reason
    with pytest.raises(ConfigError, match=f'{reason}; use step="graph"'):
        Decoder(model, batch, 8, step="persistent")
    with pytest.raises(ConfigError, match=reason):
        generate(model, [[1]] * batch, decode_step="persistent")


def test_other_steps_and_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="step='fast' is none of 'graph', 'persistent', 'auto'"):
        Decoder(make(), 1, 8, step="fast")  # type: ignore[arg-type]
    caches = [(torch.zeros(1, 2, 64, 64),) * 2]
    with pytest.raises(ConfigError, match=r"keys and values are torch\.float32: cast the model to bfloat16"):
        persistent_step(make(), caches, 64, torch.zeros(1, dtype=torch.int64))
    Decoder(make(), 1, 8).check()  # returns at once: there is nothing to wait for


def test_auto_gives_way_to_the_layers_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(qkv_bias=True, init_std=0.08).requires_grad_(False)
    expected = generate(model, [[1, 2, 3]], max_new_tokens=5)
    decoder = Decoder(model, 1, 12, step="auto")
    assert (
        decoder.choice == "the layers of the model; the persistent kernel needs a model on a CUDA GPU, not on the CPU"
    )
    assert generate(model, [[1, 2, 3]], max_new_tokens=5, decode_step="auto") == expected
    # A device may refuse only at the launch, and the dtype of keys and values is known only then.
    monkeypatch.setattr(decoder_module, "refusal", lambda model, batch_size: None)
    assert generate(model, [[1, 2, 3]], max_new_tokens=5, decode_step="auto") == expected
    decoder = Decoder(model, 1, 12, step="auto")
    assert decoder.choice == "measured at the first step, which has not come yet"
    decoder.prefill([[1]])
    decoder.step(torch.tensor([2]))
    assert decoder.choice.startswith("the layers of the model; the persistent kernel cannot be used:")
    with pytest.raises(ConfigError, match="cast the model to bfloat16"):
        generate(model, [[1, 2, 3]], max_new_tokens=5, decode_step="persistent")


def test_auto_gives_way_where_the_copy_of_the_weights_finds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(decoder_module, "persistent_step", full)
    monkeypatch.setattr(decoder_module, "refusal", lambda model, batch_size: None)
    decoder, strict = Decoder(make(), 1, 12, step="auto"), Decoder(make(), 1, 12, step="persistent")
    for one in (decoder, strict):
        one.prefill([[1]])
    decoder.step(torch.tensor([2]))
    assert decoder.choice == "the layers of the model; the persistent kernel cannot be used: CUDA out of memory."
    with pytest.raises(torch.OutOfMemoryError):
        strict.step(torch.tensor([2]))


def test_rows_start_and_wait_around_the_persistent_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts every row up, and a row that does not grow keeps its length. A failed step is made anew."""
    ReferenceStep.made = 0
    monkeypatch.setattr(decoder_module, "persistent_step", ReferenceStep)
    monkeypatch.setattr(decoder_module, "refusal", lambda model, batch_size: None)
    model = make(qkv_bias=True, init_std=0.08).requires_grad_(False)
    cast_model(model, torch.bfloat16)
    decoder = Decoder(model, 2, 20, step="persistent")
    decoder.extend(0, [1, 2, 3], 0)
    decoder.growing.copy_(torch.tensor([1, 0]))
    decoder.step(torch.tensor([4, 0]))
    assert decoder.lengths.tolist() == [4, 0]
    decoder.extend(1, [5, 6], 0)
    decoder.growing.fill_(1)
    decoder.step(torch.tensor([4, 7]))
    assert decoder.lengths.tolist() == [5, 3]
    assert ReferenceStep.made == 1
    with monkeypatch.context() as failing:
        failing.setattr(ReferenceStep, "check", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.check()
    decoder.step(torch.tensor([1, 1]))
    assert ReferenceStep.made == 2


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def on_gpu(**changes: object) -> TernaryTransformer:
    """Make a model on the GPU, on the sparse backend."""
    from sbn_lightning.inference.opening import use_backend

    torch.manual_seed(0)
    model = make(qkv_bias=True, pattern="2:4", init_std=0.08, **changes).cuda().requires_grad_(False)
    cast_model(model, torch.bfloat16)
    use_backend(model, "sparse", torch.bfloat16)
    return model


@needs_hopper
def test_a_decoder_with_the_persistent_step_gives_the_logits_of_the_graph() -> None:
    model = on_gpu()
    theirs, ours = Decoder(model, 2, 32), Decoder(model, 2, 32, step="persistent")
    for prompts in ([[1, 2, 3, 4, 5], [7, 8, 9]], [[3], [4, 5]]):  # a decoder may be used for new prompts
        tokens = theirs.prefill(prompts).argmax(-1)
        ours.prefill(prompts)
        for _ in range(10):
            expected, logits = theirs.step(tokens).float(), ours.step(tokens).float()
            ours.check()
            assert float((logits - expected).norm() / expected.norm()) < 0.05
            tokens = expected.argmax(-1)
        assert torch.equal(ours.lengths, theirs.lengths)
    assert len(generate(model, [[1, 2]], max_new_tokens=20, decode_step="persistent")[0]) == 20


@needs_hopper
def test_auto_measures_on_a_gpu_and_gives_way_where_the_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sbn_kernels.decode.step import step as step_module

    monkeypatch.setattr(choice, "_verdicts", {})
    model = on_gpu(d_ffn=4096)
    for batch in (1, 12):
        decoder = Decoder(model, batch, 32, step="auto")
        decoder.prefill([[1, 2, 3 + i] for i in range(batch)])
        decoder.step(torch.ones(batch, dtype=torch.int64, device="cuda"))
        decoder.check()
        assert "ms a step, the layers of the model" in decoder.choice
        assert decoder.lengths.tolist() == [4] * batch
    monkeypatch.setattr(choice, "_verdicts", {})
    monkeypatch.setattr(step_module, "multiprocessors", lambda index: 400)  # More programs than fit at the same time.
    decoder = Decoder(model, 1, 32, step="auto")
    decoder.prefill([[1, 2, 3]])
    decoder.step(torch.ones(1, dtype=torch.int64, device="cuda"))
    assert decoder.kind == "graph"
    assert "at the same time" in decoder.choice


@needs_hopper
def test_a_failed_step_fails_its_requests_and_the_next_request_is_served() -> None:
    model = on_gpu()
    opened = LoadedModel(model, model.config, "checkpoint", Path("made up"), TextFiles())
    with Generator(opened, batch_size=2, max_length=60, decode_step="persistent") as generator:
        first = generator.submit([1, 2, 3], max_new_tokens=20, stop_tokens=()).result(60)
        step = generator._decoder._persistent.kernel
        assert step is not None
        step._table[0, 0, 3] = 2**31 - 1  # Its first program waits in vain for weights, for 2 seconds.
        with pytest.raises(RuntimeError, match="waited longer"):
            generator.submit([1, 2, 3], max_new_tokens=20, stop_tokens=()).result(60)
        again = generator.submit([1, 2, 3], max_new_tokens=20, stop_tokens=()).result(60)
    assert again.tokens == first.tokens
