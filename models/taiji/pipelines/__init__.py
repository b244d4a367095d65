"""Pipelines of the family: ordinary `DiffusionPipeline` subclasses."""

from taiji.pipelines.stable_diffusion import TaijiStableDiffusionPipeline

__all__ = ["TaijiStableDiffusionPipeline"]
