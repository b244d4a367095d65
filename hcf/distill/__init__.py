"""Distillation: a teacher pipeline in, a few-step or smaller student pipeline out."""
