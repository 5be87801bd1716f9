"""Record every micro-batch in a file that remains after the process has died."""

import os
import zlib

from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.layers.sparse_linear import masked_layers


class Recorder(RunCallback):
    """Appends one line for each micro-batch: number, loss to the last bit, checksums of samples and masks.

    Args:
        path: The file.
        note: Anything; a value in the configuration.
    """

    def __init__(self, path: str, note: str = "") -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        masks = zlib.crc32(b"".join(layer.packed_mask().numpy().tobytes() for _, layer in masked_layers(pl_module)))
        samples = zlib.crc32(batch.numpy().tobytes())
        step, window = trainer.global_step, trainer.accumulate_grad_batches
        line = f"{step} {batch_idx % window} {outputs['loss'].item().hex()} {samples:08x} {masks:08x}\n"
        # One write of a few bytes is either complete or absent, whatever happens to the process.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def read(path):
    """The record by number of the micro-batch. If a number was recorded several times, the last entry counts."""
    entries = {}
    with open(path) as stream:
        for line in stream:
            step, window, *values = line.split()
            entries[int(step), int(window)] = values
    return entries
