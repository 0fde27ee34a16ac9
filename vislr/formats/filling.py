"""Put a read adapter on a model: check that it belongs there, make the layers, copy the values."""

from __future__ import annotations

import dataclasses

from torch import nn

from vislr.adapters.adabn_layer import check_one_carrier
from vislr.adapters.inject import active_adapters, adapter_layers, attach, carriers, detach
from vislr.adapters.targets import adaptable, batch_norms, modules_outside
from vislr.core.errors import AdapterError, hint
from vislr.core.registry import Attached
from vislr.formats.adapter_file import AdapterFile, base_entry, family_of
from vislr.formats.kinds import check_values, put


def check_base(module: nn.Module, file: AdapterFile, any_base: bool = False) -> None:
    """Refuse a model that the adapter was not made for; changes nothing.

    Args:
        any_base: accept a model of the same architecture with other weights.

    Raises:
        AdapterError: another architecture, or the weights under the adapter differ from those that it
            was made on.
    """
    layers = modules_outside(module) if file.kind in ("sara", "imported") else adaptable(module)
    layers = layers | batch_norms(module) if "adabn" in file.manifest["sites"].values() else layers
    missing = [site for site in file.tensors if site not in layers]
    if missing:
        made_for = file.manifest["architecture"] or "another model"
        raise AdapterError(
            f"the adapter is for {made_for}; this {type(module).__name__} has no layer '{missing[0]}' "
            f"({len(missing)} of {len(file.tensors)} are missing){hint(missing[0], layers)}"
        )
    family, own = file.manifest["family"], family_of(module)
    if family and own and family != own:
        raise AdapterError(f"the adapter is for the family '{family}'; this {type(module).__name__} is '{own}'")
    wanted = file.manifest["base"].get("sha256")
    if any_base or not wanted:
        return
    given = base_entry(module, {site: file.kind_of(site) for site in file.tensors})
    if given["sha256"] != wanted:
        made_on = file.manifest["base"].get("dtype", "")
        dtypes = f" (made on {made_on}, this is {given['dtype']})" if made_on != given["dtype"] else ""
        raise AdapterError(
            f"the base weights differ from those that the adapter was made on{dtypes}; "
            "allow another base (any_base=True) if that is meant"
        )


def fill(module: nn.Module, name: str, file: AdapterFile) -> None:
    """Copy a file's values into adapter `name`, which `attach(module, file.config, name)` made.

    Raises:
        AdapterError, FormatError: a tensor without a place, a layer without its tensors, or a wrong
            shape; no value is changed.
    """
    layers = adapter_layers(module, name)
    for site in [*file.tensors, *layers]:
        if site not in layers:
            raise AdapterError(f"adapter '{name}' has no layer '{site}' for the file's tensors{hint(site, layers)}")
        if site not in file.tensors:
            raise AdapterError(f"the file lacks the tensors of '{site}'{hint(site, file.tensors)}")
    for site, layer in layers.items():
        check_values(layer, name, file.kind_of(site), file.tensors[site], site)
    for site, layer in layers.items():
        put(layer, name, file.kind_of(site), file.tensors[site])


def attach_file(module: nn.Module, name: str, file: AdapterFile, any_base: bool = False) -> Attached:
    """`check_base`, `attach` and `fill` in one: all, or the model as it was.

    Returns:
        what `vislr.adapters.detach` takes.
    """
    check_base(module, file, any_base)
    if "adabn" in file.manifest["sites"].values():
        active = active_adapters(module)
        check_one_carrier([*(other for other in carriers(module) if other in active), name])
    attached = attach(module, file.config, name)
    try:
        if file.statistics is not None:
            beside = attach(module, file.statistics, name)
            # One entry in the record: what came from one file comes off together.
            attached = dataclasses.replace(
                attached,
                sites=attached.sites + beside.sites,
                change={**attached.change, "statistics": beside.change["config"]},
                undo={**attached.undo, "part": "all"},
            )
        fill(module, name, file)
    except BaseException:
        detach(module, attached)
        raise
    return attached
