"""Components under LoRA: what their weights are, when they have changed, and what fits them."""

from hcf.lora.changes import touch, unwatch, watch, weights_hash, weights_token
from hcf.lora.check import check_lora, check_pipeline_lora
from hcf.lora.effective import EffectiveWeights, clean_module, effective_weights

__all__ = [
    "EffectiveWeights",
    "check_lora",
    "check_pipeline_lora",
    "clean_module",
    "effective_weights",
    "touch",
    "unwatch",
    "watch",
    "weights_hash",
    "weights_token",
]
