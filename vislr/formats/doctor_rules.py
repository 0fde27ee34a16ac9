"""What each tool does with an adapter file, as data: a rule fires where a file has all its traits.

Sources: diffusers 0.42.1 with transformers 5.23 and peft 0.21.2 was run on files made for each rule (the tests do
so again); ComfyUI's, A1111's and sd-scripts' readers were read and their formulas run apart from the applications.
A tool of which no rule fires loads the whole file as it was meant.
"""

from __future__ import annotations

from dataclasses import dataclass

TOOLS = {
    "diffusers": "diffusers",
    "comfyui": "ComfyUI",
    "a1111": "A1111, Forge",
    "sd-scripts": "sd-scripts",
    "vislr": "vislr",
}
# From harmless to hopeless; the last one that fires names the tool's verdict.
VERDICTS = ("loads", "hides", "loads if", "mis-scales", "drops", "refuses", "unknown", "breaks")

TRAITS = {
    "kohya": "tensors with `_`-joined names",
    "diffusers": "tensors named by component and path",
    "bare": "tensors named by path alone",
    "comfy": "tensors with the original code's names, joined with dots",
    "peft": "tensors behind base_model.model.",
    "vislr": "tensors of vislr's own format",
    "unet": "layers of a UNet",
    "sd3": "layers of SD3's transformer",
    "flux": "layers of FLUX's transformer",
    "pixart": "layers of PixArt's transformer",
    "other family": "layers of a model that image tools with LoRA menus do not run (DiT, timm, unknown)",
    "tucker": "LoCon layers with a Tucker core",
    "tucker not square": "Tucker cores that are not square",
    "loha": "LoHa layers",
    "lokr": "LoKr layers",
    "oft": "OFT layers",
    "diff": "whole matrices",
    "bias": "changes of biases",
    "norm": "changes of norms",
    "dora by output": "DoRA layers with a magnitude per output",
    "dora by input": "DoRA layers with a magnitude per input",
    "ours": "layers of kinds that vislr alone has (ConvLoRA, FLoRA, SaRA, QALoRA)",
    "adabn": "BatchNorm statistics",
    "alpha tensors": "alpha tensors",
    "header": "lora_adapter_metadata in the header",
    "scale in header": "layers whose scale, not 1, is in the header alone",
    "alpha 0": "layers whose alpha is 0",
    "text q/k/v without out": "text-encoder attention layers (q, k, v) without out_proj",
    "text mlp": "text-encoder layers fc1, fc2",
    "add_embedding": "SDXL's added embeddings under diffusers' names",
    "A/B": "original names with lora_A, lora_B",
    "model prefix": "names behind model.diffusion_model.",
    "fused, alpha kept": "fused layers whose rank grew and whose alpha did not",
    "wrong base version": "an ss_base_model_version of another family",
    "unsupported": "tensors of kinds that vislr does not read",
    "unplaced": "tensors without a place",
    "not finite": "tensors with NaN or infinite values",
    "beyond half": "tensors with values beyond float16",
}


@dataclass(frozen=True)
class Rule:
    """One thing that one tool does.

    Attributes:
        tool: a key of `TOOLS`.
        needs: traits that the file must have; the first one's count goes into `says` as {n}.
        verdict: one of `VERDICTS`.
        says: what happens, in a line.
        fix: the command that makes a file without this trouble; "" if there is none. {file}, {out} and {base} are
            filled in.
        unless: traits with which another rule speaks.
    """

    tool: str
    needs: tuple[str, ...]
    verdict: str
    says: str
    fix: str = ""
    unless: tuple[str, ...] = ()


_CONVERT = "vislr convert {file} {out} --format "
_DIFFUSERS, _KOHYA, _COMFY = _CONVERT + "diffusers", _CONVERT + "kohya", _CONVERT + "comfy"
_BAKE = " --dora bake --base {base} --rank 32"
_DROP = " --drop true"
_FOREIGN = ("comfyui", "a1111", "sd-scripts")


def _every(tools: tuple[str, ...], *rest: object, **options: object) -> tuple[Rule, ...]:
    return tuple(Rule(tool, *rest, **options) for tool in tools)  # type: ignore[arg-type]


