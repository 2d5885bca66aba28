"""Ling 2.0: configuration, native model, loading, and the hooked bridge.

Importing this package registers the native classes with transformers' Auto classes, so
``AutoModelForCausalLM.from_pretrained`` loads original Ling 2.0 checkpoints without remote code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ling_probe.model.config import ARCHITECTURE, LingConfig
from ling_probe.model.conversion import register_conversions
from ling_probe.model.modeling import LingForCausalLM, LingModel

AutoConfig.register(LingConfig.model_type, LingConfig, exist_ok=True)
# Some derivatives write this model_type; AutoConfig.register insists on the class's own.
CONFIG_MAPPING.register("bailing_moe_v2", LingConfig, exist_ok=True)
AutoModel.register(LingConfig, LingModel, exist_ok=True)
AutoModelForCausalLM.register(LingConfig, LingForCausalLM, exist_ok=True)
register_conversions()

__all__ = ["ARCHITECTURE", "LingConfig", "LingForCausalLM", "LingModel"]
