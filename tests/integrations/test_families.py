"""Any AutoModelForCausalLM trains, resumes, generates and reverts: small random models of 37 families."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from sbn_lightning import MaskRefresh  # noqa: E402
from sbn_lightning.core.errors import ConfigError, DataError  # noqa: E402
from sbn_lightning.inference.loop import generate  # noqa: E402
from sbn_lightning.integrations.huggingface.causal_lm import CausalLM, Network  # noqa: E402
from sbn_lightning.integrations.pytorch import convert, revert  # noqa: E402
from sbn_lightning.layers.masked_linear import masked_layers  # noqa: E402
from sbn_lightning.sparsity.pattern import nonzeros_per_group  # noqa: E402
from tests.helpers import Losses, imported, quiet_trainer, token_loader  # noqa: E402
from tests.integrations.families import FAMILIES, SMALL, build  # noqa: E402

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def step(model, optimizer):
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_there_are_37_of_them():
    assert len(FAMILIES) == 37


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_resumes_generates_and_reverts(name):
    model = build(name)
    report = convert(model, "2:4", exclude=("lm_head", "embed_out"))
    kinds = {layer.rpartition(".")[2] for layer in report.converted}
    assert len(kinds) >= 3
    assert not kinds & {"lm_head", "gate", "router", "embed_out"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = step(model, optimizer)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    second = step(model, optimizer)
    assert second < first

    again = build(name)
    convert(again, "2:4", exclude=("lm_head", "embed_out"))
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert step(again, optimizer) == second

    padded, seen = torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = again.eval().generate(padded, attention_mask=seen, **options)[:, 3:].tolist()
    assert generate(Network(again, "ternary"), [[5, 6, 7], [8, 9]], max_new_tokens=3) == theirs

    masks = {layer: module.mask for layer, module in masked_layers(again)}
    parts = {layer: len(module.split_sizes or (1,)) for layer, module in masked_layers(again)}
    assert sorted(revert(again)) == sorted(masks)
    assert again.state_dict().keys() == build(name).state_dict().keys()
    for layer, mask in masks.items():
        experts = layer.endswith("proj") and ".experts." in layer
        weight = again.get_parameter(layer if experts else f"{layer}.weight")
        weight = weight.flatten(0, 1) if experts else weight
        weight = weight.t() if not experts and type(again.get_submodule(layer)).__name__ == "Conv1D" else weight
        assert nonzeros_per_group(weight * ~mask, 4).max() == 0
        assert weight.abs().unique().numel() <= 1 + parts[layer]


def module(**options):
    torch.manual_seed(0)
    source = {"model_type": "qwen3", "head_dim": 8, **SMALL}
    return CausalLM(source, **({"warmup_steps": 2} | options))


def loader():
    return token_loader(batches=1, batch_size=8, vocab_size=96)  # a resumed run starts a plain loader anew


def test_the_lightning_module_trains_and_resumes_to_the_last_bit(tmp_path):
    whole, seen = module(), Losses()
    trainer = quiet_trainer([seen, MaskRefresh()], max_steps=6)
    trainer.fit(whole, loader(), loader())
    assert seen.values[-1] < seen.values[0]
    assert trainer.callback_metrics["val/perplexity"] > 1

    begun = module(schedule_steps=6)
    trainer = quiet_trainer([MaskRefresh()], max_steps=3)
    trainer.fit(begun, loader())
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    again, later = module(schedule_steps=6), Losses()
    quiet_trainer([later, MaskRefresh()], max_steps=6).fit(again, loader(), ckpt_path=tmp_path / "three.ckpt")
    assert later.values == seen.values[3:]


def test_a_checkpoint_alone_is_enough_and_exports(tmp_path):
    trained = module()
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True).eval()
    assert torch.equal(again(TOKENS), trained.eval()(TOKENS))
    again.export(tmp_path / "folder")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(loaded(input_ids=TOKENS).logits, trained(TOKENS))
    third = CausalLM(str(tmp_path / "folder"), linear="dense")
    assert torch.equal(third.eval()(TOKENS), trained(TOKENS))


def test_dense_and_masked_models_and_what_is_refused(tmp_path):
    assert not dict(masked_layers(module(linear="dense")))
    assert all(type(layer).__name__ == "SparseLinear" for _, layer in masked_layers(module(linear="masked")))
    for source, message in [({}, "without model_type"), ({"model_type": "qwen99"}, "qwen99")]:
        with pytest.raises(ConfigError, match=message):
            CausalLM(source)
    with pytest.raises(DataError, match=r"model.source no/such/folder"):  # no name of the hub, so nothing is asked
        CausalLM("no/such/folder")
    trained = module()
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = CausalLM({"model_type": "llama", **SMALL})
    with pytest.raises(ConfigError, match="the checkpoint is of a qwen3 model, this one is llama"):
        quiet_trainer(max_steps=2).fit(other, loader(), ckpt_path=tmp_path / "one.ckpt")


def test_the_quantiser_needs_no_lightning():
    found, _ = imported("import sbn_lightning.integrations.huggingface", ["lightning", "litdata"])
    assert found == []
