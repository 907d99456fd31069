"""Engines for TensorRT: the toolchain that makes them. Functions here take its Python module as `trt`."""
