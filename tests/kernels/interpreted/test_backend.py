"""Layers and a whole model give the same on portable kernels, in the interpreter, as on the reference backend."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from sbn_kernels.quantize import triton as quantize
from sbn_kernels.swiglu import triton as swiglu

from sbn_lightning import DenseToSparseRamp, MaskRefresh, SparseEMAWeightAveraging, SparseTernaryPrecision
from sbn_lightning.backends.integer import Gradients, KernelBackend
from sbn_lightning.layers.sparse_linear import SparseBitLinear, ternary_layers
from tests.helpers import Losses, quiet_trainer, small_module, token_loader
from tests.kernels.toy import TOY

TINY = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 16}  # the interpreter is slow


class Run(NamedTuple):
    trainer: Trainer
    losses: list[float]


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().square().mean().sqrt() / expected.square().mean().sqrt())


def gradients(layer: SparseBitLinear, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert layer.weight.grad is not None
    assert x.grad is not None
    return y.detach(), x.grad, layer.weight.grad


OPTIONS = [
    {"pattern": "2:4"},
    {"pattern": "6:8", "split_sizes": (20, 10), "gamma_over": "kept"},
    {"pattern": "3:5", "activation_bits": 4, "bias": False},
    {"pattern": "4:4", "gradient": "masked"},
    {"pattern": "2:4", "mask_source": "ternary"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", ["portable", TOY.name])
def test_a_layer_computes_what_the_reference_computes(options: dict[str, object], kernel: str, toy: None) -> None:
    torch.manual_seed(0)
    layer = SparseBitLinear(40, 30, **options)  # type: ignore[arg-type]
    other = copy.deepcopy(layer)
    other.backend = KernelBackend(kernel)
    x, dy = torch.randn(3, 7, 40), torch.randn(3, 7, 30)
    expected = gradients(layer, x, dy)
    for ours, reference in zip(gradients(other, x, dy), expected, strict=True):
        assert relative_rms(ours, reference) < 1e-5
    assert torch.equal(layer.mask, other.mask)
    assert torch.equal(layer.ternary()[0], other.ternary()[0])
    assert list(layer.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize(("gradients_kind", "most"), [("bf16", 32768), ("int8", 32768), ("bf16", 39)])
def test_a_swiglu_before_a_layer_is_the_references(
    gradients_kind: Gradients, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbn_lightning.backends.integer.MAX_FEATURES", most)  # with 39 there is no fusion
    torch.manual_seed(0)
    layer = SparseBitLinear(40, 30, pattern="2:4")
    other = copy.deepcopy(layer)
    other.backend = KernelBackend("portable", gradients=gradients_kind)
    other.backend.seed = torch.tensor([1])
    found = []
    for each in (layer, other):
        x = torch.randn(3, 7, 80, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = each(x, swiglu=True)
        y.backward(torch.ones_like(y))
        assert each.weight.grad is not None
        assert x.grad is not None
        found.append((y.detach(), x.grad, each.weight.grad))
    for ours, reference in zip(*reversed(found), strict=True):
        assert relative_rms(ours, reference) < (1e-2 if gradients_kind == "int8" else 1e-3)


def test_masks_follow_the_weight_a_ramp_and_a_hold(toy: None) -> None:
    torch.manual_seed(0)
    layer = SparseBitLinear(32, 24, pattern="2:4")
    layer.backend = KernelBackend(TOY.name)
    twin = SparseBitLinear(32, 24, pattern="2:4")
    twin.load_state_dict(layer.state_dict())
    for step in range(5):
        for each in (layer, twin):
            torch.manual_seed(step)
            with torch.no_grad():
                each.weight.add_(torch.randn_like(each.weight))
            each.set_density(4 if step < 2 else 2, 0.5 if step == 2 else 1.0)
            each.hold_mask = step == 4
        x = torch.randn(5, 32)
        assert torch.equal(layer.mask, twin.mask)
        assert relative_rms(layer(x), twin(x)) < 1e-5


def test_a_checkpoint_with_a_denser_mask_keeps_it(toy: None) -> None:
    torch.manual_seed(0)
    ramping = SparseBitLinear(32, 24, pattern="2:4")
    ramping.set_density(4)
    layer = SparseBitLinear(32, 24, pattern="2:4")
    layer.backend = KernelBackend(TOY.name)
    layer.load_state_dict(ramping.state_dict())
    x = torch.randn(5, 32)
    assert relative_rms(layer(x), ramping(x)) < 1e-5


def test_int8_gradients_are_near_the_exact_ones_and_the_mean_is_nearer() -> None:
    torch.manual_seed(0)
    layer = SparseBitLinear(64, 48, pattern="2:4", split_sizes=(32, 16))
    x, dy = torch.randn(8, 64), torch.randn(8, 48)
    _, dx, dw = gradients(layer, x, dy)
    layer.backend = backend = KernelBackend("portable", gradients="int8")
    sums = [torch.zeros_like(dx), torch.zeros_like(dw)]
    draws = 64
    for seed in range(draws):
        layer.weight.grad = None
        backend.seed = torch.tensor([seed])
        _, dx8, dw8 = gradients(layer, x, dy)
        assert relative_rms(dx8, dx) < 0.02
        assert relative_rms(dw8, dw) < 0.02
        sums[0] += dx8 / draws
        sums[1] += dw8 / draws
    single = relative_rms(dx8, dx), relative_rms(dw8, dw)
    means = relative_rms(sums[0], dx), relative_rms(sums[1], dw)
    assert all(mean < 2 * one / draws**0.5 for one, mean in zip(single, means, strict=True))


def test_int8_gradients_need_a_seed() -> None:
    layer = SparseBitLinear(32, 16, pattern="2:4")
    layer.backend = KernelBackend("portable", gradients="int8")
    with pytest.raises(ValueError, match="seed"):
        layer(torch.randn(2, 32))


def train(
    plugin: SparseTernaryPrecision | None,
    ckpt_path: str | None = None,
    callbacks: Sequence[Callback] = (),
    checkpointing: bool = False,
    validate: bool = False,
    **options: object,
) -> Run:
    losses = Losses()
    plugins = [] if plugin is None else [plugin]
    trainer = quiet_trainer([*callbacks, losses], plugins=plugins, **({"max_steps": 2} | options))
    loader = token_loader(batches=1, batch_size=2, length=5)
    module = small_module(pattern="2:4", activation_checkpointing=checkpointing, **TINY)
    trainer.fit(module, loader, loader if validate else None, ckpt_path=ckpt_path)
    return Run(trainer, losses.values)


def test_a_model_on_the_plugin_follows_the_reference() -> None:
    expected = train(None).losses
    assert train(SparseTernaryPrecision("int8", dtype="fp32")).losses == pytest.approx(expected, abs=1e-4)
    near = train(SparseTernaryPrecision("int8", gradients="int8", dtype="fp32")).losses
    assert near == pytest.approx(expected, abs=2e-2)
    assert near != expected


def test_int8_gradients_are_reproducible_and_resume_exactly(tmp_path: Path) -> None:
    def plugin(seed: int = 0) -> SparseTernaryPrecision:
        return SparseTernaryPrecision("int8", gradients="int8", dtype="fp32", seed=seed)

    whole = train(plugin(), max_steps=3).losses
    assert train(plugin(seed=20_240_101)).losses[1] != whole[1]  # a date
    half = train(plugin(), max_steps=1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = train(plugin(), str(tmp_path / "half.ckpt"), max_steps=3)
    assert half.losses + rest.losses == whole


def test_recomputed_activations_round_as_the_first_ones_did() -> None:
    plugins = [SparseTernaryPrecision("int8", gradients="int8", dtype="fp32") for _ in range(2)]
    assert train(plugins[0], checkpointing=True).losses == train(plugins[1]).losses


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("recomputed", [True, "mlp"])
def test_recomputed_blocks_do_not_quantise_again(
    recomputed: bool | str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, blocks, interpreting = [], swiglu.blocks, quantize.interpreting
    monkeypatch.setattr(swiglu, "blocks", lambda features: runs.append("swiglu") or blocks(features))
    monkeypatch.setattr(quantize, "interpreting", lambda: runs.append("tokens") or interpreting())
    module = small_module(pattern="2:4", activation_checkpointing=recomputed, **TINY)
    backend = KernelBackend("portable")
    for layer in ternary_layers(module).values():
        layer.backend = backend
    if compile:
        module.model.compile_blocks()
    tokens = torch.randint(32, (2, 9))
    module.model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert runs.count("swiglu") == TINY["n_layers"]
    assert runs.count("tokens") == (0 if compile else 3 * TINY["n_layers"])  # compiled: plain PyTorch, fused
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_callbacks_and_averages_see_what_they_see_on_the_reference() -> None:
    def run(plugin: SparseTernaryPrecision | None) -> tuple[list[float], float]:
        callbacks = [MaskRefresh(interval=2), DenseToSparseRamp("rows", end=0.5), SparseEMAWeightAveraging(decay=0.5)]
        trained = train(plugin, callbacks=callbacks, validate=True, max_steps=3)
        return trained.losses, float(trained.trainer.callback_metrics["val/loss"])

    expected, val = run(None)
    losses, averaged = run(SparseTernaryPrecision("int8", dtype="fp32"))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert averaged == pytest.approx(val, abs=1e-4)
    assert averaged != pytest.approx(losses[-1], abs=1e-4)


def test_two_models_on_one_plugin_draw_seeds_of_their_own() -> None:
    plugin = SparseTernaryPrecision("int8", gradients="int8", dtype="fp32")
    fabric = Fabric(accelerator="cpu", plugins=plugin)
    models = [torch.nn.Sequential(SparseBitLinear(8, 8, pattern="2:4")) for _ in range(2)]
    wrapped = [fabric.setup(model) for model in models]
    seeds = []
    for _ in range(2):
        for model, each in zip(models, wrapped, strict=True):
            fabric.backward(each(torch.randn(2, 8)).sum())
            backend = model[0].backend
            assert isinstance(backend, KernelBackend)
            assert backend.seed is not None
            seeds.append(int(backend.seed))
    assert len(set(seeds)) == 4
    plugin.teardown()
    assert {model[0].backend.name for model in models} == {"reference"}


def test_tokens_are_saved_for_the_backward_as_int8() -> None:
    layer = SparseBitLinear(64, 48, pattern="2:4")
    layer.backend = KernelBackend("portable")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        layer(torch.randn(40, 64, requires_grad=True))
    assert [tensor.dtype for tensor in saved if tensor.shape == (40, 64)] == [torch.int8]


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_what_comes_after_a_layer_may_work_in_place(kind: Gradients) -> None:
    torch.manual_seed(0)
    layer = SparseBitLinear(16, 16, pattern="2:4", bias=False)
    found = []
    for inplace in (False, True):
        layer.backend = backend = KernelBackend("portable", gradients=kind)
        backend.seed = torch.tensor([1])
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x)
        if inplace:
            y += x
        else:
            y = y + x
        y = torch.nn.functional.relu(y, inplace=inplace)
        y.square().sum().backward()
        found.append((x.grad, layer.weight.grad))
        layer.weight.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("gradients_", "drops"), [("int8", True), ("int8-dx", True), ("bf16", False)])
def test_codes_that_only_packed_words_are_read_for_are_dropped(gradients_: Gradients, drops: bool) -> None:
    torch.manual_seed(0)
    layer = SparseBitLinear(96, 40, pattern="2:4")
    codes = layer.ternary()[0]
    layer.backend = KernelBackend("hopper-sparse", gradients=gradients_)
    layer.prepare()
    assert (layer._prepared.codes is None) == drops
    assert torch.equal(layer.ternary()[0], codes)
    layer.set_rounding(0.5, 1.0)  # Now the forward reads the codes.
    layer.prepare()
    assert torch.equal(layer._prepared.codes, codes)
