"""The adapter section of a training config, and the config of peft or vislr that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vislr.core.errors import ConfigError
from vislr.train.checks import above_zero, at_least, share

# Linears of the text encoders' blocks: CLIP's, then T5's. Embeddings and projections stay.
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
# Kinds whose change is not scaled.
_WITHOUT_SCALE = {"sara": "trains the weights themselves and has none", "oft": "rotates the weights and has none"}


@dataclass
class AdapterSection:
    """What is trained."""

    kind: Literal["convlora", "flora", "lora", "dora", "loha", "lokr", "oft", "sara"] = "convlora"
    """convlora: low-rank reshaped kernels. flora: Tucker core and factors. lora, dora, loha, lokr, oft: peft's. sara:
    the entries of the weights that are nearest to zero, in place."""
    name: str = "default"
    """Name under which the adapter is put on the model."""
    r: int = 4
    """Rank; oft: side of the blocks that rotate the input; sara has none."""
    alpha: float | None = None
    """Scale of the update: multiplied by alpha / r, flora by alpha; null: a scale of 1. oft and sara have none."""
    ranks: list[int | float] | None = None
    """flora only: a rank, or a share of the size, for each axis: out, in, height, width. null: r for every axis."""
    fraction: float | None = None
    """sara only: share of all entries of the targets that is trained."""
    threshold: float | None = None
    """sara only, in place of fraction: entries of smaller magnitude are trained (published: 2e-4 to 2e-3)."""
    count: int | None = None
    """sara only, in place of fraction: this many entries are trained."""
    rank_weight: float = 5e-4
    """sara only: factor of the nuclear norm of the trained entries; 0: none."""
    reselect_after: int | None = None
    """sara only: steps after which only entries that are still below the threshold are trained on; null: never."""
    target_modules: list[str] | None = None
    """Layers to adapt: names, ends of names (to_q), all-linear, or one re:EXPRESSION over whole names;
    null: every linear and convolution of the backbone (sara: every layer with a weight)."""
    exclude_modules: list[str] | None = None
    """Layers to leave alone, written like target_modules."""
    dropout: float = 0.0
    """flora, lora and dora: share of the adapter's input that is dropped in training."""
    text_encoders: list[str] = field(default_factory=list)
    """Text encoders that are adapted, too, in the same way: text_encoder, text_encoder_2, text_encoder_3."""

    def __post_init__(self) -> None:
        at_least(1, adapter__r=self.r, adapter__count=self.count, adapter__reselect_after=self.reselect_after)
        at_least(0, adapter__rank_weight=self.rank_weight)
        above_zero(adapter__alpha=self.alpha, adapter__fraction=self.fraction, adapter__threshold=self.threshold)
        share(adapter__dropout=self.dropout)
        for rank in self.ranks or []:
            above_zero(adapter__ranks=rank)
        if self.ranks is not None and self.kind != "flora":
            raise ConfigError(f"adapter.ranks belongs to flora, and adapter.kind is {self.kind}; use adapter.r")
        if self.dropout and self.kind not in ("flora", "lora", "dora"):
            raise ConfigError(f"adapter.dropout is for flora, lora and dora; {self.kind} has none")
        given = [key for key in ("fraction", "threshold", "count") if getattr(self, key) is not None]
        if self.kind == "sara" and len(given) != 1:
            raise ConfigError(
                "sara needs one of adapter.fraction, adapter.threshold, adapter.count; "
                f"given {' and '.join(given) or 'none'}"
            )
        if self.kind != "sara" and given:
            raise ConfigError(f"adapter.{given[0]} belongs to sara, and adapter.kind is {self.kind}; use adapter.r")
        if self.kind in _WITHOUT_SCALE and self.alpha is not None:
            raise ConfigError(f"adapter.alpha is a scale of updates; {self.kind} {_WITHOUT_SCALE[self.kind]}")
        if self.kind == "oft" and self.text_encoders:
            raise ConfigError("adapter.text_encoders: a file of several components cannot hold oft; leave them out")
        _patterns("target_modules", self.target_modules)
        _patterns("exclude_modules", self.exclude_modules)
        for name in self.text_encoders:
            if name not in ("text_encoder", "text_encoder_2", "text_encoder_3"):
                raise ConfigError(
                    f"adapter.text_encoders names '{name}'; expected text_encoder, text_encoder_2 or text_encoder_3"
                )

    def to_change(self) -> Any:
        """The config that `vislr.apply` takes: ConvLoraConfig, FloraConfig, SaraConfig, or one of peft's."""
        return self._change(
            _patterns("target_modules", self.target_modules), _patterns("exclude_modules", self.exclude_modules)
        )

    def to_text_change(self, encoder: Any) -> Any:
        """The same for a text encoder: every linear of its blocks.

        Raises:
            ConfigError: the encoder is none that is known.
        """
        ends = {name.rpartition(".")[2] for name, _ in encoder.named_modules()}
        targets = [name for name in TEXT_TARGETS if name in ends]
        if not targets:
            raise ConfigError(f"adapter.text_encoders names a {type(encoder).__name__}; expected CLIP or T5")
        return self._change(targets, None)

    def _change(self, target: Any, exclude: Any) -> Any:
        where = {"target_modules": target, "exclude_modules": exclude}
        if self.kind in ("lora", "dora", "loha", "lokr", "oft"):
            return self._of_peft(where)
        from vislr.adapters import ConvLoraConfig, FloraConfig, SaraConfig

        if self.kind == "convlora":
            return ConvLoraConfig(r=self.r, alpha=self.alpha, **where)
        if self.kind == "sara":
            return SaraConfig(
                fraction=self.fraction, threshold=self.threshold, count=self.count, rank_weight=self.rank_weight,
                reselect_after=self.reselect_after, **where,
            )  # fmt: skip
        scale = 1.0 if self.alpha is None else self.alpha
        return FloraConfig(ranks=self.ranks or self.r, scale=scale, dropout=self.dropout, **where)

    def _of_peft(self, where: dict[str, Any]) -> Any:
        from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

        # peft's annotations say int; every scale it computes is a float.
        alpha: Any = self.r if self.alpha is None else self.alpha
        if self.kind == "oft":
            # Where the side does not divide a layer's input, peft takes the nearest that does.
            return OFTConfig(r=0, oft_block_size=self.r, **where)
        if self.kind in ("loha", "lokr"):
            return (LoHaConfig if self.kind == "loha" else LoKrConfig)(r=self.r, alpha=alpha, **where)
        dora = self.kind == "dora"
        return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, use_dora=dora, **where)


def _patterns(key: str, patterns: list[str] | None) -> Any:
    """Patterns as peft writes them: a list of names, or one text for an expression."""
    if patterns is None:
        return None
    if not patterns:
        raise ConfigError(f"adapter.{key} is an empty list; give names, or null")
    special = [pattern for pattern in patterns if pattern.startswith("re:") or pattern == "all-linear"]
    if special and len(patterns) > 1:
        raise ConfigError(f"adapter.{key}: '{special[0]}' stands alone, and {len(patterns)} patterns are given")
    return special[0].removeprefix("re:") if special else patterns
