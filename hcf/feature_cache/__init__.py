"""DeepCache (Ma et al., arXiv 2312.00858): most steps run only the outer layers of a U-Net.

    install(pipe, FeatureCacheConfig(interval=3))     # torch: any scheduler, guidance, img2img
    remove(pipe)                                      # as it was
    FullStep(unet), ShallowStep(unet)                 # the two graphs, for an exporter
    CachedDenoiser(full_engine, shallow_engine, config)

Order: cache first, then compile or offload. The reverse is refused, for the outer layers would run
past what was put in front of the U-Net. What a cache does to images is for `hcf check` to say.
"""

from hcf.feature_cache.cut import CacheCost, FullStep, ShallowStep, require_cuttable, step_cost
from hcf.feature_cache.install import (
    CachedDenoiser,
    CacheReport,
    FeatureCache,
    attach,
    cache_of,
    detach,
    install,
    remove,
)
from hcf.feature_cache.schedule import full_steps
from hcf.settings import FeatureCacheConfig

__all__ = [
    "CacheCost",
    "CacheReport",
    "CachedDenoiser",
    "FeatureCache",
    "FeatureCacheConfig",
    "FullStep",
    "ShallowStep",
    "attach",
    "cache_of",
    "detach",
    "full_steps",
    "install",
    "remove",
    "require_cuttable",
    "step_cost",
]
