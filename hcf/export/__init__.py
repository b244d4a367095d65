"""Torch modules to ONNX graphs, and back to what is in them."""
