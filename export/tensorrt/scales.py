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


def has_static_scales(options: BuildOptions) -> bool:
    """Whether plans of these options round activations with static scales, if there are products to do it for."""
    return options.precision in LARGEST and not options.weight_only


def static_products(config: ModelConfig, options: BuildOptions) -> list[str]:
    """The dense products whose inputs are rounded with static scales; under fp8 a model may have none."""
    experts, all_of_them = config.moe is not None, options.precision != "fp8"
    names = dense_products(config) if has_static_scales(options) else ()
    return [name for name in names if all_of_them or not fine(name, experts=experts)]


def load_scales(checkpoint: Checkpoint, options: BuildOptions) -> StaticScales:
    """Read the calibration that the options name.

    Raises GateworkError when products with static scales have none, unless only a plan is wanted, and when a precision without
    them is given one.
    """
    if options.calibration is not None and not has_static_scales(options):
        what = f"{options.precision}{' with --weight-only' if options.weight_only else ''} has no static scales"
        fix = "leave --calibration out"
        raise GateworkError(what, got="--calibration", expected=" or ".join(LARGEST), fix=fix)
    if options.calibration is not None:
        return StaticScales(checkpoint, Calibration.load(options.calibration, checkpoint))
    if static_products(checkpoint.config, options) and not options.plan_only:
        fix = f"gatework calibrate {checkpoint.path} --text FILE --out calibration.json, then --calibration calibration.json"
        raise GateworkError(f"{options.precision} on {options.target} needs the ranges of activations", fix=fix)
    return StaticScales(checkpoint, None)
