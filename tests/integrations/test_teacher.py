"""A ternary model of transformers learns from its dense teacher."""

from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from lightning.pytorch import LightningDataModule  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from sbn_lightning import RoundingWarmup  # noqa: E402
from sbn_lightning.core.errors import ConfigError, DataError  # noqa: E402
from sbn_lightning.fabric.loop import FabricRun, train  # noqa: E402
from sbn_lightning.integrations.huggingface.causal_lm import CausalLM  # noqa: E402
from sbn_lightning.training.distillation import Distillation  # noqa: E402
from sbn_lightning.training.parameter_groups import LearningRateRule  # noqa: E402
from tests.helpers import Losses, quiet_trainer, token_loader  # noqa: E402
from tests.integrations.families import build  # noqa: E402

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense Gemma 2, whose logits are capped after the head."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "gemma2"
    build("gemma2").save_pretrained(path)
    return str(path)


def student(folder, **options):
    rules = [LearningRateRule("*embed*", 0.3)]
    distillation = Distillation(folder, **({"language_model": 0.5} | options))
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    return CausalLM(folder, "ternary", "2:4", optimizer=optimizer, distillation=distillation, learning_rates=rules)


class Data(LightningDataModule):
    def train_dataloader(self):
        return token_loader(batches=3, vocab_size=96)

    def val_dataloader(self):
        return token_loader(batches=1, vocab_size=96)


def fit(module, max_steps=6, ckpt_path=None):
    losses = Losses()
    save = ModelCheckpoint(dirpath="saved", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [losses, save, RoundingWarmup(0.8, total_steps=6)]
    trainer = quiet_trainer(callbacks, max_steps=max_steps, enable_checkpointing=True)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    return losses.values, trainer.callback_metrics


def test_a_run_resumes_to_the_last_bit_and_the_teacher_stays_outside(folder):
    module = student(folder)
    whole, metrics = fit(module)
    assert {"train/distillation", "train/distillation_logits"} <= metrics.keys()
    saved = torch.load("saved/step=3.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == CausalLM(folder, "ternary", "2:4").state_dict().keys()
    resumed, _ = fit(student(folder), ckpt_path="saved/step=3.ckpt")
    assert resumed[-3:] == whole[3:]
    assert CausalLM.load_from_checkpoint("saved/step=3.ckpt").distillation == module.distillation


def test_the_fabric_loop_computes_the_same(folder):
    from lightning.fabric import Fabric

    ours, theirs = student(folder), student(folder)
    fit(ours)
    warmup = RoundingWarmup(0.8, total_steps=6)
    run = FabricRun(Fabric(accelerator="cpu", devices=1, callbacks=[warmup]), max_steps=6, enable_progress_bar=False)
    train(run, theirs, Data())
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_dense_student_with_the_teachers_weights_has_nothing_to_learn(folder):
    module = CausalLM(folder, "dense", distillation=Distillation(folder, language_model=1.0))
    loss, metrics = module.compute_loss(module.model, TOKENS)
    assert abs(float(metrics["train/distillation_logits"])) < 1e-5
    torch.testing.assert_close(loss, module.model.loss(TOKENS[:, :-1], TOKENS[:, 1:]))


def test_a_teacher_in_bfloat16_has_exact_positions(folder):
    teacher = CausalLM.load_teacher(Distillation(folder, dtype="bfloat16"))
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    frequencies = [b for name, b in teacher.named_buffers() if name.endswith("inv_freq")]
    assert frequencies
    assert {b.dtype for b in frequencies} == {torch.float32}


@pytest.mark.parametrize("loss", ["hidden", "relations"])
def test_losses_on_blocks_are_refused(folder, loss):
    with pytest.raises(ConfigError, match="hidden and relations look into the blocks of our own transformer"):
        student(folder, **{loss: 1.0})


def test_teachers_that_cannot_be_are_refused(folder):
    with pytest.raises(ConfigError, match=r"teacher last\.ckpt is a checkpoint; give a Hugging Face folder"):
        CausalLM(folder, distillation=Distillation("last.ckpt"))
    module = CausalLM(folder, distillation=Distillation("no/such/folder"))
    with pytest.raises(DataError, match=r"model\.distillation\.teacher no/such/folder"):
        module.compute_loss(module.model, TOKENS)
    experts = build("qwen3-moe").config.to_dict()
    with pytest.raises(ConfigError, match="does not work with a mixture of experts"):
        CausalLM({k: v for k, v in experts.items() if v is not None}, distillation=Distillation(folder))
