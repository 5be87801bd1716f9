"""What a conversion does to a model of transformers before training; see :mod:`sbn_lightning.evaluation.inspection`.

The parts are the linear layers of a block by their own names, such as ``q_proj``. Architectures give
their blocks different arguments, so each measurement runs the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.evaluation.inspection import (
    NO_LATENT_WEIGHTS,
    Convert,
    Inspection,
    Measured,
    Place,
    first_blocks,
)
from sbn_lightning.formats.init_from import without_learned_scales, without_masks
from sbn_lightning.integrations.huggingface.network import Network, build_network
from sbn_lightning.layers.candidates import guess_split_sizes, left_alone, shape_of
from sbn_lightning.layers.conv1d import is_conv1d
from sbn_lightning.layers.experts import fused_weights
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.sparsity.config import SparsityConfig

# The parts of layers that the architecture stores fused, by the layer's name and the number of parts.
_PART_NAMES = {
    ("qkv_proj", 3): ("q", "k", "v"),
    ("c_attn", 3): ("q", "k", "v"),
    ("gate_up_proj", 2): ("gate", "up"),
}


class NetworkInspection(Inspection):
    """Runs a dense model of transformers with parts of it converted, on a few rows of tokens.

    Args:
        model: The dense model; hooks are added and removed again.
        rows: The tokens, int64 ``[rows, T + 1]``.
        sparsity: The options of the conversion.

    Raises:
        ConfigError: If the pattern fits none of the layers, or the model has fused experts.
    """

    def __init__(self, model: Network, rows: Tensor, sparsity: SparsityConfig) -> None:
        if any(fused_weights(module) for module in model.modules()):
            raise ConfigError("inspect does not know the parts of a mixture of experts")
        self.model, self.rows, self.sparsity = model, rows, sparsity  # type: ignore[assignment]
        names = {id(module): name for name, module in model.hf.named_modules()}
        self._places = {}
        for i, block in enumerate(model.blocks):
            for own, module in block.named_modules():
                name = names[id(module)]
                if not isinstance(module, nn.Linear) and not is_conv1d(module):
                    continue
                # A conversion skips these layers too.
                if left_alone(model.hf, name, module) or shape_of(module)[0] % sparsity.nm.m:
                    continue
                sizes, last = guess_split_sizes(model.hf, name, module), own.rpartition(".")[2]
                parts = _PART_NAMES.get((last, len(sizes or ())), (last,))
                key = f"{i}/{own.replace('.', '/')}"
                self._places[key] = Place(module, i, parts, sizes)
        if not self._places:
            raise ConfigError(f"no linear layer in the blocks of {type(model.hf).__name__} fits {sparsity.pattern}")

    def _unchanged(self) -> float:
        return float(self.model.loss(self.rows[:, :-1], self.rows[:, 1:]))

    def _run(self, convert: Convert, blocks: range, parts: Sequence[str]) -> float:
        convert(blocks, parts)
        loss = self._unchanged()
        convert(range(0), parts)
        return loss

    def _cumulative(self, convert: Convert, parts: list[str], points: int) -> Iterator[Measured]:
        for count in sorted(self._ends(points)):
            yield Measured("cumulative", first_blocks(count - 1), "ternary", self._run(convert, range(count), parts))


def dense_network(network: Network) -> Network:
    """Return a model with dense layers around the same weights: what the latent weights compute without a mask.

    Args:
        network: A model in any arithmetic that has latent weights.

    Raises:
        ConfigError: If a layer holds codes and no latent weight.
    """
    if any(isinstance(module, PackedTernaryLinear) for module in network.modules()):
        raise ConfigError(NO_LATENT_WEIGHTS)
    state = without_learned_scales(without_masks(dict(network.hf.state_dict())), ternary_layers(network.hf))
    hf = build_network({**network.config.hugging_face, "quantization_config": None})
    hf.load_state_dict(state)
    return Network(hf.to(next(network.parameters()).device), "dense").eval().requires_grad_(False)
