"""The vLLM plugin's loading and tensor parallelism, rank by rank in one process. Runs where vLLM is installed."""

from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor import parameter  # noqa: E402
from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402

from sbn_lightning import SparseBitLinear  # noqa: E402
from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.formats.huggingface.sbn import pack_codes  # noqa: E402
from sbn_lightning.integrations.vllm import SBNConfig, SBNExpertsMethod, SBNLinearMethod  # noqa: E402
from sbn_lightning.integrations.vllm import experts as vllm_experts  # noqa: E402
from sbn_lightning.integrations.vllm import linear as vllm_linear  # noqa: E402
from sbn_lightning.layers.experts_linear import Routing, SparseBitExperts  # noqa: E402
from sbn_lightning.layers.packed import packed_layer  # noqa: E402
from sbn_lightning.sparsity.config import SparsityConfig  # noqa: E402
from sbn_lightning.sparsity.ternary import token_magnitude  # noqa: E402

OPTIONS = {"pattern": "2:4", "activation_bits": 8}
HIDDEN, HEAD, HEADS, KV_HEADS, FFN = 64, 16, 8, 2, 96


@pytest.fixture(autouse=True)
def _configured():
    with set_current_vllm_config(VllmConfig()):
        yield


def on_rank(monkeypatch, rank, size):
    for module in (parameter, linear):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    monkeypatch.setattr(vllm_experts, "get_tensor_model_parallel_world_size", lambda: size)


def exchange_magnitudes(monkeypatch, slices, bits=8):
    """Give every rank what an all-gather would: the magnitudes of all ranks' slices."""
    of_all = torch.cat([token_magnitude(one, bits) for one in slices], dim=-1)
    monkeypatch.setattr(vllm_linear, "tensor_model_parallel_all_gather", lambda own, dim: of_all)


def whole_layer(rows, columns):
    torch.manual_seed(rows)
    return packed_layer(SparseBitLinear(columns, rows, bias=False, **OPTIONS)).eval()


def load(layer, parts):
    """Load the parts of a layer as vLLM does, and return the layer's product."""
    for shard_id, part in parts.items():
        for target, value in ((layer.codes, pack_codes(part.codes)), (layer.gamma, part.gamma)):
            layer.weight_loader_v2(target, value, *(() if shard_id is None else (shard_id,)))
    layer.quant_method.process_weights_after_loading(layer)
    return lambda x: layer.quant_method.apply(layer, x)


def config(*names, **more):
    return SBNConfig({name: OPTIONS | more for name in names})


