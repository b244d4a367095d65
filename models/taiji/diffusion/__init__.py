"""Diffusion mathematics shared by the family: targets, weights, guidance."""
