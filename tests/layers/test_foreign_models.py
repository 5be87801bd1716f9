"""The callbacks on models that know nothing of this package."""

import importlib
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.transformer import Transformer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import SwinTransformer, VisionTransformer

import sbn_lightning
from sbn_lightning import DenseToSparseRamp, MaskRefresh, NMPattern, SparsityPatternLogger, TernarySparseConversion
from sbn_lightning.callbacks.weight_averaging import SparseEMAWeightAveraging
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.conversion import convert_linears, revert_linears
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.sparsity.pattern import nonzeros_per_group, top_n_mask
from tests.helpers import ForeignModule, quiet_trainer, regression_loader

transformers = pytest.importorskip("transformers")

VOCABULARY = 64


def qwen2(tied=True):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_llama_shape(), tie_word_embeddings=tied))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_llama_shape()))


def gpt2():
    shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def _llama_shape():
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return shape | {"num_attention_heads": 4, "num_key_value_heads": 2}


def demo():
    return Transformer(vocab_size=VOCABULARY, ninp=32, nhead=2, nhid=64, nlayers=1, dropout=0.0)


def vit():
    return VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4
    )


def swin():
    return SwinTransformer([2, 2], 16, [2], [2], [2, 2], num_classes=4)


class Training(LightningModule):
    """How a user would train any of these models."""

    def __init__(self, build, in_configure_model=False):
        super().__init__()
        self.build, self.model, self.losses = build, None, []
        if not in_configure_model:
            self.configure_model()

    def configure_model(self):
        if self.model is None:
            torch.manual_seed(1)
            self.model = self.build()

    def training_step(self, batch, batch_idx):
        if isinstance(self.model, transformers.PreTrainedModel):
            loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        elif isinstance(self.model, Transformer):
            loss = F.nll_loss(self.model(batch[0][:, :-1], batch[0][:, 1:]), batch[0][:, 1:].flatten())
        else:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def sequences():
    tokens = torch.randint(VOCABULARY, (8, 13), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(tokens), batch_size=4)


def images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    pictures = torch.randn(16, 3, 16, 16, generator=generator)
    pictures[torch.arange(16), :, labels * 4] += 5
    return DataLoader(TensorDataset(pictures, labels), batch_size=8)


