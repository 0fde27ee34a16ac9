"""An adapter in memory, the same for every file format and model family.

A `CanonicalAdapter` is a mapping from canonical module names to `Entry`s. Names are
`<component>.<path>`: the pipeline's component ("unet", "transformer", "text_encoder", ...) and the
module's path in diffusers' naming, with `text_model.` in CLIP text encoders whatever the installed
transformers does; for bare models (timm) the path alone.

=========  ======================================================  ===========================
kind       tensors: suffix -> shape                                scale of the product
=========  ======================================================  ===========================
lora       `lora_down.weight` (r, Cg, *K), `lora_up.weight`        alpha / r, r = down.shape[0]
           (Co, r, 1...); Tucker: `lora_mid.weight` (r_out, r, *K)
           DoRA: `dora_scale` (Co, 1...) or (1, Cg, 1...)
loha       `hada_w{1,2}_a` (Co, r), `hada_w{1,2}_b` (r, Cg K);     alpha / r
           Tucker: `hada_t{1,2}` (r, r, *K), a (r, Co), b (r, Cg)
lokr       `lokr_w1` (a, c) or `_a`, `_b`; `lokr_w2` (b, d, *K)    alpha / r; 1 if both factors
           or `_a` (b, r), `_b` (r, d K); `lokr_t2` (r, r, *K)     are whole
diff       `diff` as the weight                                    1
norm       `w_norm`, `b_norm` (C,)                                 1
convlora   `convlora_A` (r k1, Cg k2...), `convlora_B` (Co k1,     alpha / r, r = A.shape[0] / k1
           r k1)
flora      `flora_core`, `flora_out`, `flora_in`, `flora_k1`...    alpha
sara       `sara_index`, `sara_delta`, `sara_shape`                1
qalora     `qalora_A` (r, Cg, *K), `qalora_B` (Co, r, 1...)        alpha / r
adabn      `adabn_mean`, `adabn_var`, `adabn_count`                no delta
oft        `oft_blocks` (n, b, b)                                  not additive
=========  ======================================================  ===========================

`alpha` is a float32 scalar; without it the scale is 1. Any kind may also hold `diff_b`, the bias's change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vislr.core.errors import FormatError, hint
from vislr.formats import algebra

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
KINDS: dict[str, tuple[str, ...]] = {
    "lora": ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "alpha", "diff_b"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale", "alpha", "diff_b"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale", "alpha",
             "diff_b"),
    "diff": ("diff", "diff_b"),
    "norm": ("w_norm", "b_norm"),
    "convlora": ("convlora_A", "convlora_B", "alpha", "diff_b"),
    "flora": ("flora_core", "flora_out", "flora_in", "flora_k1", "flora_k2", "flora_k3", "alpha", "diff_b"),
    "sara": ("sara_index", "sara_delta", "sara_shape", "sara_kept"),
    "qalora": ("qalora_A", "qalora_B", "qalora_scale", "qalora_input_scale", "qalora_input_zero", "alpha", "diff_b"),
    "adabn": ("adabn_mean", "adabn_var", "adabn_count"),
    "oft": ("oft_blocks", "alpha"),
}  # fmt: skip
NO_DELTA = ("adabn", "oft")


@dataclass
class Entry:
    """What one adapter does to one module.

    Attributes:
        kind: a key of `KINDS`.
        tensors: suffix -> tensor.
        shape: of the module's weight, where it is known.
    """

    kind: str
    tensors: dict[str, torch.Tensor]
    shape: tuple[int, ...] | None = None

    @property
    def alpha(self) -> float | None:
        """The stored alpha; None: the file has none."""
        return float(self.tensors["alpha"]) if "alpha" in self.tensors else None

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None where the kind has no such rank."""
        t = self.tensors
        if self.kind == "lora":
            return t["lora_down.weight"].shape[0]
        if self.kind == "loha":
            return t["hada_w1_b"].shape[0]
        if self.kind == "lokr":
            parts = [t[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in t]
            return parts[-1].shape[0] if parts else None
        if self.kind == "convlora":
            k1 = self.shape[2] if self.shape is not None and len(self.shape) > 2 else 1
            return t["convlora_A"].shape[0] // k1
        if self.kind == "qalora":
            return t["qalora_A"].shape[0]
        return None

    @property
    def scale(self) -> float:
        """What multiplies the product of the tensors."""
        alpha, rank = self.alpha, self.rank
        if self.kind == "flora":
            return 1.0 if alpha is None else alpha
        return 1.0 if alpha is None or not rank else alpha / rank

    @property
    def dora(self) -> str:
        """ "", "out" (a magnitude per output) or "in" (per input)."""
        if "dora_scale" not in self.tensors:
            return ""
        return "in" if algebra.per_input(self.tensors["dora_scale"]) else "out"

    def product(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scale times the product of the tensors, before any DoRA: `shape` if known, else as the tensors give it.

        Raises:
            FormatError: the kind has no delta, or tensors and shape disagree.
        """
        t = self.tensors
        if self.kind in NO_DELTA:
            raise FormatError(f"a layer of kind '{self.kind}' is no addition to a weight")
        if self.kind == "diff":
            if "diff" not in t:
                return torch.zeros(self.shape or (1,), dtype=dtype)
            found = t["diff"].to(dtype)
        elif self.kind == "norm":
            found = t["w_norm"].to(dtype) if "w_norm" in t else torch.zeros_like(t["b_norm"], dtype=dtype)
        elif self.kind == "sara":
            found = algebra.sara(t, dtype)[0]
        elif self.kind == "convlora":
            if self.shape is None:
                raise FormatError("a ConvLoRA layer needs the shape of its weight")
            found = self.scale * algebra.convlora(t, self.shape, dtype)
        else:
            found = self.scale * getattr(algebra, self.kind)(t, dtype)
        if self.shape is None or tuple(found.shape) == self.shape:
            return found
        try:
            return found.reshape(self.shape)
        except RuntimeError:
            raise FormatError(f"the tensors make {tuple(found.shape)}, the weight has shape {self.shape}") from None

    def delta(self, weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The change of the weight.

        Args:
            weight: the base weight; DoRA needs it.
            dtype: to compute in, and of the result.

        Returns:
            `shape` if that is known, else the shape that the tensors give: (Co, Cg, *K) or (Co, rest).

        Raises:
            FormatError: the kind has no delta, or DoRA without the weight.
        """
        change = self.product(dtype)
        if not self.dora:
            return change
        if weight is None:
            raise FormatError("DoRA's change depends on the base weight; give it")
        weight = weight.to(dtype)
        return algebra.dora(weight, change.reshape(weight.shape), self.tensors["dora_scale"])

    def bias_delta(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The change of the bias, (Co,); None: there is none."""
        if self.kind == "sara":
            return algebra.sara(self.tensors, dtype)[1]
        found = self.tensors.get("b_norm" if self.kind == "norm" else "diff_b")
        return None if found is None else found.to(dtype)


@dataclass
class CanonicalAdapter:
    """One adapter over all components of a pipeline, apart from any file and any model.

    Attributes:
        entries: full name -> Entry, in the order of the file.
        family: a key of `families.FAMILIES`; "": not known.
        format: what it was read from; "": made in memory.
        metadata: the header, less what belongs to a format.
        notes: what a user should know, a line each.
        unplaced: key -> why it found no place; only of readings that are not strict.
        aux: name -> tensor of auxiliary heads.
        manifest: vislr's own part of the header.
    """

    entries: dict[str, Entry]
    family: str = ""
    format: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unplaced: dict[str, str] = field(default_factory=dict)
    aux: dict[str, torch.Tensor] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None

    def components(self) -> list[str]:
        """The components it touches, in order; "" for bare models."""
        return list(dict.fromkeys(split_name(name)[0] for name in self.entries))

    def only(self, components: Sequence[str]) -> CanonicalAdapter:
        """The same adapter on these components alone.

        Raises:
            FormatError: it has no layer on one of them.
        """
        present = self.components()
        for component in components:
            if component not in present:
                raise FormatError(f"the adapter has no layers for '{component}'{hint(component, present)}")
        kept = {name: entry for name, entry in self.entries.items() if split_name(name)[0] in components}
        return replace(self, entries=kept)

    def of(self, component: str) -> dict[str, Entry]:
        """Path -> Entry of one component."""
        split = ((split_name(name), entry) for name, entry in self.entries.items())
        return {path: entry for (owner, path), entry in split if owner == component}


def split_name(name: str) -> tuple[str, str]:
    """ "unet.conv_in" -> ("unet", "conv_in"); a name without component -> ("", name)."""
    component, dot, path = name.partition(".")
    return (component, path) if dot and component in COMPONENTS else ("", name)


def join_name(component: str, path: str) -> str:
    """The inverse of `split_name`."""
    return f"{component}.{path}" if component else path
