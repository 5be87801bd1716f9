"""CUDA graphs of the training step of a model of transformers, as far as a CPU goes."""

from contextlib import nullcontext
from functools import partial
from threading import Event, Thread

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers", minversion="5")

from lightning.fabric import Fabric  # noqa: E402
from torch._dynamo.testing import CompileCounter  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import masking_utils  # noqa: E402

from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.data import TokenDataModule  # noqa: E402
from sbn_lightning.distributed import shard  # noqa: E402
from sbn_lightning.distributed.gradient_mean import replicate  # noqa: E402
from sbn_lightning.distributed.strategies import ShardedStrategy  # noqa: E402
from sbn_lightning.fabric import FabricRun  # noqa: E402
from sbn_lightning.fabric import train as fit_with_fabric  # noqa: E402
from sbn_lightning.integrations.huggingface.causal_lm import CausalLM  # noqa: E402
from sbn_lightning.integrations.huggingface.network import Network  # noqa: E402
from sbn_lightning.layers import convert_linears  # noqa: E402
from sbn_lightning.training.distillation import Distillation  # noqa: E402
from sbn_lightning.training.graphs import GraphedLoss  # noqa: E402
from tests.helpers import Losses, compiled_frames, quiet_trainer, token_loader  # noqa: E402
from tests.integrations.families import FAMILIES, build  # noqa: E402

SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
GLM = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


def make(cuda_graphs=False, linear="ternary", distillation=None, **source):
    torch.manual_seed(0)
    return CausalLM(
        {"model_type": "llama", **SMALL, **source}, linear, "2:4", optimizer=partial(torch.optim.AdamW, lr=1e-2),
        warmup_steps=2, cuda_graphs=cuda_graphs, distillation=distillation,
    )  # fmt: skip


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


def test_blocks_that_are_computed_again_do_not_look(monkeypatch):
    """A backward computes blocks again, after the forward. The masks are those of the forward."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: pytest.fail("looked"))
    network, expected = (Network(build("gemma3"), "dense").train() for _ in range(2))
    hf = network.hf
    getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)()
    tokens = torch.arange(3, 27).view(2, 12)
    for one in (network, expected):
        one.loss(tokens, tokens).backward()
    for again, parameter in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(again.grad, parameter.grad)


def test_rows_of_other_threads_may_be_packed():
    """Another thread calls transformers itself while a network runs, and networks end in another order than begun."""
    hf, tokens, positions = build("llama"), torch.arange(3, 27).view(1, 24), torch.arange(12).repeat(2)[None]
    networks = [Network(build("llama"), "dense") for _ in range(2)]
    inside, ended = [Event(), Event()], [Event(), Event()]

    def wait_in(number):
        def hook(module, args):
            inside[number].set()
            assert ended[number].wait(60)

        return hook

    def packed():
        return hf(input_ids=tokens, position_ids=positions, use_cache=False).logits

    expected, threads = packed(), []
    for number, network in enumerate(networks):
        network.embed.register_forward_pre_hook(wait_in(number))
        threads.append(Thread(target=network, args=(tokens,)))
        threads[-1].start()
        assert inside[number].wait(60)
    found = [packed()]
    for event, thread in zip(ended, threads, strict=True):
        event.set()
        thread.join()
        found.append(packed())
    assert not torch.equal(expected, hf(input_ids=tokens, use_cache=False).logits)
    assert all(torch.equal(one, expected) for one in found)


def test_a_forward_that_fails_changes_nothing():
    hf, tokens, positions = build("llama"), torch.arange(3, 27).view(1, 24), torch.arange(12).repeat(2)[None]
    expected = hf(input_ids=tokens, position_ids=positions, use_cache=False).logits
    with pytest.raises(IndexError):
        Network(hf, "dense")(tokens + 96)
    assert torch.equal(hf(input_ids=tokens, position_ids=positions, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_whole_network_is_compiled_without_a_break(name):
    network, tokens = Network(build(name), "dense"), torch.arange(3, 27).view(2, 12)
    expected = network(tokens)
    assert torch.equal(torch.compile(network, backend="eager", fullgraph=True)(tokens), expected)


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
    network, counter = make().model, CompileCounter()
    for block in network.blocks:
        block.compile(backend=counter)
    network.is_compiled = True
    compiled = compiled_frames(network, counter, lambda number: record_now(monkeypatch, number >= 2))
    assert recordings["recorded"] == 2
    assert compiled == [compiled[0]] * len(compiled)


@pytest.mark.parametrize("options", [{}, {"linear": "masked"}, {"linear": "dense"}, {"distillation": 0.5}], ids=str)
def test_training_is_the_same_to_the_last_bit(options, recordings):
    if "distillation" in options:
        build("llama", vocab_size=320).save_pretrained("teacher")
        options = {"distillation": Distillation("teacher", language_model=options["distillation"])}
    found = []
    for cuda_graphs in (False, True):
        module, losses = make(cuda_graphs=cuda_graphs, **options), Losses()
        trainer = quiet_trainer([losses], max_steps=8, accumulate_grad_batches=2, gradient_clip_val=0.5)
        trainer.fit(module, token_loader(batches=16))
        found.append((losses.values, module.state_dict()))
        assert "cuda_graphs" not in module.hparams  # A checkpoint may be trained on without a GPU.
    (expected, plain), (losses, graphed) = found
    assert losses == expected
    assert all(torch.equal(graphed[name], value) for name, value in plain.items())
    assert (recordings["recorded"], recordings["replayed"]) == (2, 2 * (16 - 2))


def test_the_fabric_loop_replays_micro_batches(recordings, tokens):
    trained = []
    for cuda_graphs in (False, True):
        data = TokenDataModule(str(tokens), batch_size=4, sequence_length=16, num_workers=0, seed=5)
        options = {"max_steps": 4, "accumulate_grad_batches": 2, "enable_progress_bar": False}
        run = FabricRun(Fabric(accelerator="cpu", devices=1), **options)
        trained.append(make(vocab_size=512, cuda_graphs=cuda_graphs))
        fit_with_fabric(run, trained[-1], data)
    for (name, one), (_, other) in zip(*(module.state_dict().items() for module in trained), strict=True):
        assert torch.equal(one, other), name
    assert (recordings["recorded"], recordings["replayed"]) == (2, 2 * (8 - 2))


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
@pytest.mark.parametrize("strategy", ["sbn_ddp", "sbn_fsdp2"])
def test_replays_send_gradients(strategy, name, recordings, tmp_path):
    """In a group of this process alone, with the hooks and the copies of several ranks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh, found = init_device_mesh("cpu", (1,)), []
        for cuda_graphs in (False, True):
            hf = build(name)
            convert_linears(hf, "2:4")
            network, graphed, mean = Network(hf, "ternary"), GraphedLoss(), None
            if strategy == "sbn_fsdp2":
                shard(network, mesh)
            else:
                mean = replicate(network, mesh.get_group(), torch.float32)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
            for batch in token_loader(vocab_size=96):
                loss = partial(lambda model, rows: model.loss(rows[:, :-1], rows[:, 1:]), network)
                value = graphed(network, loss, batch) if cuda_graphs else loss(batch)
                with nullcontext() if mean is None else mean.backward(network):
                    value.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(value.item())
    finally:
        dist.destroy_process_group()
    half = len(found) // 2
    assert found[half:] == found[:half]
    assert recordings["recorded"] == 2


@pytest.mark.parametrize(
    ("source", "options", "trainer", "reason"),
    [
        ({}, {}, {}, "a run on cpu; set model.cuda_graphs to false$"),  # sizes/cpu is for our own transformer.
        ({"model_type": "qwen3_moe", **MOE}, {}, {}, "a mixture of experts"),
        ({"model_type": "glm4_moe", **GLM}, {}, {}, "a mixture of experts"),  # Its router has no balance loss.
        ({"model_type": "doge", "is_moe": False}, {}, {}, "a run on cpu"),  # A balance loss is configured, but unused.
        ({}, {"linear": "masked"}, {"strategy": ShardedStrategy()}, "linear: masked in sbn_fsdp2, only with ternary"),
        ({}, {"linear": "dense"}, {"strategy": ShardedStrategy()}, "linear: dense in sbn_fsdp2, only with ternary"),
        ({}, {}, {"strategy": ShardedStrategy()}, "a run on cpu"),
    ],
)
def test_what_does_not_work_is_refused(source, options, trainer, reason):
    module = make(cuda_graphs=True, **source, **options)
    module.trainer = quiet_trainer(max_steps=1, **trainer)
    with pytest.raises(ConfigError, match=f"model.cuda_graphs does not work with {reason}"):
        module.setup("fit")


def test_blocks_that_are_skipped_at_random_are_refused(recordings):
    """A recording would skip the same blocks in each replay."""
    source = {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5, "dropout": 0.0}
    with pytest.raises(ConfigError, match="draws random numbers on the host"):
        quiet_trainer(max_steps=8).fit(make(cuda_graphs=True, **source), token_loader(batches=8))
