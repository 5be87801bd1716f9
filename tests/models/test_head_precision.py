"""The head's products in 8 bits: close to exact ones, unbiased, the same bits again, or refused."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sbn_lightning.backends import int8_head
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.loss import linear_cross_entropy
from sbn_lightning.models.transformer import TernaryTransformer

CLASSES, TOKENS, WIDTH = 300, 600, 32


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    monkeypatch.setattr("sbn_lightning.models.loss.CHUNK_BYTES", 0)  # 256 tokens in a chunk
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(CLASSES, WIDTH) * torch.rand(CLASSES, 1)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(CLASSES, (TOKENS,))


def both(batch: tuple[Tensor, Tensor, Tensor], precision: str = "int8") -> tuple[Tensor, tuple[Tensor, ...]]:
    hidden, weight, target = batch
    loss = linear_cross_entropy(hidden, weight, target, "auto", precision)  # type: ignore[arg-type]
    return loss.detach(), torch.autograd.grad(loss, (hidden, weight))


def test_loss_and_gradients_are_close_and_the_mean_over_draws_is_closer(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, target = (value.detach() for value in batch)
    expected = F.cross_entropy(hidden.double() @ weight.double().t(), target)
    head = int8_head.Int8Head(hidden, weight, target)
    h8, w8 = head._tokens * head._token_scale[:, None], head._codes * head._class_scale[:, None]
    wide = h8.double().requires_grad_(), w8.double().requires_grad_()
    rounded = F.cross_entropy(wide[0] @ wide[1].t(), target)
    exact = torch.autograd.grad(rounded, wide)
    seeds = iter(torch.arange(64).unsqueeze(1))
    with patch.object(int8_head, "seed_of", lambda *given: next(seeds)):
        draws = [both(batch) for _ in range(64)]
    for loss, _ in draws:
        assert abs(loss - rounded) < 1e-5
        assert abs(loss - expected) < 0.01
    for i, wanted in enumerate(exact):
        one = (draws[0][1][i] - wanted).norm() / wanted.norm()
        mean = (sum(gradients[i] for _, gradients in draws) / len(draws) - wanted).norm() / wanted.norm()
        assert one < 0.15
        assert mean < one / 6  # an unbiased error falls by 8


def test_a_pass_that_is_run_again_gives_the_same_bits(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, _, target = batch
    first, again = both(batch), both(batch)
    assert torch.equal(first[0], again[0])
    assert all(map(torch.equal, first[1], again[1]))
    other = int8_head.seed_of(hidden.detach(), target.roll(1) + 1)
    assert other != int8_head.seed_of(hidden.detach(), target)
    assert int8_head.seed_of(hidden.detach() * 1.5, target) != int8_head.seed_of(hidden.detach(), target)


def test_a_loss_without_gradients_is_exact(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.no_grad():
        exact = linear_cross_entropy(*batch, "chunked", "full")
        assert torch.equal(linear_cross_entropy(*batch, "chunked", "int8"), exact)


def test_a_model_trains_with_it() -> None:
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 64}
    losses = {}
    for precision in ("full", "int8"):
        torch.manual_seed(0)
        model = TernaryTransformer(TransformerConfig(**shape, head_precision=precision))  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        tokens = torch.randint(64, (4, 17))
        losses[precision] = []
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[precision].append(float(loss.detach()))
    assert losses["int8"] != losses["full"]
    assert losses["int8"][-1] < 0.8 * losses["int8"][0]
    assert abs(losses["int8"][-1] - losses["full"][-1]) < 0.05 * losses["full"][-1]


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="needs loss="):
        TransformerConfig(head_precision="int8", loss="plain")
    with pytest.raises(ConfigError, match="not one of 'full', 'int8'"):
        TransformerConfig(head_precision="int4")  # type: ignore[arg-type]
    assert "head_precision" not in TransformerConfig().to_dict(whole=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_have_a_loss_near_the_exact_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = (50 * torch.randn(20, 512)).to(dtype), (0.003 * torch.randn(30, 512)).to(dtype)
    target = torch.randint(30, (20,))
    loss, gradients = both((hidden.requires_grad_(), weight.requires_grad_(), target))
    expected = F.cross_entropy(hidden.detach().double() @ weight.detach().double().t(), target)
    assert abs(loss - expected) < 0.05
    assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients)
