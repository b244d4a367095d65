"""Taiji: Chinese text-to-image models on diffusers (definitions, data and training)."""
