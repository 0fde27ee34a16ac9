"""One layer's adapter in another form: exact where the algebra allows, by SVD with its error where not.

==========================  =====================================  =======================================
from                        to                                     exact
==========================  =====================================  =======================================
Tucker LoCon                LoCon of rank r_out (`mid` folded)     yes; alpha * r_out / r_in
Tucker LoCon                Tucker with a square core (ComfyUI)    yes, zeros; alpha * r / r_in
ConvLoRA of rank r          LoCon of rank r k1^2                   yes
FLoRA                       Tucker LoCon; LoRA of rank r_out       yes, kernel factors applied to the core
LoHa of rank r              LoRA of rank r^2                       yes (columns' and rows' products)
LoKr                        LoRA of rank rank(w1) rank(w2)         yes
SaRA                        `diff`                                 yes
any with a delta            `diff`                                 yes, dense
any with a delta            LoRA of a given rank                   no: SVD, with the error
==========================  =====================================  =======================================

An exact rank above min(out, in) is brought down to that by SVD, which is exact to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vislr.core.errors import FormatError
from vislr.core.merging import low_rank_of, resized
from vislr.formats import algebra
from vislr.formats.canonical import Entry

LOW_RANK = ("lora", "loha", "lokr", "convlora", "flora", "qalora")
Pair = tuple[torch.Tensor, torch.Tensor]


def scalar(value: float) -> torch.Tensor:
    """An alpha as files hold it."""
    return torch.tensor(value, dtype=torch.float32)


def _plus(entry: Entry, tensors: dict[str, torch.Tensor], kind: str) -> Entry:
    kept = {key: tensor for key, tensor in entry.tensors.items() if key in ("dora_scale", "diff_b")}
    return Entry(kind, {**tensors, **kept}, entry.shape)


def folded(entry: Entry) -> Entry:
    """A LoCon without `mid`; any other entry as it is."""
    t = entry.tensors
    if entry.kind != "lora" or "lora_mid.weight" not in t:
        return entry
    mid, down = t["lora_mid.weight"], t["lora_down.weight"]
    wide = torch.promote_types(mid.dtype, torch.float32)
    joined = torch.einsum("pq...,qi->pi...", mid.to(wide), down.flatten(1).to(wide)).to(mid.dtype)
    made = {"lora_down.weight": joined, "lora_up.weight": t["lora_up.weight"]}
    if "alpha" in t:
        made["alpha"] = scalar(entry.scale * joined.shape[0])
    return _plus(entry, made, "lora")


def squared(entry: Entry) -> Entry:
    """A Tucker LoCon with a square core, padded by zeros; any other entry as it is."""
    t = entry.tensors
    mid = t.get("lora_mid.weight")
    if mid is not None and mid[0, 0].numel() == 1:
        return folded(entry)  # LyCORIS knows no core on a 1 x 1 kernel
    if mid is None or mid.shape[0] == mid.shape[1]:
        return entry
    side = max(mid.shape[:2])
    core = mid.new_zeros(side, side, *mid.shape[2:])
    core[: mid.shape[0], : mid.shape[1]] = mid
    down, up = t["lora_down.weight"], t["lora_up.weight"]
    wide_down = down.new_zeros(side, *down.shape[1:])
    wide_down[: down.shape[0]] = down
    wide_up = up.new_zeros(up.shape[0], side, *up.shape[2:])
    wide_up[:, : up.shape[1]] = up
    made = {"lora_down.weight": wide_down, "lora_mid.weight": core, "lora_up.weight": wide_up}
    if "alpha" in t:
        made["alpha"] = scalar(entry.scale * side)
    return _plus(entry, made, "lora")


def as_tucker(entry: Entry) -> Entry:
    """A FLoRA layer as a Tucker LoCon, without kernel as a LoRA; any other entry as it is."""
    if entry.kind != "flora":
        return entry
    t = entry.tensors
    core, out, inside = algebra.flora_core(t, torch.float32), t["flora_out"], t["flora_in"]
    ones = (1,) * (core.dim() - 2)
    down = inside.T.reshape(inside.shape[1], inside.shape[0], *ones)
    made = {"lora_down.weight": down, "lora_up.weight": out.reshape(*out.shape, *ones)}
    if ones and core[0, 0].numel() > 1:
        made["lora_mid.weight"] = core.to(out.dtype)
    else:
        made["lora_down.weight"] = (
            (core.flatten(1) @ down.flatten(1).float()).reshape(-1, *down.shape[1:]).to(out.dtype)
        )
    made["alpha"] = scalar(entry.scale * made["lora_down.weight"].shape[0])
    return _plus(entry, made, "lora")


def dense(entry: Entry, weight: torch.Tensor | None = None) -> Entry:
    """The same change as a `diff` (float32), with the bias's; the one form that holds everything.

    Raises:
        FormatError: the kind has no delta, or is DoRA and `weight` is not given.
    """
    bias = entry.bias_delta()
    return Entry("diff", {"diff": entry.delta(weight)} | ({} if bias is None else {"diff_b": bias}), entry.shape)


def pair_of(entry: Entry) -> Pair | None:
    """up (out, R) and flat down (R, n) in float32 or wider, up @ down the unscaled product; None: no such form."""
    t, f = entry.tensors, torch.float32
    if entry.kind == "lora":
        flat = folded(Entry("lora", {key: t[key].to(f) for key in t}))
        return flat.tensors["lora_up.weight"].flatten(1), flat.tensors["lora_down.weight"].flatten(1)
    if entry.kind == "qalora":
        return t["qalora_B"].to(f).flatten(1), t["qalora_A"].to(f).flatten(1)
    if entry.kind == "flora":
        core, out, inside = algebra.flora_core(t, f), t["flora_out"].to(f), t["flora_in"].to(f)
        return out, torch.einsum("pq...,iq->pi...", core, inside).flatten(1)
    if entry.kind == "convlora":
        a, b = t["convlora_A"].to(f), t["convlora_B"].to(f)
        k1 = entry.shape[2] if entry.shape is not None and len(entry.shape) > 2 else 1
        # Row o k1 + a of B A is the a-th of k1 equal pieces of output o's weight.
        return b.reshape(b.shape[0] // k1, -1), torch.block_diag(*[a] * k1)
    if entry.kind == "loha":
        (u1, v1), (u2, v2) = (_loha_pair(t, n) for n in (1, 2))
        if u1.shape[1] * u2.shape[1] > min(u1.shape[0], v1.shape[1]):
            return None  # dearer than the matrix itself
        return (u1[:, :, None] * u2[:, None, :]).flatten(1), (v1[:, None, :] * v2[None, :, :]).flatten(0, 1)
    if entry.kind == "lokr":
        (u1, v1), (u2, v2) = _lokr_pair(t, 1), _lokr_pair(t, 2)
        return torch.kron(u1, u2), torch.kron(v1, v2)
    return None


def _loha_pair(t: algebra.Tensors, n: int) -> Pair:
    a, b, core = t[f"hada_w{n}_a"].float(), t[f"hada_w{n}_b"].float(), t.get(f"hada_t{n}")
    return (a, b) if core is None else (a.T, torch.einsum("pq...,qi->pi...", core.float(), b).flatten(1))


def _lokr_pair(t: algebra.Tensors, n: int) -> Pair:
    whole = t.get(f"lokr_w{n}")
    if whole is not None:
        matrix = whole.float().flatten(1)
        rows, columns = matrix.shape
        return (torch.eye(rows), matrix) if rows <= columns else (matrix, torch.eye(columns))
    a, b = t[f"lokr_w{n}_a"].float(), t[f"lokr_w{n}_b"].float()
    if n == 2 and "lokr_t2" in t:
        return a.T, torch.einsum("pq...,qi->pi...", t["lokr_t2"].float(), b).flatten(1)
    return a, b


def as_lora(
    entry: Entry, rank: int | None = None, weight: torch.Tensor | None = None, bake: bool = False
) -> tuple[Entry, float]:
    """The same change as a LoRA or LoCon without `mid`, and the relative error (Frobenius) of that.

    Args:
        rank: at most this; None: whatever is exact.
        weight: the base weight; `bake` of a DoRA needs it.
        bake: turn DoRA's magnitude into part of the change; otherwise `dora_scale` stays beside it, and
            the error is that of the product.

    Raises:
        FormatError: the kind has no such form (norm, AdaBN), or DoRA is baked without the weight.
    """
    if entry.kind in ("norm", "adabn", "oft"):
        raise FormatError(f"a layer of kind '{entry.kind}' has no form as LoRA")
    baked = bake and bool(entry.dora)
    if entry.kind == "lora" and not baked:
        plain = folded(entry)
        if rank is None or plain.rank is None or plain.rank <= rank:
            return plain, 0.0
    pair = None if baked else pair_of(entry)
    shape = entry.shape
    if pair is None:
        delta = entry.delta(weight) if baked else entry.product()
        shape = shape or tuple(delta.shape)
        if len(shape) < 2:
            raise FormatError("the change of a weight with one axis has no form as LoRA")
        up, down, error = low_rank_of(delta, rank)
        scale = 1.0
    else:
        shape = shape or _shape_of(entry)
        (up, down), error, scale = pair, 0.0, entry.scale
        limit = min(up.shape[0], down.shape[1]) if rank is None else rank
        if up.shape[1] > limit:
            up, down, error = resized(up, down, limit)
    dtype = _dtype(entry)
    made = {
        "lora_down.weight": down.reshape(-1, *shape[1:]).to(dtype),
        "lora_up.weight": up.reshape(*up.shape, *(1,) * (len(shape) - 2)).to(dtype),
        "alpha": scalar(scale * up.shape[1]),
    }
    result = _plus(entry, made, "lora")
    result.shape = shape
    if baked:
        del result.tensors["dora_scale"]
    bias = entry.bias_delta()
    if bias is not None:
        result.tensors["diff_b"] = bias
    return result, error


def _shape_of(entry: Entry) -> tuple[int, ...]:
    """The weight's shape, or (out, rest), from the tensors alone."""
    t = {key: value.to("meta") for key, value in entry.tensors.items() if key != "alpha"}
    return tuple(Entry(entry.kind, t, entry.shape).product().shape)


