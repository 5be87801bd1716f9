"""The kernels of a prompt equal their plain-PyTorch twins in the interpreter."""

import pytest
import torch
from sbn_kernels.gemm.registry import registered
from sbn_kernels.prompt import attend, attend_reference, rotate_and_store, rotate_and_store_reference

from sbn_lightning.backends.integer import KernelBackend
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.inference import Decoder
from sbn_lightning.inference.prompt_pass import make_pass
from sbn_lightning.layers.sparse_linear import ternary_layers
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer
from tests.kernels.toy import TOY

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


@pytest.mark.parametrize(
    ("dtype", "biased", "start"),
    [(torch.float32, True, 3), (torch.float32, False, 0), (torch.bfloat16, True, 0), (torch.bfloat16, False, 0)],
)
def test_queries_keys_and_values_are_turned_in_place_and_stored(dtype: torch.dtype, biased: bool, start: int) -> None:
    heads, kv_heads, size, length = 3, 2, 16, 5
    qkv = torch.randn(2, length, (heads + 2 * kv_heads) * size).to(dtype)
    bias = torch.randn(qkv.shape[2]).to(dtype) if biased else None
    cos, sin = torch.randn(9, size), torch.randn(9, size)
    caches = [torch.randn(4, kv_heads, 8, size).to(dtype) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    rows, before = torch.tensor([3, 1]), torch.tensor([start, start // 2])
    wanted = rotate_and_store_reference(qkv, bias, cos, sin, *expected, rows, heads, before)
    assert rotate_and_store(qkv, bias, cos, sin, *caches, rows, heads, before) is qkv
    bound = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(qkv, wanted, **bound)
    for ours, theirs in zip(caches, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **bound)
    assert torch.equal(
        caches[0][3, :, start : start + length],
        qkv[0].unflatten(-1, (-1, size))[:, heads : heads + kv_heads].transpose(0, 1),
    )


def test_shapes_that_do_not_fit_are_refused() -> None:
    cache, table, one = torch.zeros(1, 1, 2, 16), torch.zeros(8, 16), torch.zeros(1).long()
    with pytest.raises(ValueError, match="do not fit"):
        rotate_and_store(torch.zeros(1, 3, 48), None, table, table, cache, cache, one, 1, one)
    for bias, rows, message in ((torch.zeros(16), one, "the bias must be"), (None, torch.zeros(2).long(), "int64")):
        with pytest.raises(ValueError, match=message):
            rotate_and_store(torch.zeros(1, 2, 48), bias, table, table, cache, cache, rows, 1, one)


# The interpreter multiplies the bits of bfloat16 as integers, so these are float16.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "length", "before"),
    [(3, 1, 64, 5, (0, 131)), (2, 2, 64, 70, (128, 3)), (2, 1, 128, 130, (0, 60))],
)
def test_attention_reads_rows_of_the_cache_up_to_each_token(
    heads: int, kv_heads: int, size: int, length: int, before: tuple[int, int]
) -> None:
    keys, values = torch.randn(2, 4, kv_heads, 200, size).half()
    qkv = torch.randn(2, length, (heads + 2 * kv_heads) * size).half()
    q = qkv.unflatten(-1, (-1, size)).transpose(1, 2)[:, :heads]
    rows, numbers = torch.tensor([3, 1]), torch.tensor(before)
    ours = attend(q, keys, values, rows, numbers)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, attend_reference(q, keys, values, rows, numbers), rtol=2**-9, atol=2**-9)
    last = attend(q[:, :, -3:], keys, values, rows, numbers + length - 3)
    torch.testing.assert_close(last, ours[:, -3:], rtol=2**-9, atol=2**-9)


def test_attention_refuses_what_does_not_fit() -> None:
    cache, one = torch.zeros(1, 1, 8, 64).half(), torch.zeros(1).long()
    for q, keys, rows, message in (
        (torch.zeros(1, 1, 9, 64).half(), cache, one, "9 queries of 1 heads"),
        (torch.zeros(1, 1, 2, 64), cache, one, "float32"),
        (torch.zeros(1, 1, 2, 64).half(), cache.mT.contiguous().mT, one, "must be contiguous"),
        (torch.zeros(1, 1, 2, 64).half(), cache, one.int(), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, keys, keys, rows, one)


@pytest.mark.parametrize("biased", [True, False])
def test_a_pass_over_the_kernels_reads_prompts_as_the_blocks_do(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 48, "vocab_size": 40}
    config = TransformerConfig(**shape, qkv_bias=biased, pattern="2:4", init_std=0.1, max_sequence_length=64)
    torch.manual_seed(0)
    model = TernaryTransformer(config).bfloat16().eval().requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv.bias is None or block.attention.qkv.bias.normal_()
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    plain = Decoder(model, 2, 16)
    expected = plain.prefill(prompts)
    for layer in ternary_layers(model).values():
        layer.backend = KernelBackend(TOY.name)
    ours = Decoder(model, 2, 16)
    monkeypatch.setattr(model, "hidden", None)  # the blocks do not run
    with registered(TOY):
        logits = ours.prefill(prompts)
        assert ours.lengths.tolist() == [5, 3]
        first = ours.extend(0, prompts[1], 0)
        ours.extend(1, prompts[0][:2], 0)
        parts = ours.extend(1, prompts[0][2:], 2)  # A part behind tokens in the cache.
        ours.extend(1, prompts[1], 0)
        chunks = Decoder(model, 2, 16, prefill_chunk=4).prefill(prompts)
    for a, b in ((logits, expected), (first, expected[1:]), (parts, expected[:1]), (chunks, expected)):
        assert (a - b).float().norm() < 0.05 * b.float().norm()
    for mine, theirs in zip(ours._layers, plain._layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert (a[1, :, :3] - b[1, :, :3]).float().norm() < 0.05 * b[1, :, :3].float().norm()
    assert ours.lengths.tolist() == [3, 3]


def on_kernels(**changes: object) -> TernaryTransformer:
    """A model in bfloat16 whose ternary layers run on an integer kernel."""
    options = {"d_model": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 48, "vocab_size": 40}
    model = TernaryTransformer(TransformerConfig(**options | changes)).bfloat16()
    for layer in ternary_layers(model).values():
        layer.backend = KernelBackend(TOY.name)
    return model


@pytest.mark.parametrize(
    "changes", [{"linear": "dense"}, {"qk_norm": "head"}, {"activation_bits": 4}, {"head_dim": 16}], ids=str
)
def test_models_that_the_kernels_do_not_cover_have_no_pass(changes: dict[str, object]) -> None:
    assert make_pass(on_kernels()) is not None
    assert make_pass(on_kernels(**changes)) is None


def test_layers_without_a_kernel_and_layers_with_a_hook_have_no_pass() -> None:
    model = on_kernels()
    assert make_pass(model.float()) is None
    model.bfloat16().blocks[0].mlp.register_forward_hook(lambda *_: None)
    assert make_pass(model) is None
    model = on_kernels()
    model.blocks[0].mlp.down.backend = REFERENCE
    assert make_pass(model) is None
