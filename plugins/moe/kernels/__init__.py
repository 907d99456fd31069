"""The GPU kernels of `gatework::MoE`: Triton sources, which of them a call launches, and their compilation ahead of time.

Compiled for sm_80, sm_89, sm_90 and sm_120, checked under Triton's interpreter; those of sm_90 have run on an H100.
`launches` is plain Python and says what to launch; only `compile` and the kernels' own files need Triton.
"""
