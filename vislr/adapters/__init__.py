"""Adapters: ConvLoRA, FLoRA, SaRA, AdaBN and QALoRA as peft methods, and one door on and off for any adapter.

Importing this registers them with peft, so `inject_adapter_in_model`, `get_peft_model`, `PeftModel` and
diffusers' `set_adapters`, `fuse_lora`, `unfuse_lora` and `delete_adapters` know them.
"""

from vislr.adapters import adabn, conv_lora, flora, qalora, sara
from vislr.adapters.adabn import AdaBnConfig, Adaptation, adapt_statistics
from vislr.adapters.conv_lora import ConvLoraConfig
from vislr.adapters.flora import FloraConfig
from vislr.adapters.inject import adapter_names, adapter_parameters, attach, detach, set_adapters
from vislr.adapters.qalora import QALoraConfig
from vislr.adapters.sara import SaraConfig
from vislr.adapters.tucker import TuckerReport, tucker_from_weight


def _register() -> None:
    from peft import mapping

    for module, config, tuner in (
        (conv_lora, ConvLoraConfig, conv_lora.ConvLoraModel),
        (flora, FloraConfig, flora.FloraModel),
        (sara, SaraConfig, sara.SaraModel),
        (adabn, AdaBnConfig, adabn.AdaBnModel),
        (qalora, QALoraConfig, qalora.QALoraModel),
    ):
        # peft's own `register_peft_method` refuses types outside of its enum; the mappings do not.
        kind: dict = {"config": config, "tuner": tuner, "prefix": tuner.prefix}
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[module.PEFT_TYPE] = kind["config"]
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[module.PEFT_TYPE] = kind["tuner"]
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[module.PEFT_TYPE] = kind["prefix"]


_register()

__all__ = [
    "AdaBnConfig",
    "Adaptation",
    "ConvLoraConfig",
    "FloraConfig",
    "QALoraConfig",
    "SaraConfig",
    "TuckerReport",
    "adapt_statistics",
    "adapter_names",
    "adapter_parameters",
    "attach",
    "detach",
    "set_adapters",
    "tucker_from_weight",
]
