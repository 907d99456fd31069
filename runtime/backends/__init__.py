"""What executes an engine's graph; `ort` is ONNX Runtime."""