class FirstMasks(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4:  # where the walk of the tests has arrived at 2:4
            self.masks = {name: layer.mask for name, layer in masked_layers(pl_module)}


LLAMA_LAYERS = {
    f"model.model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
}
GPT2_LAYERS = {
    f"model.transformer.h.{i}.{name}"
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}
VIT_LAYERS = {f"model.encoder.layers.encoder_layer_{i}.mlp.{j}" for i in range(2) for j in (0, 3)}
DEMO_LAYERS = {f"model.transformer.{side}coder.layers.0.linear{i}" for side in ("en", "de") for i in (1, 2)}
PACKED = "packed q, k and v are a bare parameter of MultiheadAttention"
OUT_PROJ = "subclass of nn.Linear"


@pytest.mark.parametrize(
    ("build", "loader", "exclude", "converted", "skipped"),
    [
        (qwen2, sequences, (), LLAMA_LAYERS, {"model.lm_head": "shares its weight"}),
        (llama, sequences, ("lm_head",), LLAMA_LAYERS, {"model.lm_head": "excluded by name"}),
        (gpt2, sequences, ("lm_head",), GPT2_LAYERS, {"model.lm_head": "excluded by name"}),
        (
            demo,
            sequences,
            ("model.decoder",),
            DEMO_LAYERS,
            {
                "model.transformer.encoder.layers.0.self_attn.in_proj_weight": PACKED,
                "model.transformer.encoder.layers.0.self_attn.out_proj": OUT_PROJ,
                "model.transformer.decoder.layers.0.multihead_attn.in_proj_weight": PACKED,
                "model.decoder": "excluded by name",
            },
        ),
        (
            vit,
            images,
            ("heads",),
            VIT_LAYERS,
            {
                "model.conv_proj": "one pixel is part of many windows",
                "model.encoder.layers.encoder_layer_1.self_attention.in_proj_weight": PACKED,
                "model.encoder.layers.encoder_layer_1.self_attention.out_proj": OUT_PROJ,
                "model.heads.head": "excluded by name",
            },
        ),
    ],
    ids=["qwen2", "llama", "gpt2", "demo", "vit"],
)
@pytest.mark.parametrize(("in_configure_model", "accumulate"), [(False, 2), (True, 1)])
def test_training(build, loader, exclude, converted, skipped, in_configure_model, accumulate, tmp_path):
    conversion, looks, first = TernarySparseConversion("2:4", exclude=exclude), SparsityPatternLogger(5), FirstMasks()
    trainer = quiet_trainer(
        [first, looks, DenseToSparseRamp("walk", end=1 / 3), MaskRefresh(interval=2), conversion],
        max_steps=12,
        accumulate_grad_batches=accumulate,
        logger=CSVLogger(tmp_path),
    )
    module = Training(build, in_configure_model)
    trainer.fit(module, loader())
    layers = dict(masked_layers(module))
    assert set(conversion.report.converted) == set(layers) == set(looks.counts) == converted
    for name, reason in skipped.items():
        assert reason in conversion.report.skipped[name]
    assert sum(module.losses[-4:]) < 0.9 * sum(module.losses[:4])
    assert looks.total().mask_flips > 0
    for name, layer in layers.items():
        assert nonzeros_per_group(layer.mask, 4).unique().tolist() == [2]
        assert not torch.equal(layer.mask, first.masks[name])
        parts = layer.weight.split(layer.split_sizes or (layer.out_features,))
        assert len(parts) == (3 if "c_attn" in name else 1)
        for part, effective in zip(parts, layer.effective_weight().split([len(part) for part in parts]), strict=True):
            gamma = part.abs().mean().item()
            assert effective.unique().tolist() == pytest.approx([-gamma, 0, gamma])
        assert not layer.effective_weight()[~layer.mask].any()


def test_gpt2_keeps_parameters_and_shapes():
    model = gpt2()
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    convert_linears(model, "2:4")
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == before
    layer = model.transformer.h[0].attn.c_attn
    assert torch.equal(layer.mask, top_n_mask(layer._parameters["weight"].t(), NMPattern(2, 4)))
    model.load_state_dict(other := gpt2().state_dict())  # a dense checkpoint
    assert torch.equal(
        layer.mask, top_n_mask(other["transformer.h.0.attn.c_attn.weight"].t().contiguous(), NMPattern(2, 4))
    )


def test_gpt2_computes_what_its_dense_twin_with_masked_weights_does():
    model, twin = gpt2().eval(), gpt2().eval()
    convert_linears(model, "2:4", kind="masked")
    state = {name: value for name, value in model.state_dict().items() if "mask_bits" not in name}
    for name, layer in masked_layers(model):
        state[f"{name}.weight"] = (layer.weight * layer.mask).t()
    twin.load_state_dict(state)
    tokens = next(iter(sequences()))[0]
    torch.testing.assert_close(model(tokens).logits, twin(tokens).logits)


@pytest.mark.parametrize("build", [qwen2, gpt2])
def test_revert_and_save_pretrained(build, tmp_path):
    torch.manual_seed(0)
    module, tokens = Training(build), next(iter(sequences()))[0]
    conversion = TernarySparseConversion("2:4", activation_bits=None)
    trainer = quiet_trainer([conversion], max_steps=3)
    trainer.fit(module, sequences())
    module.eval()
    expected = module.model(tokens).logits
    plain = build()
    assert conversion.revert(module) == conversion.report.converted
    assert {name: type(m) for name, m in module.model.named_modules()} == {
        name: type(m) for name, m in plain.named_modules()
    }
    assert module.model.lm_head.weight is module.model.get_input_embeddings().weight
    torch.testing.assert_close(module.model(tokens).logits, expected)
    module.model.save_pretrained(tmp_path / "model")
    again = build().from_pretrained(tmp_path / "model").eval()
    assert again.lm_head.weight is again.get_input_embeddings().weight
    torch.testing.assert_close(again(tokens).logits, expected)
    trainer.save_checkpoint("reverted.ckpt")
    other = Training(build)
    other.load_state_dict(torch.load("reverted.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(other.eval().model(tokens).logits, expected)


@pytest.mark.parametrize(("build", "in_configure_model"), [(qwen2, False), (gpt2, True)])
def test_dense_to_sparse_from_a_dense_checkpoint(build, in_configure_model):
    dense = Training(build)
    trainer = quiet_trainer(max_steps=4)
    trainer.fit(dense, sequences())
    trainer.save_checkpoint("dense.ckpt")
    seen = []

    class Start(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not seen:
                seen.append(trainer.global_step)
                seen.append(trainer.optimizers[0].state_dict()["state"][0]["step"].item())
                expected = dense.state_dict()
                for name, layer in masked_layers(pl_module):
                    parameter = layer._parameters["weight"]
                    assert torch.equal(parameter, expected[f"{name}.weight"])
                    assert torch.equal(layer.mask, top_n_mask(layer.weight, NMPattern(2, 4)))

    module = Training(build, in_configure_model)
    sparse = quiet_trainer([TernarySparseConversion("2:4"), MaskRefresh(), Start()], max_steps=12)
    sparse.fit(module, sequences(), ckpt_path="dense.ckpt")
    assert seen == [4, 4]
    assert len(module.losses) == 8
    assert module.losses[-1] < module.losses[0]


# EMA, torch.compile


def test_ema_of_transposed_weights():
    module = Training(gpt2)
    ema = SparseEMAWeightAveraging(decay=0.5)
    quiet_trainer([ema, TernarySparseConversion("2:4"), MaskRefresh(interval=3)], max_steps=5).fit(module, sequences())
    for (_, layer), (_, average) in zip(masked_layers(module), masked_layers(ema._average_model.module), strict=True):
        assert torch.equal(layer.weight, average.weight)
        assert torch.equal(layer.mask, top_n_mask(layer.weight.contiguous(), NMPattern(2, 4)))


# Layers that a model computes with, but does not call


def test_layers_that_are_bypassed_are_an_error():
    conversion = TernarySparseConversion("2:4", exclude=("head",))
    with pytest.raises(ConfigError, match=r"without calling them.*attn\.qkv, .*attn\.proj.*exclude them"):
        quiet_trainer([conversion], max_steps=1).fit(Training(swin), images())
    excluding = TernarySparseConversion("2:4", exclude=("head", "attn"))
    module = Training(swin)
    quiet_trainer([excluding], max_steps=2).fit(module, images())
    assert len(module.losses) == 2
    assert all("mlp" in name or "reduction" in name for name in excluding.report.converted)
    assert not any(layer._forward_pre_hooks for _, layer in masked_layers(module))


@pytest.mark.parametrize("padding", [False, True])
def test_fused_inference_of_torch_transformers_is_switched_off_and_back_on(padding):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None

    def outputs():
        y = []
        for training in (True, False):
            model.train(training)
            with torch.no_grad():
                y.append(model(x, src_key_padding_mask=mask)[:, :3])
        return y

    convert_linears(model, "2:4", activation_bits=None)
    sparse, evaluated = outputs()
    torch.testing.assert_close(sparse, evaluated)
    dense = nn.TransformerEncoder(layer, 2)
    switches = [(m.use_nested_tensor, m.layers[0].activation_relu_or_gelu) for m in (model, dense)]
    assert switches == [(False, 0), (True, 1)]
    revert_linears(model)
    assert (model.use_nested_tensor, model.layers[1].activation_relu_or_gelu) == (True, 1)
    for plain in outputs():
        torch.testing.assert_close(plain, sparse)


class Swapping(Precision):
    """Replaces linear layers, as precision plugins for other number formats do."""

    def convert_module(self, module):
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    copy = nn.Linear(child.in_features, child.out_features)
                    setattr(parent, name, copy)
        return module


def test_a_plugin_that_replaces_converted_layers_is_an_error():
    with pytest.raises(ConfigError, match=r"replaced or reverted.*net\.0, net\.2.*precision plugin"):
        quiet_trainer([TernarySparseConversion("2:4")], plugins=[Swapping()]).fit(ForeignModule(), regression_loader())


class WithTestStep(ForeignModule):
    def test_step(self, batch, batch_idx):
        self.log("test", self.training_step(batch, batch_idx))


def test_one_callback_converts_every_module_it_meets_and_none_twice():
    conversion = TernarySparseConversion("2:4")
    trainer = quiet_trainer([conversion], max_steps=1)
    first, second = WithTestStep(), WithTestStep(in_configure_model=True)
    trainer.fit(first, regression_loader())
    before = dict(masked_layers(first))
    trainer.fit(second, regression_loader())
    assert list(dict(masked_layers(second))) == ["net.0", "net.2"]
    conversion.revert(second)
    trainer.test(second, regression_loader(), verbose=False)
    assert list(masked_layers(second)) == []
    trainer.fit(first, regression_loader())
    assert dict(masked_layers(first)) == before


# Examples


@pytest.mark.parametrize(
    ("example", "options", "pattern", "layers"),
    [
        ("hugging_face", {"model": "llama"}, "2:4", 0),
        ("hugging_face", {"model": "gpt2"}, "2:4", 0),
        ("lightning_demo", {}, "2:4", 8),
        ("torchvision_vit", {}, "6:8", 6),
        ("dense_checkpoint", {}, "2:4", 0),
    ],
)
def test_example(example, options, pattern, layers, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(sbn_lightning.__file__).parents[1] / "examples")
    _, module, *_ = importlib.import_module(example).main(steps=4, **options)
    found, pattern = dict(masked_layers(module)), NMPattern.parse(pattern)
    assert len(found) == layers  # the list is empty if the example ends with a plain model
    assert all((nonzeros_per_group(layer.mask, pattern.m) == pattern.n).all() for layer in found.values())
    for name, linear in module.named_modules():
        if not found and "mlp" in name and hasattr(linear, "weight"):
            values = linear.weight if isinstance(linear, nn.Linear) else linear.weight.t()
            assert len(values.unique()) == 3
            assert nonzeros_per_group(values, pattern.m).max() <= pattern.n
    assert "loss" in capsys.readouterr().out or example == "torchvision_vit"


def test_a_converted_conv1d_follows_a_fused_optimiser():
    """A fused update does not increment the version counter, so codes from a stale cache would never change."""
    model = nn.Sequential(importlib.import_module("transformers.pytorch_utils").Conv1D(8, 16))
    convert_linears(model, "2:4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        before = model[0].ternary()[0].clone()
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(model[0].ternary()[0], before)
        assert torch.equal(model[0].mask, top_n_mask(model[0].weight, model[0].pattern))
