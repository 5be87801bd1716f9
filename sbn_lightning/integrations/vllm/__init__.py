"""A vLLM plugin: ``vllm serve FOLDER`` for a Hugging Face folder with 2-bit ternary weights.

The user has no option to set. vLLM finds :func:`register` by the entry point ``vllm.general_plugins``, and
:class:`SBNConfig` by ``quant_method: "sbn"`` in ``config.json``. vLLM fuses q, k and v into one layer, and gate and up
into another. The 2-bit codes of the parts are loaded into slices of one tensor, and gamma has one entry for each part,
as in a fused layer of this project. After loading, each layer becomes a packed layer of this project, which takes its
kernels from the registry that the whole project uses. vLLM calls the layer as one operator
(:mod:`sbn_lightning.layers.packed_op`), which ``torch.compile`` and CUDA graphs take as it is.

``plugin.py`` has the method, ``linear.py`` the linear layers and tensor parallelism, and ``experts.py`` the fused
experts of a mixture.

vLLM is imported with this folder, and nothing else in this project imports this folder.
"""

from sbn_lightning.integrations.vllm.experts import SBNExpertsMethod
from sbn_lightning.integrations.vllm.linear import SBNLinearMethod
from sbn_lightning.integrations.vllm.plugin import SBNConfig, register

__all__ = ["SBNConfig", "SBNExpertsMethod", "SBNLinearMethod", "register"]
