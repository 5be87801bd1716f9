"""CUDA graphs of a model of transformers on a GPU: equal to the step without graphs to the last bit."""

from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from sbn_lightning import MaskRefresh, SparseTernaryPrecision  # noqa: E402
from sbn_lightning.backends.selection import engines  # noqa: E402
from sbn_lightning.integrations.huggingface.causal_lm import CausalLM  # noqa: E402
from sbn_lightning.training import graphs  # noqa: E402
from tests.helpers import Losses, quiet_trainer, token_loader  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "options", "compile"),
    [("llama", {}, False), ("llama", {}, True), ("mistral", {"sliding_window": 16}, False)],
)
def test_twelve_steps_are_the_same_to_the_last_bit(model_type, options, compile, monkeypatch):
    if "sparse" not in engines(torch.device("cuda"))[0]:
        pytest.skip("sparse does not run on this GPU")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    recorded, record, found = [], graphs.record, []
    monkeypatch.setattr(graphs, "record", lambda *given: recorded.append(1) or record(*given))
    try:
        for cuda_graphs in (False, True):
            torch.manual_seed(0)
            module = CausalLM(
                {"model_type": model_type, **SHAPE, **options}, pattern="2:4", warmup_steps=2, compile=compile,
                optimizer=partial(torch.optim.AdamW, lr=1e-2), cuda_graphs=cuda_graphs,
            )  # fmt: skip
            losses = Losses()
            trainer = quiet_trainer(
                [losses, MaskRefresh(4)], accelerator="gpu", devices=1, max_steps=12, accumulate_grad_batches=2,
                gradient_clip_val=0.5, plugins=[SparseTernaryPrecision("sparse", "int8")],
            )  # fmt: skip
            trainer.fit(module, token_loader(batches=24, batch_size=8, length=65, vocab_size=512))
            found.append((losses.values, {name: v.cpu() for name, v in module.state_dict().items()}))
            assert len(recorded) == 4 * cuda_graphs  # Two states: masks are refreshed or held.
    finally:
        torch.use_deterministic_algorithms(before)
    (expected, plain), (replayed, graphed) = found
    assert replayed == expected
    assert all(torch.equal(graphed[name], value) for name, value in plain.items())
