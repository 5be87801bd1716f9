"""The precision plugin on a GPU: every backend agrees with the reference, alone and in the usual combinations."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from sbn_lightning import (
    MaskedWeightDecay,
    MaskRefresh,
    NonFiniteGuard,
    SparseTernaryPrecision,
    SparsityPatternLogger,
    TernarySparseConversion,
    TokenThroughput,
    WeightDecaySchedule,
)
from sbn_lightning.backends.selection import choose, engines
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear, masked_layers
from sbn_lightning.sparsity.ternary import quantize_activations
from tests.helpers import Losses, quiet_trainer, small_module, token_loader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {"d_model": 256, "d_ffn": 512, "vocab_size": 512, "n_layers": 2}


def supported():
    found, _ = engines(torch.device("cuda"))
    return found


def need(backend):
    if backend not in supported():
        pytest.skip(f"{backend} does not run on this GPU")


def fit(plugin, compile=False, callbacks=(), pattern="2:4", **options):
    torch.manual_seed(0)
    changes = {key: options.pop(key) for key in ("activation_checkpointing", "activation_bits") if key in options}
    module = small_module(**SHAPE, pattern=pattern, **changes)
    module.hparams["compile"] = compile
    losses = Losses()
    defaults = {"accelerator": "gpu", "devices": 1, "max_steps": 8, "plugins": [plugin]}
    trainer = quiet_trainer([losses, *callbacks], **(defaults | options))
    trainer.fit(module, token_loader(batch_size=8, length=65, vocab_size=512))
    return trainer, module, torch.tensor(losses.values)


def reference(**options):
    return fit(SparseTernaryPrecision("reference", dtype="fp32"), **options)[2]


@pytest.mark.parametrize("gradients", ["bf16", "int8"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("backend", "pattern"), [("sparse", "2:4"), ("int8", "2:4"), ("int8", "6:8"), ("auto", "6:8")])
def test_training_follows_the_reference(backend, pattern, compile, gradients):
    if backend != "auto":
        need(backend)
    expected = reference(pattern=pattern)
    _, module, losses = fit(SparseTernaryPrecision(backend, gradients, "fp32"), compile, pattern=pattern)
    torch.testing.assert_close(losses, expected, rtol=2e-2 if gradients == "int8" else 2e-3, atol=0)
    assert all(p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "max_steps": 4},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "compile": True},
        {"activation_bits": 4},
        {"callbacks": [MaskRefresh(interval=3)], "compile": True},
        {"gradient_clip_val": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_it_combines(options):
    need("sparse")
    expected = reference(**options)
    torch.testing.assert_close(
        fit(SparseTernaryPrecision("sparse", dtype="fp32"), **options)[2], expected, rtol=2e-3, atol=0
    )


def test_bf16_is_near_float32():
    expected = reference()
    torch.testing.assert_close(fit(SparseTernaryPrecision("auto"))[2], expected, rtol=1e-2, atol=0)


def test_a_checkpoint_moves_between_backends_and_to_the_cpu(tmp_path):
    need("sparse")
    trainer, module, _ = fit(SparseTernaryPrecision("sparse", dtype="fp32"))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    masks = {name: layer.mask.cpu() for name, layer in masked_layers(module)}
    codes = {name: layer.ternary()[0].cpu() for name, layer in masked_layers(module)}
    for options in ({"accelerator": "cpu"}, {"accelerator": "gpu", "plugins": [SparseTernaryPrecision("int8")]}):
        fresh = small_module(**SHAPE, pattern="2:4")
        quiet_trainer(**({"max_steps": 8, "devices": 1} | options)).fit(
            fresh, token_loader(batch_size=8, length=65, vocab_size=512), ckpt_path=tmp_path / "x.ckpt"
        )
        for name, layer in masked_layers(fresh):
            assert torch.equal(layer.mask.cpu(), masks[name])
            assert (layer.ternary()[0].cpu() != codes[name]).float().mean() < 1e-4


def test_fabric():
    need("sparse")

    def run(plugin):
        module = small_module(**SHAPE, pattern="2:4")
        fabric = Fabric(accelerator="gpu", devices=1, plugins=[plugin])
        model, optimizer = fabric.setup(module.model, torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True))
        model.mark_forward_method("loss")
        losses = []
        for batch in token_loader(batch_size=8, length=65, vocab_size=512):
            batch = fabric.to_device(batch)
            optimizer.zero_grad()
            with fabric.autocast():
                loss = model.loss(batch[:, :-1], batch[:, 1:])
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    expected = run(SparseTernaryPrecision("reference", dtype="fp32"))
    torch.testing.assert_close(run(SparseTernaryPrecision("sparse", dtype="fp32")), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_foreign_model_gets_the_kernels_by_callback_and_plugin(compiled, capsys):
    transformers = pytest.importorskip("transformers")
    from lightning.pytorch import LightningModule

    class Foreign(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
            config = transformers.Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2)
            self.model = transformers.Qwen2ForCausalLM(config)
            if compiled:
                self.model.model.compile()

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    found = []
    for plugins in (
        [SparseTernaryPrecision("reference", dtype="fp32")],
        [SparseTernaryPrecision("auto", dtype="fp32")],
    ):
        losses = Losses()
        callbacks = [losses, TernarySparseConversion("2:4")]
        trainer = quiet_trainer(callbacks, accelerator="gpu", devices=1, plugins=plugins)
        trainer.fit(Foreign(), token_loader(batch_size=8, length=65, vocab_size=512))
        found.append(torch.tensor(losses.values))
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=0)


def test_an_impossible_request_names_the_hardware_and_what_works():
    for name, reason in engines(torch.device("cuda"))[1].items():
        with pytest.raises(ConfigError, match=f'backend "{name}" cannot run on .*{torch.cuda.get_device_name()}'):
            fit(SparseTernaryPrecision(name))
        assert reason


@pytest.mark.parametrize("gradients", ["bf16", "int8"])
def test_a_compiled_layer_is_one_graph(gradients):
    need("sparse")
    layer = SparseBitLinear(256, 192, pattern="2:4").cuda()
    plugin = SparseTernaryPrecision("sparse", gradients)
    plugin.convert_module(layer)
    run = torch.compile(layer, fullgraph=True)
    for tokens in (16, 300):
        x = torch.randn(tokens, 256, device="cuda", requires_grad=True)
        with plugin.forward_context():
            y = run(x)
        y.float().square().sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_reference_quantises_alike_on_gpu_and_cpu(dtype, bits):
    """If max|x| is a multiple of 127 / 2^k, many values lie halfway, and the last bit of the scale decides."""
    x = torch.randint(-254, 255, (64, 512), generator=torch.Generator().manual_seed(0))
    x[:, 0] = 254
    x = (x / 2).to(dtype)
    if bits == 4:  # division by sqrt(7) always rounds, and the GPU sums in another order
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (here, scale), (there, other) = quantize_activations(x, bits), quantize_activations(x.cuda(), bits)
    torch.testing.assert_close(other.cpu(), scale, rtol=0 if bits == 8 else 1e-6, atol=0)
    assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("kind", [SparseBitLinear, SparseLinear])
def test_the_reference_does_not_synchronise(kind):
    options = {"split_sizes": (100, 92)} if kind is SparseBitLinear else {}
    layer = kind(256, 192, pattern="2:4", **options).cuda()
    x = torch.randn(8, 256, device="cuda", requires_grad=True)
    # A layer without an optimiser waits, because it asks the GPU whether its weight was written to.
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.refresh_mask()
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_small_batches_and_generation_shapes():
    need("sparse")
    torch.manual_seed(0)
    layer = SparseBitLinear(256, 192, bias=False, pattern="2:4").cuda()  # a bias could cancel all but the rounding
    model = nn.Sequential(layer)
    plugin = SparseTernaryPrecision("sparse")
    twin = SparseBitLinear(256, 192, bias=False, pattern="2:4").cuda()
    twin.load_state_dict(layer.state_dict())
    plugin.convert_module(model)
    for tokens in (1, 7, 64, 65, 300, 0):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad(), plugin.forward_context():
            y = model(x)
        assert y.shape == (tokens, 192)
        if tokens:
            torch.testing.assert_close(y, twin(x), rtol=1e-2, atol=1e-3)


class NoWaiting(Callback):
    """Raises an error if the host waits for the device, from the fourth step on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("compile", "loss"), [(False, "plain"), (True, "chunked")])
