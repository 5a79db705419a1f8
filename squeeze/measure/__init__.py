"""Measuring models in onnxruntime: latency, fidelity, accuracy."""
