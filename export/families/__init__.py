"""The families of models that Gatework knows: how to read their configs, and where they keep their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import (
    dbrx,
    gpt_oss,
    grok1,
    llama,
    mistral,
    mixtral,
    mpt,
    olmoe,
    openmoe,
    phi,
    phi_2023,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    switch,
    switch_t5x,
)
from gatework.export.weights import WeightMap
from gatework.plugins.errors import GateworkError


@dataclass(frozen=True, slots=True)
class Family:
    """One family in Hugging Face layout.

    read_config: `config.json` as a dict -> ModelConfig.
    weight_map: where each canonical weight of `ModelConfig.tensor_shapes` lies in the checkpoint.
    """

    name: str
    read_config: Callable[[dict[str, Any]], ModelConfig]
    weight_map: Callable[[ModelConfig], WeightMap]


FAMILIES: dict[str, Family] = {
    name: Family(name, module.read_config, module.weight_map)
    for name, module in {
        "llama": llama,
        "mistral": mistral,
        "mixtral": mixtral,
        "dbrx": dbrx,
        "qwen3": qwen3,
        "qwen3_moe": qwen3_moe,
        "olmoe": olmoe,
        "phi": phi,
        **dict.fromkeys(phi_2023.GENERATIONS, phi_2023),
        "qwen": qwen,
        "qwen2": qwen2,
        "qwen2_moe": qwen2_moe,
        "mpt": mpt,
        "gpt_oss": gpt_oss,
        "grok-1": grok1,
        "openmoe": openmoe,
        "switch_transformers": switch,
    }.items()
}
# Weight maps of T5X's layout.
T5X: dict[str, Callable[[ModelConfig], WeightMap]] = {
    "openmoe": openmoe.t5x_weight_map,
    "switch_transformers": switch_t5x.weight_map,
}
# Configs that leave model_type to their remote code, or name another family there.
_BY_ARCHITECTURE = dict.fromkeys(grok1.ARCHITECTURES, "grok-1") | dict.fromkeys(openmoe.ARCHITECTURES, "openmoe")


def family_of(raw: dict[str, Any]) -> Family:
    """The family that a `config.json` asks for: by its class, where only one family has that, or by its model_type.

    An unknown one is a GateworkError.
    """
    model_type = raw.get("model_type")
    if isinstance(names := raw.get("architectures"), list) and names:
        model_type = _BY_ARCHITECTURE.get(str(names[0]), model_type)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        got = "none" if model_type is None else repr(model_type)
        raise GateworkError("unknown model_type", got=got, expected=f"one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
