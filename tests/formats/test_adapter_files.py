"""Adapter files: round trips of every kind, what other tools read, and every way a file can be wrong."""

import json
import struct

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline
from torch import nn

from vislr.adapters import ConvLoraConfig, FloraConfig, adapter_parameters, attach, detach
from vislr.core.errors import AdapterError, FormatError, OutputError
from vislr.formats import attach_file, check_base, fill, read_adapter, write_adapter


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def build(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
ALL = ["conv", "fc"]
CONFIGS = {
    "convlora": ConvLoraConfig(r=2, alpha=0.1, target_modules=ALL),
    "flora": FloraConfig(ranks=[4, 2, 2, 3], scale=0.3, target_modules=ALL),
    "lora": LoraConfig(r=2, lora_alpha=3, target_modules=ALL),
    "lora patterns": LoraConfig(r=2, rank_pattern={"fc": 3}, alpha_pattern={"conv": 5}, target_modules=ALL),
    "rslora": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=ALL),
    "dora": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=ALL),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=ALL),
    "loha tucker": LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=ALL),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=ALL),
    "lokr both": LoKrConfig(r=1, alpha=3, decompose_both=True, use_effective_conv2d=True, target_modules=ALL),
    "oft": OFTConfig(r=0, oft_block_size=2, target_modules=ALL),
}


def run(model):
    with torch.no_grad():
        return model(X)


def randomise(model, name, size=0.1):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def trained(config, model=None):
    model = build() if model is None else model
    attach(model, config, "a")
    randomise(model, "a")
    return model


def parts(path):
    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def untouched(model):
    return (
        not any("adapter" in key for key in vars(model))
        and type(model.conv) is nn.Conv2d
        and not hasattr(model, "peft_config")
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind, tmp_path):
    model = trained(CONFIGS[kind])
    path = write_adapter(model, "a", tmp_path / "a.safetensors")
    file = read_adapter(path)
    assert file.format == "vislr"
    assert file.kind == {"rslora": "lora", "dora": "lora"}.get(kind, kind.split()[0])
    assert sorted(file.tensors) == ALL
    fresh = build()
    attach_file(fresh, "other-name", file)
    assert torch.equal(run(fresh), run(model))
    again = write_adapter(fresh, "other-name", tmp_path / "again.safetensors")
    one, two = parts(path)[0], parts(again)[0]
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("convlora", {"conv.convlora_A": (6, 12), "conv.convlora_B": (24, 6), "conv.alpha": (),
                      "fc.convlora_A": (2, 8), "fc.convlora_B": (6, 2), "fc.alpha": ()}),
        ("flora", {"conv.flora_core": (4, 2, 2, 3), "conv.flora_out": (8, 4), "conv.flora_in": (4, 2),
                   "conv.flora_k1": (3, 2), "conv.flora_k2": (3, 3), "conv.alpha": (),
                   "fc.flora_core": (4, 2), "fc.flora_out": (6, 4), "fc.flora_in": (8, 2), "fc.alpha": ()}),
        ("dora", {"conv.lora_down.weight": (2, 4, 3, 3), "conv.lora_up.weight": (8, 2, 1, 1), "conv.alpha": (),
                  "conv.dora_scale": (8, 1, 1, 1), "fc.lora_down.weight": (2, 8), "fc.lora_up.weight": (6, 2),
                  "fc.alpha": (), "fc.dora_scale": (6, 1)}),
        ("oft", {"conv.oft_blocks": (18, 2, 2), "fc.oft_blocks": (4, 2, 2)}),
    ],
)  # fmt: skip
def test_keys_and_shapes(kind, expected, tmp_path):
    tensors, header = parts(write_adapter(trained(CONFIGS[kind]), "a", tmp_path / "a.safetensors", component="unet"))
    assert {key: tuple(value.shape) for key, value in tensors.items()} == expected
    manifest = json.loads(header["vislr.manifest"])
    assert header["format"] == "pt"
    assert manifest["schema"] == 1
    assert manifest["component"] == "unet"
    assert manifest["architecture"] == "Net"
    assert manifest["sites"] == dict.fromkeys(ALL, manifest["kind"])
    assert len(manifest["base"]["sha256"]) == 64
    assert set(manifest["versions"]) == {"vislr", "torch", "peft", "diffusers"}


