"""What executes an engine's graph: `ort` is ONNX Runtime, `tensorrt` TensorRT; `open` chooses by the manifest."""
