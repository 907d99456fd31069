"""What the decoder of an encoder-decoder model reads of a prompt: keys and values that the encoder made of it, kept by slot."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from gatework.plugins.engine_format import CROSS, SOURCE_LENGTHS
from gatework.plugins.errors import GateworkError

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Source:
    """Keys and values [slots, Hkv, L, Dh] of every decoder layer, in the process's memory, with room for L = `positions`.

    Args:
        encoder: its session.
        inputs: the decoder's, by name.
        taps: values inside the encoder's graph, and the outputs of its session that give them.
    """

    def __init__(
        self,
        encoder: ort.InferenceSession,
        inputs: Mapping[str, ort.NodeArg],
        slots: int,
        positions: int,
        taps: Mapping[str, str],
    ) -> None:
        self._encoder, self._taps = encoder, taps
        self.tapped: dict[str, np.ndarray] = {}  # what `taps` were in the last run
        self._lengths = np.ones(slots, np.int64)
        cross = {name: value for name, value in inputs.items() if name.startswith(f"{CROSS}.")}
        if unknown := {value.type for value in cross.values()} - set(_TYPES):
            what = "an encoder does not run in this type here"
            raise GateworkError(what, got=", ".join(unknown), expected=" or ".join(_TYPES))
        self._values = {
            name: np.zeros((slots, value.shape[1], positions, value.shape[3]), _TYPES[value.type])
            for name, value in cross.items()
        }

    def encode(self, slot: int, tokens: list[int]) -> None:
        """Run the encoder over a prompt, for a slot."""
        feeds = {"input_ids": np.array([tokens], np.int64), SOURCE_LENGTHS: np.array([len(tokens)], np.int64)}
        found = self._encoder.run([*self._values, *self._taps.values()], feeds)
        for kept, value in zip(self._values.values(), found[: len(self._values)], strict=True):
            kept[slot, :, : len(tokens)] = value[0]
        self.tapped = dict(zip(self._taps, found[len(self._values) :], strict=True))
        self._lengths[slot] = len(tokens)

    def read(self, name: str, slot: int) -> np.ndarray:
        """A copy of a slot's keys or values, [Hkv, length, Dh] float32; name as in "0.k"."""
        return self._values[f"{CROSS}.{name}"][slot, :, : self._lengths[slot]].astype(np.float32)

    def move(self, source: int, target: int) -> None:
        """Copy what a slot has to another."""
        length = self._lengths[target] = self._lengths[source]
        for kept in self._values.values():
            kept[target, :, :length] = kept[source, :, :length]

    def bind(self, binding: ort.IOBinding, first_slot: int, batch: int) -> None:
        """Let a step read the slots from `first_slot` on."""
        for name, kept in (self._values | {SOURCE_LENGTHS: self._lengths}).items():
            rows = kept[first_slot : first_slot + batch]
            binding.bind_input(name, "cpu", 0, rows.dtype.type, rows.shape, rows.ctypes.data)