def test_alpha_means_alpha_over_r(tmp_path):
    tensors, _ = parts(write_adapter(trained(CONFIGS["rslora"]), "a", tmp_path / "a.safetensors"))
    assert tensors["fc.alpha"] == torch.tensor(5 * 3**0.5)
    tensors, _ = parts(write_adapter(trained(CONFIGS["flora"]), "a", tmp_path / "b.safetensors"))
    assert tensors["fc.alpha"] == torch.tensor(0.3)


def test_an_edited_alpha_rescales_the_delta(tmp_path):
    model = trained(CONFIGS["flora"])
    tensors, header = parts(write_adapter(model, "a", tmp_path / "a.safetensors"))
    tensors["fc.alpha"] = torch.tensor(0.6)
    save_file(tensors, tmp_path / "b.safetensors", metadata=header)
    fresh = build()
    attach_file(fresh, "a", read_adapter(tmp_path / "b.safetensors"))
    assert torch.allclose(fresh.fc.delta("a"), 2 * model.fc.delta("a"))
    assert torch.equal(fresh.conv.delta("a"), model.conv.delta("a"))


def test_nested_kinds_are_written_under_the_models_own_names(tmp_path):
    model = trained(CONFIGS["convlora"])
    alone = run(model)
    attach(model, CONFIGS["flora"], "b")
    attach(model, CONFIGS["lora"], "c")
    for name, kind in (("a", "convlora"), ("b", "flora"), ("c", "lora")):
        path = write_adapter(model, name, tmp_path / f"{name}.safetensors")
        assert not [key for key in parts(path)[0] if "base_layer" in key]
        assert read_adapter(path).kind == kind
    fresh = build()
    attach_file(fresh, "a", read_adapter(tmp_path / "a.safetensors"))
    assert torch.equal(run(fresh), alone)


