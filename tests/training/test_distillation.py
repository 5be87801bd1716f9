"""A ternary student learns from its dense teacher, in the Trainer, in the Fabric loop and in a plain loop."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from sbn_lightning import RoundingWarmup, SparseBitNet
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.fabric.loop import FabricRun, train
from sbn_lightning.formats.init_from import load_weights
from sbn_lightning.formats.load import load_model
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.models.distillation import StoredLogits, likeliest
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.training import graphs
from sbn_lightning.training.answers import AnswerLoss
from sbn_lightning.training.distillation import Distillation, Distiller
from tests.helpers import Losses, quiet_trainer, small_config, token_loader

EVERYTHING = {"language_model": 0.5, "hidden": 0.1, "relations": 0.1, "temperature": 2.0, "top_k": 50}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A dense model that has learned eight batches by heart."""
    torch.manual_seed(3)
    model = TernaryTransformer(small_config(linear="dense"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        for batch in token_loader():
            model.loss(batch[:, :-1], batch[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    file = tmp_path_factory.mktemp("teacher") / "dense.ckpt"
    lightning_file.write(model.config, model.state_dict(), file, TextFiles())
    return str(file)


def module_of(teacher, **options):
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    distillation = Distillation(teacher, **options)
    return SparseBitNet(small_config(), optimizer, warmup_steps=1, init_from=teacher, distillation=distillation)


def fit(module, max_steps=6, ckpt_path=None, more=()):
    losses = Losses()
    save = ModelCheckpoint(dirpath="saved", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = quiet_trainer(
        [losses, save, RoundingWarmup(0.8, total_steps=6), *more], max_steps=max_steps, enable_checkpointing=True
    )
    trainer.fit(module, token_loader(batches=3), ckpt_path=ckpt_path)
    return losses.values, trainer


def test_a_resumed_run_is_the_uninterrupted_one_and_the_teacher_stays_outside(teacher):
    module = module_of(teacher, **EVERYTHING)
    whole, trainer = fit(module)
    assert {"train/distillation", "train/distillation_hidden", "train/distillation_relations"} <= set(
        trainer.callback_metrics
    )
    assert all(layer.rounding == (1.0, 1.0) for layer in ternary_layers(module).values())
    saved = torch.load("saved/step=3.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(SparseBitNet(small_config()).state_dict())
    assert saved["hyper_parameters"]["distillation"]["teacher"] == teacher
    resumed, _ = fit(module_of(teacher, **EVERYTHING), ckpt_path="saved/step=3.ckpt")
    assert resumed[-3:] == whole[3:]
    again = SparseBitNet.load_from_checkpoint("saved/step=3.ckpt")
    assert again.distillation == module.distillation


def test_the_fabric_loop_computes_the_same(teacher):
    module = module_of(teacher, **EVERYTHING)
    fit(module)
    other, warmup = module_of(teacher, **EVERYTHING), RoundingWarmup(0.8, total_steps=6)
    run = FabricRun(Fabric(accelerator="cpu", devices=1, callbacks=[warmup]), max_steps=6, enable_progress_bar=False)
    train(run, other, _Data())
    for (name, ours), theirs in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_student_comes_nearer_to_the_teacher_in_a_plain_loop(teacher):
    student = TernaryTransformer(small_config())
    load_weights(student, teacher)
    distiller = Distiller(Distillation(teacher, dtype="bfloat16"))
    distiller.check(student)
    assert distiller.teacher.embed.weight.dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    divergences = []
    for batch in [*token_loader()] * 3:
        loss, parts = distiller.loss(student, batch[:, :-1], batch[:, 1:])
        loss.backward()
        assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
        optimizer.step()
        optimizer.zero_grad()
        divergences.append(float(parts["logits"]))
        assert float(parts["loss"]) > 0
    assert sum(divergences[-8:]) < 0.8 * sum(divergences[:8])


def test_a_dense_student_with_the_teachers_weights_has_nothing_to_learn(teacher):
    student = TernaryTransformer(small_config(linear="dense"))
    load_weights(student, teacher)
    batch = next(iter(token_loader()))
    loss, parts = Distiller(Distillation(teacher, hidden=1.0, relations=1.0)).loss(student, batch[:, :-1], batch[:, 1:])
    assert abs(float(loss)) < 1e-5
    assert float(parts["loss"]) == pytest.approx(student.loss(batch[:, :-1], batch[:, 1:]).item())


def test_a_teacher_counts_at_answers_alone(teacher):
    module = module_of(teacher, language_model=0.5)
    module.answer_loss = AnswerLoss([3], [4])
    batch = next(iter(token_loader(vocab_size=300))).clone()
    batch[0, 2], batch[0, 6], batch[2, 9] = 3, 4, 3
    loss, metrics = module.compute_loss(module.model, batch)
    chosen = module.answer_loss.places(batch)[:, 1:]
    assert metrics["train/answer_tokens"] == int(chosen.sum())
    student, theirs = (model(batch[:, :-1])[chosen] for model in (module.model, load_model(teacher).model))
    expected = F.kl_div(student.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected + 0.5 * F.cross_entropy(student, batch[:, 1:][chosen]))

    likely = likeliest(load_model(teacher).model.hidden(batch[:, :-1]), load_model(teacher).model.lm_head.weight, 5)
    stored = StoredLogits(*(part.flatten(0, 1) for part in likely))
    places = module.answer_loss.target_places(batch)
    inputs = module.model, batch[:, :-1], batch[:, 1:]
    found, _ = Distiller(Distillation(None)).loss(*inputs, stored, None, places)
    expected, _ = Distiller(Distillation(teacher, top_k=5)).loss(*inputs, places=places)
    torch.testing.assert_close(found, expected)
    module.answer_loss = AnswerLoss([1, 1, 1], [4])
    nothing, _ = module.compute_loss(module.model, batch)
    nothing.backward()
    assert nothing == 0


def test_relations_are_seen_in_compiled_models(teacher):
    student = TernaryTransformer(small_config())
    batch = next(iter(token_loader()))
    found = []
    for compiled in (False, True):
        distiller = Distiller(Distillation(teacher, relations=1.0))
        distiller.check(student)
        if compiled:
            for model in (student, distiller.teacher):
                model.compile_blocks(backend="eager")
        found.append(distiller.loss(student, batch[:, :-1], batch[:, 1:]))
        distiller.check(student)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": 0.0}, "are all 0"),
        ({"hidden": -1.0}, r"hidden=-1.0 must be 0 or more"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_k": 0}, "top_k=0 must be 1 or more"),
        ({"divergence": "both"}, "divergence='both' is not one of"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Distillation("teacher.ckpt", **options)


def test_a_teacher_that_is_not_there_is_missed_before_training(teacher):
    module = SparseBitNet(small_config(), init_from=teacher, distillation=Distillation("nowhere.ckpt"))
    with pytest.raises(DataError, match=r"the teacher nowhere.ckpt does not exist; write it with: sbn import-hf"):
        quiet_trainer().fit(module, token_loader())


def test_a_teacher_that_does_not_fit_is_refused(teacher):
    loaded = load_model(teacher).model
    other = TernaryTransformer(replace(small_config(), vocab_size=300))
    with pytest.raises(ConfigError, match="has 320 tokens, the student 300"):
        Distiller(Distillation(teacher), loaded).check(other)
    other = TernaryTransformer(small_config(n_layers=1))
    with pytest.raises(ConfigError, match="has 2 blocks of width 32, the student 1"):
        Distiller(Distillation(teacher, hidden=1.0), loaded).check(other)
    with pytest.raises(ConfigError, match="relation_block=-2: the models have 1 and 2 blocks"):
        Distiller(Distillation(teacher, relations=1.0), loaded).check(other)


class _Data(LightningDataModule):
    def train_dataloader(self):
        return token_loader(batches=3)

    def val_dataloader(self):
        return token_loader(batches=1)


def test_graphs_of_the_step_change_nothing(teacher, monkeypatch):
    """Recorded as on a CPU: the function runs again in each replay."""
    runs = []

    def record(function, pool):
        function()
        return lambda: (runs.append(1), torch.enable_grad()(function)())

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr("sbn_lightning.training.module.check_graphs", lambda module, trainer: None)
    seen = []
    for cuda_graphs in (False, True):
        module = module_of(teacher, **EVERYTHING)
        module.cuda_graphs = cuda_graphs
        losses, trainer = fit(module)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        seen.append((losses, metrics, [parameter.detach() for parameter in module.parameters()]))
    assert seen[1][:2] == seen[0][:2]
    assert {"train/distillation_hidden", "train/distillation_relations"} <= seen[1][1].keys()
    assert all(torch.equal(ours, expected) for ours, expected in zip(seen[1][2], seen[0][2], strict=True))
    assert len(runs) >= 4
