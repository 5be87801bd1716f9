"""Modules whose ``forward`` is an entry of the instance, and a change of their class.

A conversion gives a module another class. A ``forward`` that somebody stored in the instance hides the forward of the
class, and the module would go on computing what it computed before. Three kinds of entries are known:

* accelerate stores a wrapper (``device_map="auto"``, ``dispatch_model``). The wrapper calls ``_old_forward``, a method
  of the old class. :func:`change_class` binds ``_old_forward`` to the new class, so the hooks of accelerate keep
  working.
* accelerate leaves the method of the class in the instance when it removes its hooks. :func:`change_class` drops it.
* Anything else is a patch. Nobody can say what a patch computes with, so :func:`why_class_stays` refuses.

accelerate is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, cast

from torch import nn

from sbn_lightning.core.errors import ConfigError

_WRAPPED = "_old_forward"  # Where accelerate keeps the forward that its wrapper calls.


def why_class_stays(module: nn.Module) -> str | None:
    """Why a module cannot get another class; None if it can.

    Args:
        module: A module that is to be converted, reverted or packed.
    """
    if _is_offloaded(module):
        return (
            'its weights are offloaded (accelerate, a device_map with "cpu" or "disk" beside a GPU), so they are not '
            "there to be changed: load the model without offloading"
        )
    own = vars(module)
    forward = own.get("forward")
    if forward is None or _is_method(module, forward):
        return None
    if _is_of_accelerate(forward) and _is_method(module, own.get(_WRAPPED)):
        return None
    return (
        "somebody replaced its forward (module.forward = ...), which would go on computing with the old weights: "
        "convert, revert or pack without the replacement"
    )


def refuse(fixed: Mapping[str, str], done: str, remedy: str = "") -> None:
    """Raise an error that names the modules that cannot get another class, if there are any.

    Args:
        fixed: The reasons by name.
        done: What cannot be done, as a participle.
        remedy: What a user can do, beside what the reasons say.

    Raises:
        ConfigError: If there is a reason.
    """
    if fixed:
        reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in list(fixed.items())[:3])
        more = f"; and {len(fixed) - 3} more" if len(fixed) > 3 else ""
        raise ConfigError(f"cannot be {done}: {reasons}{more}{remedy}")


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, and let the hooks of accelerate call the forward of that class.

    Args:
        module: A module for which :func:`why_class_stays` returns None.
        kind: The new class.
    """
    own = vars(module)
    plain = _is_method(module, own.get("forward"))
    wrapped = _is_method(module, own.get(_WRAPPED))
    cast(Any, module).__class__ = kind
    if plain:
        del own["forward"]
    if wrapped:
        own[_WRAPPED] = MethodType(kind.forward, module)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give the hooks of accelerate to the module that takes the place of another one.

    Args:
        old: The module that is replaced; :func:`why_class_stays` returns None for it.
        new: The module in its place.
    """
    forward = vars(old).get("forward")
    if _is_of_accelerate(forward):
        wrapper = partial(cast(Any, forward).func, new)
        vars(new).update({"_hf_hook": vars(old)["_hf_hook"], _WRAPPED: new.forward, "forward": wrapper})


def _is_method(module: nn.Module, forward: Any) -> bool:
    """Whether ``forward`` is the forward of the module's own class."""
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    return bound and forward.__func__ is type(module).forward


def _is_of_accelerate(forward: Any) -> bool:
    return isinstance(forward, partial) and getattr(forward.func, "__module__", None) == "accelerate.hooks"


def _is_offloaded(module: nn.Module) -> bool:
    hook = vars(module).get("_hf_hook")
    return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))