@pytest.mark.parametrize("size", [1, 2, 4])  # with 4 ranks two share a key/value head
def test_fused_qkv_computes_the_rows_of_each_rank(monkeypatch, size):
    parts = {"q": whole_layer(HEADS * HEAD, HIDDEN), "k": whole_layer(KV_HEADS * HEAD, HIDDEN)}
    parts["v"] = whole_layer(KV_HEADS * HEAD, HIDDEN)
    x = torch.randn(5, HIDDEN)
    known = config("a.q_proj", "a.k_proj", "a.v_proj")
    for rank in range(size):
        on_rank(monkeypatch, rank, size)
        layer = linear.QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, quant_config=known, prefix="a.qkv_proj"
        )
        q = parts["q"](x).chunk(size, dim=-1)[rank]
        replicas = max(1, size // KV_HEADS)
        k, v = (parts[one](x).chunk(min(size, KV_HEADS), dim=-1)[rank // replicas] for one in "kv")
        assert torch.equal(load(layer, parts)(x), torch.cat([q, k, v], dim=-1))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_gate_and_up_computes_the_rows_of_each_rank(monkeypatch, size):
    gate, up = whole_layer(FFN, HIDDEN), whole_layer(FFN, HIDDEN)
    x = torch.randn(5, HIDDEN)
    for rank in range(size):
        on_rank(monkeypatch, rank, size)
        layer = linear.MergedColumnParallelLinear(
            HIDDEN, [FFN, FFN], bias=False, quant_config=config("a.gate_proj", "a.up_proj"), prefix="a.gate_up_proj"
        )
        wanted = torch.cat([part(x).chunk(size, dim=-1)[rank] for part in (gate, up)], dim=-1)
        assert torch.equal(load(layer, {0: gate, 1: up})(x), wanted)


@pytest.mark.parametrize("size", [1, 2])
def test_layers_that_the_folder_stores_fused(monkeypatch, size):
    sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    torch.manual_seed(0)
    source = SparseBitLinear(HIDDEN, sum(sizes), bias=False, split_sizes=tuple(sizes), **OPTIONS)
    whole = packed_layer(source).eval()
    assert whole.gamma.unique().numel() == 3
    x = torch.randn(5, HIDDEN)
    known = config("a.qkv_proj", split_sizes=sizes)
    for rank in range(size):
        on_rank(monkeypatch, rank, size)
        layer = linear.QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, quant_config=known, prefix="a.qkv_proj"
        )
        wanted = torch.cat([part.chunk(size, dim=-1)[rank] for part in whole(x).split(sizes, dim=-1)], dim=-1)
        assert torch.equal(load(layer, {None: whole})(x), wanted)
    on_rank(monkeypatch, 0, 1)
    two = config("a.qkv_proj", split_sizes=[HEADS * HEAD, 2 * KV_HEADS * HEAD])
    with pytest.raises(ConfigError, match="has 2 parts in the folder and 3 in vLLM"):
        linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, quant_config=two, prefix="a.qkv_proj")


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_slices_add_up(monkeypatch, size, bits):
    torch.manual_seed(HIDDEN)
    whole = packed_layer(SparseBitLinear(FFN, HIDDEN, bias=False, pattern="2:4", activation_bits=bits)).eval()
    x = torch.randn(5, FFN)
    slices = x.chunk(size, dim=-1)
    exchange_magnitudes(monkeypatch, slices, bits or 8)
    total = torch.zeros(5, HIDDEN)
    for rank in range(size):
        on_rank(monkeypatch, rank, size)
        layer = linear.RowParallelLinear(
            FFN, HIDDEN, bias=False, quant_config=config("a.down_proj", activation_bits=bits), prefix="a.down_proj"
        )
        total += load(layer, {None: whole})(slices[rank])
        assert torch.equal(layer.ternary.gamma, whole.gamma)  # the gamma of the whole tensor on each rank
    if size == 1:
        assert torch.equal(total, whole(x))
    assert torch.allclose(total, whole(x), rtol=0, atol=2e-6 * whole(x).abs().max())


EXPERTS = 4


@pytest.mark.parametrize(("size", "weighted_first"), [(1, False), (2, False), (1, True)])
def test_experts_of_all_ranks_add_up(monkeypatch, size, weighted_first):
    torch.manual_seed(0)
    top_k = 1 if weighted_first else 2
    options = SparsityConfig.make("2:4")
    up = packed_layer(SparseBitExperts(EXPERTS, HIDDEN, (FFN, FFN), sparsity=options)).eval()
    down = packed_layer(SparseBitExperts(EXPERTS, FFN, (HIDDEN,), sparsity=options)).eval()
    x, weights = torch.randn(7, HIDDEN), torch.rand(7, top_k)
    ids = torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(7)])
    route = Routing.of(ids, EXPERTS)
    hidden = up(route.gather(x * weights if weighted_first else x), route.counts)
    wanted = route.combine(
        down(hidden, route.counts, swiglu=True), torch.ones_like(weights) if weighted_first else weights
    )
    gate, value = hidden.chunk(2, dim=-1)
    exchange_magnitudes(monkeypatch, (torch.nn.functional.silu(gate) * value).chunk(size, dim=-1))
    total = torch.zeros_like(x)
    for rank in range(size):
        on_rank(monkeypatch, rank, size)
        layer = torch.nn.Module()
        layer.apply_router_weight_on_input = weighted_first
        method = SBNExpertsMethod(block_of_experts(rank, size), "a.experts", **OPTIONS)
        method.create_weights(layer, EXPERTS, HIDDEN, FFN // size, torch.float32)
        stored = {"gate_up_proj": up, "w2": down}
        tensors = {f"{name}.codes": pack_codes(one.codes) for name, one in stored.items()}
        tensors |= {f"{name}.gamma": one.gamma for name, one in stored.items()}
        assert len(list(layer.load_weights(tensors.items()))) == 4
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, weights, ids.int(), shared_experts=None, shared_experts_input=None)
    assert torch.allclose(total, wanted, rtol=0, atol=2e-6 * wanted.abs().max())


