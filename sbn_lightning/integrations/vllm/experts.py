"""The fused experts of vLLM on 2-bit ternary weights.

A block has two weights, :data:`GATE_UP` and :data:`DOWN`, each with the rows of all experts one after the other. They
become two :class:`~sbn_lightning.layers.experts_linear.PackedExperts`, the layers that the rest of the project runs.
vLLM chooses the experts of each token. :class:`Routing` sorts the tokens by expert, and adds the
outputs of each token's experts.

The products loop over the experts that got tokens, and the loop reads the number of tokens on the host. A CUDA graph
cannot hold such a loop. Where vLLM captures graphs, the layers take the kernel that multiplies all experts in one
launch (``backend="grouped"``).

Each rank of tensor parallelism has a slice of the inner features of every expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.huggingface.sbn import unpack_codes
from sbn_lightning.integrations.vllm.linear import check_slice, whole_magnitude
from sbn_lightning.layers.experts_linear import PackedExperts, Routing
from sbn_lightning.layers.packed import InferenceBackend
from sbn_lightning.sparsity.config import SparsityConfig

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The names of the two weights of a block of experts, in the folder."""

_VLLM_DOWN = "w2"  # Mixtral's name for down in vLLM, which renames the folder's tensors before it hands them over.


class SBNExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Load and compute the experts of one block.

    Args:
        moe: What vLLM knows about the block.
        prefix: The name of the block in vLLM, for messages.
        pattern: The pattern "N:M".
        activation_bits: The number of bits of activations, or None.

    Raises:
        ConfigError: If the block has biases, another activation than SwiGLU, or is spread over ranks in another way
            than by tensor parallelism.
    """

    def __init__(self, moe: FusedMoEConfig, prefix: str, pattern: str, activation_bits: int | None) -> None:
        super().__init__(moe)
        self.prefix, self.pattern, self.activation_bits = prefix, pattern, activation_bits
        if moe.has_bias or moe.activation != MoEActivation.SILU:
            raise ConfigError(f"{prefix}: only experts without biases and with silu(gate) * up are served")
        parallel = moe.moe_parallel_config
        if parallel.use_ep or parallel.tp_size != get_tensor_model_parallel_world_size():
            raise ConfigError(
                f"{prefix}: ternary experts are spread over ranks by tensor parallelism alone; leave out "
                "--enable-expert-parallel and --data-parallel-size"
            )

    def maybe_roundup_sizes(self, hidden_size: int, inner_size: int, *rest: Any) -> tuple[int, int]:
        """Return the sizes as they are: the kernels take any width that fits the pattern."""
        return hidden_size, inner_size

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Return None: the weights are not for vLLM's own kernels."""

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make room for this rank's 2-bit codes, and take over the loading.

        Raises:
            ConfigError: If this rank's share of a row does not consist of whole groups and whole bytes.
        """
        inner = intermediate_size_per_partition
        check_slice(inner, self.moe.intermediate_size, self.pattern, f"inner features of {self.prefix}")
        shapes = {
            "gate_up_codes": (num_experts, 2, inner, -(-hidden_size // 4)),
            "gate_up_gamma": (num_experts, 2),
            "down_codes": (num_experts, hidden_size, -(-inner // 4)),
            "down_gamma": (num_experts,),
        }
        for name, shape in shapes.items():
            dtype = torch.uint8 if name.endswith("codes") else torch.float32
            layer.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        # vLLM's own function splits floating-point tensors of three dimensions, which these are not.
        layer.load_weights = lambda weights: self._load(layer, weights)  # type: ignore[assignment]
        layer.sbn_shape = (num_experts, hidden_size, inner)  # type: ignore[assignment]
        model = get_current_vllm_config().model_config
        graphs = model is not None and not model.enforce_eager and torch.cuda.is_available()
        self.backend: InferenceBackend = "grouped" if graphs else "auto"

    def _load(self, layer: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        rank = self.moe.moe_parallel_config.tp_rank
        for name, tensor in weights:
            weight, _, kind = name.rpartition(".")
            own = "gate_up" if weight == GATE_UP else "down" if weight in (DOWN, _VLLM_DOWN) else None
            if own is None or kind not in ("codes", "gamma"):
                raise ConfigError(f"{self.prefix} has no place for the tensor {name} of the folder")
            target = getattr(layer, f"{own}_{kind}").data
            if kind == "codes":
                cut = -2 if own == "gate_up" else -1
                whole = list(target.shape)
                whole[cut] = tensor.numel() * whole[cut] // target.numel()
                tensor = tensor.view(whole).narrow(cut, rank * target.shape[cut], target.shape[cut])
            target.copy_(tensor.view(target.shape) if kind == "gamma" else tensor)
            yield f"{own}_{kind}"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn the loaded codes into packed layers, and choose their kernels."""
        experts, hidden, inner = layer.sbn_shape  # type: ignore[misc]
        up = self._packed(layer.gate_up_codes, layer.gate_up_gamma, hidden, (inner, inner), experts)
        down = self._packed(layer.down_codes, layer.down_gamma, inner, (hidden,), experts)
        del layer.gate_up_codes, layer.gate_up_gamma, layer.down_codes, layer.down_gamma
        layer.up, layer.down = up, down
        self._key = f"{self.prefix} {len(_BLOCKS)}"
        _BLOCKS[self._key] = (up, down, self.moe.moe_parallel_config.tp_size)

    def _packed(self, codes: Any, gamma: Any, in_features: int, parts: tuple[int, ...], experts: int) -> PackedExperts:
        sparsity = SparsityConfig.make(self.pattern, activation_bits=self.activation_bits, split_sizes=parts * experts)
        rows = unpack_codes(codes.data.flatten(0, -2), in_features)
        layer = PackedExperts(rows, gamma.data.flatten(), None, sparsity=sparsity)
        layer.experts, layer.backend = experts, self.backend
        layer._settle()
        return layer

    def apply(self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared: Any) -> Tensor:
        """Send tokens through their experts.

        Args:
            layer: The block.
            x: The tokens, ``[tokens, hidden]``.
            topk_weights: The weights of the experts' outputs, ``[tokens, k]``.
            topk_ids: The experts of each token, ``[tokens, k]``.
            **shared: vLLM's shared experts, which vLLM computes by itself.

        Returns:
            ``[tokens, hidden]``: with tensor parallelism this rank's part of the sum.

        Raises:
            ConfigError: If the block weights its tokens instead of the outputs, and a token has several experts.
        """
        if getattr(layer, "apply_router_weight_on_input", False):
            if topk_weights.shape[1] != 1:
                raise ConfigError(
                    f"{self.prefix} weights the tokens before their experts, which needs one expert a token, "
                    f"and has {topk_weights.shape[1]}"
                )
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        y: Tensor = torch.ops.sbn_lightning.packed_experts(x, topk_weights, topk_ids, self._key)
        return y


# An operator takes tensors and plain values, so it finds the layers by a name.
_BLOCKS: dict[str, tuple[PackedExperts, PackedExperts, int]] = {}


def packed_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, block: str) -> Tensor:
    """Compute a block of experts, as :meth:`SBNExpertsMethod.apply` does; ``block`` is its name in ``_BLOCKS``."""
    up, down, ranks = _BLOCKS[block]
    route = Routing.of(topk_ids.long(), up.experts)
    gate, value = up(route.gather(x), route.counts).chunk(2, dim=-1)
    hidden = F.silu(gate) * value
    y = down(hidden, route.counts, magnitude=whole_magnitude(hidden, down.activation_bits, ranks))
    return route.combine(y, topk_weights).to(x.dtype)


_LIBRARY = torch.library.Library("sbn_lightning", "FRAGMENT")
_LIBRARY.define("packed_experts" + torch.library.infer_schema(packed_experts, mutates_args=()))
_LIBRARY.impl("packed_experts", packed_experts, "CompositeExplicitAutograd")
torch.library.register_fake(
    "sbn_lightning::packed_experts", lambda x, topk_weights, topk_ids, block: torch.empty_like(x), lib=_LIBRARY
)