def test_a_merged_adapter_of_another_kind_is_refused(tmp_path):
    model = trained(CONFIGS["lora"])
    model.fc.merge()
    with pytest.raises(AdapterError, match="unmerge it first"):
        write_adapter(model, "a", tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    ours = trained(CONFIGS["convlora"])
    ours.fc.merge(keep_base=False)
    with pytest.raises(AdapterError, match="base was not kept"):
        write_adapter(ours, "a", tmp_path / "a.safetensors")


def test_metadata(tmp_path):
    model = trained(CONFIGS["convlora"])
    path = write_adapter(model, "a", tmp_path / "a.safetensors", metadata={"title": "emoji"})
    assert parts(path)[1]["title"] == "emoji"
    for wrong in ({"title": 1}, {"vislr.manifest": "x"}, {"format": "pt"}):
        with pytest.raises(FormatError, match="metadata"):
            write_adapter(model, "a", tmp_path / "b.safetensors", metadata=wrong)


@pytest.mark.parametrize("kind", ["convlora", "lora"])
def test_writing_errors(kind, tmp_path):
    model = trained(CONFIGS[kind])
    with pytest.raises(AdapterError, match="no adapter is called 'b'; choose from 'a'"):
        write_adapter(model, "b", tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="'difusers'; did you mean 'diffusers'"):
        write_adapter(model, "a", tmp_path / "a.safetensors", format="difusers")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="regular file"):
        write_adapter(model, "a", tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize("kind", ["convlora", "flora", "dora", "loha"])
def test_the_diffusers_format_holds_plain_lora(kind, tmp_path):
    with pytest.raises(FormatError, match="plain LoRA, not " + kind):
        write_adapter(trained(CONFIGS[kind]), "a", tmp_path / "a.safetensors", format="diffusers")


# What diffusers writes and reads.


def noise(pipe):
    generator = torch.Generator().manual_seed(0)
    options = {"output_type": "latent", "num_inference_steps": 1, "generator": generator}
    if "SD3" in type(pipe).__name__ or "Diffusion3" in type(pipe).__name__ or "Flux" in type(pipe).__name__:
        options |= {"max_sequence_length": 16, "height": 32, "width": 32}
    return pipe("red car", **options).images


PIPELINES = {"sd": tiny_sd_pipeline, "sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline}


@pytest.mark.parametrize("config", ["plain", "patterns"])
@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_reads_what_we_write_and_we_read_what_it_writes(name, config, tmp_path):
    pipe = PIPELINES[name]()
    component = "unet" if name == "sd" else "transformer"
    module = getattr(pipe, component)
    targets = ["to_q", "to_out.0", "conv1", "proj_in"] if name == "sd" else ["to_q", "to_out.0"]
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    if config == "patterns":
        lora = LoraConfig(
            r=2, lora_alpha=3, target_modules=targets, rank_pattern={"to_q": 3}, alpha_pattern={"to_q": 7}
        )
    off = noise(pipe)
    attach(module, lora, "a")
    randomise(module, "a")
    adapted = noise(pipe)
    assert not torch.equal(adapted, off)
    path = write_adapter(module, "a", tmp_path / "a.safetensors", format="diffusers", component=component)
    assert all(key.startswith(f"{component}.") and ".lora_" in key for key in parts(path)[0])

    theirs = PIPELINES[name]()
    theirs.load_lora_weights(str(path), adapter_name="x")
    assert torch.equal(noise(theirs), adapted)
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    model = getattr(theirs, component)
    model.peft_config["default"] = model.peft_config["x"]
    metadata = _collate_lora_metadata({component: model})
    del model.peft_config["default"]
    layers = {f"{component}_lora_layers": get_peft_model_state_dict(model, adapter_name="x")}
    type(theirs).save_lora_weights(tmp_path / "theirs", **layers, **metadata)

    for source in (path, tmp_path / "theirs" / "pytorch_lora_weights.safetensors"):
        file = read_adapter(source)
        assert (file.format, file.kind, file.manifest["component"]) == ("diffusers", "lora", component)
        ours = PIPELINES[name]()
        attach_file(getattr(ours, component), "y", file)
        assert torch.equal(noise(ours), adapted)


def test_a_diffusers_file_without_metadata_has_scale_one(tmp_path):
    model = trained(LoraConfig(r=2, lora_alpha=2, rank_pattern={"fc": 3}, alpha_pattern={"fc": 3}, target_modules=ALL))
    tensors, _ = parts(write_adapter(model, "a", tmp_path / "a.safetensors", format="diffusers"))
    assert sorted(tensors)[0] == "transformer.conv.lora_A.weight"
    save_file(tensors, tmp_path / "bare.safetensors")
    file = read_adapter(tmp_path / "bare.safetensors")
    assert file.notes == ("no alpha in the file for 2 layers: scale 1",)
    fresh = build()
    attach_file(fresh, "a", file)
    assert torch.equal(run(fresh), run(model))
    tensors["transformer.fc.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "alpha.safetensors")
    scaled = build()
    attach_file(scaled, "a", read_adapter(tmp_path / "alpha.safetensors"))
    assert scaled.fc.scaling["a"] == 2.0
    assert scaled.conv.scaling["a"] == 1.0


# Bases.


def test_another_base(tmp_path):
    file = read_adapter(write_adapter(trained(CONFIGS["convlora"]), "a", tmp_path / "a.safetensors"))
    other = build(seed=7)
    with pytest.raises(AdapterError, match="base weights differ"):
        attach_file(other, "a", file)
    assert untouched(other)
    attach_file(other, "a", file, any_base=True)
    assert torch.equal(other.fc.delta("a"), trained(CONFIGS["convlora"]).fc.delta("a"))


def test_another_dtype_is_named(tmp_path):
    file = read_adapter(write_adapter(trained(CONFIGS["convlora"]), "a", tmp_path / "a.safetensors"))
    with pytest.raises(AdapterError, match="made on float32, this is bfloat16"):
        check_base(build().bfloat16(), file)


def test_the_base_is_checked_below_other_adapters(tmp_path):
    file = read_adapter(write_adapter(trained(CONFIGS["convlora"]), "a", tmp_path / "a.safetensors"))
    model = build()
    under = attach(model, CONFIGS["flora"], "b")
    randomise(model, "b")
    attach_file(model, "a", file)
    detach(model, under)
    assert torch.equal(run(model), run(trained(CONFIGS["convlora"])))


def test_missing_layers_are_named(tmp_path):
    file = read_adapter(write_adapter(trained(CONFIGS["convlora"]), "a", tmp_path / "a.safetensors"))
    other = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "fcc": nn.Linear(8, 6)})
    with pytest.raises(AdapterError, match=r"for Net; this ModuleDict has no layer 'fc' .*did you mean 'fcc'"):
        attach_file(other, "a", file)
    assert type(other["conv"]) is nn.Conv2d


# Broken files.


@pytest.fixture
def file(tmp_path):
    return write_adapter(trained(CONFIGS["convlora"]), "a", tmp_path / "good.safetensors")


def rewrite(path, change):
    """Write a copy with `change(tensors, manifest)` applied; a returned text replaces the manifest."""
    tensors, header = parts(path)
    manifest = json.loads(header["vislr.manifest"])
    replaced = change(tensors, manifest)
    bad = path.with_name("bad.safetensors")
    save_file(
        tensors, bad, metadata={"vislr.manifest": replaced if isinstance(replaced, str) else json.dumps(manifest)}
    )
    return bad


def drop(key):
    return lambda tensors, manifest: tensors.pop(key)


def put(key, value):
    return lambda tensors, manifest: tensors.__setitem__(key, value)


def config(**changes):
    return lambda tensors, manifest: manifest["config"].update(changes)


def field(**changes):
    return lambda tensors, manifest: manifest.update(changes)


def nan(tensors, manifest):
    tensors["fc.convlora_B"][0, 0] = float("nan")


READ_ERRORS = {
    "an unknown schema": (field(schema=3), "schema version 3; this vislr knows 1 and 2"),
    "no schema": (lambda t, m: m.pop("schema"), "schema version None"),
    "a manifest that is no JSON": (lambda t, m: "{", "is no JSON"),
    "a manifest that is a list": (lambda t, m: "[]", "is a list"),
    "a field of the wrong type": (field(sites=[1]), "'sites' of its vislr.manifest"),
    "an unknown format": (field(format="kohya"), "of format 'kohya'"),
    "an unknown kind": (field(kind="convlorra"), "'convlorra' adapter.*did you mean 'convlora'"),
    "a config of another kind": (config(peft_type="FLORA"), "its config is of 'FLORA'"),
    "an unknown config key": (config(rnak=3), "unknown config key 'rnak'"),
    "an impossible config": (config(r=0), "its config is impossible: rank r is 0"),
    "not a number": (nan, "'fc.convlora_B' has NaN"),
    "integers": (put("fc.convlora_A", torch.zeros(2, 8, dtype=torch.int32)), "'fc.convlora_A' is torch.int32"),
    "an unknown suffix": (put("fc.convlora_C", torch.zeros(1)), "tensor 'fc.convlora_C' belongs to no layer"),
    "an unknown layer": (put("fd.convlora_A", torch.zeros(1)), "tensor 'fd.convlora_A' belongs to no layer"),
    "a layer without tensors": (
        lambda t, m: [t.pop(f"fc.{k}") for k in ("convlora_A", "convlora_B", "alpha")], "lacks the tensors of 'fc'"),
}  # fmt: skip


@pytest.mark.parametrize("case", READ_ERRORS)
def test_reading_errors(case, file):
    change, message = READ_ERRORS[case]
    with pytest.raises(FormatError, match=message):
        read_adapter(rewrite(file, change))


FILL_ERRORS = {
    "a missing tensor": (drop("fc.convlora_B"), "lacks 'fc.convlora_B' of shape"),
    "a missing alpha": (drop("conv.alpha"), "lacks 'conv.alpha'"),
    "a wrong shape": (put("fc.convlora_B", torch.zeros(6, 3)), r"'fc.convlora_B' has shape \(6, 3\).*expect \(6, 2\)"),
    "a config of another rank": (config(r=3), "'conv.convlora_A' has shape"),
    "a rank beyond the layer": (config(r=30), "rank 30"),
}


@pytest.mark.parametrize("case", FILL_ERRORS)
def test_filling_errors_leave_the_model_untouched(case, file):
    change, message = FILL_ERRORS[case]
    model = build()
    output = run(model)
    with pytest.raises(AdapterError, match=message):
        attach_file(model, "a", read_adapter(rewrite(file, change)))
    assert untouched(model)
    assert torch.equal(run(model), output)


def test_fill_is_all_or_nothing(file):
    broken = read_adapter(rewrite(file, put("fc.convlora_B", torch.zeros(6, 3))))
    model = build()
    attach(model, ConvLoraConfig(r=2, target_modules=ALL), "a")
    randomise(model, "a")
    before = {name: p.clone() for name, p in adapter_parameters(model, "a").items()}
    with pytest.raises(FormatError, match="has shape"):
        fill(model, "a", broken)
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model, "a").items())
    partial = build()
    attach(partial, ConvLoraConfig(r=2, target_modules=["fc"]), "a")
    with pytest.raises(AdapterError, match="no layer 'conv'"):
        fill(partial, "a", read_adapter(file))


