"""With deterministic kernels, a run that resumes on a GPU ends like one that went on, to the last bit, in all modes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sbn_lightning import SparseTernaryPrecision
from sbn_lightning.backends.selection import engines
from tests.helpers import quiet_trainer, small_module, token_loader, unbounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {"d_model": 256, "d_ffn": 512, "vocab_size": 512, "n_layers": 2, "loss": "chunked"}
# The options of the plugin, and changes of the model's config.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({}, {}),
    "int8-dx": ({"gradients": "int8-dx"}, {}),
    "int8-dw": ({"gradients": "int8-dw"}, {}),
    "int8": ({"gradients": "int8"}, {}),
    "int8, head": ({"gradients": "int8"}, {"head_precision": "int8"}),
    "int8, gates": ({"gradients": "int8", "saved_gates": "int8"}, {}),
    "int8, recomputed": ({"gradients": "int8"}, {"activation_checkpointing": "mlp"}),
}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backward of attention adds in any order otherwise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def train(
    mode: str, compiled: bool, steps: int, batches: Any, ckpt_path: Path | None = None, save: Path | None = None
) -> dict[str, torch.Tensor]:
    options, changes = MODES[mode]
    if "sparse" not in engines(torch.device("cuda"))[0]:
        pytest.skip("sparse does not run on this GPU")
    module = small_module(**SHAPE | changes, pattern="2:4")
    module.hparams["schedule_steps"], module.hparams["compile"] = 6, compiled
    trainer = quiet_trainer(
        [], accelerator="gpu", devices=1, max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=0.5,
        plugins=[SparseTernaryPrecision("sparse", **options)],
    )  # fmt: skip
    trainer.fit(module, batches, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return {name: value.cpu() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_resumes_to_the_last_bit(mode: str, compiled: bool, tmp_path: Path) -> None:
    batches = list(token_loader(batches=12, batch_size=8, length=65, vocab_size=512))
    expected = train(mode, compiled, 6, unbounded(batches))
    train(mode, compiled, 3, unbounded(batches), save=tmp_path / "x.ckpt")
    actual = train(mode, compiled, 6, unbounded(batches[6:]), ckpt_path=tmp_path / "x.ckpt")
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
