"""Measure how good a model is, and how sparse.

* :mod:`~sbn_lightning.evaluation.scoring` computes log-probabilities of given tokens.
* :mod:`~sbn_lightning.evaluation.sliding` computes perplexity with sliding windows.
* :mod:`~sbn_lightning.evaluation.texts` reads the tokens of a text.
* :mod:`~sbn_lightning.evaluation.layer_report` describes each linear layer: pattern, zeros, gamma.
* :mod:`~sbn_lightning.evaluation.harness` is for the lm-evaluation-harness (``pip install -e ".[eval]"``).
* :mod:`~sbn_lightning.evaluation.measure` puts them together for the command ``sbn evaluate``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.evaluation.layer_report import LayerReport, layer_reports
    from sbn_lightning.evaluation.scoring import score
    from sbn_lightning.evaluation.sliding import Perplexity, perplexity

__all__ = ["LayerReport", "Perplexity", "layer_reports", "perplexity", "score"]

_MODULE_OF = {
    "LayerReport": "layer_report",
    "Perplexity": "sliding",
    "layer_reports": "layer_report",
    "perplexity": "sliding",
    "score": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