def _dtype(entry: Entry) -> torch.dtype:
    floating = [t.dtype for key, t in entry.tensors.items() if t.is_floating_point() and key != "alpha"]
    return torch.float32 if not floating or entry.kind == "sara" else floating[0]


def dims(entry: Entry) -> tuple[int, int]:
    """(out, in) of the layer's weight, in counted with its kernel."""
    t = entry.tensors
    if entry.kind == "lora" and entry.shape is None:
        mid = t.get("lora_mid.weight")
        kernel = () if mid is None else mid.shape[2:]
        return t["lora_up.weight"].shape[0], math.prod(t["lora_down.weight"].shape[1:]) * math.prod(kernel)
    shape = entry.shape or _shape_of(entry)
    return shape[0], math.prod(shape[1:])


def made_dims(entry: Entry) -> tuple[int, int]:
    """(out, in) as the tensors make them, whatever shape is stated.

    Raises:
        RuntimeError, FormatError, IndexError, KeyError: the tensors do not go together.
    """
    stated = entry.shape if entry.kind == "convlora" else None
    shape = _shape_of(Entry(entry.kind, entry.tensors, stated))
    return shape[0], math.prod(shape[1:])


# Rows of the output axis: original code bases fuse layers along it.

_ROW_FIRST = ("lora_up.weight", "hada_w1_a", "hada_w2_a", "diff", "diff_b", "w_norm", "b_norm", "flora_out", "qalora_B")


