"""The GPU kernels of `gatework::MoE`: Triton sources, which of them a call launches, and their compilation ahead of time.

`launches` is plain Python and says what to launch; only `compile` and the kernels' own files need Triton.
"""
