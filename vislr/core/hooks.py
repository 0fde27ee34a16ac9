"""diffusers' hooks put on a module and taken off so that nothing of them stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook
    from torch import nn


def put_on(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook; its `pre_forward`, `new_forward` and `post_forward` run around the module's forward."""
    from diffusers.hooks import HookRegistry

    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def take_off(module: nn.Module, name: str) -> None:
    """Remove a hook; with the last one the module's own forward is back and no attribute of hooks is left."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return
    registry.remove_hook(name, recurse=False)
    tidy(module)


def tidy(module: nn.Module) -> None:
    """Where no hook is left on the module, take away what hooks had put beside them."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    if registry is None or registry.hooks:
        return
    del module.__dict__["_diffusers_hook"]
    forward: Any = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module:
        del module.__dict__["forward"]


def hook_of(module: nn.Module, name: str) -> Any:
    """The hook of this name on the module, or None."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)
