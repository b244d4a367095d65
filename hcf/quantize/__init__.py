"""Post-training quantisation: calibration set, ranges, error report, ONNX Runtime's own form."""
