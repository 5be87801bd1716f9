"""Tokens a second and model FLOPs utilisation."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from sbn_lightning import TokenThroughput
from sbn_lightning.callbacks.throughput import count_tokens
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.flops import peak_flops
from tests.helpers import quiet_trainer, small_module, token_loader


def test_count_tokens():
    ids = torch.zeros(4, 9, dtype=torch.long)
    assert count_tokens(ids) == 32
    assert count_tokens({"mask": torch.ones(2, 2), "input_ids": ids}) == 36
    assert count_tokens([ids, torch.zeros(4)]) == 32
    assert count_tokens("text") == 0


class Clock:
    """A clock that stands still until a test advances it."""

    now = 0.0

    def __call__(self):
        return self.now


class Slow(Callback):
    """Advances the clock: a second for each batch, a minute for each validation and each checkpoint."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.clock.now += 1

    def on_validation_end(self, trainer, pl_module):
        self.clock.now += 60

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.clock.now += 60


@pytest.mark.parametrize("accumulate", [1, 2])
def test_throughput_and_utilisation(tmp_path, monkeypatch, accumulate):
    clock = Clock()
    monkeypatch.setattr("sbn_lightning.callbacks.throughput.time.perf_counter", clock)
    module = small_module()
    weights = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
    config, tokens = module.config, 4 * 16
    flops = tokens * (6 * weights + 6 * config.n_layers * config.d_model * 16)
    throughput = TokenThroughput(window=2, peak_flops=10 * flops)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1)
    options = {"max_steps": 8 // accumulate, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    trainer = quiet_trainer(
        [throughput, Slow(clock), saver], logger=CSVLogger(tmp_path), val_check_interval=3, **options
    )
    trainer.fit(module, token_loader(), token_loader(batches=1))
    rows = list(csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").open()))
    for name, expected in (("tokens_per_second", tokens), ("model_flops_utilization", 0.1)):
        logged = [float(row[name]) for row in rows if row.get(name)]
        assert len(logged) >= 8 // accumulate // 2
        assert logged == pytest.approx([expected] * len(logged))


def test_without_a_peak_there_is_no_utilisation():
    trainer = quiet_trainer([TokenThroughput(window=1)], max_steps=1)
    trainer.fit(small_module(), token_loader())
    assert "tokens_per_second" in trainer.callback_metrics
    assert "model_flops_utilization" not in trainer.callback_metrics


@pytest.mark.parametrize("option", [{"window": 0}, {"peak_flops": 0.0}, {"peak_flops": float("nan")}])
def test_throughput_names_what_is_not_positive(option):
    (name,) = option
    with pytest.raises(ConfigError, match=name):
        TokenThroughput(**option)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H20", None),
    ],
)
def test_peaks_are_the_dense_ones(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    # Where Lightning's table also lists the dense peak of tensor cores, both tables agree.
    if name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"):
        assert peak == pytest.approx(get_available_flops(torch.device("cuda", 0), torch.bfloat16), rel=1e-3)
