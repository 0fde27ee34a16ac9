"""Which module goes where when a unit is removed, for every block that vislr knows.

Everything is decided by the class names of diffusers, timm and torchvision and by structure; nothing
is computed and no weight is read, so it works on meta.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import TargetError, hint
from vislr.prune import skips
from vislr.prune.skips import Removed

REMOVALS = ("skip", "identity")
# Blocks of two streams, and the adaptive norms in them that are units of their own.
_STREAMS = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
_NORMS = ("norm1", "norm1_context")
_BRANCHES = ("attn", "attn1", "attn2", "ff", "ff_context", "mlp")
# Residual blocks of conv nets -> names of the activation after the sum, the first that the block has.
_RESIDUAL: dict[str, tuple[str, ...]] = {
    "BasicBlock": ("act2", "relu"),
    "Bottleneck": ("act3", "relu"),
    "Bottle2neck": ("relu",),
    "ResBottleneckBlock": ("activation",),
    "ConvNeXtBlock": (),
    "CNBlock": (),
    "InvertedResidual": (),
    "DepthwiseSeparableConv": (),
    "EdgeResidual": (),
    "MBConv": (),
    "FusedMBConv": (),
}
_SHORTCUTS = ("downsample", "shortcut", "proj")


def class_name(module: nn.Module, *known: str) -> str | None:
    """The first of `known` that the module's class, or a class that it is made from, is called."""
    names = {base.__name__ for base in type(module).__mro__}
    return next((name for name in known if name in names), None)


def parent_of(name: str) -> str:
    """The name of the module that holds `name`."""
    return name.rpartition(".")[0]


def is_block(module: nn.Module) -> bool:
    """Whether the module is a transformer block with branches that can be removed one by one."""
    if class_name(module, "BasicTransformerBlock", *_STREAMS[:2]):
        return True
    # timm: pre-norm or post-norm, each branch with its norm and scale.
    return all(isinstance(getattr(module, part, None), nn.Module) for part in ("attn", "mlp", "norm1", "norm2"))


def branches(block: nn.Module) -> list[str]:
    """Attribute names of a block's residual branches that are still there."""
    names = (name for name in _BRANCHES if isinstance(getattr(block, name, None), nn.Module))
    return [name for name in names if not isinstance(getattr(block, name), Removed)]


def norms(block: nn.Module) -> list[str]:
    """Attribute names of the adaptive norms of a block of two streams that are still there."""
    if not class_name(block, *_STREAMS[:2]):
        return []
    return [name for name in _NORMS if class_name(getattr(block, name), *skips.PlainNorm.OUTPUTS)]


def replacements(model: nn.Module, name: str, removal: str = "skip") -> dict[str, nn.Module]:
    """What takes whose place when the unit `name` alone is removed.

    Args:
        model: the model, adapters on it or not.
        name: of a residual block, a transformer, a transformer block, a branch of one, or an adaptive norm.
        removal: "skip": a branch gives 0. "identity": attention and feed-forward become the identity,
            as in the code of HierarchicalPrune; the same for everything else.

    Returns:
        full name -> module.

    Raises:
        TargetError: there is no such unit, or it cannot be removed.
    """
    model = unwrapped(model)
    modules = dict(model.named_modules())
    if name not in modules or not name:
        raise TargetError(f"the {type(model).__name__} has no unit '{name}'{hint(name, modules)}")
    module, parent = modules[name], modules[parent_of(name)]
    kind = type(module).__name__
    if isinstance(module, Removed):
        raise TargetError(f"'{name}' is removed already")
    attribute = name.rpartition(".")[2]
    if is_block(parent) and attribute in _BRANCHES:
        return _branch(name, module, parent, attribute, removal)
    if attribute in norms(parent):
        weight: Any = module.linear
        known = class_name(module, *skips.PlainNorm.OUTPUTS)
        return {name: skips.PlainNorm(str(known), weight.in_features)}
    if class_name(module, "ResnetBlock2D"):
        return {name: _resnet(name, module)}
    if class_name(module, "Transformer2DModel"):
        return {name: skips.PassTransformer2D(kind)}
    if class_name(module, *_STREAMS):
        return {name: skips.PassStreams(kind, bool(getattr(module, "context_pre_only", False)))}
    if is_block(module):
        embedding = getattr(getattr(module, "norm1", None), "emb", None)
        if isinstance(embedding, nn.Module) and attribute == "0":
            return {name: skips.PassBlockKeepingEmbedding(kind, embedding)}
        return {name: skips.Pass(kind)}
    known = class_name(module, *_RESIDUAL)
    if known:
        return {name: _residual(module, _RESIDUAL[known])}
    raise TargetError(f"'{name}' is a {kind}, which is no unit that can be removed")


