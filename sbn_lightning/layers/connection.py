"""What converted layers of one model do together, and the names of a model's modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sbn_lightning.layers.joined import note_groups
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.swiglu_fusion import fuse_swiglu

# In evaluation these modules of PyTorch hand the weights of their linear layers to one fused kernel and never call the
# layers, so the kernel would use the dense latent weights. Each entry is the attribute that switches the fused kernel,
# and the value that turns the kernel off.
_FUSED_INFERENCE: dict[type[nn.Module], tuple[str, int]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with their names, without the part that ``torch.compile`` adds to names."""
    for name, module in model.named_modules():
        yield name.replace("_orig_mod.", ""), module


def connect_layers(model: nn.Module) -> list[str]:
    """Find converted layers that can compute together, and switch off fused inference, which would not see their masks.

    Every way to put a converted model together ends with this function. So a model that was saved and loaded trains as
    fast as before, and with the same bits. A second call finds nothing new.

    Returns:
        The names of the modules whose SwiGLU is handed to the layer after it.
    """
    swiglu = fuse_swiglu(model)
    note_groups(model, SparseBitLinear)
    switch_fused_inference(model, on=False)
    return swiglu


def switch_fused_inference(model: nn.Module, on: bool) -> None:
    """Switch off PyTorch's fused inference around masked layers, or put it back as it was."""
    for module in model.modules():
        for kind, (switch, off) in _FUSED_INFERENCE.items():
            if isinstance(module, kind):
                if on and "fused_before" in vars(module):
                    setattr(module, switch, vars(module).pop("fused_before"))
                elif not on and "fused_before" not in vars(module) and any(masked_layers(module)):
                    vars(module)["fused_before"] = getattr(module, switch)
                    setattr(module, switch, off)
