"""How the tools spell the last part of a key, and what it is in canonical form.

==========================================  ==========================  ============================
spelling                                    canonical                   writers
==========================================  ==========================  ============================
`.lora_down.weight`, `.lora_up.weight`      the same                    kohya, LyCORIS, ComfyUI
`.lora_A.weight`, `.lora_B.weight`          `lora_down/up.weight`       peft, diffusers
`.lora_A.default.weight`, `.lora_A`         `lora_down.weight`          peft inside a model; Mochi
`.lora.down.weight`                         `lora_down.weight`          diffusers until 0.21
`.lora_linear_layer.down.weight`            `lora_down.weight`          the same, text encoders
`.processor.to_q_lora.down.weight`          `lora_down.weight` of       the same, attention
                                            `.to_q`
`.lora_magnitude_vector[.weight]`           `dora_scale` (Co, 1...)     peft; OneTrainer
`.magnitude`                                `dora_scale` (Co, 1...)     ai-toolkit
`.lora_mid.weight`, `.hada_*`, `.lokr_*`,   the same                    LyCORIS
`.diff`, `.diff_b`, `.w_norm`, `.b_norm`
==========================================  ==========================  ============================
"""

from __future__ import annotations

from vislr.formats.canonical import KINDS

MAGNITUDES = (".lora_magnitude_vector.default.weight", ".lora_magnitude_vector.weight", ".lora_magnitude_vector",
              ".magnitude")  # fmt: skip
_PAIR = {
    ".lora_A.default.weight": "lora_down.weight",
    ".lora_B.default.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_A": "lora_down.weight",
    ".lora_B": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    "_lora.down.weight": "lora_down.weight",
    "_lora.up.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
}
_OWN = {f".{suffix}": suffix for suffixes in KINDS.values() for suffix in suffixes}
_ENDINGS: dict[str, str] = {**_PAIR, **dict.fromkeys(MAGNITUDES, "dora_scale"), **_OWN}
# What LyCORIS, sd-scripts and ComfyUI also write, and what it is.
UNSUPPORTED = {
    ".oft_diag": "OFT", ".rescale": "OFT", ".oft_R.weight": "OFT", ".boft_R": "BOFT", ".on_input": "(IA)3",
    ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA", ".b2.weight": "GLoRA", ".bm.weight": "GLoRA",
    ".q_layer.weight": "T-LoRA", ".p_layer.weight": "T-LoRA", ".lambda_layer": "T-LoRA",
    ".set_weight": "a replaced weight", ".reshape_weight": "a weight of another shape",
}  # fmt: skip

# Names of attention parts in diffusers' old files.
_OLD_PARTS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def cut(key: str) -> tuple[str, str, bool] | None:
    """A key as (module, canonical suffix, whether it is a magnitude in peft's shape); None: no adapter's key."""
    place = len(key)
    found = None
    # Endings have at most four dots; the longest that is known counts.
    for _ in range(4):
        place = key.rfind(".", 0, place)
        if place < 0:
            break
        if key[place:] in _ENDINGS:
            found = key[:place], _ENDINGS[key[place:]], key[place:] in MAGNITUDES
        elif key[place - 5 : place] == "_lora" and key[place - 5 :] in _ENDINGS:
            found = _old(key[: place - 5]), _ENDINGS[key[place - 5 :]], False
    return found


def _old(module: str) -> str:
    stem, _, part = module.rpartition(".")
    if stem.endswith(".processor"):
        return f"{stem.removesuffix('.processor')}.{_OLD_PARTS.get(part, part)}"
    return f"{stem}.{_OLD_TEXT.get(part, part)}"


def unsupported(key: str) -> str:
    """What a key belongs to that vislr does not read, or ""."""
    return next((what for ending, what in UNSUPPORTED.items() if key.endswith(ending)), "")
