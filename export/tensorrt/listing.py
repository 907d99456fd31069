"""A parsed network as a table, and the counts that tell whether TensorRT understood the graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

_PASSED_THROUGH = ("SHUFFLE", "CAST", "IDENTITY")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: kind is trt.LayerType's name; inputs and outputs are (name, dtype, shape), -1 for dynamic dimensions."""

    name: str
    kind: str
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """The layers of a network, in order, and its outputs: (name, dtype, shape), as of a layer."""

    layers: tuple[Layer, ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    def counts(self) -> Counter[str]:
        """Layers of each kind."""
        return Counter(layer.kind for layer in self.layers)

    def products(self) -> dict[str, tuple[str, str]]:
        """Every matrix product with the types in which its operands are stored, such as ("INT8", "INT8")."""
        makers = {name: layer for layer in self.layers for name, _, _ in layer.outputs}
        return {
            layer.name: (_stored_type(layer, 0, makers), _stored_type(layer, 1, makers))
            for layer in self.layers
            if layer.kind == "MATRIX_MULTIPLY"
        }

    def to_json(self) -> dict[str, Any]:
        """For layers.json."""
        layers = [{"name": x.name, "kind": x.kind, "inputs": x.inputs, "outputs": x.outputs} for x in self.layers]
        return {"counts": dict(self.counts()), "products": self.products(), "layers": layers, "outputs": self.outputs}


def list_network(network: Any) -> Listing:
    """Read a parsed trt.INetworkDefinition."""
    layers = []
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        inputs = tuple(_describe(layer.get_input(i)) for i in range(layer.num_inputs) if layer.get_input(i) is not None)
        outputs = tuple(_describe(layer.get_output(i)) for i in range(layer.num_outputs))
        layers.append(Layer(layer.name, layer.type.name, inputs, outputs))
    return Listing(tuple(layers), tuple(_describe(network.get_output(i)) for i in range(network.num_outputs)))


def _describe(tensor: Any) -> tuple[str, str, tuple[int, ...]]:
    try:
        shape = tuple(tensor.shape)
    except ValueError:  # TensorRT says so of a shape that is not known before a build
        shape = ()
    return tensor.name, tensor.dtype.name, shape


def _stored_type(layer: Layer, operand: int, makers: dict[str, Layer]) -> str:
    """The type behind a product's operand: that of the codes where it is dequantised, else its own."""
    name, dtype, _ = layer.inputs[operand]
    maker = makers.get(name)
    while maker is not None and maker.kind in _PASSED_THROUGH:
        maker = makers.get(maker.inputs[0][0])
    return maker.inputs[0][1] if maker is not None and maker.kind == "DEQUANTIZE" else dtype
