"""gpt-oss as it is released: experts in MXFP4. Random codes and scales, unpacked by transformers' own function."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.checkpoints import make_checkpoint, new_folder

WEIGHTS = "model.safetensors"
EXPERTS = "model.layers.{}.mlp.experts.{}"


def write_release(folder: Path, **sizes: int) -> tuple[Path, Path]:
    """The same weights twice: as released, and in bfloat16 as transformers saves them."""
    floats = make_checkpoint(folder, "gpt-oss", dtype=torch.bfloat16, **sizes)
    released = new_folder(folder, "gpt-oss-mxfp4")
    shutil.copytree(floats, released, dirs_exist_ok=True)
    plain, packed = load_file(floats / WEIGHTS), load_file(floats / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = random_blocks(packed.pop(name).transpose(1, 2).shape, generator)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    save_file(plain, floats / WEIGHTS, metadata={"format": "pt"})
    save_file(packed, released / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((released / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (released / "config.json").write_text(json.dumps(config))
    return released, floats


def random_blocks(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every code, and scales from 2^-7 to 2^-3, of a weight [E, rows, columns]."""
    E, rows, columns = shape
    blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), generator=generator)
    scales = torch.randint(127 - 7, 127 - 2, (E, rows, columns // 32), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)
