"""A mixture of experts computes its formulas, balances its load, trains, and leaves and enters in every format."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from sbn_lightning import TernaryTransformer, TransformerConfig
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats import load_model
from sbn_lightning.formats.init_from import load_weights
from sbn_lightning.inference import generate
from sbn_lightning.layers import pack_layers
from sbn_lightning.layers.experts_linear import PackedExperts, Routing
from sbn_lightning.models.families.registry import family_of
from sbn_lightning.models.flops import flops_per_token
from sbn_lightning.models.moe import MixtureOfExperts, busiest, load_balance_loss, loads
from tests.formats.models import save

TOKENS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "vocab_size": 320,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ffn": 64,
    "max_sequence_length": 64,
    "pattern": "2:4",
    "n_experts": 4,
    "d_expert": 24,
}


def make(**options):
    torch.manual_seed(0)
    model = TernaryTransformer(TransformerConfig(**(SHAPE | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def logits(model):
    out = model.eval()(TOKENS)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_a_dense_mixture_computes_its_formula(normalise, activation):
    mixture = make(linear="dense", normalise_experts=normalise, activation=activation).blocks[0].mlp
    x = torch.randn(3, 5, 32)
    gates, downs = mixture.gate_up.weight.chunk(4), mixture.down.weight.chunk(4)
    expected = torch.zeros_like(x)
    for index in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        token = x[tuple(index)]
        p = (mixture.router.weight @ token).softmax(0)
        chosen = p.argsort(descending=True)[:2].tolist()
        total = sum(p[e] for e in chosen) if normalise else 1
        for e in chosen:
            gate, up = (gates[e] @ token).chunk(2)
            hidden = (F.silu(gate) if activation == "silu" else F.relu(gate) ** 2) * up
            expected[tuple(index)] += p[e] / total * (downs[e] @ hidden)
    torch.testing.assert_close(mixture(x), expected)


@pytest.mark.parametrize("kind", ["ternary", "masked"])
def test_sparse_experts_compute_with_their_effective_weights(kind):
    """Without quantised tokens a sparse layer is a dense layer with the effective weight."""
    sparse, dense = make(linear=kind, activation_bits=None), make(linear="dense")
    for own, other in zip(sparse.blocks, dense.blocks, strict=True):
        for name in ("gate_up", "down"):
            getattr(other.mlp, name).weight.data = getattr(own.mlp, name).effective_weight()
        other.mlp.router.weight.data = own.mlp.router.weight.data
        x = torch.randn(7, 32)
        torch.testing.assert_close(own.mlp(x), other.mlp(x))
    kept = sparse.blocks[0].mlp.down.mask.unflatten(-1, (-1, 4)).sum(-1)
    assert kept.unique().tolist() == [2]


def test_a_share_of_the_rounding_reaches_experts():
    """Without any rounding a ternary layer is a masked layer."""
    ternary, masked = make().blocks[0].mlp, make(linear="masked").blocks[0].mlp
    x = torch.randn(7, 32)
    with torch.no_grad():
        rounded = ternary(x)
        for layer in (ternary.gate_up, ternary.down):
            layer.set_rounding(0.0, 0.0)
        torch.testing.assert_close(ternary(x), masked(x))
        for layer in (ternary.gate_up, ternary.down):
            layer.set_rounding(1.0, 1.0)
        assert torch.equal(ternary(x), rounded)


def test_each_expert_has_a_gamma_for_gate_and_for_up():
    mixture = make().blocks[0].mlp
    assert mixture.gate_up.split_sizes == (24,) * 8
    assert mixture.gate_up.ternary()[1].shape == (8,)
    assert mixture.down.ternary()[1].shape == (4,)


def test_the_loss_of_the_load_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model = make()
    routed = []
    for block in model.blocks:
        block.mlp.router.register_forward_hook(lambda module, inputs, out: routed.append(out))
    model(TOKENS)
    ours = load_balance_loss(loads(model))
    torch.testing.assert_close(ours, modeling.load_balancing_loss_func(tuple(routed), 4, 2))
    assert busiest(loads(model)) >= 1
    (gradient,) = torch.autograd.grad(ours, model.blocks[1].mlp.router.weight)
    assert gradient.abs().max() > 0


def test_the_loss_includes_the_load_in_training_only():
    model = make(load_balance=0.5)
    targets = TOKENS.roll(-1, 1)
    training = model.train().loss(TOKENS, targets)
    balance = load_balance_loss(loads(model))
    evaluated = model.eval().loss(TOKENS, targets)
    torch.testing.assert_close(training, evaluated + 0.5 * balance)


@pytest.mark.parametrize("options", [{}, {"linear": "masked"}, {"linear": "dense"}, {"activation_checkpointing": True}])
def test_training_lowers_the_loss_and_checkpointing_changes_no_gradient(options):
    model = make(init_std=0.05, **options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model.loss(TOKENS, TOKENS.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    if options == {"activation_checkpointing": True}:
        plain = make(init_std=0.05).train()
        plain.loss(TOKENS, TOKENS.roll(-1, 1)).backward()
        again = make(init_std=0.05, activation_checkpointing=True).train()
        again.loss(TOKENS, TOKENS.roll(-1, 1)).backward()
        for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), name
    copy.deepcopy(model)  # The load holds tensors with gradients, which cannot be copied.


def test_compiled_blocks_compute_and_learn_the_same():
    plain, compiled = make(n_layers=1).train(), make(n_layers=1).train()
    compiled.compile_blocks(backend="eager")
    for model in (plain, compiled):
        loss = model.loss(TOKENS, TOKENS.roll(-1, 1))
        loss.backward()
    torch.testing.assert_close(loss, plain.loss(TOKENS, TOKENS.roll(-1, 1)))
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_the_router_computes_in_float32_and_keeps_its_dtype(tmp_path):
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        logits_of_router = model.blocks[0].mlp.router(torch.randn(3, 32, dtype=torch.bfloat16))
    assert logits_of_router.dtype == torch.float32
    torch.save(lightning_file.contents(model.config, model.state_dict()), tmp_path / "model.ckpt")
    loaded = load_model(tmp_path / "model.ckpt", dtype=torch.bfloat16).model
    assert loaded.blocks[0].mlp.router.weight.dtype == torch.float32
    assert loaded.embed.weight.dtype == torch.bfloat16


def test_flops_count_the_experts_of_a_token():
    one, many = make(n_experts=2), make(n_experts=16)
    more_router = 6 * 32 * 14 * 2
    assert flops_per_token(many, 16) == flops_per_token(one, 16) + more_router
    mlp = 6 * 2 * 3 * 32 * 24
    plain = TernaryTransformer(TransformerConfig(**(SHAPE | {"n_experts": 0, "d_expert": None, "d_ffn": 24})))
    assert flops_per_token(one, 16) == flops_per_token(plain, 16) + (mlp // 2 + 6 * 32 * 2) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 0}, "d_expert=24 is for a mixture"),
        ({"n_experts_per_token": 5}, "must be 1 to n_experts=4"),
        ({"n_experts": -1}, "must not be negative"),
        ({"mlp_bias": True}, "experts have no mlp_bias"),
        ({"d_expert": 22}, "d_expert"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**(SHAPE | options))


def test_routing_sorts_by_expert_and_undoes_it():
    index = torch.tensor([[2, 0], [0, 3], [2, 3]])
    route = Routing.of(index, 4)
    assert route.counts.tolist() == [2, 0, 2, 2]
    x = torch.arange(3.0).unsqueeze(1)
    assert route.gather(x).flatten().tolist() == [0, 1, 0, 2, 1, 2]
    assert route.combine(route.gather(x), torch.tensor([[1.0, 2], [3, 4], [5, 6]])).flatten().tolist() == [0, 7, 22]


# In and out


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints by kind of layer, and the models that they hold."""
    folder = tmp_path_factory.mktemp("moe")
    made = {}
    for kind in ("ternary", "masked", "dense"):
        for norm in (None, "head", "projection"):
            model = make(linear=kind, qk_norm=norm, normalise_experts=norm != "projection").eval()
            path = folder / f"{kind}-{norm}.ckpt"
            torch.save(lightning_file.contents(model.config, model.state_dict()), path)
            made[kind, norm] = path, model
    return made


