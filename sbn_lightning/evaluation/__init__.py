"""How good a model is, and how sparse.

* :mod:`~sbn_lightning.evaluation.scoring`: log-probabilities of given tokens;
* :mod:`~sbn_lightning.evaluation.sliding`: perplexity with sliding windows;
* :mod:`~sbn_lightning.evaluation.report`: what each linear layer is: pattern, zeros, gamma;
* :mod:`~sbn_lightning.evaluation.harness`: for the lm-evaluation-harness (``pip install sbn-lightning[eval]``);
* :mod:`~sbn_lightning.evaluation.command`: ``sbn evaluate``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.evaluation.report import LayerReport, layer_reports
    from sbn_lightning.evaluation.scoring import score
    from sbn_lightning.evaluation.sliding import Perplexity, perplexity

__all__ = ["LayerReport", "Perplexity", "layer_reports", "perplexity", "score"]

_MODULE_OF = {
    "LayerReport": "report",
    "Perplexity": "sliding",
    "layer_reports": "report",
    "perplexity": "sliding",
    "score": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
