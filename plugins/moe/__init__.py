"""The operator `gatework::MoE`: its definition, its ONNX form, its kernels and their bindings."""
