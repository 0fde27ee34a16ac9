"""One subclass per diffusers class that can carry structural plans in its config.

`vislr.UNet2DConditionModel` and the others behave like the class of diffusers that they are made
from. Their config has the key `vislr`: the ordered list of structural plans, which `from_config`
replays on the freshly built model, so `from_pretrained` loads the smaller weights strictly. A folder
needs `import vislr` and unmodified diffusers, nothing else.

Diffusers' own class would only warn about missing keys and fill them with random numbers. So one
tensor that every model has (`GUARDS`) is stored under `vislr.<name>`, and a tensor of one number in
another shape takes its key: the plain class fails on it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vislr.core import registry
from vislr.core.errors import FormatError, ModelError, VislrError, hint

# The config's key, and the name under which the guarded tensor is stored.
KEY = "vislr"
# Class of diffusers -> the guarded tensor: one axis, never removed, never quantised, no target of adapters.
GUARDS = {
    "DiTTransformer2DModel": "proj_out_2.bias",
    "FluxTransformer2DModel": "proj_out.bias",
    "PixArtTransformer2DModel": "proj_out.bias",
    "SD3Transformer2DModel": "proj_out.bias",
    "UNet2DConditionModel": "conv_out.bias",
}
# Handed from `from_pretrained` to `from_config` through diffusers, which passes on what it does not know.
_GUARDED = "vislr_guarded"


class _Planned:
    """What the subclasses add; stands before the class of diffusers."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' own, strict: every tensor of the file has its place and every weight its tensor.

        Raises:
            FormatError: the config has no plan, an edited or unknown one, or the weights do not fit it.
        """
        wanted = kwargs.pop("output_loading_info", False)
        where = "/".join(str(part) for part in (pretrained_model_name_or_path, kwargs.get("subfolder")) if part)
        kwargs |= {"output_loading_info": True, _GUARDED: True}
        try:
            loader = cls if kwargs.get("low_cpu_mem_usage") is False else _exact_scales(cls)  # type: ignore[arg-type]
            model, info = super(_Planned, loader).from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        except (ValueError, RuntimeError) as error:
            if "expected shape" in str(error) or "size mismatch" in str(error):
                raise FormatError(f"the weights in '{where}' do not fit the plan in their config: {error}") from error
            raise
        for words, keys in (("lack", info["missing_keys"]), ("have no place for", info["unexpected_keys"])):
            if keys:
                raise FormatError(
                    f"the weights in '{where}' do not fit the plan in their config: they {words} "
                    f"'{min(keys)}' ({len(keys)} such tensors)"
                )
        model.__class__ = cls
        _open_guard(model)
        align(model)
        return (model, info) if wanted else model

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers' own, then the plans of the config's key `vislr`, in their order.

        Raises:
            FormatError: a plan is missing, edited or unknown. ModelError, TargetError: it does not fit.
        """
        guarded = kwargs.pop(_GUARDED, False)
        if config is not None and not isinstance(config, Mapping):
            config = cls.load_config(config)  # type: ignore[attr-defined]
        plans = (config or {}).get(KEY)
        if guarded and not plans:
            raise FormatError(
                f"the config names no plans (key '{KEY}'), so this {cls.__name__} cannot be built; an unchanged model "
                f"is loaded by diffusers.{cls.__name__}"
            )
        plain = {key: value for key, value in config.items() if key != KEY}
        made = super().from_config(plain, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]
        model = made[0] if return_unused_kwargs else made
        if plans:
            replay(model, plans)
        if guarded:
            model.__dict__["_vislr_plans"] = plans
            _close_guard(model)
        elif plans:
            model.register_to_config(**{KEY: plans})
        return made

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' own, with the guarded tensor under its other name.

        Raises:
            ModelError: adapters are on the model; `vislr.save` writes them beside it.
        """
        if not self.config.get(KEY):  # type: ignore[attr-defined]
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if any(".base_layer." in key for key in self.state_dict()):  # type: ignore[attr-defined]
            raise ModelError("adapters are on the model; save it with vislr.save, which writes them beside it")
        return super(_Planned, _guarded_twin(self)).save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def _exact_scales(cls: type) -> type:
    """The class as diffusers' low-memory loader reads it, which would cast the scales of quantised layers."""
    kept = [*(cls._keep_in_fp32_modules or ()), "weight_scale", "input_scale"]  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "_keep_in_fp32_modules": kept})


@functools.cache
def planned_class(name: str) -> type:
    """The subclass of diffusers' class `name`.

    Raises:
        ModelError: models of that class cannot carry plans.
    """
    import diffusers

    if name not in GUARDS:
        raise ModelError(f"a {name} cannot carry plans in its config{hint(name, GUARDS)}")
    base = getattr(diffusers, name)
    # A pipeline hands on what it finds in the signature: the variant, the size of shards.
    _Planned.save_pretrained.__signature__ = inspect.signature(base.save_pretrained)  # type: ignore[attr-defined]
    # The face: `getattr(vislr, name)` is what diffusers looks up for ["vislr", name] in model_index.json.
    body = {"__module__": "vislr", "__doc__": f"diffusers' {name} with structural plans in its config."}
    return type(name, (_Planned, base), body)


def can_carry(module: Any) -> bool:
    """Whether the module's class is one of diffusers' (or already ours) that can carry plans."""
    kind = type(module)
    if kind.__name__ not in GUARDS:
        return False
    return issubclass(kind, _Planned) or kind.__module__.startswith("diffusers.")


