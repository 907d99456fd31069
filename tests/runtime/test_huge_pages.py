"""Weights of CPU engines: copied into huge pages, or mapped where there are none, too little memory, or the user wants it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from gatework.export.build import build_engine
from gatework.plugins import machine
from gatework.plugins.errors import GateworkError
from gatework.runtime.backends import huge_pages
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.cli import main
from gatework.runtime.engine import Engine
from tests.checkpoints import make_checkpoint
from tests.switch import make_switch

pytestmark = pytest.mark.skipif(not machine.has_huge_pages(), reason="no huge pages here")
TOKENS = [5, 3, 8, 1]
GB = 1 << 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "mixtral")


@pytest.fixture(scope="module", params=["int8", "int4"])
def engine(checkpoint: Path, request: pytest.FixtureRequest) -> Path:
    return build_engine(checkpoint, checkpoint.parent / request.param, precision=request.param, max_seq=16)


def mapped(folder: Path) -> set[str]:
    """Names of the files of a folder that are mapped into this process."""
    paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return {Path(path).name for path in paths if path.startswith(f"{folder}/")}


def test_a_copy_and_the_files_give_the_same_bits(engine: Path) -> None:
    copied = OrtBackend(Engine.open(engine), max_batch=1)
    assert not mapped(engine)
    logits = copied.prefill(0, TOKENS, 0).copy()
    shared = OrtBackend(Engine.open(engine), max_batch=1, share_weights=True)
    assert mapped(engine) == {"weights.safetensors", "experts.safetensors"}
    assert np.array_equal(shared.prefill(0, TOKENS, 0), logits)


@pytest.mark.parametrize("lack", ["memory", "huge pages", "address space"])
def test_files_are_mapped_where_a_copy_is_not_to_be_had(
    engine: Path, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    if lack == "memory":
        size = sum(file.stat().st_size for file in engine.glob("*.safetensors"))
        monkeypatch.setattr(huge_pages, "available_memory", lambda: 2 * size - 1)
    elif lack == "huge pages":
        monkeypatch.setattr(huge_pages, "has_huge_pages", lambda: False)
    else:
        monkeypatch.setattr(huge_pages.mmap, "mmap", no_memory)
    backend = OrtBackend(Engine.open(engine), max_batch=1)
    assert mapped(engine) == {"weights.safetensors", "experts.safetensors"}
    assert np.isfinite(backend.prefill(0, TOKENS, 0)).all()


def no_memory(*_: object, **__: object) -> None:
    raise OSError(12, "Cannot allocate memory")


def test_encoder_and_decoder_read_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = huge_pages._read
    monkeypatch.setattr(huge_pages, "_read", lambda path: read.append(path.name) or original(path))
    engine = build_engine(make_switch(tmp_path), tmp_path / "engine", precision="int8", max_seq=16)
    backend = OrtBackend(Engine.open(engine), max_batch=1)
    backend.encode(0, TOKENS)
    logits = backend.prefill(0, [0], 0).copy()
    assert sorted(read) == ["experts.safetensors", "weights.safetensors"]
    assert not mapped(engine)
    shared = OrtBackend(Engine.open(engine), max_batch=1, share_weights=True)
    shared.encode(0, TOKENS)
    assert np.array_equal(shared.prefill(0, [0], 0), logits)


def test_a_file_that_lost_its_end_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Engine.open(engine)
    monkeypatch.setattr(huge_pages, "_fill", lambda block, file, start: 1)
    with pytest.raises(GateworkError, match="safetensors is damaged; fix: build the engine again"):
        OrtBackend(opened, max_batch=1)


def test_the_command(engine: Path, capsys: pytest.CaptureFixture) -> None:
    outputs = []
    for words in ([], ["--share-weights"]):
        assert main(["generate", str(engine), "--prompt-ids", "1,2", "--max-tokens", "4", "--json", *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


# ---- what the machine has


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files in which Linux tells a process what it may have."""
    files = {
        "proc/meminfo": "MemTotal:       24683520 kB\nMemAvailable:   16777216 kB\nHugePages_Total:       0\n",
        "proc/self/cgroup": "0::/service/worker\n",
        "sys/fs/cgroup/service/memory.max": "max\n",
        "sys/fs/cgroup/service/worker/memory.max": f"{8 * GB}\n",
        "sys/fs/cgroup/service/worker/memory.current": f"{7 * GB}\n",
        "sys/fs/cgroup/service/worker/memory.stat": f"anon {2 * GB}\nactive_file {2 * GB}\ninactive_file {GB}\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_memory_of_a_control_group(root: Path) -> None:
    assert machine.available_memory(root) == 4 * GB
    (root / "sys/fs/cgroup/service/worker/memory.max").write_text("max\n")
    assert machine.available_memory(root) == 16 * GB
    group = root / "sys/fs/cgroup/service"  # an outer group's limit holds as well
    (group / "memory.max").write_text(f"{3 * GB}\n")
    (group / "memory.current").write_text(f"{3 * GB}\n")
    (group / "memory.stat").write_text("active_file 4096\ninactive_file 0\n")
    assert machine.available_memory(root) == 4096


def test_memory_where_nothing_is_known(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("5:memory:/docker/1\n")  # version 1
    assert machine.available_memory(root) == 16 * GB
    (root / "proc/meminfo").unlink()
    assert machine.available_memory(root) == 0


def test_huge_pages_that_were_turned_off(root: Path) -> None:
    assert machine.has_huge_pages(root)
    (root / "sys/kernel/mm/transparent_hugepage/enabled").write_text("always madvise [never]\n")
    assert not machine.has_huge_pages(root)
    assert not machine.has_huge_pages(root / "elsewhere")


@pytest.mark.skipif(sys.platform != "linux", reason="known on Linux only")
def test_this_machine() -> None:
    assert machine.available_memory() > GB // 4
