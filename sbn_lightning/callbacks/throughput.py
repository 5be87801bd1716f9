"""``TokenThroughput``: tokens per second and model-FLOPs utilisation of training, without validation and checkpoints.

Lightning's ``ThroughputMonitor`` treats a precision plugin that it does not know as float32, and for some GPUs its
table of peaks has figures "with sparsity" or without tensor cores. Here FLOPs and peaks are those of the dense model in
BF16 (:mod:`sbn_lightning.models.flops`), however a run really computes. So the utilisation compares a run with a dense
run, and sparse or int8 kernels can bring the value above 1.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sbn_lightning.callbacks.base import RunCallback, show
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models import flops

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


def count_tokens(batch: Any) -> int:
    """Return the number of tokens that a batch trains on.

    A tensor ``[batch, sequence_length + 1]`` counts as ``batch * sequence_length`` tokens. In a mapping all tokens of
    ``input_ids`` count, or all tokens of the first tensor if there are no ``input_ids``.
    """
    sequences, length = _shape(batch)
    return sequences * length


def _shape(batch: Any) -> tuple[int, int]:
    """Return the number of sequences in a batch, and of tokens to train on in each."""
    if isinstance(batch, Tensor):
        return batch[..., 0].numel(), batch.shape[-1] - 1
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids", next((v for v in batch.values() if isinstance(v, Tensor)), None))
        return (ids[..., 0].numel(), ids.shape[-1]) if isinstance(ids, Tensor) else (0, 0)
    return _shape(batch[0]) if isinstance(batch, (list, tuple)) and batch else (0, 0)


class TokenThroughput(RunCallback):
    """Log ``tokens_per_second`` and ``model_flops_utilization``, and show them in the progress bar.

    The tokens are those of all processes. The utilisation is that of one device: the FLOPs that the device's tokens
    would cost in the dense model (:func:`~sbn_lightning.models.flops.flops_per_token`), divided by the FLOPs that the
    device can do in that time in dense BF16. There is no utilisation on a CPU, and none on a GPU of unknown peak
    unless ``peak_flops`` is given.

    Time is measured between the ends of batches, without waiting for the device. Over a window of many batches this is
    the device's time.

    Args:
        window: The number of batches that an average spans.
        peak_flops: The FLOP/s that one device can do in dense BF16. None takes the known value of the GPU.

    Raises:
        ConfigError: If an argument is not positive.
    """

    def __init__(self, window: int = 20, peak_flops: float | None = None) -> None:
        if window < 1:
            raise ConfigError(f"TokenThroughput: window={window} must be at least 1")
        if peak_flops is not None and not peak_flops > 0:
            raise ConfigError(f"TokenThroughput: peak_flops={peak_flops} must be positive")
        self.window = window
        self.peak_flops = peak_flops
        self._peak: float | None = None
        self._flops_per_token = self._flops_per_pair = 0.0
        self._paused: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._tokens, self._flops, self._batches, self._since = 0, 0.0, 0, time.perf_counter()

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        """Find out what a token costs and what the device can do."""
        # The cost of a token is a constant, plus a term for each token of its sequence.
        self._flops_per_token = flops.flops_per_token(pl_module, 0)
        self._flops_per_pair = flops.flops_per_token(pl_module, 1) - self._flops_per_token
        device = next((parameter.device for parameter in pl_module.parameters()), torch.device("cpu"))
        self._peak = self.peak_flops or flops.peak_flops(device)
        if self._peak is None and device.type == "cuda":
            rank_zero_info(
                f"TokenThroughput knows no peak for {torch.cuda.get_device_name(device)}: give peak_flops for "
                "model_flops_utilization"
            )
        self._paused = None
        self._restart()

    def on_validation_start(self, trainer: Run, pl_module: nn.Module) -> None:
        """Stop the clock until the next batch."""
        self._pause()

    def on_save_checkpoint(self, trainer: Run, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Stop the clock until the next batch."""
        self._pause()

    def _pause(self) -> None:
        if self._paused is None:
            self._paused = time.perf_counter()

    def on_train_batch_start(self, trainer: Run, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Start the clock again."""
        if self._paused is not None:
            self._since += time.perf_counter() - self._paused
            self._paused = None

    def on_train_batch_end(self, trainer: Run, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the tokens of a batch, and log the average at the end of a window."""
        sequences, length = _shape(batch)
        tokens = sequences * length
        self._tokens += tokens
        self._flops += tokens * (self._flops_per_token + length * self._flops_per_pair)
        self._batches += 1
        if self._batches == self.window:
            seconds = time.perf_counter() - self._since
            show(trainer, pl_module, "tokens_per_second", self._tokens * trainer.world_size / seconds)
            if self._peak is not None:
                show(trainer, pl_module, "model_flops_utilization", self._flops / seconds / self._peak)
            self._restart()
