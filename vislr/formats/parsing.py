"""Keys and tensors of any known file to a `CanonicalAdapter`: every tensor finds its place or is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from vislr.core.errors import FormatError, hint
from vislr.formats import families, layouts, naming, suffixes
from vislr.formats.canonical import KINDS, CanonicalAdapter, Entry, join_name, split_name
from vislr.formats.container import is_finite, shown
from vislr.formats.factors import dims, halves_swapped, made_dims, take_rows
from vislr.formats.lora_metadata import alphas
from vislr.formats.manifest import AUX, DIFFUSERS_METADATA, MANIFEST, read_manifest

_MATRICES = ("hada_w", "lokr_w1", "lokr_w2_", "convlora_", "flora_out", "flora_in", "flora_k")
# The largest weight whose change is computed: a file of a few megabytes can stand for a matrix of terabytes.
MAX_WEIGHT = 2**28
INTEGERS = ("sara_index", "sara_shape", "sara_kept", "adabn_count")
_OWNED = ("format", MANIFEST, DIFFUSERS_METADATA, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_NEEDED = {
    "lora": ({"lora_down.weight", "lora_up.weight"},),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "lokr": tuple(
        left | right for left in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for right in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    ),
    "convlora": ({"convlora_A", "convlora_B"},),
    "flora": ({"flora_core", "flora_out", "flora_in"},),
    "qalora": ({"qalora_A", "qalora_B"},),
    "sara": ({"sara_index", "sara_delta", "sara_shape"},),
    "adabn": ({"adabn_mean", "adabn_var", "adabn_count"},),
    "oft": ({"oft_blocks"},),
    "diff": ({"diff"}, {"diff_b"}),
    "norm": ({"w_norm"}, {"b_norm"}),
}  # fmt: skip
_MARKS = {  # a suffix that only one kind has -> the kind
    suffix: kind for kind, names in KINDS.items() for suffix in names if suffix not in ("alpha", "dora_scale", "diff_b")
}


class _Reading:
    """One parse: collects places and complaints."""

    def __init__(self, strict: bool, where: str) -> None:
        self.strict, self.where = strict, where
        self.unplaced: dict[str, str] = {}

    def complain(self, keys: Any, reason: str) -> None:
        keys = [keys] if isinstance(keys, str) else list(keys)
        if self.strict:
            prefix = f"'{self.where}': " if self.where else ""
            raise FormatError(f"{prefix}tensor '{shown(keys[0])}' {reason}")
        self.unplaced |= dict.fromkeys(keys, reason)


def parse(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    strict: bool = True,
    family: str | None = None,
    where: str = "",
    component: str = "",
) -> CanonicalAdapter:
    """Read the tensors of one file, of any format that `vislr.formats` knows.

    Args:
        tensors: key -> values; alphas are read, other values only looked at for being finite.
        metadata: the header.
        strict: raise for a tensor without a place, a wrong shape or NaN; otherwise such keys are
            collected in `unplaced`.
        family: of the model that the file is to go on, for files that do not tell.
        where: the file's name, for messages.
        component: where names without a prefix belong.

    Raises:
        FormatError: `strict` and a tensor without a place; names the key. A manifest that is damaged.
    """
    reading = _Reading(strict, where)
    manifest = _manifest(metadata, where)
    if manifest is not None and manifest["format"] == "vislr":
        groups, aux, found_family = _own_groups(tensors, manifest, reading)
        form, notes = "vislr", []
    else:
        groups, aux, found_family, form, notes = _foreign_groups(
            tensors, metadata, manifest, family, component, reading
        )
    entries: dict[str, Entry] = {}
    shapes = families.golden(found_family) if found_family else {}
    for (keys, parts), located in groups:
        entry = _entry(parts, keys, reading)
        if entry is None:
            continue
        entry.shape = _given_shape(manifest, located, entry)
        reason = _misfit(entry)
        if reason:
            reading.complain(keys, reason)
            continue
        try:
            pieces = split(entry, located.row)
        except FormatError as error:
            reading.complain(keys, str(error))
            continue
        for path, piece in zip(located.paths, pieces, strict=True):
            name = join_name(located.component, path)
            if piece is None:
                continue
            if name in entries:
                reading.complain(keys, f"is for '{shown(name)}', which another tensor is for, too")
                continue
            _set_shape(piece, shapes.get(located.component, {}).get(path))
            entries[name] = piece
    kept = {key: value for key, value in metadata.items() if key not in _OWNED}
    result = CanonicalAdapter(entries, found_family, form, kept, notes, reading.unplaced, aux, manifest)
    bare = sum(e.alpha is None and e.rank is not None and not _whole_lokr(e) for e in entries.values())
    if bare:
        result.notes.append(f"no alpha in the file for {bare} layers: scale 1")
    if not entries and not reading.unplaced:
        raise FormatError(f"'{where}' holds no adapter" if where else "no adapter in these tensors")
    return result


def _whole_lokr(entry: Entry) -> bool:
    return entry.kind == "lokr" and "lokr_w1" in entry.tensors and "lokr_w2" in entry.tensors


def _manifest(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    return read_manifest(metadata[MANIFEST], where) if MANIFEST in metadata else None


def _own_groups(tensors: Mapping[str, torch.Tensor], manifest: dict[str, Any], reading: _Reading) -> Any:
    """Of a vislr file: sites and kinds are in the manifest, names are canonical."""
    component, sites = manifest["component"], manifest["sites"]
    aux: dict[str, torch.Tensor] = {}
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for key, tensor in tensors.items():
        if key.startswith(AUX):
            aux[key.removeprefix(AUX)] = tensor
            continue
        found = suffixes.cut(key)
        if found is None or found[0] not in sites:
            site = found[0] if found else key
            # Every hint reads the whole list; a file may have tens of thousands of strays.
            near = hint(site, sites) if len(reading.unplaced) < 8 else ""
            reading.complain(key, f"belongs to no layer of this {manifest['kind']} adapter{near}")
            continue
        keys, parts = groups.setdefault(found[0], ([], {}))
        keys.append(key)
        parts[found[1]] = tensor
    family = manifest["family"] if manifest["family"] in families.FAMILIES else ""
    located = []
    for site, group in groups.items():
        # Files of one component leave it out of the names.
        name = site if manifest["schema"] > 1 else join_name(component, site)
        owner, path = split_name(name)
        located.append((group, naming.Located(owner, (path,), layouts.Row(path, (path,)))))
    return located, aux, family or families.guess({component: sites})


def _foreign_groups(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    manifest: dict[str, Any] | None,
    family: str | None,
    component: str,
    reading: _Reading,
) -> Any:
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    aux: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        found = suffixes.cut(key)
        if found is None:
            what = suffixes.unsupported(key)
            reading.complain(key, f"belongs to {what}, which is not supported" if what else "is no part of an adapter")
            continue
        module, suffix, magnitude = found
        keys, parts = groups.setdefault(module, ([], {}))
        keys.append(key)
        if suffix in parts:
            reading.complain(key, f"gives '{suffix}' of '{shown(module)}' a second time")
            continue
        parts[suffix] = _Magnitude(tensor) if magnitude else tensor

    def width(name: str) -> int | None:
        for module in (name, naming.PEFT + name):
            down = groups.get(module, ((), {}))[1].get("lora_down.weight")
            if down is not None and down.dim() > 1:
                return down.shape[1]
        return None

    named = manifest["family"] if manifest is not None and manifest["family"] in families.FAMILIES else ""
    detected = named or naming.detect(groups, metadata, width, family or "")
    located = []
    for module, group in groups.items():
        place = naming.locate(detected, module, component)
        if place is None:
            reading.complain(group[0], f"is for no module of the family '{detected}'" if detected else
                             "is for no family of models that vislr knows")  # fmt: skip
            continue
        located.append((group, place))
    notes = [] if detected else ["the family of the model is not known; names are taken as they are"]
    _fill_from_metadata(located, metadata, reading)
    return located, aux, detected, _form(groups), notes


class _Magnitude:
    """A DoRA magnitude in peft's shape, to be brought into (Co, 1...)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _form(modules: Mapping[str, Any]) -> str:
    first = next(iter(modules), "")
    if naming.is_flat(first):
        return "kohya"
    if first.startswith(naming.COMFY) or first.startswith("text_encoders."):
        return "comfy"
    return "peft" if first.startswith(naming.PEFT) else "diffusers"


