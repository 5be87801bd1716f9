"""CUDA graphs of the training step of a model of transformers, as far as a CPU goes."""

from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from torch._dynamo.testing import CompileCounter  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import masking_utils  # noqa: E402

from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.integrations.huggingface.causal_lm import CausalLM  # noqa: E402
from sbn_lightning.integrations.huggingface.network import Network  # noqa: E402
from sbn_lightning.training.graphs import GraphedLoss  # noqa: E402
from tests.helpers import Losses, quiet_trainer, token_loader  # noqa: E402
from tests.integrations.families import FAMILIES, build  # noqa: E402

SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


def make(model_type="llama", **options):
    torch.manual_seed(0)
    source = {"model_type": model_type, **SMALL, **(MOE if model_type == "qwen3_moe" else {})}
    return CausalLM(source, pattern="2:4", optimizer=partial(torch.optim.AdamW, lr=1e-2), warmup_steps=2, **options)


def record_now(monkeypatch, now):
    """Say that the stream of the GPU is being recorded, or not."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_forward_waits_for_the_positions(name, monkeypatch):
    """The logits are those of a forward that looks whether rows are packed. The host would wait for that look."""
    hf, tokens = build(name), torch.arange(3, 27).view(2, 12)
    expected = hf(input_ids=tokens, use_cache=False).logits

    def look(position_ids):
        raise AssertionError("the host would wait for the GPU here")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    assert torch.equal(Network(hf, "dense")(tokens), expected)
    assert masking_utils.find_packed_sequence_indices is look


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding", "gemma3", "gpt2", "phi3"])
def test_a_recording_attends_as_before(name, monkeypatch):
    """In a recording, some versions of transformers make a mask where there is none otherwise."""
    network, tokens = Network(build(name), "dense"), torch.arange(3, 27).view(2, 12)
    given, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention",
        lambda *args, **options: given.append(options.get("attn_mask")) or attention(*args, **options),
    )  # fmt: skip
    expected = network(tokens)
    before, given[:] = list(given), []
    record_now(monkeypatch, True)
    assert torch.equal(network(tokens), expected)
    assert before
    assert [mask is None for mask in given] == [mask is None for mask in before]


def test_compiled_blocks_are_not_compiled_again_while_recording(recordings, monkeypatch):
    counter, compiled = CompileCounter(), []
    network = make().model
    for block in network.blocks:
        block.compile(backend=counter)
    network.is_compiled = True
    graphed, optimizer = GraphedLoss(), torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step, batch in enumerate(token_loader()):
        record_now(monkeypatch, step >= 2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = graphed(network, lambda rows: network.loss(rows[:, :-1], rows[:, 1:]), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        compiled.append(counter.frame_count)
    assert recordings["recorded"] == 2
    assert compiled == [compiled[0]] * len(compiled)


def test_training_is_the_same_to_the_last_bit(recordings):
    found = []
    for cuda_graphs in (False, True):
        module, losses = make(cuda_graphs=cuda_graphs), Losses()
        trainer = quiet_trainer([losses], max_steps=8, accumulate_grad_batches=2, gradient_clip_val=0.5)
        trainer.fit(module, token_loader(batches=16))
        found.append((losses.values, module.state_dict()))
        assert "cuda_graphs" not in module.hparams  # A checkpoint may be trained on without a GPU.
    (expected, plain), (losses, graphed) = found
    assert losses == expected
    assert all(torch.equal(graphed[name], value) for name, value in plain.items())
    assert (recordings["recorded"], recordings["replayed"]) == (2, 2 * (16 - 2))


@pytest.mark.parametrize(("model_type", "reason"), [("llama", "a run on cpu"), ("qwen3_moe", "a mixture of experts")])
def test_what_does_not_work_is_refused(model_type, reason):
    with pytest.raises(ConfigError, match=f"model.cuda_graphs does not work with {reason}"):
        quiet_trainer(max_steps=1).fit(make(model_type, cuda_graphs=True), token_loader())
