"""The benchmark of training steps with tiny models on a CPU: its rows, the memory by part, the row of the Trainer."""

import argparse
import csv
import importlib
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.transformer import TernaryTransformer
from tests.benchmarks.test_benchmarks import BENCHMARKS, ENVIRONMENT, WallClockEvent


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    module = importlib.import_module("training_step")
    variants = importlib.import_module("step_variants")
    tiny = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 64, "vocab_size": 64}
    own = variants.TransformerConfig
    monkeypatch.setattr(variants, "TransformerConfig", lambda **given: own(**given | tiny))
    foreign = variants.ForeignModel
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64}
    monkeypatch.setattr(variants, "ForeignModel", lambda *head, **changes: foreign(*head, **changes | shape))
    on_reference = {
        name: (build, options and {"backend": "reference"}) for name, (build, options) in module.VARIANTS.items()
    }
    monkeypatch.setattr(module, "VARIANTS", on_reference)
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(module, "SEQUENCE_LENGTH", 16)
    monkeypatch.setattr(torch.cuda, "Event", WallClockEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(TernaryTransformer, "compile_blocks", lambda self: None)
    monkeypatch.setattr(foreign, "compile_blocks", lambda self: None)
    return module


def arguments(module: ModuleType, **given: object) -> argparse.Namespace:
    plain = {"shape": module.SHAPES[3], "layers": None, "sequences": 2, "accumulate": 2, "steps": 2}
    plain |= {"checkpointing": False, "memory": False, "trainer": False, "profile": False, "optimizer": None}
    return argparse.Namespace(**plain | given)


def test_rows_and_memory_by_part(benchmark: ModuleType, tmp_path: Path) -> None:
    base: dict[str, float] = {}
    path = tmp_path / "training_step.csv"
    for name in ("bf16 dense", "ours 2:4"):
        benchmark.measure(path, name, arguments(benchmark, memory=True), base)
    rows = read(path)
    assert [row["variant"] for row in rows] == ["bf16 dense", "ours 2:4"]
    assert rows[0]["vs_bf16"] == "1"
    assert float(rows[1]["vs_bf16"]) == pytest.approx(float(rows[0]["ms"]) / float(rows[1]["ms"]), rel=1e-3)
    assert {row["tokens_per_step"] for row in rows} == {"64"}
    parts = read(tmp_path / "training_memory.csv")
    held: dict[str, float] = {}
    for name in ("bf16 dense", "ours 2:4"):
        sizes = {row["part"]: float(row["gib"]) * 2**30 for row in parts if row["variant"] == name}
        assert sum(sizes.values()) == pytest.approx(0, abs=20)  # A CPU reports no peak; the parts sum to it.
        weights = sum(p.nelement() * 4 for p in TernaryTransformer(benchmark.make_config(
            benchmark.SHAPES[3], 16, False, None)).parameters())  # fmt: skip
        assert sizes["parameters"] == pytest.approx(weights, rel=0.01)
        assert sizes["optimiser states"] >= 2 * sizes["parameters"] * 0.99
        held[name] = sizes["buffers and prepared weights"]
    assert held["ours 2:4"] > held["bf16 dense"]  # masks and codes
    assert any(row["part"] == "saved int8 x 32" for row in parts if row["variant"] == "ours 2:4")


def test_a_foreign_model_and_the_trainer(benchmark: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "training_step.csv"
    given = {"shape": benchmark.SHAPES[4], "trainer": True, "optimizer": "torch.optim.Adam"}
    benchmark.measure(path, "ours 2:4", arguments(benchmark, **given), {})
    rows = read(path)
    assert [row["variant"] for row in rows] == ["ours 2:4, Adam", "ours 2:4, Adam, Trainer"]
    assert all(float(row["ms"]) > 0 and row["vs_bf16"] == "" for row in rows)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("step_memory")


def test_saved_tensors_are_counted_once(memory: ModuleType) -> None:
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    with memory.recorded(memory.storages(layer.parameters())) as kinds:
        y = layer(x) * layer(x)
    assert y.shape == (4, 8)
    assert kinds == {"float32 x 8": 3 * 4 * 8 * 4}  # x once, and both factors


def test_recording_holds_nothing_afterwards(memory: ModuleType) -> None:
    """A node that saves its own output is a cycle that only the node can break."""
    x = torch.randn(4, 8, requires_grad=True)
    with memory.recorded({}) as kinds:
        y = (x * 2).exp()
    assert kinds == {"float32 x 8": 4 * 8 * 4}
    gone = weakref.ref(y)
    del y
    assert gone() is None


def test_every_variant_can_be_built(benchmark: ModuleType) -> None:
    pytest.importorskip("transformers")
    for shape in benchmark.SHAPES[3:]:
        for name, (build, _) in benchmark.VARIANTS.items():
            if "torchao" in name:
                continue  # a package that the tests do not need
            foreign = shape == benchmark.SHAPES[4]
            if "recomputed" in name if foreign else "chunked" in name:  # an option of the other kind of model
                with pytest.raises(ConfigError, match="model ha"):
                    build(benchmark.make_config(shape, 16, False, None), None)
                continue
            model = build(benchmark.make_config(shape, 16, False, None), None)
            assert callable(model.loss), name


@pytest.mark.parametrize("shape", [4, 5], ids=["foreign", "ours"])
def test_rows_with_cuda_graphs(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: int
) -> None:
    from sbn_lightning.training import graphs

    recorded = []
    monkeypatch.setattr(graphs, "record", lambda function, pool: recorded.append(function()) or function)
    monkeypatch.setattr(graphs._Graphs, "forward", torch.enable_grad()(graphs._Graphs.forward))
    path = tmp_path / "training_step.csv"
    benchmark.measure(path, "ours 2:4", arguments(benchmark, shape=benchmark.SHAPES[shape]), {}, graphs=True)
    assert [row["variant"] for row in read(path)] == ["ours 2:4, CUDA graphs"]
    assert len(recorded) == 2
