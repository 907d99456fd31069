"""The MoE operator's kernels that a GPU engine carries: all that its calls can ask for, compiled on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from gatework.export.config import ModelConfig
from gatework.export.decoder import moe_attributes
from gatework.export.lower import WEIGHT_FORMATS
from gatework.export.lower.experts import with_format
from gatework.export.options import BuildOptions
from gatework.plugins.engine_format import KERNELS
from gatework.plugins.moe.kernels.compile import save
from gatework.plugins.moe.kernels.launches import Variant, variants
from gatework.plugins.moe.spec import MoEAttributes, MoESizes


class LargestCall(NamedTuple):
    """The call of most tokens that one of an engine's MoE nodes makes; all its nodes are alike."""

    sizes: MoESizes
    attributes: MoEAttributes
    dtype: Literal["float16", "bfloat16"]


def largest_call(config: ModelConfig, options: BuildOptions) -> LargestCall:
    """Of a model with experts."""
    assert config.moe is not None
    sizes = MoESizes(most_tokens(config, options), config.hidden_size, config.moe.num_experts, config.intermediate_size)
    weight_format = WEIGHT_FORMATS[options.precision]  # type: ignore[index]
    kept = options.weight_only
    attributes = with_format(moe_attributes(config), weight_format, options.group, keep_activations=kept)
    return LargestCall(sizes, attributes, "float16" if options.precision == "fp16" else "bfloat16")


def most_tokens(config: ModelConfig, options: BuildOptions) -> int:
    """Of a step of the engine; an encoder reads a whole prompt in one."""
    assert options.max_seq is not None
    return max(options.prefill_chunk, options.max_batch, options.max_seq if config.encoder_layers else 0)


def engine_kernels(config: ModelConfig, options: BuildOptions) -> tuple[Variant, ...]:
    """The kernels that an engine holds; none without experts, or without their weights."""
    if config.moe is None or options.plan_only:
        return ()
    return variants(_sm(options), *largest_call(config, options), has_bias=config.moe.bias)


def write_kernels(config: ModelConfig, options: BuildOptions, directory: Path) -> list[str]:
    """Compile the engine's kernels into `directory`/kernels; returns the files' names, from `directory` on."""
    if not (listed := engine_kernels(config, options)):
        return []
    return [f"{KERNELS}/{name}" for name in save(directory / KERNELS, _sm(options), listed)]


def _sm(options: BuildOptions) -> int:
    assert options.device.capability is not None
    major, minor = options.device.capability
    return 10 * major + minor