def block_of_experts(rank=0, size=1, **different):
    parallel = SimpleNamespace(use_ep=False, tp_size=size, tp_rank=rank)
    known = {"has_bias": False, "activation": MoEActivation.SILU, "intermediate_size": FFN}
    return SimpleNamespace(**known | {"moe_parallel_config": parallel} | different)


def test_blocks_of_experts_that_are_refused(monkeypatch):
    on_rank(monkeypatch, 0, 2)
    method = SBNExpertsMethod(block_of_experts(size=2), "a.experts", "6:8", 8)
    with pytest.raises(ConfigError, match=r"a rank's 12 of 96 inner features of a.experts are not whole groups of 8"):
        method.create_weights(torch.nn.Module(), EXPERTS, HIDDEN, 12, torch.float32)
    for different, message in (
        ({"has_bias": True}, "a.experts: only experts without biases"),
        ({"activation": MoEActivation.GELU}, r"only experts .* with silu\(gate\) \* up"),
        ({"moe_parallel_config": SimpleNamespace(use_ep=True, tp_size=2)}, "leave out --enable-expert-parallel"),
        ({"moe_parallel_config": SimpleNamespace(use_ep=False, tp_size=4)}, "and --data-parallel-size"),
    ):
        with pytest.raises(ConfigError, match=message):
            SBNExpertsMethod(block_of_experts(size=2, **different), "a.experts", **OPTIONS)
    layer = SimpleNamespace(apply_router_weight_on_input=True)
    with pytest.raises(ConfigError, match=r"a.experts weights the tokens .* needs one expert a token, and has 2"):
        method.apply(layer, torch.zeros(3, HIDDEN), torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"a.experts has no place for the tensor gate.bias of the folder"):
        list(method._load(torch.nn.Module(), [("gate.bias", torch.zeros(1))]))


@pytest.mark.parametrize(("pattern", "width", "size"), [("2:4", 24, 4), ("6:8", 48, 4), ("5:7", 28, 2)])
def test_widths_that_do_not_divide_are_refused(monkeypatch, pattern, width, size):
    on_rank(monkeypatch, 0, size)
    known = SBNConfig({"a.down_proj": OPTIONS | {"pattern": pattern}})
    with pytest.raises(ConfigError, match=f"a rank's {width // size} of {width} input features .* use fewer ranks"):
        linear.RowParallelLinear(width, HIDDEN, bias=False, quant_config=known, prefix="a.down_proj")


def test_what_is_not_served_is_refused(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    known = SBNConfig({"a.q_proj": OPTIONS, "a.k_proj": OPTIONS, "b.experts.gate_up_proj": OPTIONS})
    with pytest.raises(ConfigError, match=r"the parts q_proj, k_proj, v_proj of a.qkv_proj differ"):
        linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, quant_config=known, prefix="a.qkv_proj")
    with pytest.raises(ConfigError, match=r"b.experts is a Module, which is not served with ternary"):
        known.get_quant_method(torch.nn.Module(), "b.experts")
    dense = linear.RowParallelLinear(FFN, HIDDEN, bias=False, quant_config=known, prefix="c.down_proj")
    assert not isinstance(dense.quant_method, SBNLinearMethod)
    with pytest.raises(ConfigError, match="this folder holds latent ones"):
        SBNConfig.from_config({"form": "latent"})
    with pytest.raises(ConfigError, match="has version 9"):
        SBNConfig.from_config({"version": 9})
