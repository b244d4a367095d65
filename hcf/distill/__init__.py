"""Step and guidance distillation: a teacher pipeline in, a few-step student pipeline out."""
