"""The precision plugin without a GPU: what it leaves unchanged, what it refuses, and which loops may use it."""

import gc
import pickle
import weakref

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from sbn_kernels.runtime.capability import Needs
from torch import nn

from sbn_lightning import (
    SparseBitNet,
    SparseTernaryPrecision,
    TernarySparseConversion,
    TransformerConfig,
    convert_linears,
    revert_linears,
)
from sbn_lightning.backends import candidates, selection
from sbn_lightning.backends.reference import REFERENCE, ReferenceBackend
from sbn_lightning.backends.selection import Choice, choose, decide, table
from sbn_lightning.backends.timing import Trial
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import SparseBitLinear
from sbn_lightning.sparsity.ternary import quantize_activations
from sbn_lightning.training import precision
from tests.helpers import (
    ForeignModule,
    Interrupted,
    Losses,
    quiet_trainer,
    regression_loader,
    small_module,
    token_loader,
)


def fit(module, plugins=(), callbacks=(), **options):
    losses = Losses()
    trainer = quiet_trainer([losses, *callbacks], plugins=list(plugins), **options)
    trainer.fit(module, token_loader())
    return trainer, losses.values


def test_on_a_cpu_auto_is_the_reference_bit_for_bit(caplog):
    plain, with_plugin = small_module(), small_module()
    _, expected = fit(plain)
    with caplog.at_level("INFO"):
        _, losses = fit(with_plugin, [SparseTernaryPrecision(dtype="fp32")])
    assert losses == expected
    assert "model.blocks.*.attention.qkv (2)" in caplog.text
    assert "tensors are on the CPU" in caplog.text
    states = plain.state_dict(), with_plugin.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_move_between_runs_with_and_without_the_plugin(tmp_path, first):
    plugins = [[SparseTernaryPrecision(dtype="fp32")], []]
    _, expected = fit(small_module())
    trainer, begin = fit(small_module(), plugins[not first], max_steps=3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    losses = Losses()
    trainer = quiet_trainer([losses], plugins=plugins[first])
    trainer.fit(small_module(), token_loader(), ckpt_path=tmp_path / "three.ckpt")
    assert begin == expected[:3]
    assert len(losses.values) == 3


def test_parameters_stay_float32_and_bf16_is_autocast():
    module, seen = small_module(), []
    for layer in module.modules():
        if isinstance(layer, SparseBitLinear):
            layer.register_forward_hook(lambda layer, inputs, y: seen.append(y.dtype))
    trainer, _ = fit(module, [SparseTernaryPrecision()])
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert trainer.precision == "bf16-mixed"


def test_gradients_are_clipped_with_a_fused_optimiser():
    module = small_module()
    make = module._make_optimizer
    module._make_optimizer = lambda groups: make(groups, fused=True)
    norms = []

    class Norm(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.extend([torch.nn.utils.get_total_norm(grads).item()] if grads else [])

    fit(module, [SparseTernaryPrecision()], [Norm()], gradient_clip_val=0.01)
    assert norms
    assert max(norms) <= 0.0101


def test_fabric_gives_the_losses_of_a_loop_without_the_plugin():
    def run(plugins):
        module = small_module()
        fabric = Fabric(accelerator="cpu", plugins=plugins)
        model, optimizer = fabric.setup(module.model, torch.optim.AdamW(module.parameters(), lr=1e-2))
        model.mark_forward_method("loss")
        losses = []
        for batch in token_loader():
            optimizer.zero_grad()
            with fabric.autocast():
                loss = model.loss(batch[:, :-1], batch[:, 1:])
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain = run([])
    assert run([SparseTernaryPrecision(dtype="fp32")]) == plain
    assert run([SparseTernaryPrecision()]) == pytest.approx(plain, rel=0.05)


def test_outputs_of_a_forward_in_fabric_have_the_dtype_of_fabrics_own_bf16_mixed():
    """A loss outside the model is then computed in float32."""
    tokens = next(iter(token_loader()))

    def run(**options):
        fabric = Fabric(accelerator="cpu", **options)
        model = fabric.setup(small_module().model)
        logits = model(tokens[:, :-1])
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    logits, loss = run(plugins=SparseTernaryPrecision())
    expected, expected_loss = run(precision="bf16-mixed")
    assert logits.dtype == expected.dtype == torch.float32
    assert torch.equal(loss, expected_loss)
    assert torch.equal(logits, logits.bfloat16().float())  # computed in bfloat16
    assert run(plugins=SparseTernaryPrecision(dtype="fp32"))[0].dtype == torch.float32

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = SparseBitLinear(8, 8, pattern="2:4")

        def forward(self, x):
            return {"y": self.layer(x), "indices": torch.arange(2), "name": "a"}

    given = Fabric(accelerator="cpu", plugins=SparseTernaryPrecision()).setup(Pair())(torch.randn(2, 8))
    assert (given["y"].dtype, given["indices"].dtype, given["name"]) == (torch.float32, torch.int64, "a")


def test_a_lightning_module_trains_in_fabric_too():
    module = ForeignModule()
    convert_linears(module, "2:4")
    fabric = Fabric(accelerator="cpu", plugins=SparseTernaryPrecision())
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    before = [p.detach().clone() for p in module.parameters()]
    model.mark_forward_method("training_step")
    loss = model.training_step(next(iter(regression_loader())), 0)
    fabric.backward(loss, model=model)
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_foreign_module_needs_only_the_callback_and_the_plugin(caplog):
    with caplog.at_level("INFO"):
        trainer = quiet_trainer([TernarySparseConversion("2:4")], plugins=[SparseTernaryPrecision()])
        trainer.fit(ForeignModule(), regression_loader())
    assert "SparseTernaryPrecision(backend='auto'" in caplog.text


@pytest.mark.parametrize("backend", ["sparse", "int8"])
def test_what_the_hardware_cannot_do_is_an_error_that_says_what_it_can(backend):
    if torch.cuda.is_available():
        pytest.skip("the CPU is not what limits here")
    with pytest.raises(ConfigError, match=f'backend "{backend}" cannot run on the CPU: .*; use auto, reference'):
        fit(small_module(pattern="2:4"), [SparseTernaryPrecision(backend)])


def test_options_reach_the_backend_of_each_layer(monkeypatch):
    pytest.importorskip("triton")
    choice = Choice("int8", "portable", "")
    monkeypatch.setattr(precision, "choose", lambda layers, *rest: dict.fromkeys(layers, choice))
    module = small_module(pattern="2:4")
    plugin = SparseTernaryPrecision(gradients="int8", saved_gates="int8", join_layers=False)
    plugin.convert_module(module)
    with plugin.forward_context():
        backends = [layer.backend for layer in module.modules() if isinstance(layer, SparseBitLinear)]
    assert {(backend.gradients, backend.saved_gates, backend.joins) for backend in backends} == {("int8", True, False)}


def test_saved_gates_on_the_reference_are_an_error():
    with pytest.raises(ConfigError, match='saved_gates="int8" needs integer tensor cores'):
        SparseTernaryPrecision("reference", saved_gates="int8")


def test_a_distillation_refuses_the_head_in_8_bits():
    config = TransformerConfig(head_precision="int8")
    with pytest.raises(ConfigError, match="a distillation has no head in 8 bits"):
        SparseBitNet(config, distillation={"teacher": "somewhere"})


def test_int8_gradients_on_the_reference_are_an_error():
    with pytest.raises(ConfigError, match="integer tensor cores"):
        fit(small_module(), [SparseTernaryPrecision("reference", gradients="int8")])


def test_a_model_without_ternary_layers_is_an_error():
    with pytest.raises(ConfigError, match=r"no SparseBitLinear .* TernarySparseConversion"):
        fit(small_module(linear="dense"), [SparseTernaryPrecision()])


@pytest.mark.parametrize(
    "option", [{"backend": "fast"}, {"gradients": "fp8"}, {"dtype": "fp16"}, {"tokens": 0}, {"saved_gates": "fp8"}]
)
def test_unknown_options_are_named(option):
    (name,) = option
    with pytest.raises(ConfigError, match=name):
        SparseTernaryPrecision(**option)


def only_this_runs(monkeypatch, op):
    """Pretend that the machine has what one kernel needs, and lacks what every other kernel needs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Needs, "missing", lambda self, index: None if self.op == op else "is not here")


def test_a_layer_that_a_backend_cannot_run_is_named(monkeypatch):
    layers = {
        "a": SparseBitLinear(32, 32, pattern="2:4"),
        "b": SparseBitLinear(32, 32, pattern="6:8"),
        "c": SparseBitLinear(32, 32, pattern="2:4", activation_bits=None),
        "d": SparseBitLinear(32, 33, pattern="2:4"),
    }
    device = torch.device("cpu")
    cases = {
        ("sparse_gemm", "b"): "2:4, not 6:8",
        ("sparse_gemm", "c"): "activation_bits=None",
        ("cusparselt", "d"): "multiples of 32, not 32 -> 33",
    }
    for (op, name), reason in cases.items():
        only_this_runs(monkeypatch, op)
        with pytest.raises(ConfigError, match=f"layer {name}: .*{reason}"):
            choose({name: layers[name]}, "sparse", device, torch.float32, 64)
    chosen = choose({"a": layers["a"]}, "sparse", device, torch.float32, 64)
    assert "sparse (cusparselt)" in table({"a": layers["a"]}, chosen)


def test_layers_are_left_on_the_reference_when_a_run_is_over():
    model = nn.Sequential(SparseBitLinear(32, 32, pattern="2:4"))
    plugin = SparseTernaryPrecision()
    plugin.convert_module(model)
    with plugin.forward_context():
        model(torch.randn(2, 32))
    plugin.teardown()
    assert model[0].backend.name == "reference"


def test_a_refused_model_is_refused_at_every_call():
    model = nn.Sequential(SparseBitLinear(32, 32, pattern="6:8"))
    wrapped = Fabric(accelerator="cpu", plugins=SparseTernaryPrecision("sparse")).setup(model)
    for _ in range(2):
        with pytest.raises(ConfigError, match='"sparse" cannot run'):
            wrapped(torch.randn(2, 32))


def test_a_plugin_keeps_no_model_alive():
    plugin = SparseTernaryPrecision()
    models = [nn.Sequential(SparseBitLinear(32, 32, pattern="2:4")) for _ in range(2)]
    wrapped = [Fabric(accelerator="cpu", plugins=plugin).setup(model) for model in models]
    for model in wrapped:
        model(torch.randn(2, 32))
    gone = [weakref.ref(model[0]) for model in models]
    del model, models, wrapped
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_layer_that_is_reverted_on_the_way_is_left_alone():
    model = nn.Sequential(SparseBitLinear(32, 32, pattern="2:4"), SparseBitLinear(32, 32, pattern="2:4"))
    plugin = SparseTernaryPrecision(dtype="fp32")
    plugin.convert_module(model)
    for _ in range(2):
        with plugin.forward_context():
            model(torch.randn(2, 32))
        revert_linears(model[0])
        revert_linears(model)
    plugin.teardown()
    assert set(vars(model[0])) == set(vars(nn.Linear(32, 32)))


def test_one_plugin_serves_several_runs_and_commands():
    plugin, losses = SparseTernaryPrecision(dtype="fp32"), []
    for _ in range(2):
        module = small_module()
        trainer, values = fit(module, [plugin])
        losses.append(values)
        with torch.no_grad():
            expected = module.model.loss(*(next(iter(token_loader()))[:, i : i + 16] for i in (0, 1)))
        for evaluate in (trainer.validate, trainer.test):
            (metrics,) = evaluate(module, token_loader(batches=1), verbose=False)
            assert next(iter(metrics.values())) == pytest.approx(expected.item())
        assert len(trainer.predict(module, token_loader(batches=1))) == 1
    assert losses[0] == losses[1]


def test_after_an_exception_the_plugin_is_as_new():
    class Interrupt(Callback):
        def on_train_batch_end(self, *_):
            raise Interrupted

    plugin = SparseTernaryPrecision(dtype="fp32")
    with pytest.raises(Interrupted):
        fit(small_module(), [plugin], [Interrupt()])
    assert pickle.loads(pickle.dumps(plugin))._models == []
    assert fit(small_module(), [plugin])[1] == fit(small_module())[1]


def test_tensors_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    layers = {"a": SparseBitLinear(32, 32, pattern="2:4")}
    with pytest.raises(ConfigError, match='"int8" cannot run on the CPU: tensors are on the CPU'):
        choose(layers, "int8", torch.device("cpu"), torch.float32, 64)


def test_a_backend_that_fails_at_the_trial_is_left_out(monkeypatch):
    class Failing(ReferenceBackend):
        def prepare(self, *args):
            raise RuntimeError("architecture mismatch\nand more")

    trial = selection.Trial
    only_this_runs(monkeypatch, "cusparselt")
    monkeypatch.setattr(candidates, "_index", lambda device: 0)
    monkeypatch.setattr(selection.Choice, "make", lambda self, gradients: Failing())
    monkeypatch.setattr(selection, "milliseconds", lambda runs, device: ({name: [1.0] for name in runs}, {}))
    monkeypatch.setattr(selection, "Trial", lambda layer, device, *rest: trial(layer, torch.device("cpu"), *rest))
    chosen = choose({"a": SparseBitLinear(32, 32, pattern="2:4")}, "auto", torch.device("cuda"), torch.float32, 64)
    assert chosen["a"].backend == "reference"
    assert "sparse: architecture mismatch" in chosen["a"].why


@pytest.mark.parametrize("bits", [8, 4])
def test_a_backend_with_a_wrong_product_is_told_from_a_right_one(bits):
    class Lossy(ReferenceBackend):
        def linear(self, x, latent, prepared, gradient_mask, activation_bits, swiglu=False):
            y = super().linear(x, latent, prepared, gradient_mask, activation_bits, swiglu)
            y[0, 0] += 40 * prepared.row_scale[0] * x[0].abs().max() / (127 if bits == 8 else 1)
            return y

    class Scaleless(ReferenceBackend):
        def linear(self, x, latent, prepared, gradient_mask, activation_bits, swiglu=False):
            x8, _ = quantize_activations(x, activation_bits)
            return (x8.float() @ prepared.codes.float().t() * prepared.row_scale).to(x.dtype)

    class Shifted(ReferenceBackend):
        def linear(self, x, latent, prepared, gradient_mask, activation_bits, swiglu=False):
            x8, scale = quantize_activations(x, activation_bits)
            return (x8.float() @ prepared.codes.float().t() * scale.roll(1, 0) * prepared.row_scale).to(x.dtype)

    layer = SparseBitLinear(64, 48, pattern="2:4", split_sizes=(32, 16), activation_bits=bits)
    trial = Trial(layer, torch.device("cpu"), torch.bfloat16, 40)
    assert trial.agrees(REFERENCE, trial.prepare(REFERENCE))
    for wrong in (Lossy(), Scaleless(), Shifted()):
        assert not trial.agrees(wrong, trial.prepare(wrong)), wrong


@pytest.mark.parametrize(
    ("samples", "best", "level"),
    [
        ({"reference": [3.0] * 5, "int8": [2.0] * 5, "sparse": [1.0] * 5}, "sparse", False),
        ({"reference": [1.0] * 5, "int8": [2.0] * 5}, "reference", False),
        ({"reference": [1.0] * 5, "int8": [1.02] * 5, "sparse": [1.01] * 5}, "sparse", True),  # within 3 %
        ({"int8": [1.0, 1.3, 1.1, 0.9, 1.2], "sparse": [1.2, 1.1, 1.3, 1.0, 1.25]}, "sparse", True),  # within the noise
        ({"int8": [1.0] * 5, "sparse": [1.1] * 5}, "int8", False),
    ],
)
def test_level_times_are_settled_by_a_fixed_order(samples, best, level):
    for order in (samples, dict(reversed(samples.items()))):
        name, why = decide(order)
        assert name == best
        assert ("level within the noise" in why) == level


def test_layers_of_a_compiled_foreign_model_are_prepared_before_the_graph_and_once_a_step():
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(SparseBitLinear(8, 8, pattern="2:4"), SparseBitLinear(8, 8, pattern="2:4"))
        plugin = SparseTernaryPrecision("reference", dtype="fp32")
        plugin.convert_module(model)
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.5), torch.randn(4, 8)
        losses[compiled] = []
        for _ in range(3):
            made = []
            for _ in range(2):
                with plugin.forward_context():
                    assert model[0].owner_prepares is compiled
                    loss = model(x).square().mean()
                loss.backward()
                made.append(id(model[0]._prepared))
            assert made[0] == made[1]
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(float(loss.detach()))
        assert not model[0].owner_prepares
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][0] > losses[True][2]
    model.automatic_optimization = False  # as in a LightningModule that steps its optimiser itself
    with plugin.forward_context():
        assert not model[0].owner_prepares
