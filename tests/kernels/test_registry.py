"""The registry, without a GPU: the kernel for each number of tokens on each GPU, and why the others cannot run."""

from collections.abc import Iterator

import pytest
import sbn_kernels.catalog as catalog
import torch
from sbn_kernels.gemm import registry
from sbn_kernels.gemm.registry import LinearShape, form_for_few_tokens, gradients_on, product, products, serving
from sbn_kernels.runtime import capability
from sbn_kernels.runtime.capability import Needs

SHAPE = LinearShape(4096, 14336, 2, 4)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Pretend that the machine has the GPU that a test names. Nothing is launched."""
    machine: dict[str, object] = {"capability": (9, 0), "gluon": None, "cusparselt": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: machine["capability"])
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: machine["cusparselt"])
    monkeypatch.setattr(capability, "gluon_missing", lambda: machine["gluon"])
    monkeypatch.setattr(capability, "interpreting", lambda: False)
    monkeypatch.setattr(registry, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(torch.version, "hip", None)
    for cache in (capability._missing, registry._readers, registry._gradients_on):
        cache.cache_clear()
    yield machine
    for cache in (capability._missing, registry._readers, registry._gradients_on):
        cache.cache_clear()


def first(backend: str, index: int = 0, shape: LinearShape = SHAPE) -> str | None:
    kernels = [k for k in products(backend) if k.most_tokens is None and k.needs.missing(index) is None]
    return next((k.name for k in kernels if k.unfit(shape) is None), None)


def served(form: str, tokens: int, chosen: str | None = None) -> str | None:
    kernel = serving(form, tokens, 14336, 4096, 0, chosen)
    return kernel and kernel.name


def test_on_hopper(gpu: dict[str, object]) -> None:
    assert (first("sparse"), first("int8"), gradients_on(0)) == ("hopper-sparse", "hopper", "hopper")
    assert [served("sparse24", tokens, "hopper-sparse") for tokens in (1, 4, 64, 65)] == [
        "decode-sparse", "decode-sparse", "hopper-sparse", "hopper-sparse"
    ]  # fmt: skip
    assert [served("dense", tokens) for tokens in (1, 64, 4096)] == ["decode", "hopper", "hopper"]
    assert form_for_few_tokens(product("hopper-sparse"), 0) == "sparse24"


def test_on_hopper_with_an_older_triton(gpu: dict[str, object]) -> None:
    gpu["gluon"] = "needs Triton >= 3.9"
    assert (first("sparse"), first("int8"), gradients_on(0)) == ("cusparselt", "portable", "portable")
    assert [served("dense", tokens) for tokens in (1, 64, 65)] == ["decode-portable", "decode-portable", None]
    assert form_for_few_tokens(product("portable"), 0) == "dense"
    assert "Triton" in str(product("hopper").needs.missing(0))


@pytest.mark.parametrize("here", [(8, 0), (10, 0)])
def test_on_other_gpus(gpu: dict[str, object], here: tuple[int, int]) -> None:
    gpu["capability"] = here
    assert (first("sparse"), first("int8"), gradients_on(0)) == ("cusparselt", "portable", "portable")
    assert [served("dense", tokens) for tokens in (1, 17, 64, 65)] == ["decode", "decode", "decode", None]
    assert product("hopper").needs.missing(0) == (
        f"needs a Hopper GPU (compute capability 9.0), not {here[0]}.{here[1]}"
    )


def test_on_an_old_gpu(gpu: dict[str, object]) -> None:
    gpu["capability"] = (7, 5)
    assert (first("sparse"), first("int8"), gradients_on(0)) == (None, None, None)
    assert product("portable").needs.missing(0) == "needs compute capability >= 8.0, not 7.5"
    with pytest.raises(capability.UnsupportedError):
        registry.gradients(0)


def test_a_kernel_says_which_layers_it_cannot_serve(gpu: dict[str, object]) -> None:
    assert first("sparse", shape=LinearShape(64, 64, 6, 8)) is None
    assert first("int8", shape=LinearShape(64, 64, 6, 8)) == "hopper"
    assert first("sparse", shape=LinearShape(64, 64, 1, 4)) == "hopper-sparse"
    gpu["gluon"] = "needs Triton >= 3.9"
    capability._missing.cache_clear()
    assert first("sparse", shape=LinearShape(64, 33, 2, 4)) is None
    assert product("cusparselt").unfit(LinearShape(64, 33, 2, 4)) == "cusparselt needs multiples of 32, not 64 -> 33"
    assert "activation_bits=None" in str(product("portable").unfit(LinearShape(64, 64, 2, 4, None)))


def test_the_report_names_every_kernel_with_its_reason(gpu: dict[str, object]) -> None:
    gpu["capability"] = (8, 0)
    rows = catalog.report(0)
    names = [row.kernel for row in rows]
    assert {kernel.name for kernel in products()} <= set(names)
    for row in rows:
        if row.kernel.startswith("hopper"):
            assert "Hopper" in str(row.reason)
    assert {row.reason for row in rows if row.kernel in ("portable", "decode", "cusparselt")} == {None}


def test_every_kernel_is_complete() -> None:
    for kernel in products():
        assert kernel.backend in ("int8", "sparse")
        assert isinstance(kernel.needs, Needs)
        assert kernel.pattern is None or kernel.most_tokens is not None or product(kernel.denser).pattern is None
        assert (kernel.prefers is None) == (kernel.most_tokens is None)
