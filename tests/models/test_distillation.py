"""The losses of a distillation: chunked and plain agree, and each is zero where the student is the teacher."""

import pytest
import torch
from torch.nn import functional as F

from sbn_lightning.models.distillation import (
    LogitsLoss,
    _by_autograd,
    forward_losses_and_gradient,
    hidden_state_loss,
    linear_distillation,
    relation_loss,
)

TOKENS, CLASSES = 13, 40


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = draw(TOKENS, 8).requires_grad_(), draw(CLASSES, 8).requires_grad_()
    target = torch.randint(0, CLASSES, (TOKENS,), generator=generator)
    return hidden, weight, draw(TOKENS, 6), draw(CLASSES, 6), target


def plain(tensors, options):
    """The formulas over all logits at once, with autograd."""
    hidden, weight, teacher_hidden, teacher_weight, target = tensors
    logits, t = hidden @ weight.t(), options.temperature
    q, p = F.softmax(logits / t, -1), F.softmax(teacher_hidden @ teacher_weight.t() / t, -1)
    if options.top_k is not None:
        top = p.topk(options.top_k).indices
        p, q = (torch.cat((x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)), -1) for x in (p, q))
    a, b = (p, q) if options.divergence == "forward" else (q, p)
    divergence = t**2 * (a * (a / b).log()).sum(-1).mean()
    return options.language_model * F.cross_entropy(logits, target) + options.teacher * divergence


@pytest.mark.parametrize("chunk", [5, TOKENS])
@pytest.mark.parametrize(
    "options",
    [
        LogitsLoss(),
        LogitsLoss(0.5, 2.0, temperature=3.0),
        LogitsLoss(0.5, 2.0, "reverse", temperature=2.0),
        LogitsLoss(0.0, 1.0, top_k=7),
        LogitsLoss(1.0, 0.5, "reverse", top_k=7),
    ],
    ids=str,
)
def test_chunks_give_the_formula_and_its_gradients(tensors, options, chunk):
    total, language, divergence = linear_distillation(*tensors, options, chunk)
    expected = plain(tensors, options)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, options.language_model * language + options.teacher * divergence)
    ours = torch.autograd.grad(3 * total, tensors[:2])
    theirs = torch.autograd.grad(3 * expected, tensors[:2])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [LogitsLoss(0.5, 2.0, temperature=3.0), LogitsLoss(0.5, 1.0, top_k=7)], ids=str)
def test_logits_in_place_of_hidden_states_give_the_same(tensors, options):
    hidden, weight, teacher_hidden, teacher_weight, target = tensors
    expected, *parts = linear_distillation(*tensors, options, 5)
    logits, theirs = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    total, *others = linear_distillation(logits, None, theirs, None, target, options, 5)
    torch.testing.assert_close([total, *others], [expected, *parts])
    gradients = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in (total, expected))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
def test_the_closed_form_is_what_autograd_gives(weights):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, TOKENS, CLASSES, generator=generator, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (TOKENS,), generator=generator)
    options = LogitsLoss(weights[0], weights[1], temperature=weights[2])
    assert options.is_closed
    assert not LogitsLoss(top_k=3).is_closed
    assert not LogitsLoss(divergence="reverse").is_closed
    expected = _by_autograd(student, teacher, target, options, differentiate=True, count=1)
    torch.testing.assert_close(forward_losses_and_gradient(student, teacher, target, *weights), expected)


def test_all_classes_among_the_top_are_the_whole_loss(tensors):
    whole, _, _ = linear_distillation(*tensors, LogitsLoss())
    top, _, _ = linear_distillation(*tensors, LogitsLoss(top_k=CLASSES + 1))
    assert torch.equal(whole, top)


def test_the_teacher_itself_has_no_divergence(tensors):
    hidden, weight, _, _, target = tensors
    for options in (LogitsLoss(), LogitsLoss(divergence="reverse", top_k=3)):
        total, _, divergence = linear_distillation(hidden, weight, hidden.detach(), weight.detach(), target, options)
        assert abs(float(divergence)) < 1e-9
        assert all(g.abs().max() < 1e-9 for g in torch.autograd.grad(total, (hidden, weight)))


def test_hidden_states_are_compared_as_a_share_of_each_token():
    teacher = torch.randn(2, 5, 8)
    teacher[:, 0] *= 1000  # as the first token of a pretrained model
    assert hidden_state_loss(teacher, teacher) == 0
    assert hidden_state_loss(1.1 * teacher, teacher).item() == pytest.approx(0.01, rel=1e-4)


def test_relations_are_those_of_minilm():
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 16)
    expected = []
    for head in range(2):
        q, p = student[..., 4 * head : 4 * head + 4], teacher[..., 8 * head : 8 * head + 8]
        own, their = ((x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) for x in (q, p))
        expected.append(F.kl_div(own.log(), their, reduction="none").sum(-1))
    loss = relation_loss(student, teacher, heads=2)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert torch.autograd.grad(loss, student)[0].abs().max() > 0
    assert relation_loss(teacher, teacher, heads=4) == 0
