"""diffusers' hooks put on a module and taken off so that nothing of them stays, in any order.

A hook whose class says `outermost = True` may leave its module out (a cache): it stays around all others,
whichever came first. A module with hooks that is copied (`copy.deepcopy`) gets copies of them; diffusers' own
forward is a closure over the original, which copying does not reach.
"""

from __future__ import annotations

import copy
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook
    from torch import nn

_COPY = "__deepcopy__"


def put_on(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook; its `pre_forward`, `new_forward` and `post_forward` run around the module's forward."""
    from diffusers.hooks import HookRegistry

    registry: Any = HookRegistry.check_if_exists_or_initialize(module)
    above = [] if _outermost(hook) else [other for other in registry._hook_order if _outermost(registry.hooks[other])]
    lifted = {other: registry.hooks[other] for other in above}
    for other in reversed(above):
        _unlink(registry, other)
    for other, each in {name: hook, **lifted}.items():
        registry.register_hook(each, other)
    module.__dict__[_COPY] = types.MethodType(_copied, module)


def take_off(module: nn.Module, name: str) -> None:
    """Remove a hook; with the last one the module's own forward is back and no attribute of hooks is left."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return
    if name in registry.hooks:
        _unlink(registry, name)
    tidy(module)


def tidy(module: nn.Module) -> None:
    """Where no hook is left on the module, take away what hooks had put beside them."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    if registry is None or registry.hooks:
        return
    del module.__dict__["_diffusers_hook"]
    module.__dict__.pop(_COPY, None)
    forward: Any = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module:
        del module.__dict__["forward"]


def hook_of(module: nn.Module, name: str) -> Any:
    """The hook of this name on the module, or None."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)


def rebind(module: nn.Module) -> None:
    """Register the hooks that a copied module holds anew, in their order, if they are bound to the original."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    if registry is None or not registry._hook_order or registry._module_ref is module:
        return
    module.__dict__.pop("forward", None)
    module.__dict__["_diffusers_hook"] = fresh = type(registry)(module)
    for name in registry._hook_order:
        fresh.register_hook(registry.hooks[name], name)


def _outermost(hook: Any) -> bool:
    return getattr(hook, "outermost", False)


def _unlink(registry: Any, name: str) -> None:
    """Remove a hook from anywhere in the chain."""
    place = registry._hook_order.index(name)
    outer = registry._fn_refs[place + 1] if place + 1 < len(registry._fn_refs) else None
    # diffusers links the next hook to what is below by its `forward`, which is its own if it has one.
    own = outer.forward if outer is not None and outer.original_forward is not None else None
    registry.remove_hook(name, recurse=False)
    if outer is not None and own is not None:
        outer.original_forward, outer.forward = outer.forward, own


def _copied(module: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy` of a module with hooks: what runs in the copy is the copy."""
    registry = module.__dict__["_diffusers_hook"]
    make, args, state = module.__reduce_ex__(4)[:3]
    twin = make(*args)
    memo[id(module)] = twin
    kept = {key: value for key, value in state.items() if key not in (_COPY, "forward", "_diffusers_hook")}
    twin.__setstate__(copy.deepcopy(kept, memo))
    twin.__dict__["_diffusers_hook"] = fresh = type(registry)(twin)
    for name in registry._hook_order:
        hook = registry.hooks[name]
        memo[id(hook.fn_ref)] = None
        # What a hook had registered beside itself runs the original.
        handle = getattr(hook, "handle", None)
        if handle is not None:
            for table in (twin._forward_pre_hooks, twin._forward_pre_hooks_with_kwargs):
                table.pop(handle.id, None)
        fresh.register_hook(copy.deepcopy(hook, memo), name)
    twin.__dict__[_COPY] = types.MethodType(_copied, twin)
    return twin