def entry_of(kind: str, name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """A plan as configs and records hold it."""
    return {"kind": kind, "name": name, "plan": plan, "sha256": _digest(kind, plan)}


def _digest(kind: str, plan: Any) -> str:
    return hashlib.sha256(json.dumps([kind, plan], sort_keys=True).encode()).hexdigest()


def read_entry(entry: Any) -> tuple[registry.Kind, str, Any]:
    """(kind, name, plan) of an entry; nothing that the entry names is imported or looked up outside vislr's own table.

    Raises:
        FormatError: not an entry, an unknown kind, or edited after it was written.
    """
    if not isinstance(entry, Mapping) or not {"kind", "name", "plan", "sha256"} <= set(entry):
        raise FormatError(f"a plan's entry needs kind, name, plan and sha256; got {str(entry)[:80]!r}")
    extra = sorted(set(entry) - {"kind", "name", "plan", "sha256", "component"})
    if extra or not isinstance(entry["name"], str):
        raise FormatError(f"a plan's entry has an unknown key or name: {extra or entry['name']!r}")
    kinds = {kind.name: kind for kind in registry.kinds()}
    if entry["kind"] not in kinds:
        raise FormatError(f"no kind of plan is called {entry['kind']!r}{hint(str(entry['kind']), kinds)}")
    if entry["sha256"] != _digest(entry["kind"], entry["plan"]):
        raise FormatError(f"the plan '{entry['name']}' was edited: its sha256 is not the one that was stored")
    kind = kinds[entry["kind"]]
    reader = getattr(registry.load(kind.config), "from_dict", None)
    if reader is None:
        raise FormatError(f"'{kind.name}' is no kind of plan")
    try:
        return kind, entry["name"], reader(entry["plan"])
    except VislrError as error:
        raise FormatError(f"the plan '{entry['name']}' cannot be read: {error}") from error


def replay(model: Any, entries: Any) -> None:
    """Make the structure of these plans on a freshly built model.

    Raises:
        FormatError: as `read_entry`, or a run-time plan. ModelError, TargetError: a plan does not fit the model.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)):
        raise FormatError(f"the config's '{KEY}' is a {type(entries).__name__}; expected a list of plans")
    for entry in entries:
        kind, name, plan = read_entry(entry)
        if not kind.structural:
            raise FormatError(f"the plan '{name}' of kind '{kind.name}' is no part of a model's structure")
        registry.handler_of(kind).rebuild(model, plan)


def with_plans(model: Any) -> Any:
    """A model that was built from its config by diffusers alone, with the config's plans replayed on it.

    Raises:
        as `replay`.
    """
    plans = model.config.get(KEY) if hasattr(model, "register_to_config") else None
    if plans:
        replay(model, plans)
    return model


def mark(module: Any, entries: list[dict[str, Any]]) -> None:
    """Give a module the class and the config that say these plans; without any, diffusers' own again.

    A module of another class stays as it is.
    """
    if not can_carry(module):
        return
    planned = planned_class(type(module).__name__)
    if entries:
        module.__class__ = planned
        module.register_to_config(**{KEY: entries})
        return
    module.__class__ = planned.__mro__[2]
    frozen = type(module._internal_dict)
    module._internal_dict = frozen({key: value for key, value in module.config.items() if key != KEY})


def _guard(model: Any) -> tuple[str, str]:
    path, _, tensor = GUARDS[type(model).__name__].rpartition(".")
    return path, tensor


def _close_guard(model: Any) -> None:
    """Move the guarded tensor to `vislr.<name>`, so that a loader finds what the file holds."""
    import torch
    from torch import nn

    path, tensor = _guard(model)
    layer = model.get_submodule(path)
    real = layer._parameters[tensor]
    holder = nn.Module()
    inner = holder
    for part in path.split("."):
        inner.add_module(part, nn.Module())
        inner = getattr(inner, part)
    inner.register_parameter(tensor, real)
    model._modules[KEY] = holder
    # Two axes: no bias has this shape, also not that of a single output.
    layer._parameters[tensor] = nn.Parameter(torch.zeros(1, 1, dtype=real.dtype, device=real.device))


def _open_guard(model: Any) -> None:
    path, tensor = _guard(model)
    layer = model.get_submodule(path)
    stored = model._modules.pop(KEY).get_submodule(path)._parameters[tensor]
    layer._parameters[tensor] = stored
    model.register_to_config(**{KEY: model.__dict__.pop("_vislr_plans")})


def align(model: Any) -> None:
    """Give tensors that lie askew in the mapped file memory of their own.

    Kernels round differently at other alignments: without this a loaded model's answers differ in the
    last bit from those of the model that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _guarded_twin(model: Any) -> Any:
    """The model as its file holds it: shares every tensor, and leaves the model itself alone."""

    def shallow(module: Any) -> Any:
        kind: Any = type(module)
        twin = kind.__new__(kind)
        twin.__dict__.update(module.__dict__)
        for name in ("_modules", "_parameters"):
            twin.__dict__[name] = dict(module.__dict__[name])
        return twin

    path = _guard(model)[0]
    twin = shallow(model)
    inner = twin
    for part in path.split("."):
        inner._modules[part] = shallow(inner._modules[part])
        inner = inner._modules[part]
    _close_guard(twin)
    return twin


def __getattr__(name: str) -> Any:
    if name == "ModelMixin":
        import diffusers

        return diffusers.ModelMixin
    if name in GUARDS:
        return planned_class(name)
    raise AttributeError(f"module 'vislr.models' has no attribute {name!r}")