@pytest.mark.parametrize("options", [{"gradients": "bf16"}, {"gradients": "int8"}], ids=str)
def test_a_step_of_a_trainer_does_not_wait_for_the_gpu(options, compile, loss, tmp_path):
    """The run has the callbacks of the recipes. Only steps that log or look at the pattern may wait."""
    need("sparse")
    callbacks = [
        NoWaiting(),
        MaskRefresh(interval=2),
        WeightDecaySchedule(until=0.5),
        MaskedWeightDecay(1.0, until=0.9),
    ]
    callbacks += [SparsityPatternLogger(50), TokenThroughput(window=4), NonFiniteGuard()]
    torch.manual_seed(0)
    module = small_module(**SHAPE, pattern="2:4", loss=loss)
    module.hparams["compile"] = compile
    trainer = quiet_trainer(
        callbacks, accelerator="gpu", devices=1, max_steps=8, accumulate_grad_batches=2, gradient_clip_val=1.0,
        log_every_n_steps=50, plugins=[SparseTernaryPrecision("sparse", **options)], logger=TensorBoardLogger(tmp_path),
    )  # fmt: skip
    trainer.fit(module, token_loader(batches=16, batch_size=8, length=65, vocab_size=512))
    assert trainer.global_step == 8


@pytest.mark.parametrize(("in_features", "out_features"), [(2048, 2560), (896, 1152), (4096, 14336)])
def test_auto_makes_the_same_choice_twice(in_features, out_features):
    layers = {"a": SparseBitLinear(in_features, out_features, pattern="2:4", device="cuda")}
    device = layers["a"].weight.device
    first, second = (choose(layers, "auto", device, torch.bfloat16, 4096)["a"] for _ in range(2))
    assert (first.backend, first.kernel) == (second.backend, second.kernel), (first.why, second.why)
    assert " ms" in first.why


@pytest.mark.parametrize("gradients", ["bf16", "int8"])
def test_what_comes_after_a_layer_may_work_in_place(gradients):
    need("int8")
    model = nn.Sequential(SparseBitLinear(64, 64, pattern="2:4", bias=False), nn.ReLU(inplace=True)).cuda()
    plugin = SparseTernaryPrecision("int8", gradients)
    plugin.convert_module(model)
    x = torch.randn(3, 5, 64, device="cuda", requires_grad=True)
    with plugin.forward_context():
        y = model(x)
        z = model[0](x)
    z += 1
    (y.float().sum() + z.float().square().sum()).backward()
    assert x.grad is not None