def test_a_peft_alpha_that_disagrees(tmp_path):
    path = write_adapter(trained(CONFIGS["lora"]), "a", tmp_path / "good.safetensors")
    model = build()
    with pytest.raises(FormatError, match=r"'fc.alpha' is 9, its config says 3"):
        attach_file(model, "a", read_adapter(rewrite(path, put("fc.alpha", torch.tensor(9.0)))))
    assert untouched(model)


def test_a_config_cannot_choose_other_layers_or_an_init(tmp_path):
    path = write_adapter(trained(CONFIGS["lora"]), "a", tmp_path / "good.safetensors")
    bad = rewrite(path, config(target_modules=".*", init_lora_weights="pissa"))
    model = build()
    with pytest.raises(AdapterError, match="changes the base weights"):
        attach_file(model, "a", read_adapter(bad))
    assert untouched(model)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_files(size, file):
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(FormatError, match=r"is no safetensors file|cut short"):
        read_adapter(file)


def test_what_is_no_adapter_file(tmp_path):
    with pytest.raises(FormatError, match="there is no file"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="is not a regular file"):
        read_adapter(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="no safetensors"):
        read_adapter(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(FormatError, match="no safetensors"):
        read_adapter(tmp_path / "b.safetensors")
    save_file({}, tmp_path / "c.safetensors")
    with pytest.raises(FormatError, match="holds no tensors"):
        read_adapter(tmp_path / "c.safetensors")
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(FormatError, match=r"no vislr.manifest and no lora_A/lora_B keys \(first key 'fc.weight'\)"):
        read_adapter(tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("unet.fc.lora_B.weight"), "lacks 'unet.fc.lora_B.weight'"),
        (lambda t: t.update({"unet.fc.lora_B.weight": torch.zeros(6, 5)}), "ranks of 'fc' disagree"),
        (lambda t: t.update({"unet.fc.alpha": torch.zeros(6)}), r"alpha of 'fc' has shape \(6,\)"),
        (lambda t: t.update({"unet.fc.weight": torch.zeros(6)}), "tensor 'unet.fc.weight' is not"),
        (lambda t: t.update({"fc.lora_A.weight": torch.zeros(2, 8)}), "tensor 'fc.lora_A.weight' is not"),
        (lambda t: t.update({"text_encoder.fc.lora_A.weight": torch.zeros(2, 8),
                             "text_encoder.fc.lora_B.weight": torch.zeros(6, 2)}), "adapters of text_encoder, unet"),
    ],
)  # fmt: skip
def test_broken_diffusers_files(change, message, tmp_path):
    model = trained(CONFIGS["lora"])
    path = write_adapter(model, "a", tmp_path / "a.safetensors", format="diffusers", component="unet")
    tensors, _ = parts(path)
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match=message):
        read_adapter(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "{", "is no JSON object"),
        (lambda m: "[]", "is no JSON object"),
        (lambda m: json.dumps({key.replace("unet.", "vae."): value for key, value in m.items()}), "nothing of 'unet'"),
        (lambda m: json.dumps(m | {"unet.alpha_pattern": {"(": 2}}), "alpha_pattern of its config is impossible"),
        (lambda m: json.dumps(m | {"unet.lora_alpha": "x"}), "lora_alpha"),
        (lambda m: json.dumps(m | {"unet.rnak": 2}), "unknown config key 'rnak'"),
    ],
)
def test_broken_diffusers_metadata(change, message, tmp_path):
    path = write_adapter(
        trained(CONFIGS["lora"]), "a", tmp_path / "a.safetensors", format="diffusers", component="unet"
    )
    tensors, header = parts(path)
    header["lora_adapter_metadata"] = change(json.loads(header["lora_adapter_metadata"]))
    save_file(tensors, tmp_path / "bad.safetensors", metadata=header)
    with pytest.raises(FormatError, match=message):
        read_adapter(tmp_path / "bad.safetensors")