def take_rows(entry: Entry, rows: torch.Tensor) -> Entry:
    """The same change for these rows of the output axis alone, in this order.

    Raises:
        FormatError: a magnitude per input belongs to all rows together.
    """
    if entry.dora == "in":
        raise FormatError("a DoRA magnitude per input cannot be taken apart by outputs")
    if entry.kind not in ("lora", "loha", "diff", "norm", "flora", "qalora"):
        extra = {key: entry.tensors[key] for key in ("dora_scale",) if key in entry.tensors}
        whole = dense(Entry(entry.kind, {k: v for k, v in entry.tensors.items() if k not in extra}, entry.shape))
        if extra:
            raise FormatError(f"a fused layer of kind '{entry.kind}' with DoRA cannot be taken apart")
        entry = whole
    tucker = "hada_t1" in entry.tensors
    made = {}
    for key, tensor in entry.tensors.items():
        if key in ("hada_w1_a", "hada_w2_a") and tucker:
            made[key] = tensor[:, rows].contiguous()
        elif key in _ROW_FIRST or key == "dora_scale":
            made[key] = tensor[rows].contiguous()
        else:
            made[key] = tensor
    return Entry(entry.kind, made, None if entry.shape is None else (len(rows), *entry.shape[1:]))


def halves_swapped(entry: Entry) -> Entry:
    """The two halves of the output axis in the other order."""
    out = dims(entry)[0] if entry.kind != "norm" else len(next(iter(entry.tensors.values())))
    order = torch.arange(out)
    return take_rows(entry, torch.cat([order[out // 2 :], order[: out // 2]]))


def fused(entries: Sequence[Entry | None], sizes: Sequence[int]) -> Entry:
    """Several layers with one input as one layer, their outputs one after the other.

    LoRAs become one whose down is theirs one below the other and whose up is block-diagonal (the rank is
    the sum), unless all share one down; alpha grows with the rank. Other kinds become LoRAs first where
    that is exact and smaller, else a `diff`.

    Args:
        entries: None: nothing changes there.
        sizes: the outputs of each.

    Raises:
        FormatError: DoRA on some of the layers, or per input; shapes that do not go together.
    """
    present = [entry for entry in entries if entry is not None]
    doras = {entry.dora for entry in present} | ({""} if len(present) < len(entries) else set())
    if "in" in doras or len(doras) > 1:
        raise FormatError("layers with DoRA can be fused if all of them have a magnitude per output, and all are there")
    if any(e.kind in ("norm", "adabn", "oft") for e in present):
        raise FormatError(f"layers of kind '{present[0].kind}' cannot be fused")
    bias = _stacked([None if e is None else e.bias_delta() for e in entries], sizes)
    if any(e.kind not in LOW_RANK for e in present):
        if doras != {""}:
            raise FormatError("DoRA on one part and another kind on the next cannot be fused")
        inner = dims(present[0])[1]
        parts = [
            torch.zeros(n, inner) if e is None else e.delta().reshape(n, inner)
            for e, n in zip(entries, sizes, strict=True)
        ]
        return Entry("diff", {"diff": torch.cat(parts)} | ({} if bias is None else {"diff_b": bias}))
    loras = [None if entry is None else as_lora(entry)[0].tensors for entry in entries]
    scales = [1.0 if t is None else Entry("lora", t).scale for t in loras]
    downs = [t["lora_down.weight"] for t in loras if t is not None]
    scale = next(s for s, t in zip(scales, loras, strict=True) if t is not None)
    ups = [
        None if t is None else (t["lora_up.weight"] if s == scale else t["lora_up.weight"] * (s / scale))
        for s, t in zip(scales, loras, strict=True)
    ]
    if all(downs[0] is down or torch.equal(downs[0], down) for down in downs[1:]):
        down = downs[0]
        stacked = _stacked(ups, sizes)
    else:
        down, start, blocks = torch.cat(downs), 0, []
        for up, size in zip(ups, sizes, strict=True):
            block = down.new_zeros(size, down.shape[0])
            if up is not None:
                block[:, start : start + up.shape[1]] = up.flatten(1)
                start += up.shape[1]
            blocks.append(block)
        stacked = torch.cat(blocks)
    assert stacked is not None
    made = {"lora_down.weight": down, "lora_up.weight": stacked, "alpha": scalar(scale * down.shape[0])}
    if doras == {"out"}:
        made["dora_scale"] = torch.cat([t["dora_scale"].reshape(-1, 1) for t in loras if t is not None])
    return Entry("lora", made | ({} if bias is None else {"diff_b": bias}))


def _stacked(parts: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> torch.Tensor | None:
    """Parts one after the other along the first axis, zeros for those that are None; None if all are."""
    given = next((part for part in parts if part is not None), None)
    if given is None:
        return None
    zeros = [given.new_zeros(size, *given.shape[1:]) for size in sizes]
    return torch.cat([zero if part is None else part for part, zero in zip(parts, zeros, strict=True)])
