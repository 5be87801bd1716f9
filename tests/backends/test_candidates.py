"""Which kernels a measurement compares, and what it makes of the times. Nothing is launched."""

import pytest
import torch
from sbn_kernels.gemm.registry import product
from sbn_kernels.runtime.capability import Needs
from torch import nn

from sbn_lightning import SparseTernaryPrecision
from sbn_lightning.backends import selection
from sbn_lightning.backends.candidates import candidates, rivals
from sbn_lightning.backends.selection import choose, choose_packed
from sbn_lightning.backends.timing import Trial, decide
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear

GPU = torch.device("cuda", 0)
AMPERE = ("cusparselt", "int8_gemm", "ampere_sparse_gemm", "ampere_ternary_gemm")
HOPPER = (*AMPERE, "sparse_gemm", "ternary_gemm")


def runs(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Pretend that a GPU has what these kernels need, and lacks what every other kernel needs."""
    monkeypatch.setattr(Needs, "missing", lambda self, index: None if self.op in ops else "is not here")


def test_kernels_that_nobody_has_timed_are_measured_beside_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseBitLinear(128, 128, pattern="2:4")
    runs(monkeypatch, *AMPERE)
    assert candidates(layer, GPU)[0] == {"sparse": "cusparselt", "int8": "portable"}
    assert rivals(layer, GPU, "sparse", "cusparselt") == ["ampere-sparse"]
    assert rivals(layer, GPU, "int8", "portable") == ["ampere"]
    assert rivals(SparseBitLinear(128, 128, pattern="6:8"), GPU, "sparse", "cusparselt") == []
    runs(monkeypatch, *HOPPER)
    assert candidates(layer, GPU)[0] == {"sparse": "hopper-sparse", "int8": "hopper"}
    assert rivals(layer, GPU, "sparse", "hopper-sparse") == []  # made for this GPU


def test_the_ampere_kernel_serves_what_cusparselt_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, *AMPERE)
    assert candidates(SparseBitLinear(64, 33, pattern="2:4"), GPU)[0]["sparse"] == "ampere-sparse"
    assert choose_packed(128, 128, 2, 4, 8, "auto", GPU).kernel == "ampere-sparse"
    assert product("ampere-sparse").denser == "portable"


def test_the_faster_kernel_of_a_backend_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real choice on times that are made up, with the reference in the place of the kernels."""
    runs(monkeypatch, *AMPERE)
    times = {"reference": 1.0, "sparse": 0.5, "sparse (ampere-sparse)": 0.4, "int8": 0.8, "int8 (ampere)": 0.9}
    monkeypatch.setattr(selection.Choice, "make", lambda self, gradients: selection.REFERENCE)
    monkeypatch.setattr(selection, "milliseconds", lambda calls, device: ({name: [times[name]] for name in calls}, {}))
    monkeypatch.setattr(selection, "Trial", lambda layer, device, *rest: Trial(layer, torch.device("cpu"), *rest))
    layers = {"a": SparseBitLinear(128, 128, pattern="2:4")}
    chosen = choose(layers, "auto", GPU, torch.float32, 64)["a"]
    assert (chosen.backend, chosen.kernel) == ("sparse", "ampere-sparse")
    assert "sparse (ampere-sparse) 0.400 ms" in chosen.why
    times["sparse"] = 0.405
    assert choose(layers, "auto", GPU, torch.float32, 64)["a"].kernel == "cusparselt"


def test_level_times_go_to_the_preferred_backend() -> None:
    assert decide({"reference": [1.0], "int8": [0.5], "sparse (ampere-sparse)": [0.51]})[0] == "sparse (ampere-sparse)"
    assert decide({"reference": [1.0], "int8": [0.5], "sparse": [0.6]})[0] == "int8"


def test_a_trial_goes_through_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    from sbn_lightning.backends import timing

    monkeypatch.setattr(timing, "copies_beyond_cache", lambda x: 4)
    trial = Trial(SparseBitLinear(32, 16, pattern="2:4"), torch.device("cpu"), torch.float32, 8)
    weight = trial.prepare(selection.REFERENCE)
    seen = []
    monkeypatch.setattr(
        selection.REFERENCE, "linear", lambda x, *rest: seen.append(x.data_ptr()) or x.new_zeros(()), raising=False
    )
    for _ in range(8):
        trial.run(selection.REFERENCE, weight)
    assert len(set(seen)) == 4
    assert seen[:4] == seen[4:]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(4, 17, dtype=torch.long), 68),
        ({"input_ids": torch.zeros(2, 8, dtype=torch.int32), "labels": torch.zeros(2, dtype=torch.long)}, 16),
        ((torch.zeros(3, 5),), 8192),
    ],
)
def test_the_plugin_counts_the_tokens_of_the_first_batch(batch: object, expected: int) -> None:
    plugin = SparseTernaryPrecision()
    plugin.convert_module(nn.Sequential(SparseBitLinear(32, 32, pattern="2:4")))
    assert plugin.convert_input(batch) is batch
    assert plugin._tokens == expected
    assert SparseTernaryPrecision(tokens=5)._tokens == 5