@pytest.mark.parametrize("kind", ["ternary", "masked"])
def test_a_packed_folder_computes_the_same(kind, checkpoints, tmp_path):
    path, model = checkpoints[kind, None]
    assert main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out"), "--format", "packed",
                 "--dtype", "float32"]) == 0  # fmt: skip
    loaded = load_model(tmp_path / "out").model
    if kind == "ternary":
        assert isinstance(loaded.blocks[0].mlp.down, PackedExperts)
        assert torch.equal(logits(pack_layers(copy.deepcopy(model))), logits(model))
    assert torch.equal(logits(loaded), logits(model))


def test_a_packed_folder_rounds_embedding_and_head_by_default_and_nothing_else(tmp_path):
    model = make(learnable_scales=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_scale"):
                parameter.normal_(std=0.2)
    torch.save(lightning_file.contents(model.config, model.state_dict()), tmp_path / "m.ckpt")
    assert main(["export", "--checkpoint", str(tmp_path / "m.ckpt"), "--output", str(tmp_path / "out")]) == 0
    in_bfloat16 = (load_model(tmp_path / name, dtype=torch.bfloat16).model for name in ("out", "m.ckpt"))
    assert torch.equal(*map(logits, in_bfloat16))
    loaded = load_model(tmp_path / "out", dtype=torch.float32).model
    assert not torch.equal(logits(loaded), logits(model))
    for weight in (model.embed.weight, model.lm_head.weight):
        weight.data = weight.data.bfloat16().float()
    assert torch.equal(logits(loaded), logits(model))


def test_a_run_starts_from_packed_experts(checkpoints, tmp_path):
    path, model = checkpoints["ternary", None]
    assert main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out"), "--format", "packed"]) == 0
    again = TernaryTransformer(model.config)
    with pytest.warns(UserWarning, match="gamma"):
        load_weights(again, str(tmp_path / "out"))
    assert torch.equal(again.blocks[1].mlp.down.ternary()[0], model.blocks[1].mlp.down.ternary()[0])
    other = TernaryTransformer(TransformerConfig(**(SHAPE | {"n_experts_per_token": 1})))
    with pytest.raises(ConfigError, match="n_experts_per_token: 2"):
        load_weights(other, str(tmp_path / "out"))


ARCHITECTURES = {None: "MixtralForCausalLM", "head": "Qwen3MoeForCausalLM", "projection": "OlmoeForCausalLM"}


@pytest.mark.parametrize("norm", ARCHITECTURES)
def test_transformers_reads_an_export_and_we_read_its_folder(norm, checkpoints, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    path, model = checkpoints["dense", norm]
    assert main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out"), "--format", "hf"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == ARCHITECTURES[norm]
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-4, rtol=2e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.n_experts_per_token == 2
    torch.testing.assert_close(logits(ours.model), logits(model))


def test_a_model_without_experts_is_no_mixture():
    plain = TransformerConfig(**(SHAPE | {"n_experts": 0, "d_expert": None, "qk_norm": "projection"}))
    with pytest.raises(ConfigError, match="no model family"):
        family_of(plain)


def test_an_hf_sbn_export_runs_in_transformers(checkpoints, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    import sbn_lightning.integrations.huggingface  # noqa: F401 (makes the method known)

    path, model = checkpoints["ternary", "head"]
    assert main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out"), "--format", "hf-sbn"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(theirs.model.layers[0].mlp.experts.down_proj, PackedExperts)
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("norm", [None, "head"])
def test_a_gguf_file_holds_each_expert(norm, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = make(d_expert=64, qk_norm=norm).eval()
    path = save(model, tmp_path / "model.ckpt")
    options = ["--format", "gguf", "--quantization", "Q4_0"]
    assert main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out"), *options]) == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "model-Q4_0.gguf")
    architecture = "llama" if norm is None else "qwen3moe"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 64, "expert_feed_forward_length": 64}
    assert wanted.items() <= {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}.items()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    mixture = model.blocks[1].mlp
    gates, ups = mixture.gate_up.effective_weight().unflatten(0, (4, 2, 64)).unbind(1)
    downs = mixture.down.effective_weight().unflatten(0, (4, 32))
    for name, expected in (("ffn_gate_exps", gates), ("ffn_up_exps", ups), ("ffn_down_exps", downs)):
        tensor = tensors[f"blk.1.{name}.weight"]
        assert tensor.shape.tolist() == [*reversed(expected.shape)]  # ggml counts dimensions from the last one
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-3, atol=0)  # gamma in float16
    router = torch.from_numpy(tensors["blk.1.ffn_gate_inp.weight"].data.copy())
    assert torch.equal(router, mixture.router.weight)
    with pytest.raises(ConfigError, match="mixture of experts"):
        load_model(tmp_path / "out" / "model-Q4_0.gguf")


@pytest.mark.parametrize(("form", "norm"), [("gguf", "projection"), ("hf-bitnet", None)])
def test_formats_without_experts_refuse_in_one_line(form, norm, checkpoints, tmp_path, capsys):
    path, _ = checkpoints["ternary", norm]
    assert main(["export", "--checkpoint", str(path), "--output", str(tmp_path / "out"), "--format", form]) == 1
    error = capsys.readouterr().err
    assert "hf-sbn" in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_an_import_refuses_what_the_block_lacks(tmp_path, capsys):
    config = {"model_type": "qwen2_moe", "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["import-hf", "--input", str(tmp_path), "--output", str(tmp_path / "out.ckpt")]) == 1
    assert "from_hugging_face" in capsys.readouterr().err


def test_generation_takes_a_mixture(checkpoints):
    path, model = checkpoints["ternary", None]
    assert isinstance(model.blocks[0].mlp, MixtureOfExperts)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :3].tolist()]
    for prompt, out in zip(prompts, generate(load_model(path).model, prompts, max_new_tokens=4), strict=True):
        rows = torch.tensor([prompt])
        for _ in range(4):
            rows = torch.cat([rows, model(rows)[:, -1:].argmax(-1)], 1)
        assert out == rows[0, len(prompt) :].tolist()