RULES: tuple[Rule, ...] = (
    # Whoever reads it.
    *_every(tuple(TOOLS)[:4], ("not finite",), "breaks", "{n} tensors have NaN or infinite values: black pictures"),
    *_every(_FOREIGN, ("beyond half",), "breaks", "{n} tensors become infinite in half precision: black pictures"),
    *_every(tuple(TOOLS), ("fused, alpha kept",), "mis-scales",
            "{n} fused layers kept the alpha of the layers they were made of: a third or a quarter of their strength"),
    *_every(("diffusers", *_FOREIGN), ("ours",), "refuses", "{n} layers are of kinds that vislr alone has",
            _KOHYA),
    *_every(("diffusers", *_FOREIGN), ("adabn",), "drops", "{n} layers of BatchNorm statistics: only vislr has them"),
    *_every(_FOREIGN, ("vislr",), "refuses", "vislr's names say nothing to it", _KOHYA, unless=("ours", "adabn")),
    Rule("diffusers", ("vislr",), "refuses", "vislr's names say nothing to it", _DIFFUSERS, unless=("ours", "adabn")),
    *_every(_FOREIGN, ("other family",), "unknown", "it is not known to run this family's adapters",
            unless=("vislr", "ours", "adabn")),
    # diffusers
    Rule("diffusers", ("kohya", "sd3"), "drops", "no layer is loaded: it cannot read SD3's kohya names", _DIFFUSERS),
    Rule("diffusers", ("tucker", "unet"), "refuses", "{n} layers have a Tucker core", _DIFFUSERS, ("vislr",)),
    Rule("diffusers", ("loha", "unet"), "refuses", "{n} layers are LoHa", _DIFFUSERS, ("vislr",)),
    Rule("diffusers", ("lokr", "unet"), "refuses", "{n} layers are LoKr", _DIFFUSERS, ("vislr",)),
    Rule("diffusers", ("loha", "flux"), "drops", "{n} LoHa layers", _DIFFUSERS, ("vislr",)),
    Rule("diffusers", ("lokr", "flux"), "drops", "{n} LoKr layers", _DIFFUSERS, ("vislr",)),
    Rule("diffusers", ("oft",), "refuses", "{n} layers are OFT; vislr.load_adapter(pipe, file) puts them on",
         unless=("vislr",)),
    Rule("diffusers", ("diff", "unet"), "refuses", "{n} layers are whole matrices", _DIFFUSERS + " --rank 64",
         ("vislr",)),
    Rule("diffusers", ("bias", "unet"), "refuses", "{n} layers change a bias; vislr.load_adapter(pipe, file) does it",
         _DIFFUSERS + _DROP, ("vislr",)),
    Rule("diffusers", ("bias", "flux"), "drops", "{n} changes of biases; vislr.load_adapter(pipe, file) keeps them",
         unless=("vislr",)),
    Rule("diffusers", ("norm", "unet"), "refuses", "{n} layers change a norm; vislr.load_adapter(pipe, file) does it",
         _DIFFUSERS + _DROP, ("vislr",)),
    Rule("diffusers", ("dora by output",), "drops", "the magnitudes of {n} DoRA layers, with a warning",
         _DIFFUSERS, ("vislr", "diffusers", "peft")),
    Rule("diffusers", ("dora by input",), "drops", "the magnitudes of {n} DoRA layers: it has none per input",
         _DIFFUSERS + _BAKE, ("vislr",)),
    Rule("diffusers", ("text q/k/v without out", "kohya"), "refuses",
         "{n} text-encoder layers q, k, v stand without out_proj: the whole file fails", _DIFFUSERS, ("text mlp",)),
    Rule("diffusers", ("text q/k/v without out", "text mlp", "kohya"), "drops",
         "{n} text-encoder layers q, k, v that stand without out_proj", _DIFFUSERS),
    Rule("diffusers", ("add_embedding", "kohya"), "refuses", "{n} layers of add_embedding are taken for another name",
         _KOHYA),
    Rule("diffusers", ("comfy", "unet"), "drops", "no layer is loaded: it does not know these names", _DIFFUSERS),
    Rule("diffusers", ("comfy", "sd3"), "drops", "no layer is loaded: it does not know these names", _DIFFUSERS),
    Rule("diffusers", ("comfy", "A/B", "flux"), "drops", "no layer is loaded: behind these names it wants lora_down",
         _DIFFUSERS),
    Rule("diffusers", ("comfy", "model prefix", "flux"), "refuses", "names start with model.diffusion_model.",
         _DIFFUSERS, ("A/B",)),
    Rule("diffusers", ("bare",), "drops", "no layer is loaded: names lack the component (unet., transformer.)",
         _DIFFUSERS),
    Rule("diffusers", ("peft", "unet"), "drops", "no layer is loaded; peft reads it with its adapter_config.json",
         _DIFFUSERS),
    Rule("diffusers", ("peft", "sd3"), "drops", "no layer is loaded; peft reads it with its adapter_config.json",
         _DIFFUSERS),
    Rule("diffusers", ("peft", "flux"), "refuses", "peft's names; peft reads it with its adapter_config.json",
         _DIFFUSERS),
    Rule("diffusers", ("diffusers", "alpha tensors", "unet"), "refuses", "{n} alpha tensors beside diffusers' names",
         _DIFFUSERS),
    Rule("diffusers", ("diffusers", "alpha tensors", "sd3"), "refuses", "{n} alpha tensors beside diffusers' names",
         _DIFFUSERS),
    Rule("diffusers", ("diffusers", "alpha tensors", "header", "flux"), "refuses",
         "alphas stand both in tensors and in the header", _DIFFUSERS),
    # ComfyUI
    Rule("comfyui", ("tucker not square",), "refuses", "{n} Tucker cores are not square", _COMFY, ("vislr",)),
    Rule("comfyui", ("dora by output",), "mis-scales",
         "{n} DoRA layers: divides by the norm of the base, not of the changed weight", _COMFY + _BAKE, ("vislr",)),
    Rule("comfyui", ("dora by input",), "loads if", "the base is not quantised: there DoRA magnitudes are ignored",
         _COMFY + _BAKE, ("vislr",)),
    Rule("comfyui", ("scale in header",), "mis-scales", "reads no header: {n} layers at scale 1", _KOHYA, ("vislr",)),
    Rule("comfyui", ("peft", "unet"), "drops", "names behind base_model.model. are read of transformers only", _KOHYA),
    Rule("comfyui", ("bare", "unet"), "drops", "names lack their prefix", _KOHYA),
    # A1111 and Forge
    Rule("a1111", ("dora by output",), "mis-scales", "{n} DoRA layers: takes norms along the other axis",
         _KOHYA + _BAKE, ("vislr",)),
    Rule("a1111", ("scale in header",), "mis-scales", "reads no header: {n} layers at scale 1", _KOHYA, ("vislr",)),
    Rule("a1111", ("diffusers", "unet"), "drops", "reads a part of diffusers' names", _KOHYA),
    Rule("a1111", ("peft",), "refuses", "does not know peft's names", _KOHYA),
    Rule("a1111", ("bare",), "refuses", "names lack their prefix", _KOHYA),
    Rule("a1111", ("sd3",), "unknown", "nobody says that it reads SD3's adapters", unless=("vislr", "peft", "bare")),
    Rule("a1111", ("flux",), "loads if", "it is Forge: A1111 does not run FLUX", unless=("vislr", "peft", "bare")),
    Rule("a1111", ("pixart",), "unknown", "it is not known to run PixArt", unless=("vislr", "peft", "bare")),
    Rule("sd-scripts", ("pixart", "kohya"), "unknown", "it is not known to run PixArt"),
    Rule("a1111", ("wrong base version",), "hides", "the header says another family: not in the list of this model's",
         _KOHYA),
    # sd-scripts
    Rule("sd-scripts", ("diffusers",), "refuses", "does not know diffusers' names", _KOHYA),
    Rule("sd-scripts", ("comfy",), "refuses", "does not know names joined with dots", _KOHYA),
    Rule("sd-scripts", ("peft",), "refuses", "does not know peft's names", _KOHYA),
    Rule("sd-scripts", ("bare",), "refuses", "names lack their prefix", _KOHYA),
    *(
        Rule("sd-scripts", (kind, "kohya"), "loads if", f"{{n}} layers ({what}) need --network_module lycoris.kohya")
        for kind, what in (
            ("tucker", "Tucker"), ("loha", "LoHa"), ("lokr", "LoKr"), ("oft", "OFT"), ("diff", "whole matrices"),
            ("bias", "biases"), ("norm", "norms"), ("dora by output", "DoRA"), ("dora by input", "DoRA"),
        )
    ),
    Rule("sd-scripts", ("alpha 0", "kohya"), "mis-scales", "{n} layers with alpha 0 at scale 1; elsewhere: off"),
    # vislr
    Rule("vislr", ("not finite",), "refuses", "{n} tensors have NaN or infinite values"),
    Rule("vislr", ("unsupported",), "refuses", "{n} tensors are of kinds that it does not read"),
    Rule("vislr", ("unplaced",), "refuses", "{n} tensors have no place", unless=("unsupported",)),
)  # fmt: skip
