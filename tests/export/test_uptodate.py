"""`gatework build --if-changed`: nothing is built again when nothing changed, and everything when anything did."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gatework.export import uptodate
from gatework.export.build import build_engine
from gatework.export.options import BuildOptions
from gatework.export.uptodate import is_current
from gatework.runtime.cli import main
from tests.checkpoints import make_checkpoint

OPTIONS = BuildOptions(target="cpu", precision="int8", max_seq=32)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("uptodate"), "mixtral")
    engine = build_engine(checkpoint, checkpoint.parent / "engine", precision="int8", max_seq=32)
    return checkpoint, engine


def test_an_engine_is_current_until_something_changes(
    built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, engine = built
    assert uptodate.is_current(checkpoint, engine, OPTIONS)
    for changed in ({"precision": "int4"}, {"max_seq": 64}, {"max_batch": 2}, {"group_size": 16}):
        assert not uptodate.is_current(
            checkpoint, engine, BuildOptions(**{"target": "cpu", "precision": "int8", "max_seq": 32} | changed)
        )
    monkeypatch.setattr(uptodate, "version", lambda tool: "0.0")
    assert not uptodate.is_current(checkpoint, engine, OPTIONS)


def test_a_touched_or_added_weight_file_counts_as_changed(built: tuple[Path, Path]) -> None:
    checkpoint, engine = built
    weights = checkpoint / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert not uptodate.is_current(checkpoint, engine, OPTIONS)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert uptodate.is_current(checkpoint, engine, OPTIONS)
    (checkpoint / "tokenizer.json").write_text("{}")
    assert not uptodate.is_current(checkpoint, engine, OPTIONS)
    (checkpoint / "tokenizer.json").unlink()


def test_an_engine_of_another_format_is_built_again(built: tuple[Path, Path]) -> None:
    checkpoint, engine = built
    kept = (engine / "manifest.json").read_text()
    (engine / "manifest.json").write_text(kept.replace('"format_version": 2', '"format_version": 1'))
    assert not uptodate.is_current(checkpoint, engine, OPTIONS)
    (engine / "manifest.json").write_text(kept)
    assert uptodate.is_current(checkpoint, engine, OPTIONS)


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_an_incomplete_engine_is_built_again(built: tuple[Path, Path], name: str) -> None:
    checkpoint, engine = built
    kept = (engine / name).read_bytes()
    (engine / name).write_bytes(kept[:-5])
    assert not uptodate.is_current(checkpoint, engine, OPTIONS)
    (engine / name).write_bytes(kept)
    assert not uptodate.is_current(checkpoint, engine.with_name("none"), OPTIONS)


def test_the_command_builds_once(built: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = built
    out = checkpoint.parent / "by-command"
    command = ["build", str(checkpoint), "--out", str(out), "--max-seq", "32", "--if-changed", "--force"]
    assert main(command) == 0
    made = (out / "manifest.json").stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"{out} is up to date\n")
    assert (out / "manifest.json").stat().st_mtime_ns == made
    assert main([*command, "--max-batch", "2"]) == 0
    assert (out / "manifest.json").stat().st_mtime_ns > made


def test_an_altered_engine_is_not_current(built: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, engine = built
    copy = shutil.copytree(engine, tmp_path / "copy")  # times included
    assert is_current(checkpoint, copy, OPTIONS)
    content = bytearray((copy / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(content)
    assert not is_current(checkpoint, copy, OPTIONS)
