"""Pipelines of the family: ordinary `DiffusionPipeline` subclasses."""

from taiji.pipelines.imagen import TaijiImagenPipeline
from taiji.pipelines.stable_diffusion import TaijiStableDiffusionPipeline
from taiji.pipelines.super_resolution import TaijiSuperResolutionPipeline

__all__ = ["TaijiImagenPipeline", "TaijiStableDiffusionPipeline", "TaijiSuperResolutionPipeline"]
