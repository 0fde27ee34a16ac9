"""Profiles and conflicts of adapters."""

import json
import math

import pytest
import torch
from adapted import NAMES
from peft import LoraConfig

import vislr
from vislr import compose
from vislr.adapters.inject import adapter_layers
from vislr.core.errors import AdapterError, ConfigError, FormatError


def curve(*values, adapter="a"):
    return compose.Profile(adapter, tuple(values))


def test_profiles_follow_the_latents_of_each_adapter_alone(sd):
    seen = []
    found = compose.profile_adapters(
        sd.pipe, NAMES, ["a cat face", "a dog face"], [0, 1], steps=4, guidance=3.0, progress=seen.append
    )
    assert seen == [name for name in NAMES for _ in range(4)]
    assert [(one.adapter, one.steps, one.runs) for one in found] == [(name, 4, 4) for name in NAMES]
    # Every run begins with the same noise; then the adapters part.
    assert len({one.curve[0] for one in found}) == 1
    assert len({one.curve[-1] for one in found}) == 3
    # By hand: the latents of one run, by the pipeline's own callback.
    latents = []

    def note(pipe, step, timestep, values):
        latents.append(values["latents"])
        return values

    single = compose.profile_adapters(sd.pipe, ["a"], ["a cat face"], [1], steps=4, guidance=3.0)[0]
    vislr.set_adapters(sd.pipe, ["a"])
    with torch.no_grad():
        sd.pipe(["a cat face"], num_inference_steps=4, guidance_scale=3.0, output_type="latent",
                generator=torch.Generator().manual_seed(1), callback_on_step_end=note)  # fmt: skip
    vislr.set_adapters(sd.pipe, [])
    by_hand = [float(compose.high_share(z.mean(1)).mean()) for z in latents[:3]]
    assert single.curve[1:] == pytest.approx(by_hand, rel=1e-4)
    assert "_diffusers_hook" not in vars(sd.model)


def test_profiles_of_flux_read_its_tokens(tiny):
    if tiny.family not in ("flux", "sd3"):
        pytest.skip("as sd")
    call = {"max_sequence_length": 8, "height": 32, "width": 32}
    (found,) = compose.profile_adapters(tiny.pipe, ["a"], ["a cat face"], steps=3, guidance=3.0, **call)
    assert found.steps == 3
    assert all(0 < value < 1 for value in found.curve)


def test_the_split_is_at_the_median():
    slow, fast = curve(0.5, 0.5, 0.49, 0.1), curve(0.5, 0.3, 0.2, 0.2, adapter="b")
    assert fast.changes == pytest.approx((0.2, 0.1, 0.0))
    assert fast.score == pytest.approx(0.2)
    middle = curve(0.5, 0.4, 0.3, 0.2, adapter="c")
    assert compose.split_profiles([slow, fast]) == (("b",), ("a",))
    assert compose.split_profiles([slow, fast, middle]) == (("b", "c"), ("a",))
    # Ties are high.
    assert compose.split_profiles([slow, curve(0.5, 0.5, 0.49, 0.1, adapter="b")]) == (("a", "b"), ())


def test_profiles_say_who_leads_in_cmlora(sd):
    profiles = [curve(0.5, 0.5, 0.5), curve(0.5, 0.3, 0.1, adapter="b"), curve(0.5, 0.4, 0.3, adapter="c")]
    plan = compose.cmlora_plan(sd.pipe, NAMES, profiles=profiles)
    assert (plan.dominance.high, plan.dominance.low) == (("b", "c"), ("a",))
    assert compose.cmlora_plan(sd.pipe, NAMES, low=["b"]).dominance.high == ("a", "c")
    assert compose.cmlora_plan(sd.pipe, NAMES).dominance.low == ()
    with pytest.raises(ConfigError, match="no profile of 'c'"):
        compose.cmlora_plan(sd.pipe, NAMES, profiles=profiles[:2])


def test_profiles_lie_beside_the_adapter(tmp_path):
    file = tmp_path / "my style.safetensors"
    assert compose.read_profile(file) is None
    profile = compose.Profile("style", (0.5, 0.25, 0.125), eta=0.3, runs=2)
    path = compose.write_profile(profile, file)
    assert path == tmp_path / "my style.profile.json"
    assert compose.read_profile(file) == profile
    path.write_text(json.dumps({"adapter": "style", "curve": [0.5]}))
    with pytest.raises(FormatError, match="at least 2"):
        compose.read_profile(file)
    path.write_text("{")
    with pytest.raises(FormatError):
        compose.read_profile(file)


def test_pictures_of_profiles_and_conflicts(sd):
    picture = compose.profile_picture([curve(0.5, 0.4, 0.3), curve(0.5, 0.3, 0.3, adapter="b")])
    assert picture.width > 400
    assert len(picture.convert("L").getcolors()) > 20
    drawn = compose.conflict_picture(compose.conflicts(sd.pipe, NAMES))
    assert len(drawn.getcolors(1 << 20)) > 20


def test_conflicts_of_known_changes(sd):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
    reports = [sd.put(name, config, 4) for name in ("p", "same", "against", "elsewhere")]
    try:
        for layer in adapter_layers(sd.model, "against").values():
            # Another part of the output: no entry is changed by both.
            up = layer.lora_B["p"].weight.data
            up[len(up) // 2 :] = 0
            layer.lora_B["same"].weight.data.copy_(2 * up)
            layer.lora_B["against"].weight.data.copy_(-up)
            layer.lora_B["elsewhere"].weight.data[: len(up) // 2] = 0
        found = compose.conflicts(sd.pipe, ["p", "same", "against", "elsewhere"])
        pairs = {(one.first, one.second): one for one in found.pairs}
        assert pairs["p", "same"].cosine == pytest.approx(1)
        assert pairs["p", "same"].norms[1] == pytest.approx(2 * pairs["p", "same"].norms[0])
        assert pairs["p", "against"].cosine == pytest.approx(-1)
        assert pairs["p", "against"].overlap == pytest.approx(1)
        assert (pairs["p", "elsewhere"].cosine, pairs["p", "elsewhere"].overlap) == (0, 0)
        layers = adapter_layers(sd.model, "p")
        assert pairs["p", "same"].shared_layers == len(layers)
        assert len(found.layers) == 6 * len(layers) == len(found.table())
        norm = math.sqrt(sum(float(layer.get_delta_weight("p").norm()) ** 2 for layer in layers.values()))
        assert pairs["p", "same"].norms[0] == pytest.approx(norm, rel=1e-4)
        assert any("cosine -1.000" in line for line in found.lines())
        assert len(compose.conflicts(sd.pipe, ["p", "same"], top=2).layers) == 2
    finally:
        sd.take(*reports)


def test_conflicts_need_two_adapters(sd):
    with pytest.raises(ConfigError, match="at least two"):
        compose.conflicts(sd.pipe, ["a"])
    with pytest.raises(AdapterError, match="'z'"):
        compose.conflicts(sd.pipe, ["a", "z"])
    with pytest.raises(ConfigError, match="at least one prompt"):
        compose.profile_adapters(sd.pipe, ["a"], [])
