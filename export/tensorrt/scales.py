"""Static scales of a plan's dense products, from a calibration and the checkpoint's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gatework.export.calibration import Calibration, dense_products
from gatework.export.checkpoint import Checkpoint
from gatework.export.config import ModelConfig
from gatework.export.groups import fine
from gatework.export.lower.products import LARGEST
from gatework.export.options import BuildOptions
from gatework.export.smoothing import balance_columns
from gatework.plugins.errors import GateworkError


@dataclass(frozen=True, slots=True)
class StaticScales:
    """The `Scales` that `lower_to_tensorrt` asks for.

    calibration: None gives every activation the range 1: good for the size and shape of a plan, useless for its numbers.
    """

    checkpoint: Checkpoint
    calibration: Calibration | None

    @property
    def smooth(self) -> Mapping[str, Sequence[float]]:
        """Factors [D] by norm weight."""
        return self.calibration.smooth if self.calibration is not None else {}

    def activation(self, product: str, largest: float) -> float:
        """The calibrated scale of a product's input."""
        return self.calibration.scale(product, largest) if self.calibration is not None else 1 / largest

    def weight_absmax(self, weight: str, factors: Sequence[float] | None) -> float:
        """Largest magnitude of a weight, its columns multiplied by `factors`; reads it once, part by part."""
        parts = self.checkpoint.parts(weight)
        return max(float((part if factors is None else balance_columns(part, factors)).abs().max()) for part in parts)


def static_products(config: ModelConfig, precision: str) -> list[str]:
    """The dense products whose inputs are rounded with static scales; under fp8 a model may have none."""
    experts, all_of_them = config.moe is not None, precision != "fp8"
    names = dense_products(config) if precision in LARGEST else ()
    return [name for name in names if all_of_them or not fine(name, experts=experts)]


def load_scales(checkpoint: Checkpoint, options: BuildOptions) -> StaticScales:
    """Read the calibration that the options name.

    Raises GateworkError when products with static scales have none, unless only a plan is wanted, and when a precision without
    them is given one.
    """
    if options.calibration is not None and options.precision not in LARGEST:
        fix = "leave --calibration out"
        raise GateworkError(
            f"{options.precision} has no static scales", got="--calibration", expected=" or ".join(LARGEST), fix=fix
        )
    if options.calibration is not None:
        return StaticScales(checkpoint, Calibration.load(options.calibration, checkpoint))
    if static_products(checkpoint.config, options.precision) and not options.plan_only:
        fix = f"gatework calibrate {checkpoint.path} --text FILE --out calibration.json, then --calibration calibration.json"
        raise GateworkError(f"{options.precision} on {options.target} needs the ranges of activations", fix=fix)
    return StaticScales(checkpoint, None)