def _fill_from_metadata(located: list[Any], metadata: Mapping[str, str], reading: _Reading) -> None:
    """Alphas of diffusers files are in their metadata, not in tensors."""
    if DIFFUSERS_METADATA not in metadata:
        return
    for place, (keys, parts), alpha in alphas(metadata[DIFFUSERS_METADATA], located, reading.where):
        own = parts.get("alpha")
        if own is not None and (own.numel() != 1 or abs(float(own) - alpha) > 1e-3 * abs(alpha)):
            reading.complain(keys, f"has an alpha, and {DIFFUSERS_METADATA} gives '{place.paths[0]}' another")
        elif own is None and "lora_down.weight" in parts:
            parts["alpha"] = torch.tensor(alpha, dtype=torch.float32)


def _entry(parts: dict[str, Any], keys: list[str], reading: _Reading) -> Entry | None:
    """The entry of one module; None after a complaint."""
    kinds = {_MARKS[suffix] for suffix in parts if suffix in _MARKS}
    if len(kinds) > 1:
        reading.complain(keys, f"stands beside tensors of another kind ({', '.join(sorted(kinds))}) for the same layer")
        return None
    kind = kinds.pop() if kinds else "diff"
    for suffix, tensor in parts.items():
        if suffix not in KINDS[kind]:
            reading.complain(keys, f"has '{suffix}' beside {kind}, which has no such part")
            return None
        value = tensor.tensor if isinstance(tensor, _Magnitude) else tensor
        integer = suffix in INTEGERS and not value.is_floating_point()
        if not integer and not value.is_floating_point():
            reading.complain(keys, f"of '{suffix}' is {value.dtype}, expected floating point")
            return None
        if reading.strict and not is_finite(value):
            reading.complain(_key_of(keys, suffix), "has NaN or infinite values")
    if not any(needed <= parts.keys() for needed in _NEEDED[kind]):
        wanted = min(_NEEDED[kind], key=lambda needed: len(needed - parts.keys()))
        reading.complain(keys, f"lacks its '{min(wanted - parts.keys())}'")
        return None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            reading.complain(keys, f"has an alpha of shape {tuple(parts['alpha'].shape)}, expected ()")
            return None
        parts["alpha"] = parts["alpha"].reshape(()).to(torch.float32)
    magnitude = parts.get("dora_scale")
    if isinstance(magnitude, _Magnitude):
        ones = parts["lora_down.weight"].dim() - 1 if "lora_down.weight" in parts else 1
        parts["dora_scale"] = magnitude.tensor.reshape(-1, *(1,) * ones)
    return Entry(kind, parts)


