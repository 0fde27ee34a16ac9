"""The golden lists against the installed libraries, and every name of every family there and back."""

from __future__ import annotations

import pytest

from vislr.formats import families, kohya, layouts, naming, suffixes
from vislr.formats.families import FAMILIES
from vislr.formats.golden import compress, expand, names_of


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "pixart"])
def test_the_lists_are_those_of_the_libraries(family):
    """Names of the true-size models, built on meta. A library that renames a module fails here, not at a user's."""
    built = names_of(family)
    for component, shapes in built.items():
        kept = families.golden(family)[component]
        assert {name: shape and tuple(shape) for name, shape in shapes.items()} == kept, component


def test_patterns_expand_to_what_was_compressed():
    names = {f"a.{i}.b.{j}.c": [i % 2] for i in range(5) for j in range(3) if (i, j) != (4, 2)} | {"a.conv": [7]}
    patterns = compress(names)
    assert sorted(name for pattern in patterns for name in expand(pattern)) == sorted(names)
    assert all(names[name] == shape for pattern, shape in patterns.items() for name in expand(pattern))
    assert len(patterns) < len(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_told_apart_without_dots(family):
    for component, shapes in families.golden(family).items():
        flat = {path.replace(".", "_") for path in shapes}
        templates = {families.template(path) for path in shapes}
        assert len(flat) == len(shapes)
        assert len({template.replace(".", "_") for template in templates}) == len(templates)
        for path in shapes:
            assert families.unflatten(family, component, path.replace(".", "_")) == path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_has_one_kohya_name(family):
    seen: dict[tuple[str, int], str] = {}
    for component, shapes in families.golden(family).items():
        for path in shapes:
            piece = kohya.piece(family, component, path)
            found = naming.locate(family, piece.name)
            assert found is not None
            assert (found.component, found.paths[piece.part]) == (component, path)
            assert seen.setdefault((piece.name, piece.part), path) == path


ORIGINALS = [
    ("sdxl", "down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
    ("sdxl", "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    ("sdxl", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
    ("sd15", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
    ("sd15", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ("sdxl", "mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
    ("sdxl", "add_embedding.linear_2", "label_emb.0.2"),
    ("sdxl", "conv_out", "out.2"),
    ("flux", "single_transformer_blocks.7.proj_mlp", "single_blocks.7.linear1"),
    ("flux", "transformer_blocks.18.attn.add_v_proj", "double_blocks.18.txt_attn.qkv"),
    ("flux", "time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("sd3", "transformer_blocks.12.attn2.to_out.0", "joint_blocks.12.x_block.attn2.proj"),
    ("sd3", "transformer_blocks.37.ff_context.net.0.proj", "joint_blocks.37.context_block.mlp.fc1"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "path", "original"), ORIGINALS)
def test_original_names(family, path, original):
    assert layouts.original(family, path).name == original
    row, paths = layouts.paths(family, original)
    assert path in paths
    assert len(paths) == len(row.sizes)


def test_models_deeper_or_shallower_than_the_list_have_names_too():
    assert families.unflatten("sd15", "unet", "up_blocks_0_attentions_0_proj_in") == "up_blocks.0.attentions.0.proj_in"
    assert families.unflatten("sd15", "unet", "up_blocks_0_attentions_0_proj_on") is None


KEYS = {
    "a.lora_A.weight": ("a", "lora_down.weight"),
    "a.lora_B.default.weight": ("a", "lora_up.weight"),
    "a.lora_A": ("a", "lora_down.weight"),
    "a.attn1.processor.to_out_lora.up.weight": ("a.attn1.to_out.0", "lora_up.weight"),
    "t.self_attn.to_q_lora.down.weight": ("t.self_attn.q_proj", "lora_down.weight"),
    "t.mlp.fc1.lora_linear_layer.down.weight": ("t.mlp.fc1", "lora_down.weight"),
    "a.lora_magnitude_vector": ("a", "dora_scale"),
    "a.lora_magnitude_vector.weight": ("a", "dora_scale"),
    "a.magnitude": ("a", "dora_scale"),
    "lora_unet_a.hada_t1": ("lora_unet_a", "hada_t1"),
}


@pytest.mark.parametrize("key", KEYS)
def test_spellings(key):
    assert suffixes.cut(key)[:2] == KEYS[key]


DETECTED = {
    "lora_unet_double_blocks_0_img_attn_qkv": "flux",
    "lora_unet_joint_blocks_0_x_block_attn_qkv": "sd3",
    "lora_unet_input_blocks_4_1_proj_in": "sdxl",
    "lora_unet_down_blocks_0_attentions_0_proj_in": "sd15",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "sdxl",
    "transformer.transformer_blocks.0.attn.add_q_proj": "sd3",
    "transformer.transformer_blocks.0.attn1.to_q": "pixart",
    "blocks.0.attn.qkv": "timm",
}


@pytest.mark.parametrize("name", DETECTED)
def test_the_family_is_read_from_names(name):
    assert naming.detect([name], {}, lambda _: None) == DETECTED[name]


@pytest.mark.parametrize(("width", "family"), [(768, "sd15"), (1024, "sd2"), (2048, "sdxl")])
def test_the_family_is_read_from_the_width_of_the_text(width, family):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert naming.detect([name], {"ss_base_model_version": "sd_v1"}, lambda _: width) == family
