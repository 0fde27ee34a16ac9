"""Adapters in canonical form with random values, on the module names of the golden lists, at narrow widths."""

from __future__ import annotations

import torch

from vislr.formats import families
from vislr.formats.canonical import CanonicalAdapter, Entry, split_name

NARROW = 64

# Names of each family: whole q/k/v groups and lone parts of groups, convs, both ends, text encoders.
SITES = {
    "sd15": ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "unet.up_blocks.1.upsamplers.0.conv",
             "unet.down_blocks.1.resnets.0.conv1", "unet.mid_block.attentions.0.proj_in",
             "unet.up_blocks.0.upsamplers.0.conv",
             "unet.time_embedding.linear_1", "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"],
    "sd2": ["unet.mid_block.resnets.1.time_emb_proj", "unet.down_blocks.0.downsamplers.0.conv", "unet.conv_out",
            "text_encoder.text_model.encoder.layers.22.mlp.fc1"],
    "sdxl": ["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", "unet.up_blocks.0.upsamplers.0.conv",
             "unet.conv_in", "unet.add_embedding.linear_1", "unet.down_blocks.1.resnets.0.conv_shortcut",
             "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
             "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
             "text_encoder_2.text_model.encoder.layers.31.mlp.fc2"],
    "sd3": [*(f"transformer.transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")),
            "transformer.transformer_blocks.1.attn.add_k_proj",
            "transformer.transformer_blocks.1.ff_context.net.0.proj",
            "transformer.transformer_blocks.23.norm1_context.linear",
            "transformer.transformer_blocks.3.norm1_context.linear",
            "transformer.norm_out.linear", "transformer.pos_embed.proj",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.5.mlp.fc1",
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"],
    "flux": [*(f"transformer.transformer_blocks.18.attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj")),
             *(f"transformer.single_transformer_blocks.37.{part}" for part in
               ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
             "transformer.transformer_blocks.0.attn.to_v", "transformer.single_transformer_blocks.1.proj_out",
             "transformer.norm_out.linear", "transformer.time_text_embed.guidance_embedder.linear_2",
             "transformer.x_embedder", "text_encoder.text_model.encoder.layers.11.self_attn.v_proj",
             "text_encoder_2.encoder.block.2.layer.1.DenseReluDense.wo"],
    "pixart": ["transformer.transformer_blocks.0.attn2.to_k", "transformer.adaln_single.linear",
               "transformer.pos_embed.proj", "text_encoder.encoder.block.0.layer.0.SelfAttention.v"],
    "dit": ["transformer.transformer_blocks.27.attn1.to_out.0", "transformer.pos_embed.proj"],
    "timm": ["blocks.3.attn.qkv", "layer2.0.downsample.0", "stages.2.blocks.1.mlp.fc1"],
}  # fmt: skip
_TIMM = {"blocks.3.attn.qkv": (36, 12), "layer2.0.downsample.0": (16, 8, 1, 1), "stages.2.blocks.1.mlp.fc1": (24, 6)}


def narrow_shape(family: str, name: str) -> tuple[int, ...]:
    """The weight's shape of a golden module, widths divided by 64."""
    component, path = split_name(name)
    if family == "timm":
        return _TIMM[path]
    shape = families.golden(family)[component][path]
    if shape is None:  # differs between the sizes of SD3
        out = {"norm1_context.linear": 2 if ".23." in path else 6, "norm_out.linear": 2, "ff_context.net.0.proj": 4}
        return (16, 4, 2, 2) if "pos_embed" in path else (24 * out.get(path.split(".", 2)[-1], out.get(path, 1)), 24)
    return tuple(max(4, size // NARROW) if size >= 64 else size for size in shape)


def random_entry(kind: str, shape: tuple[int, ...], generator: torch.Generator, rank: int = 2) -> Entry:
    """An entry of a kind ("tucker", "dora", "dora in", "loha tucker", ... are forms of a kind) for a weight."""

    def draw(*sizes: int) -> torch.Tensor:
        # Multiples of 1/8: sums and products of few of them are exact in float32, so "exact" can be tested for bits.
        return torch.randint(-8, 9, sizes, generator=generator).float() / 8

    out, inside, *k = shape
    taps = 1
    for size in k:
        taps *= size
    ones = (1,) * len(k)
    alpha = {"alpha": torch.tensor(1.0)}
    down, up = draw(rank, inside, *k), draw(out, rank, *ones)
    if kind in ("lora", "dora", "dora in"):
        tensors = {"lora_down.weight": down, "lora_up.weight": up, **alpha}
        if kind == "dora":
            tensors["dora_scale"] = draw(out, 1, *ones).abs() + 1
        elif kind == "dora in":
            tensors["dora_scale"] = draw(1, inside, *ones).abs() + 1
        return Entry("lora", tensors, shape)
    if kind == "tucker":
        tensors = {"lora_down.weight": draw(rank, inside, *ones), "lora_mid.weight": draw(rank + 1, rank, *k),
                   "lora_up.weight": draw(out, rank + 1, *ones), **alpha}  # fmt: skip
        return Entry("lora", tensors, shape)
    if kind == "loha":
        pairs = {f"hada_w{n}_{part}": draw(*size) for n in (1, 2)
                 for part, size in (("a", (out, rank)), ("b", (rank, inside * taps)))}  # fmt: skip
        return Entry("loha", pairs | alpha, shape)
    if kind == "loha tucker":
        pairs = {f"hada_w{n}_{part}": draw(rank, size) for n in (1, 2) for part, size in (("a", out), ("b", inside))}
        return Entry("loha", pairs | {f"hada_t{n}": draw(rank, rank, *k) for n in (1, 2)} | alpha, shape)
    if kind == "lokr":
        a, c = (2 if size % 2 == 0 else 1 for size in (out, inside))
        w2 = {"lokr_w2_a": draw(out // a, rank), "lokr_w2_b": draw(rank, inside // c * taps)}
        return Entry("lokr", {"lokr_w1": draw(a, c), **w2, **alpha}, shape)
    if kind == "lokr whole":
        a, c = (2 if size % 2 == 0 else 1 for size in (out, inside))
        return Entry("lokr", {"lokr_w1": draw(a, c), "lokr_w2": draw(out // a, inside // c, *k), **alpha}, shape)
    if kind == "diff":
        return Entry("diff", {"diff": draw(*shape), "diff_b": draw(out)}, shape)
    if kind == "convlora":
        k1 = k[0] if k else 1
        tensors = {"convlora_A": draw(rank * k1, inside * taps // k1), "convlora_B": draw(out * k1, rank * k1)}
        return Entry("convlora", tensors | alpha, shape)
    if kind == "flora":
        ranks = [rank + 1, rank, *(min(2, size) for size in k)]
        tensors = {"flora_core": draw(*ranks), "flora_out": draw(out, ranks[0]), "flora_in": draw(inside, ranks[1])}
        tensors |= {f"flora_k{n + 1}": draw(size, ranks[n + 2]) for n, size in enumerate(k)}
        return Entry("flora", tensors | {"alpha": torch.tensor(0.5)}, shape)
    if kind == "sara":
        size = out * inside * taps
        index = torch.randperm(size + out, generator=generator)[: max(4, size // 50)].sort().values.to(torch.int32)
        tensors = {"sara_index": index, "sara_delta": draw(len(index)).double(), "sara_shape": torch.tensor(shape)}
        return Entry("sara", tensors, shape)
    if kind == "qalora":
        return Entry("qalora", {"qalora_A": down, "qalora_B": up, **alpha}, shape)
    raise KeyError(kind)


def random_adapter(family: str, kind: str, seed: int = 0) -> CanonicalAdapter:
    """An adapter of one kind on `SITES[family]`; kinds with kernels' forms go on the convs alone."""
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for name in SITES[family]:
        shape = narrow_shape(family, name)
        if kind in ("tucker", "loha tucker") and len(shape) < 3:
            continue
        entries[name] = random_entry(kind, shape, generator)
    return CanonicalAdapter(entries, family)
