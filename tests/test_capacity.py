"""Experts that drop tokens: engines of every precision pass, what a token gets depends on its company, faults are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gatework import LLM, SamplingParams
from gatework.export.build import build_engine, export_onnx
from gatework.export.checkpoint import Checkpoint
from gatework.export.reference import load_decoder
from gatework.plugins.errors import GateworkError
from gatework.runtime.cli import main
from gatework.runtime.verify import VerifyReport, compare_engines, verify
from tests.checkpoints import make_checkpoint

ROWS = 8  # of a decode step: more than an expert's least capacity of 4
PROMPTS = [[(7 * i + 3 * j) % 128 for j in range(9 + i)] for i in range(ROWS)]


def build(path: Path, out: Path, precision: str, **settings: object) -> Path:
    if precision == "onnx":
        return export_onnx(path, out, drop_tokens=True)
    return build_engine(path, out, precision=precision, prefill_chunk=8, max_batch=ROWS, drop_tokens=True, **settings)


def check(engine: Path, path: Path, **settings: bool) -> VerifyReport:
    return verify(engine, path, prompts=PROMPTS, tokens=8, window=16, **settings)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "onnx"])
def test_engines_pass(tmp_path: Path, precision: str) -> None:
    """Against the reference in the same steps: chunks of prompts, and rows that decode together."""
    path = make_checkpoint(tmp_path, "openmoe", num_layers=2)
    report = check(build(path, tmp_path / "engine", precision), path)
    assert report.passed, str(report)
    assert all(stage.accumulated < 10 for stage in report.stages)  # of dropped tokens as well, whose rows are zeros


@torch.inference_mode()
def test_company_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of rows together are the reference's of the same steps, and not those of each row alone; inspect warns of it."""
    path, engine = make_checkpoint(tmp_path, "openmoe"), tmp_path / "engine"
    options = ["--precision", "fp32", "--prefill-chunk", "8", "--max-batch", f"{ROWS}", "--drop-tokens"]
    assert main(["build", str(path), "--out", str(engine), *options]) == 0
    for described, told in ((engine, "depends on the others of its step"), (path, "all tokens that choose it")):
        assert main(["inspect", str(described)]) == 0
        assert told in capsys.readouterr().out
    llm = LLM(engine)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    together = [completion.token_ids for completion in llm.generate(PROMPTS, params)]
    assert together != [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS]
    assert together == reference_tokens(path, 6)


def reference_tokens(path: Path, tokens: int) -> list[list[int]]:
    """Greedy, of all PROMPTS in one batch, each of which is prefilled in chunks of 8."""
    decoder = load_decoder(Checkpoint.open(path, drop_tokens=True), 64)
    caches, found = [], []
    for prompt in PROMPTS:
        cache = decoder.empty_cache(1)
        for start in range(0, len(prompt), 8):
            ids = torch.tensor([prompt[start : start + 8]])
            places = torch.tensor([start])
            logits, *cache = decoder(ids, places[:, None] + torch.arange(ids.shape[1]), places, cache)
        caches.append(cache)
        found.append([int(logits[0, -1].argmax())])
    cache = [torch.cat(each) for each in zip(*caches, strict=True)]
    for step in range(tokens - 1):
        ids = torch.tensor([row[-1:] for row in found])
        places = torch.tensor([len(prompt) + step for prompt in PROMPTS])
        logits, *cache = decoder(ids, places[:, None], places, cache)
        for row, token in zip(found, logits[:, -1].argmax(-1).tolist(), strict=True):
            row.append(token)
    return found


def test_another_capacity_is_found(tmp_path: Path) -> None:
    """An engine whose experts take half as many tokens: they are named, and so they are among engines."""
    path = make_checkpoint(tmp_path, "openmoe", num_layers=2)
    engine = build(path, tmp_path / "engine", "int8")
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(fields | {"router_capacity_factor_eval": 0.5, "router_min_capacity": 2})
    )
    report = check(engine, path, check_fingerprint=False)
    assert report.first_divergence is not None
    assert (report.first_divergence.stage.layer, report.first_divergence.stage.tensor) == (1, "experts")
    other = build(path, tmp_path / "other", "int8")
    stages = compare_engines(engine, other, prompts=PROMPTS, tokens=4).stages
    assert next(stage for stage in stages if stage.accumulated > 0).tensor == "experts"


def test_an_engine_in_stages_drops_the_same(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "openmoe", num_layers=2)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engines = (build(path, tmp_path / f"{n}", "int8", stages=n) for n in (1, 2))
    one, two = ([c.token_ids for c in LLM(engine).generate(PROMPTS, params)] for engine in engines)
    assert one == two


def test_models_without_the_rule_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mixtral")
    with pytest.raises(GateworkError, match="no capacity beyond which they could drop tokens"):
        build(path, tmp_path / "engine", "int8")
    assert not (tmp_path / "engine").exists()


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_plan_for_a100(tmp_path: Path, precision: str) -> None:
    """The engine holds the kernel that drops choices."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no plan is built")
    path = make_checkpoint(tmp_path, "openmoe", num_layers=2)
    engine = build_engine(path, tmp_path / "engine", target="a100", precision=precision, max_seq=32, drop_tokens=True)
    counts = json.loads((engine / "layers.json").read_text())["counts"]
    assert (counts["PLUGIN_V3"], counts["KV_CACHE_UPDATE"]) == (1, 4)
    assert list(engine.glob("kernels/drop_*"))
