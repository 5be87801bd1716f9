"""Triton's interpreter, made quicker for the tests."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Compute the same in a quarter of the time.

    Triton's interpreter works on small blocks, so most of its time goes into what surrounds the arithmetic. The parts
    that are replaced here do the same work once, or not at all:

    * In each call of a device function, it searches the whole language for the functions that it replaces.
    * It does not know our maximum that lets a NaN through, so it reduces one element after the other.
    * For each sum and product of integers it computes whether they overflow. It looks at the answer only if the option
      ``debug`` is set, which it is not.
    * It checks and wraps the shape of each block, of which there are a few dozen.
    """
    import numpy as np
    from sbn_kernels.common.maxima import larger
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    builtins: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(package: Any, builder: object, scope: object) -> None:
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [(name, member) for name, member in members if core.is_builtin(member)]
        for name, member in builtins[package]:
            if getattr(package, name) is member:  # not replaced yet
                interpreter._patch_attr(package, name, member, builder, scope)

    patch_any = interpreter._patch_lang
    patched: set[str] = set()  # what the kernel that is running has replaced

    @cache
    def languages(function: Any) -> set[str]:
        named = {"language": language, "core": core}
        return {name for name, module in named.items() if any(v is module for v in function.__globals__.values())}

    def patch_language(function: Any) -> Any:
        if patched and languages(function) <= patched:
            return interpreter._LangPatchScope()  # A device function: there is nothing left to replace, or to restore.
        scope = patch_any(function)
        if not patched:
            patched.update(languages(function))
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        return scope

    reduce_any = interpreter.ReduceOps.apply_impl

    def reduce(self: Any, operands: Any) -> Any:
        if self.combine_fn is larger:
            return self.min_max(operands[0], np.max)  # np.max lets a NaN through, too.
        return reduce_any(self, operands)

    type_of_any = interpreter._get_np_dtype
    types: dict[str, Any] = {}

    def type_of(kind: Any) -> Any:
        kind = kind.scalar
        if kind.name not in types:
            types[kind.name] = type_of_any(kind)
        return types[kind.name]

    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[tuple[Any, ...], Any] = {}
    tensors: dict[tuple[Any, ...], Any] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(shape)
        if not all(type(size) is int for size in sizes):
            make_block(self, element_ty, shape)
            return
        if sizes not in blocks:
            make_block(self, element_ty, shape)
            blocks[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = blocks[sizes]
        self.name = f"<{text}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in tensors:
            make_tensor(self, handle, type)
            tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[sizes]

    semantic = type(interpreter.interpreter_semantic)
    broadcast_any = semantic.broadcast_impl_value

    def broadcast(self: Any, one: Any, other: Any) -> Any:
        same = one.type.is_block() and other.type.is_block() and one.type.shape.values == other.type.shape.values
        return (one, other) if same else broadcast_any(self, one, other)

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        patch.setattr(interpreter, "_patch_lang", patch_language)
        patch.setattr(interpreter.ReduceOps, "apply_impl", reduce)
        patch.setattr(interpreter, "_get_np_dtype", type_of)
        patch.setattr(core.block_type, "__init__", init_block)
        patch.setattr(core.tensor, "__init__", init_tensor)
        patch.setattr(semantic, "broadcast_impl_value", broadcast)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield
