"""Inputs of a portable model and the reference's outputs for them, in the files that Polygraphy reads.

polygraphy run DIR/model.onnx --onnxrt --load-inputs golden/inputs.json --load-outputs golden/outputs.json
"""

from __future__ import annotations

from pathlib import Path

import torch

from gatework.export.checkpoint import Checkpoint
from gatework.export.reference import load_decoder
from gatework.export.staging import check_free
from gatework.plugins.errors import GateworkError

_LENGTH = 16  # tokens


def require_polygraphy(folder: Path) -> None:
    """GateworkError unless golden files can be written to a new folder."""
    check_free(folder, force=False, option="--golden")
    try:
        import polygraphy  # noqa: F401
    except ImportError:
        raise GateworkError("golden files need the polygraphy package", fix="pip install polygraphy") from None


def write_golden(checkpoint: Checkpoint, folder: Path, max_seq: int, *, all_logits: bool) -> None:
    """Write inputs.json, random tokens from an empty cache, and outputs.json, what the float32 reference makes of them."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    from gatework.export.onnx_export import cache_names

    config = checkpoint.config
    decoder = load_decoder(checkpoint, max_seq, all_logits=all_logits)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, min(_LENGTH, max_seq)), generator=generator)
    positions, cache = torch.arange(ids.shape[1])[None], decoder.empty_cache(1)
    starts = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        logits, *present = decoder(ids, positions, starts, cache, starts + ids.shape[1])
    feeds = {"input_ids": ids, "position_ids": positions, "write_indices": starts}
    if decoder.config.ntk_length is not None:
        feeds["prompt_lengths"] = starts + ids.shape[1]
    feeds |= dict(zip(cache_names(config, "past"), cache, strict=True))
    outputs = {"logits": logits} | dict(zip(cache_names(config, "present"), present, strict=True))
    results = RunResults()
    results.add([{name: value.numpy() for name, value in outputs.items()}], runner_name="gatework-reference")
    folder.mkdir(parents=True, exist_ok=True)
    save_json([{name: value.numpy() for name, value in feeds.items()}], str(folder / "inputs.json"))
    results.save(str(folder / "outputs.json"))