def _key_of(keys: list[str], suffix: str) -> str:
    return next((key for key in keys if key.endswith(suffix)), keys[0])


def _misfit(entry: Entry) -> str:
    """Why the shapes of an entry do not go together, or ""."""
    t = entry.tensors
    if entry.kind not in ("sara", "adabn", "oft"):
        sizes = sorted(size for tensor in t.values() for size in tensor.shape[:2])[-2:]
        core = next((t[key] for key in ("lora_mid.weight", "hada_t1", "lokr_t2", "flora_core") if key in t), None)
        entries = math.prod(sizes) * (1 if core is None else math.prod(core.shape[2:]))
        odd = next((key for key in t if key.startswith(_MATRICES) and t[key].dim() != 2), None)
        if odd is not None:
            return f"has a '{odd}' of shape {tuple(t[odd].shape)}, expected a matrix"
        if entries > MAX_WEIGHT:
            return f"would change a weight of {entries:,} entries; expected at most {MAX_WEIGHT:,}"
    if entry.kind == "lora":
        down, up, mid = t["lora_down.weight"], t["lora_up.weight"], t.get("lora_mid.weight")
        if not 2 <= down.dim() <= 5 or up.dim() < 2 or math.prod(up.shape[2:]) != 1 or not down.shape[0]:
            return f"has factors of shapes {tuple(down.shape)} and {tuple(up.shape)}"
        inner = (up.shape[1], down.shape[0]) if mid is None else tuple(mid.shape[:2])
        if (mid is None and inner[0] != inner[1]) or (mid is not None and inner != (up.shape[1], down.shape[0])):
            return f"has ranks that disagree: {tuple(down.shape)} and {tuple(up.shape)}"
        if mid is not None and (mid.dim() < 3 or math.prod(down.shape[2:]) != 1):
            return f"has a core of shape {tuple(mid.shape)} and a down of {tuple(down.shape)}"
        if entry.shape is not None:
            kernel = (down if mid is None else mid).shape[2:]
            if entry.shape[0] != up.shape[0] or math.prod(entry.shape[1:]) != down.shape[1] * math.prod(kernel):
                return f"has factors of shapes {tuple(down.shape)} and {tuple(up.shape)} for a weight {entry.shape}"
    elif entry.kind == "norm":
        if any(tensor.dim() != 1 for tensor in t.values()):
            return "is a norm's change and has more than one axis"
    elif entry.kind == "sara":
        return _sara_misfit(t)
    elif entry.kind not in ("adabn", "oft", "diff") and not (entry.kind == "convlora" and entry.shape is None):
        try:
            out, rest = made_dims(entry)
        except (RuntimeError, FormatError, IndexError, KeyError, ValueError) as error:
            return f"has shapes that do not go together: {shown(error)}"
        if entry.shape is not None and (out, rest) != (entry.shape[0], math.prod(entry.shape[1:])):
            return f"makes {(out, rest)} for a weight {entry.shape}"
        if out * rest > MAX_WEIGHT:
            return f"would change a weight of {out * rest:,} entries; expected at most {MAX_WEIGHT:,}"
    if "dora_scale" in t:
        out, rest = dims(entry)
        count = t["dora_scale"].numel()
        if count != (out if entry.dora == "out" else rest) and entry.dora == "out":
            return f"has a magnitude of shape {tuple(t['dora_scale'].shape)} for {out} outputs"
    if "diff_b" in t and t["diff_b"].dim() != 1:
        return f"has a bias of shape {tuple(t['diff_b'].shape)}"
    return ""


