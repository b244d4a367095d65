"""The sections of a recipe: strict typed models, one a stage, no unknown keys.

`seed`, `threads` and `prompts` of a recipe's top level hold for every section that has the field
and does not set it.
"""

from hcf.settings.base import Config, Threshold
from hcf.settings.distill import (
    METHOD_NAMES,
    ConsistencyConfig,
    DecoderConfig,
    DistillConfig,
    DistributionMatchingConfig,
    GuidanceEmbedding,
    PerceptualConfig,
    ProbeConfig,
    ProgressiveConfig,
    StructureConfig,
    StudentConfig,
    TrajectoryConfig,
)
from hcf.settings.export import (
    BuildConfig,
    EngineName,
    ExportConfig,
    GraphPass,
    GraphPrecision,
    Precision,
    ShapeProfile,
)
from hcf.settings.judge import BenchConfig, CheckConfig, ReportConfig
from hcf.settings.quantize import (
    CalibratedConfig,
    ExcludeRule,
    FeatureCacheConfig,
    Format,
    LayerFormat,
    LayerRule,
    Offload,
    QatConfig,
    QuantizeConfig,
    SensitivityConfig,
)

__all__ = [
    "METHOD_NAMES",
    "BenchConfig",
    "BuildConfig",
    "CalibratedConfig",
    "CheckConfig",
    "Config",
    "ConsistencyConfig",
    "DecoderConfig",
    "DistillConfig",
    "DistributionMatchingConfig",
    "EngineName",
    "ExcludeRule",
    "ExportConfig",
    "FeatureCacheConfig",
    "Format",
    "GraphPass",
    "GraphPrecision",
    "GuidanceEmbedding",
    "LayerFormat",
    "LayerRule",
    "Offload",
    "PerceptualConfig",
    "Precision",
    "ProbeConfig",
    "ProgressiveConfig",
    "QatConfig",
    "QuantizeConfig",
    "ReportConfig",
    "SensitivityConfig",
    "ShapeProfile",
    "StructureConfig",
    "StudentConfig",
    "Threshold",
    "TrajectoryConfig",
]
