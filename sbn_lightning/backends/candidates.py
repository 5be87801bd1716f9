"""Which kernels can serve a layer on a device, and why the others cannot. Nothing is measured here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch

from sbn_lightning.sparsity.config import SparsityConfig


class TernaryLayer(Protocol):
    """What the choice asks of a layer."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def sparsity(self) -> SparsityConfig: ...


class Shape(NamedTuple):
    """A layer as the registry sees it; the fields are those of ``sbn_kernels.gemm.registry.LinearShape``."""

    in_features: int
    out_features: int
    n: int
    m: int
    activation_bits: int | None


class KernelStatus(NamedTuple):
    """One row of :func:`describe`.

    Attributes:
        kernel: The name of the kernel.
        serves: What the kernel does, in a few words.
        reason: Why the kernel does not run here; None if it runs.
    """

    kernel: str
    serves: str
    reason: str | None


def describe(device: torch.device | None = None) -> list[KernelStatus]:
    """Says which kernels run on a device, and why the others do not.

    Args:
        device: The device; None: the current GPU if there is one, else the CPU.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    nowhere = why_none(device)
    if find_spec("triton") is None:
        return [KernelStatus("all kernels", "integer products", nowhere)]
    from sbn_kernels.catalog import report

    return [KernelStatus(row.kernel, row.serves, nowhere or row.reason) for row in report(_index(device))]


def candidates(
    layer: TernaryLayer | Shape, device: torch.device, packed: bool = False
) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """Asks the registry which kernels can serve a layer.

    Args:
        layer: The layer, or its shape.
        device: The device of the layer.
        packed: Whether the layer holds packed weights and no latent weight.

    Returns:
        For each backend that can serve the layer the name of its first kernel; for each other backend the reason; and
        the backends of which no kernel runs on the device, whatever the layer.
    """
    backends = ("int8", "sparse")
    if nowhere := why_none(device):
        return {}, dict.fromkeys(backends, nowhere), set(backends)
    import sbn_kernels.catalog  # noqa: F401 (registers the kernels)
    from sbn_kernels.gemm.registry import products

    found: dict[str, str] = {}
    reasons: dict[str, str] = {}
    absent: set[str] = set()
    for backend in backends:
        kernels = [kernel for kernel in products(backend) if kernel.most_tokens is None]
        missing = [f"{kernel.name} {reason}" for kernel in kernels if (reason := kernel.needs.missing(_index(device)))]
        here = [kernel for kernel in kernels if kernel.needs.missing(_index(device)) is None]
        misfits = []
        for kernel in here:
            if (reason := unfit(layer, kernel.name, packed)) is None:
                found[backend] = kernel.name
                break
            misfits.append(reason)
        else:
            on_cpu = device.type != "cuda" and not here
            reasons[backend] = "tensors are on the CPU" if on_cpu else "; ".join(dict.fromkeys(misfits or missing))
            if not here:
                absent.add(backend)
    return found, reasons, absent


def unfit(layer: TernaryLayer | Shape, kernel: str, packed: bool = False) -> str | None:
    """Says why a layer cannot run on a kernel, whatever the machine.

    Args:
        layer: The layer, or its shape.
        kernel: The name of the kernel.
        packed: Whether the layer holds packed weights and no latent weight.

    Returns:
        The reason in one line, or None if the layer can run.
    """
    from sbn_kernels.gemm.registry import LinearShape, product

    reason = product(kernel).unfit(LinearShape(*shape_of(layer)))
    if packed and reason is None and not product(kernel).for_packed_layers:
        reason = f"{kernel} reads no packed weights"
    return reason


def rivals(layer: TernaryLayer, device: torch.device, backend: str, first: str) -> list[str]:
    """Names the kernels that a measurement should compare with the first one of a backend.

    These are the kernels that nobody has timed on such a GPU. A first kernel that is written for exactly this GPU has
    no rivals.

    Args:
        layer: The layer.
        device: The device of the layer.
        backend: ``"int8"`` or ``"sparse"``.
        first: The name of the first kernel of the backend, from :func:`candidates`.
    """
    from sbn_kernels.gemm.registry import product, products

    if product(first).needs.only is not None:
        return []
    untimed = [kernel for kernel in products(backend) if kernel.untimed and kernel.most_tokens is None]
    here = [kernel.name for kernel in untimed if kernel.needs.missing(_index(device)) is None]
    return [name for name in here if name != first and unfit(layer, name) is None]


def engines(device: torch.device) -> tuple[dict[str, str], dict[str, str]]:
    """What ``device`` can run for a layer that every kernel fits.

    Returns:
        For each backend the name of its first kernel; for each other backend the reason.
    """
    found, reasons, _ = candidates(Shape(128, 128, 2, 4, 8), device)
    return found, reasons


def why_none(device: torch.device) -> str | None:
    """Why no kernel at all can run on ``device``."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and torch.cuda.is_available():
        return f"tensors are on the {device.type.upper()}"
    return None


def _index(device: torch.device) -> int | None:
    """The number of a GPU; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def shape_of(layer: TernaryLayer | Shape) -> Shape:
    """The shape of a layer, or the shape itself."""
    if isinstance(layer, Shape):
        return layer
    sparsity = layer.sparsity
    return Shape(layer.in_features, layer.out_features, sparsity.nm.n, sparsity.nm.m, sparsity.activation_bits)


def named(device: torch.device) -> str:
    """What a device is called in messages."""
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
