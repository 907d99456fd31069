"""MatMul with a transposed weight -> MatMulNBits (int8, int4) or FusedMatMul (floats, which reads W as stored).

Pre: canonical MatMul nodes. Post: no Transpose of a weight is left; routers stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx_ir as ir
import torch

from gatework.export.groups import PADDED_GROUP, DenseFormat, fit_group
from gatework.export.lower.graph import MS, Builder, linear_weight, replace
from gatework.export.packing import Pack, TensorSpec, add_packed, pack_of, static_shape
from gatework.export.quantize import quantize_rows

_HEAD, _EMBEDDING = "lm_head.weight", "embed.weight"


def to_fused_matmul(model: ir.Model) -> tuple[ir.Model, bool]:
    """Let every remaining product with a weight read it as it is stored, (out, in)."""
    return _rewrite(model, lambda build, x, weight: build.op("FusedMatMul", x, weight, domain=MS, transB=1)[0])


def to_matmul_nbits(model: ir.Model, dense: DenseFormat) -> tuple[ir.Model, bool]:
    """Quantise every product with a weight but the routers'.

    Scales have the activations' type, as the kernels demand.
    """

    def product(build: Builder, x: ir.Value | None, weight: ir.Value) -> ir.Value | None:
        pack = pack_of(weight)
        (spec,) = pack.outputs
        if ".router." in spec.name:
            return None
        N, K = static_shape(weight)
        name = _HEAD if spec.name == _EMBEDDING else spec.name  # tied
        width, widest = dense.of(name)
        size = fit_group(K, widest) or min(widest, PADDED_GROUP)  # the last block of an odd row is padded
        blocks = -(-K // size)
        outputs = (
            TensorSpec(f"{name}.codes", torch.uint8, (N, blocks, size * width // 8)),
            TensorSpec(f"{name}.scales", spec.dtype, (N, blocks)),
        )
        encode = partial(quantize_rows, bits=width, group=size, scale_dtype=spec.dtype)
        quantised = add_packed(model.graph, Pack(pack.sources, outputs, encode))
        settings = {"bits": width, "block_size": size, "N": N, "K": K}
        return build.op("MatMulNBits", x, *quantised, domain=MS, **settings)[0]

    return _rewrite(model, product)


def _rewrite(
    model: ir.Model, product: Callable[[Builder, ir.Value | None, ir.Value], ir.Value | None]
) -> tuple[ir.Model, bool]:
    """Replace every x W^T by `product(build, x, W)`, unless that is None."""
    modified = False
    for node in list(model.graph):
        weight = linear_weight(node)
        if weight is None:
            continue
        y = product(Builder(model.graph, node), node.inputs[0], weight)
        if y is not None:
            replace(node.outputs[0], y)
            modified = True
    return model, modified
