"""bench: every number is there, plausible and consistent; what does not fit is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gatework.export.build import build_engine
from gatework.plugins.errors import GateworkError
from gatework.runtime import bench as bench_module
from gatework.runtime.bench import bench, peak_rss
from gatework.runtime.cli import main
from gatework.runtime.engine import Engine
from gatework.runtime.formatting import size
from tests.checkpoints import make_checkpoint
from tests.switch import make_switch

KEYS = {"prefill_tok_s", "decode_tok_s", "ttft_ms", "weight_bytes_per_token", "gb_s", "peak_rss_mb", "load_s"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    path = make_checkpoint(folder, "mixtral", num_layers=1)
    return build_engine(path, folder / "engine", precision="int8", max_batch=3, prefill_chunk=8)


def test_numbers(engine: Path) -> None:
    result = bench(engine, prompt_tokens=20, new_tokens=5, batch=2, repeat=2, threads=1)
    assert KEYS | {"engine", "precision", "threads", "batch", "versions"} <= set(result)
    assert (result["precision"], result["threads"], result["batch"]) == ("int8", 1, 2)
    assert all(result[key] > 0 for key in KEYS)
    assert result["weight_bytes_per_token"] == Engine.open(engine).weight_bytes["per_token"]
    gb_s = result["weight_bytes_per_token"] * result["decode_tok_s"] / 1e9
    assert result["gb_s"] == pytest.approx(gb_s, rel=1e-3)  # four digits are shown
    assert result["ttft_ms"] < 1e3 * 2 * 20 / result["prefill_tok_s"]  # the first of two prompts
    assert result["versions"]["onnxruntime"]


def test_every_round_decodes_what_was_asked_for(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are counted by steps of the backend: 3 prompts of 3 chunks, then 4 decoding steps, all rows together."""
    ticks = [0.0]

    class Backend(bench_module.LLM):
        def _step(self) -> None:
            super()._step()
            ticks[0] += 1

    monkeypatch.setattr(bench_module, "LLM", Backend)
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: ticks[0])
    result = bench(engine, prompt_tokens=20, new_tokens=4, batch=3)
    assert result["ttft_ms"] == 1000
    assert result["prefill_tok_s"] == 3 * 20 / 3
    assert result["decode_tok_s"] == 3 * 4 / 4


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose encoder reads the prompt."""
    folder = tmp_path_factory.mktemp("encoding")
    return build_engine(make_switch(folder), folder / "engine", precision="fp32", max_seq=64, max_batch=1)


def test_inspect_counts_its_cache(encoding: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(encoding)]) == 0
    rows = dict(re.findall(r"^(limits|KV cache when full) +(.*)", capsys.readouterr().out, re.MULTILINE))
    assert rows["limits"] == "1 sequence of 64 tokens, prefill by 64"
    nbytes = 2 * 64 * 2 * 2 * 4 * 16 * 4  # of the decoder and of the prompt: layers, keys and values, heads
    assert rows["KV cache when full"] == f"{size(nbytes)}, half of it cross-attention's"


def measured(engine: Path, **options: int) -> tuple[int, int]:
    """Tokens of the prompt, and new ones."""
    result = bench(engine, repeat=1, **options)
    return result["prompt_tokens"], result["new_tokens"]


def test_what_is_not_asked_for_shrinks_to_what_fits(engine: Path) -> None:
    assert measured(engine) == (32, 32)
    assert measured(engine, new_tokens=10) == (64 - 10, 10)
    assert measured(engine, prompt_tokens=60) == (60, 64 - 60)


def test_prompt_of_an_encoder_takes_no_new_tokens_places(encoding: Path) -> None:
    """As of `generate`: 64 tokens are read, and 63 follow the start token."""
    assert measured(encoding) == (64, 63)
    assert measured(encoding, prompt_tokens=60, new_tokens=20) == (60, 20)
    with pytest.raises(GateworkError, match="do not fit this engine; got 64 and 64; expected 64 and 63, at most"):
        bench(encoding, new_tokens=64)
    with pytest.raises(GateworkError, match="the prompt is too long; got 65 tokens; expected at most 64"):
        bench(encoding, prompt_tokens=65)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 60, "new_tokens": 10}, "do not fit this engine; got 60 and 10; .* 64 together"),
        ({"prompt_tokens": 64}, "do not fit this engine; got 64 and 1; "),
        ({"prompt_tokens": 65}, "the prompt is too long; got 65 tokens; expected at most 64"),
        ({"prompt_tokens": 0}, "--prompt-tokens is not positive"),
        ({"new_tokens": 64}, "do not fit this engine; got 1 and 64"),
        ({"batch": 4}, "--batch is too large for this engine; got 4; expected at most 3"),
        ({"repeat": 0}, "--repeat is not positive"),
    ],
)
def test_what_does_not_fit_is_refused(engine: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(GateworkError, match=message):
        bench(engine, **options)  # type: ignore[arg-type]


def test_command_ends_with_one_json_line(engine: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--prompt-tokens", "9", "--new-tokens", "1", "--repeat", "1", "--threads", "1"]
    assert main(["bench", str(engine), *options]) == 0
    first, *table, last = capsys.readouterr().out.splitlines()
    assert first.endswith("on cpu, 1 thread")
    assert set(json.loads(last)) >= KEYS
    assert any(line.startswith("decode") and line.endswith("1 × 1 token") for line in table)


def test_peak_rss_is_this_process_only() -> None:
    """A child starts with the peak of its parent in getrusage, which this one must not report."""
    ballast = b"x" * (200 << 20)
    command = [sys.executable, "-c", "from gatework.runtime.bench import peak_rss; print(peak_rss())"]
    child = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak_rss() > len(ballast)
    assert child < len(ballast)
