"""First stages: images (B, 3, H, W) in [-1, 1] <-> latents (B, C, h, w)."""