def _sara_misfit(t: Mapping[str, torch.Tensor]) -> str:
    shape, index, delta = t["sara_shape"].flatten(), t["sara_index"], t["sara_delta"]
    if index.is_floating_point() or shape.is_floating_point() or index.dim() != 1 or index.shape != delta.shape:
        return f"has an index {tuple(index.shape)} and values {tuple(delta.shape)} that disagree"
    if len(shape) > 5 or bool((shape < 1).any()) or math.prod(int(n) for n in shape) > MAX_WEIGHT:
        return f"has the shape {shown(shape.tolist())}"
    limit = math.prod(int(n) for n in shape) + int(shape[0])
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= limit):
        return f"has places beyond its shape {tuple(int(n) for n in shape)}"
    return ""


def _given_shape(manifest: dict[str, Any] | None, located: naming.Located, entry: Entry) -> tuple[int, ...] | None:
    """The weight's shape as the manifest states it; of ConvLoRA in older files, that of a square kernel."""
    if manifest is None:
        return None
    path, shapes = located.paths[0], manifest.get("shapes")
    if isinstance(shapes, dict):
        shape = shapes.get(path) or shapes.get(join_name(located.component, path))
        if isinstance(shape, list) and all(type(n) is int and 0 < n < 2**31 for n in shape) and 0 < len(shape) <= 5:
            return tuple(shape)
    r = manifest["config"].get("r")
    if entry.kind == "convlora" and type(r) is int and r > 0:
        a, b = entry.tensors["convlora_A"], entry.tensors["convlora_B"]
        k = a.shape[0] // r
        return (b.shape[0] // k, a.shape[1] // k, k, k) if k > 1 and a.dim() == 2 else None
    return None


def _set_shape(entry: Entry, golden: tuple[int, ...] | None) -> None:
    """The weight's shape: of the golden list where the sizes agree, else as LoRA's own factors give it."""
    if entry.shape is not None or entry.kind in ("adabn", "oft"):
        return
    if entry.kind in ("diff", "norm"):
        own = next((entry.tensors[key] for key in ("diff", "w_norm") if key in entry.tensors), None)
        entry.shape = None if own is None else tuple(own.shape)
        return
    if entry.kind == "sara":
        entry.shape = tuple(int(n) for n in entry.tensors["sara_shape"].flatten())
        return
    if entry.kind == "convlora":
        a, b = entry.tensors["convlora_A"], entry.tensors["convlora_B"]
        fits = golden is not None and b.shape[0] * a.shape[1] == math.prod(golden)
        entry.shape = golden if fits else (b.shape[0], a.shape[1])
        return
    if golden is not None:
        out, rest = dims(entry)
        if out == golden[0] and rest == math.prod(golden[1:]):
            entry.shape = golden
            return
    down, mid = entry.tensors.get("lora_down.weight"), entry.tensors.get("lora_mid.weight")
    if down is not None:
        kernel = tuple((down if mid is None else mid).shape[2:])
        entry.shape = (entry.tensors["lora_up.weight"].shape[0], down.shape[1], *kernel)


def split(entry: Entry, row: layouts.Row) -> list[Entry | None]:
    """A fused module's entry as one per path; None: nothing changes there. The inverse of `factors.fused`.

    Raises:
        FormatError: DoRA that belongs to all rows together, or an output that the shares do not divide.
    """
    if row.swap == "halves" or (row.swap == "last" and _doubled(entry)):
        return [halves_swapped(entry)]
    if len(row.sizes) == 1:
        return [entry]
    out = dims(entry)[0] if set(entry.tensors) != {"diff_b"} else len(entry.tensors["diff_b"])
    unit, odd = divmod(out, sum(row.sizes))
    if odd:
        raise FormatError(f"has {out} outputs, which {len(row.sizes)} layers with shares {row.sizes} cannot have")
    ends = torch.tensor(row.sizes).cumsum(0) * unit
    starts = ends - torch.tensor(row.sizes) * unit
    rows = [torch.arange(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]
    parts = [take_rows(entry, chosen) for chosen in rows]
    if all(part.kind == "diff" for part in parts):
        return [part if any(bool(t.any()) for t in part.tensors.values()) else None for part in parts]
    columns = _own_columns([part.tensors["lora_up.weight"] for part in parts]) if entry.kind == "lora" else None
    if columns is None or "lora_mid.weight" in entry.tensors:
        return list(parts)
    return [_narrowed(part, chosen) for part, chosen in zip(parts, columns, strict=True)]


def _doubled(entry: Entry) -> bool:
    if entry.kind == "norm" or set(entry.tensors) == {"diff_b"}:
        return False
    out, inside = dims(entry)
    return out == 2 * inside


def _own_columns(ups: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Which of the rank's columns each part of a fused up uses, where no column serves two; None: shared."""
    used = torch.stack([up.flatten(1).ne(0).any(0) for up in ups])  # (parts, rank)
    rank = used.shape[1]
    if rank % len(ups) == 0:
        chunk = torch.arange(rank) // (rank // len(ups))
        if not bool((used & (chunk[None] != torch.arange(len(ups))[:, None])).any()):
            return [torch.nonzero(chunk == n).flatten() for n in range(len(ups))]
    if bool((used.sum(0) == 1).all()):
        return [torch.nonzero(row).flatten() for row in used]
    return None


def _narrowed(part: Entry, columns: torch.Tensor) -> Entry | None:
    t = dict(part.tensors)
    if not len(columns):
        kept = {"diff_b": t["diff_b"]} if "diff_b" in t and bool(t["diff_b"].any()) else {}
        return Entry("diff", kept) if kept else None
    scale = part.scale
    t["lora_down.weight"] = t["lora_down.weight"][columns].contiguous()
    t["lora_up.weight"] = t["lora_up.weight"][:, columns].contiguous()
    if "alpha" in t:
        t["alpha"] = torch.tensor(scale * len(columns), dtype=torch.float32)
    return Entry("lora", t, part.shape)
