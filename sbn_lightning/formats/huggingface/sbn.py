"""The Hugging Face folder of this project: any architecture, with 2-bit ternary weights (``quant_method: "sbn"``).

A ternary layer ``NAME`` has three tensors:

* ``NAME.codes``: uint8 ``[out_features, ceil(in_features / 4)]``. Byte j of a row holds the codes of the input features
  4j to 4j + 3, lowest bits first, two bits each, stored as code + 1.
* ``NAME.gamma``: float32 ``[parts]``, the weight scale of each part.
* ``NAME.bias``: as in the model.

The fused weight of a mixture of experts is such a layer too, with the rows of all experts one after the other.

Everything else is stored as transformers stores it. ``quantization_config`` in ``config.json`` names the layers and
their options. Two bits a weight are more than the 1.27 bits of the packed form at 2:4. In exchange a reader can cut the
tensor by rows and by columns, as tensor parallelism does, without decoding it first.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.huggingface.config import architecture
from sbn_lightning.formats.huggingface.names import fused_name, linear_parts
from sbn_lightning.formats.packed import ternary_layers
from sbn_lightning.layers.reversion import METHOD as METHOD
from sbn_lightning.sparsity.config import OPTION_NAMES
from sbn_lightning.sparsity.pattern import NMPattern, nonzeros_per_group

if TYPE_CHECKING:
    from sbn_lightning.formats.loaded import LoadedModel

VERSION = 1
OPTIONS = OPTION_NAMES
"""The options of a layer that a folder records."""


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes into two bits each.

    Args:
        codes: int8 ``[..., in_features]`` in {-1, 0, 1}.

    Returns:
        uint8 ``[..., ceil(in_features / 4)]``; unused bits hold the code 0.
    """
    quads = (F.pad(codes, (0, -codes.shape[-1] % 4)) + 1).to(torch.uint8).unflatten(-1, (-1, 4))
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack_codes(packed: Tensor, in_features: int) -> Tensor:
    """Undo :func:`pack_codes`: uint8 ``[..., ceil(in_features / 4)]`` -> int8 ``[..., in_features]``."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return (((packed.unsqueeze(-1) >> shifts) & 3).to(torch.int8) - 1).flatten(-2)[..., :in_features].contiguous()


def quantization_config(modules: Mapping[str, Mapping[str, Any]], form: str) -> dict[str, Any]:
    """Return what ``config.json`` says about the sparse layers.

    Args:
        modules: The options of each sparse layer, by its name in the Hugging Face model.
        form: ``"packed"`` for 2-bit codes, ``"latent"`` for latent weights and masks.
    """
    first = next(iter(modules.values()))
    common = {option: value for option, value in first.items() if option != "split_sizes"}
    own = {
        name: {option: value for option, value in options.items() if common.get(option) != value}
        for name, options in modules.items()
    }
    return {"quant_method": METHOD, "version": VERSION, "form": form, **common, "modules": own}


class PackedContents:
    """What a folder says about its packed layers.

    Attributes:
        modules: The options of each layer by name.
        most: The largest number of non-zero codes in a group of each layer's pattern; at least 1.
    """

    def __init__(self) -> None:
        self.modules: dict[str, dict[str, Any]] = {}
        self.most: dict[str, int] = {}
        self._zeros = self._weights = 0

    def add(self, name: str, options: Mapping[str, Any], codes: Tensor) -> None:
        """Note a layer.

        Args:
            name: The name of the layer in the folder.
            options: Its options, with the ``pattern``.
            codes: Its codes, ``[out_features, in_features]``.
        """
        self.modules[name] = dict(options)
        self.most[name] = max(1, int(nonzeros_per_group(codes, NMPattern.parse(options["pattern"]).m).max()))
        self._zeros += int((codes == 0).sum())
        self._weights += codes.numel()

    @property
    def zeros(self) -> float:
        """The share of ternary weights that are 0."""
        return self._zeros / self._weights


def widen_patterns(modules: Mapping[str, dict[str, Any]], most: Mapping[str, int]) -> str | None:
    """Write into the options of packed layers the patterns that their codes keep to.

    In the middle of a ramp, groups have more non-zeros than N. All layers of a pattern then get the same larger N,
    because vLLM computes q, k and v as one layer and refuses parts whose options differ.

    Args:
        modules: The options of each layer by name, changed in place.
        most: The largest number of non-zero codes in a group of each layer.

    Returns:
        What to say on the model card; None if all layers keep to their patterns. A warning says the same.
    """
    wider: dict[str, int] = {}
    for name, options in modules.items():
        if most[name] > NMPattern.parse(options["pattern"]).n:
            wider[options["pattern"]] = max(most[name], wider.get(options["pattern"], 0))
    if not wider:
        return None
    for options in modules.values():
        if (n := wider.get(options["pattern"])) is not None:
            options["pattern"] = f"{n}:{NMPattern.parse(options['pattern']).m}"
    reason = f"written before the ramp to {', '.join(wider)} had ended"
    warnings.warn(f"{reason}: groups have more non-zero weights than that, and the folder says so", stacklevel=3)
    return reason


def write_hf_sbn(loaded: LoadedModel, folder: Path, perplexity: float | None = None) -> str:
    """Write a ternary model of this project as a Hugging Face folder that ``from_pretrained`` reads with our quantiser.

    Args:
        loaded: The model.
        folder: The folder to write to.
        perplexity: The perplexity for the model card, if it is known.

    Returns:
        What was written, for the user.

    Raises:
        ConfigError: If the model is not ternary.
    """
    from sbn_lightning.formats.huggingface.write import _other_tensors, _save, _summary

    model, config = loaded.model, loaded.config
    layers = ternary_layers(model)
    if config.linear != "ternary" or not layers:
        raise ConfigError(f"--format hf-sbn is for ternary models; this one is {config.linear!r}: use --format hf")
    if config.layers:
        raise ConfigError(
            "--format hf-sbn holds models whose linear layers are all ternary; model.config.layers makes some of "
            "another kind: use --format packed"
        )
    tensors = _other_tensors(loaded)
    contents = PackedContents()
    for part in tqdm(list(linear_parts(config)), desc="writing", unit="layer", disable=None):
        layer = layers[part.ours]
        codes, gamma = layer.ternary()
        options = {"pattern": str(layer.pattern), "activation_bits": layer.activation_bits}
        if (fused := fused_name(part)) is not None:
            tensors[f"{fused}.codes"], tensors[f"{fused}.gamma"] = pack_codes(codes), gamma.clone()
            contents.add(fused, options, codes)
            continue
        rows = part.rows or (layer.out_features,)
        biases = (None,) * len(rows) if layer.bias is None else layer.bias.detach().split(rows)
        for name, piece, scale, bias in zip(part.theirs, codes.split(rows), gamma, biases, strict=True):
            tensors[f"{name}.codes"] = pack_codes(piece)
            tensors[f"{name}.gamma"] = scale.reshape(1).clone()
            if bias is not None:
                tensors[f"{name}.bias"] = bias.clone()
            contents.add(name, options, piece)
    remark = widen_patterns(contents.modules, contents.most)
    _save(loaded, folder, tensors, {"quantization_config": quantization_config(contents.modules, "packed")})
    facts = {
        "architecture": architecture(config),
        "modules": contents.modules,
        "remark": remark,
        "zeros": contents.zeros,
        "perplexity": perplexity,
    }
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    return f"{architecture(config)} with quant_method {METHOD!r}, {_summary(folder, tensors, 'ternary layers')}"


def model_card(facts: Mapping[str, Any]) -> str:
    """Return a model card that says what the model is and how to load it.

    Args:
        facts: ``architecture``, ``modules`` (the options of each sparse layer), ``remark`` (more about the pattern, or
            None), ``zeros`` (a share of the ternary weights) and ``perplexity`` (None if it was not measured).
    """
    modules = facts["modules"].values()
    patterns = dict.fromkeys(str(options["pattern"]) for options in modules)
    bits = dict.fromkeys(options["activation_bits"] for options in modules)
    sparsity = "; ".join(_in_words(pattern) for pattern in patterns)
    sparsity += "" if facts["remark"] is None else f". {facts['remark'].capitalize()}"
    activations = "; ".join(
        "as they are" if one is None else f"quantised to {one} bits, token by token" for one in bits
    )
    perplexity = facts["perplexity"]
    return f"""---
library_name: transformers
tags: [sbn-lightning, ternary, bitnet, sparse]
---

# A ternary model, {", ".join(patterns)}

| | |
| --- | --- |
| architecture | {facts["architecture"]} |
| weights of linear layers | -1, 0 or 1, times one scale for each part of a tensor |
| pattern | {sparsity} |
| zeros | {facts["zeros"]:.1%} of the ternary weights |
| bits | 2 for each ternary weight in the file |
| activations | {activations} |
| perplexity | {"not measured" if perplexity is None else f"{perplexity:.2f}"} |

## How to load

The Python package `sbn_lightning` comes from its own repository, and from no package index. It needs transformers.

```python
import sbn_lightning.integrations.huggingface  # makes the quantisation method known to transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```

The layers run on the kernels of sbn-lightning on a GPU that has them, and in plain PyTorch elsewhere.
"""


def _in_words(pattern: str) -> str:
    n, m = (int(part) for part in pattern.split(":"))
    rule = "no fixed pattern of zeros" if n == m else f"at most {n} of every {m} weights in a row are not zero"
    return f"{pattern}: {rule}"
