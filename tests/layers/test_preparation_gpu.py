"""On a GPU the replayed preparation of weights trains like single launches, to the last bit."""

import pytest
import torch

from sbn_lightning import SparseTernaryPrecision
from sbn_lightning.backends.selection import engines
from sbn_lightning.layers import preparation
from sbn_lightning.layers.sparse_linear import prepare_layers
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def train(gradients: str, pattern: str, backend: str, learnable_scales: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shape = {"d_model": 256, "d_ffn": 512, "vocab_size": 512, "n_layers": 2}
    config = small_config(**shape, pattern=pattern, loss="chunked", learnable_scales=learnable_scales)
    model = TernaryTransformer(config).cuda()
    plugin = SparseTernaryPrecision(backend, gradients)  # type: ignore[arg-type]
    plugin.convert_module(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    tokens = torch.randint(512, (6, 4, 65), generator=torch.Generator().manual_seed(1)).cuda()
    for batch in tokens:
        for part in batch.chunk(2):
            with plugin.forward_context():
                prepare_layers(model)
                loss = model.loss(part[:, :-1], part[:, 1:])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(
    ("gradients", "pattern", "backend", "learnable_scales"),
    [
        ("int8", "2:4", "sparse", False),
        ("bf16", "2:4", "sparse", False),
        ("int8", "6:8", "int8", False),
        ("int8", "2:4", "sparse", True),
    ],
)
def test_replays_train_like_launches(
    gradients: str, pattern: str, backend: str, learnable_scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend not in engines(torch.device("cuda"))[0]:
        pytest.skip(f"{backend} does not run on this GPU")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    calls, record = [], preparation.record
    monkeypatch.setattr(preparation, "record", lambda *given: calls.append(1) or record(*given))
    try:
        actual = train(gradients, pattern, backend, learnable_scales)
        assert len(calls) == 1
        monkeypatch.setattr(preparation, "can_record", lambda layer: False)
        expected = train(gradients, pattern, backend, learnable_scales)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(calls) == 1
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