def _resnet(name: str, module: Any) -> nn.Module:
    if module.upsample is not None or module.downsample is not None:
        raise TargetError(f"'{name}' also resizes its input and cannot be removed")
    return skips.PassResnet(type(module).__name__, module.conv_shortcut, float(module.output_scale_factor))


def _residual(module: nn.Module, activations: tuple[str, ...]) -> nn.Module:
    shortcuts = [n for n in _SHORTCUTS if isinstance(getattr(module, n, None), nn.Module)]
    after = [n for n in activations if isinstance(getattr(module, n, None), nn.Module)][:1]
    return skips.PassResidual(
        type(module).__name__,
        {n: getattr(module, n) for n in shortcuts[:1]},
        {n: getattr(module, n) for n in after},
    )


def _branch(name: str, module: nn.Module, block: Any, attribute: str, removal: str) -> dict[str, nn.Module]:
    kind, prefix = type(module).__name__, parent_of(name)
    joint = class_name(block, *_STREAMS[:2]) and attribute == "attn"
    if removal == "identity":
        return {name: (skips.SameJoint if joint else skips.Same)(kind)}
    changes: dict[str, nn.Module] = {name: (skips.ZeroJoint if joint else skips.Zero)(kind)}
    for companion in _companions(block, attribute):
        old = getattr(block, companion, None)
        if isinstance(old, nn.Module) and any(True for _ in old.parameters()):
            changes[f"{prefix}.{companion}"] = skips.Pass(type(old).__name__)
    return changes


def _companions(block: Any, attribute: str) -> tuple[str, ...]:
    """What serves this branch alone: its norm, and timm's scale behind it."""
    if class_name(block, *_STREAMS):
        return ()
    if not class_name(block, "BasicTransformerBlock"):
        return ("norm1", "ls1") if attribute == "attn" else ("norm2", "ls2")
    if block.norm_type == "ada_norm_single":
        # One table modulates all branches; norm2 belongs to the feed-forward.
        return {"attn1": ("norm1",), "ff": ("norm2",)}.get(attribute, ())
    own = {"attn1": ("norm1",), "attn2": ("norm2",), "ff": ("norm3",)}[attribute]
    # The norm of an ada_norm_zero block gives the gates of all branches.
    return () if block.norm_type == "ada_norm_zero" and attribute == "attn1" else own


def effective(model: nn.Module, removed: Collection[str], removal: str = "skip") -> list[str]:
    """The units that really go when these do, in the model's order.

    A block all of whose branches go is skipped as a whole ("identity": all of its branches and
    adaptive norms, as in the reference code); a Transformer2DModel without blocks goes with its norm
    and projections. Units inside one that goes are left out.

    Raises:
        TargetError: as `replacements`.
    """
    model = unwrapped(model)
    gone = set(removed)
    for name, children in holders(model, removal):
        if children and all(child in gone for child in children):
            gone.add(name)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for name in sorted(gone):
        if name not in order:
            raise TargetError(f"the {type(model).__name__} has no unit '{name}'{hint(name, order)}")
    outermost = [n for n in gone if not any(n.startswith(f"{other}.") for other in gone)]
    return sorted(outermost, key=order.__getitem__)


def holders(model: nn.Module, removal: str = "skip") -> Iterator[tuple[str, list[str]]]:
    """(name, names of its units) of what goes as a whole once all of its units are gone; inner ones first."""
    found = []
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, Removed):
            continue
        if is_block(module):
            parts = branches(module) + (norms(module) if removal == "identity" else [])
            found.append((name, [f"{name}.{part}" for part in parts]))
        elif class_name(module, "Transformer2DModel"):
            inner = [(i, block) for i, block in enumerate(module.transformer_blocks)]
            left = [i for i, block in inner if not isinstance(block, Removed)]
            found.append((name, [f"{name}.transformer_blocks.{i}" for i in left]))
    yield from reversed(found)


def swap(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` under this name; returns what was there."""
    parent, attribute = model.get_submodule(parent_of(name)), name.rpartition(".")[2]
    old = parent._modules[attribute]
    assert old is not None
    # Not setattr: an nn.Sequential's and an nn.ModuleList's children are named by numbers.
    parent._modules[attribute] = new
    new.training = old.training
    return old
