"""Rows of several documents: each token attends to its own document alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sbn_lightning import SparseBitNet
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.documents import document_numbers
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.training.distillation import Distillation
from tests.helpers import quiet_trainer, small_config, token_loader

EOS = 7


def a_model(**changes):
    torch.manual_seed(0)
    return TernaryTransformer(small_config(linear="dense", **changes))


def rows():
    tokens = torch.randint(8, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    tokens[0, [4, 11]] = EOS
    tokens[1, [0, 19]] = EOS
    return tokens


def test_the_token_that_ends_a_document_belongs_to_it():
    assert document_numbers(torch.tensor([[5, EOS, 3, EOS, EOS, 2]]), EOS).tolist() == [[0, 0, 1, 1, 2, 3]]


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 3}, {"activation_checkpointing": True}, {"qk_norm": "head"}]
)
def test_each_document_is_computed_as_if_it_were_alone(changes):
    model = a_model(**changes).train()
    model.separate_at = EOS
    tokens = rows()
    whole = model.hidden(tokens)
    model.separate_at = None
    for start, end in ((0, 5), (5, 12), (12, 20)):
        torch.testing.assert_close(whole[:1, start:end], model.hidden(tokens[:1, start:end]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole[1:, 1:], model.hidden(tokens[1:, 1:]), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert (model.hidden(tokens) - whole)[0, 6:].abs().max() > 0.01


def test_gradients_stay_within_documents():
    model = a_model()
    model.separate_at = EOS
    embedded = []
    model.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output) or output.retain_grad())
    model.hidden(rows())[0, 5:12].square().sum().backward()
    touched = embedded[0].grad[0].abs().sum(-1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(5, 12))


def test_a_compiled_block_is_compiled_once():
    model = a_model(n_layers=1)
    model.separate_at = EOS
    eager = [model.hidden(rows().roll(i, 1)) for i in range(3)]
    torch._dynamo.utils.counters.clear()
    model.compile_blocks(backend="eager")
    for i in range(3):
        torch.testing.assert_close(model.hidden(rows().roll(i, 1)), eager[i])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_student_and_teacher_both_separate_documents(monkeypatch, tmp_path):
    teacher = a_model()
    module = SparseBitNet(
        replace(teacher.config, linear="ternary", pattern="2:4"), schedule="constant", separate_documents=True,
        distillation=Distillation(teacher=str(tmp_path)),
    )  # fmt: skip
    monkeypatch.setattr(module, "load_teacher", lambda options: teacher)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(eos_id=EOS), callbacks=[], strategy=None)
    monkeypatch.setattr("sbn_lightning.training.module.check_strategy", lambda strategy: None)
    module._trainer = module.trainer = trainer
    module.setup("validate")
    assert module.model.separate_at == EOS
    tokens = torch.cat((rows(), rows()[:, :1]), 1)
    loss, _ = module.compute_loss(module.model, tokens)
    assert teacher.separate_at == EOS
    changed = tokens.clone()
    changed[0, :4] = 9  # another first document in the first row
    other, _ = module.compute_loss(module.model, changed)
    assert loss != other
    second = [module.compute_loss(module.model, row[:1, 5:13])[0] for row in (tokens, changed)]
    assert second[0] == second[1]


def test_data_without_an_end_of_document_are_refused(tmp_path):
    module = SparseBitNet(small_config(), schedule="constant", separate_documents=True)
    with pytest.raises(ConfigError, match="TokenDataModule"):
        quiet_trainer(default_root_dir=tmp_path).fit(module, token_loader())
