"""Bad input through the real command: one line on standard error, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.formats import convert
from tests.refusals import Refuse, check_refusal

TINY = Path(__file__).parents[2] / "examples" / "tiny-mixtral"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---- checkpoints


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sound"), "mixtral", num_layers=1)


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def refused_by_all(refused: Refuse, checkpoint: Path, engine: Path | None = None) -> str:
    """The one message with which build and export refuse a checkpoint."""
    out = checkpoint.parent / "new" / "engine"
    built = refused("build", checkpoint, "--precision", "int8", "--out", out)
    assert refused("export", checkpoint, "--out", out) == built
    return built


def test_missing_folder(refused: Refuse, tmp_path: Path) -> None:
    err = refused_by_all(refused, tmp_path / "none")
    assert "checkpoint" in err
    assert "none does not exist; fix: give a checkpoint folder" in err
    assert refused("inspect", tmp_path / "none") == err
    for command in ("generate", "bench", "verify"):
        rest = {"generate": ["--prompt", "x"], "verify": ["--reference", tmp_path]}.get(command, [])
        err = refused(command, tmp_path / "none", *rest)
        assert "none is not an engine; got no such folder; fix: build one with `gatework build`" in err


def test_unknown_model_type_lists_the_known(refused: Refuse, checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(model_type="phlogiston"))
    err = refused_by_all(refused, checkpoint)
    assert "unknown model_type; got 'phlogiston'; expected one of llama, mistral, mixtral, dbrx" in err
    assert refused("inspect", checkpoint) == err


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(refused: Refuse, checkpoint: Path, keep: float) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    err = refused_by_all(refused, checkpoint)
    assert f"{path} is damaged or cut short" in err
    assert refused("inspect", checkpoint) == err


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/../../secret.safetensors"])
def test_index_that_names_a_file_outside(refused: Refuse, checkpoint: Path, name: str) -> None:
    sharded = convert(checkpoint, "sharded")
    shutil.copy(checkpoint / "model.safetensors", sharded.parent / "secret.safetensors")
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda value: value["weight_map"].update(dict.fromkeys(value["weight_map"], name)))
    err = refused_by_all(refused, sharded)
    assert f"names a file outside the checkpoint folder; got '{name}'; fix: put the file into the folder" in err


def test_link_that_leads_outside(refused: Refuse, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "elsewhere")
    (checkpoint / "model.safetensors").symlink_to(checkpoint.parent / "elsewhere")
    err = refused_by_all(refused, checkpoint)
    assert (
        f"{checkpoint / 'model.safetensors'} is a symbolic link that leads outside the checkpoint folder; got " in err
    )
    assert "; fix: put what it leads to in its place" in err


@pytest.mark.parametrize("content", ["{}", "[" * 100_000, None], ids=["empty", "nested", "link"])
def test_tokenizer_that_no_engine_may_hold(
    refused: Refuse, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """Every way of making something refuses it, before any weight is read."""
    path = checkpoint / "tokenizer.json"
    path.symlink_to("/etc/passwd") if content is None else path.write_text(content)
    monkeypatch.setattr(Checkpoint, "rows", None)
    err = refused_by_all(refused, checkpoint)
    assert f"{path} is {'a symbolic link' if content is None else 'damaged'}" in err
    assert refused("export", checkpoint, "--link", "--out", checkpoint.parent / "linked") == err
    assert refused("export", checkpoint) == err


def test_wrong_tensor_shape(refused: Refuse, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, checkpoint / "model.safetensors")
    err = refused_by_all(refused, checkpoint)
    assert "tensor model.norm.weight in" in err
    assert "has the wrong shape; got (63,); expected (64,)" in err


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code(refused: Refuse, checkpoint: Path, zipped: bool) -> None:
    (checkpoint / "model.safetensors").unlink()
    path, trace = checkpoint / "pytorch_model.bin", checkpoint.parent / "exploded"
    if zipped:
        torch.save({"model.norm.weight": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))
    err = refused_by_all(refused, checkpoint)
    assert str(path) in err
    assert ("holds more than tensors and was not loaded" in err) == zipped
    assert not trace.exists()


def test_config_that_is_no_json(refused: Refuse, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "mixtral",\n\n')
    assert "config.json is not JSON" in refused_by_all(refused, checkpoint)


def test_folder_without_a_model(refused: Refuse, tmp_path: Path) -> None:
    assert "has neither config.json nor params.json" in refused_by_all(refused, tmp_path)
    assert "has neither config.json nor params.json" in refused("inspect", tmp_path)


# ---- requests that cannot be met


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp8"], "got cpu fp8; expected cpu: fp32|int8|int4"),
        (["--target", "v100"], "got v100 int8; expected cpu: fp32|int8|int4"),
        (["--max-seq", "65"], "--max-seq is out of range; got 65; expected 1 to 64"),
        (["--max-batch", "0"], "--max-batch is out of range; got 0"),
        (["--max-batch", "1" + "0" * 30], "--max-batch is out of range; got 1000"),
        (["--stages", "0"], "--stages is out of range; got 0"),
        (["--stages", "2"], "more stages than layers; got --stages 2; expected at most 1"),
        (["--group-size", "48"], "--group-size cannot be used; got 48"),
        (["--precision", "fp32", "--group-size", "32"], "got --group-size 32; fix: leave --group-size out"),
        (
            ["--strip-weights"],
            "--strip-weights is for TensorRT's targets; got --target cpu; fix: leave --strip-weights",
        ),
        (["--drop-tokens"], "no capacity beyond which they could drop tokens; got --drop-tokens; fix: leave --drop"),
        (["--precision", "int4", "--calibration-text", "/nowhere/x"], "/nowhere/x cannot be read: No such file"),
    ],
)
def test_impossible_builds(refused: Refuse, checkpoint: Path, options: list[str], message: str) -> None:
    assert message in refused("build", checkpoint, "--out", checkpoint.parent / "engine", *options)


def test_golden_files_in_the_way(refused: Refuse, checkpoint: Path) -> None:
    out = checkpoint.parent / "onnx"
    for folder in (out, out / "golden"):
        assert "--golden lies in --out" in refused("export", checkpoint, "--out", out, "--golden", folder)
    assert "fix: choose another --golden" in refused("export", checkpoint, "--out", out, "--golden", checkpoint)


def test_output_in_the_way(refused: Refuse, checkpoint: Path) -> None:
    out = checkpoint.parent / "engine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "exists and is not empty" in refused("build", checkpoint, "--out", out, "--force")
    assert "is in the way" in refused("build", checkpoint, "--out", out / "notes.txt")
    assert "cannot write to" in refused("build", checkpoint, "--out", "/proc/none/engine")
    assert (out / "notes.txt").read_text() == "mine"


# ---- engines


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(TINY, tmp_path_factory.mktemp("tiny") / "engine", precision="int8", max_seq=16)


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


def refused_by_runs(refused: Refuse, engine: Path) -> str:
    """The one message with which everything that runs an engine refuses it."""
    err = refused("generate", engine, "--prompt", "x")
    assert refused("bench", engine) == err
    assert refused("verify", engine, "--reference", TINY) == err
    return err


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "experts.safetensors", "tokenizer.json"])
def test_altered_engine(refused: Refuse, engine: Path, name: str) -> None:
    data = bytearray((engine / name).read_bytes())
    data[len(data) // 2] ^= 1
    (engine / name).write_bytes(data)
    err = refused_by_runs(refused, engine)
    assert f"{engine / name} is damaged: its content was altered; fix: build the engine again" in err


def test_truncated_and_incomplete_engine(refused: Refuse, engine: Path) -> None:
    path = engine / "experts.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is damaged: it has" in refused_by_runs(refused, engine)
    assert f"{path} is damaged: it has" in refused("inspect", engine)
    path.unlink()
    assert f"{path} is damaged: it is missing" in refused_by_runs(refused, engine)
    (engine / "manifest.json").write_text("{")
    assert "manifest.json is damaged: it is not JSON" in refused_by_runs(refused, engine)


def test_engine_of_a_newer_format(refused: Refuse, engine: Path) -> None:
    edit_json(engine / "manifest.json", lambda manifest: manifest.update(format_version=3))
    err = refused_by_runs(refused, engine)
    assert "a newer engine format; got 3; expected 2; fix: upgrade gatework or rebuild the engine" in err
    assert refused("inspect", engine) == err


def test_engine_of_an_older_format(refused: Refuse, engine: Path) -> None:
    edit_json(engine / "manifest.json", lambda manifest: manifest.update(format_version=1))
    err = refused_by_runs(refused, engine)
    assert "an older engine format; got 1; expected 2; fix: build the engine again" in err


# ---- prompts


def test_prompt_longer_than_max_seq(refused: Refuse, engine: Path, tmp_path: Path) -> None:
    ids = ",".join(["5"] * 17)
    err = refused("generate", engine, "--prompt-ids", ids)
    assert "the prompt is too long; got 17 tokens; expected at most 16; fix: shorten the prompt, or build" in err
    assert "with a larger --max-seq, up to 1024" in err
    (tmp_path / "long.txt").write_text("def f():\n" * 50)
    for options in (["--file", tmp_path / "long.txt"], ["--prompt", "x", "--prompt", "x = 1\n" * 50]):
        assert "the prompt is too long" in refused("generate", engine, *options)


@pytest.mark.parametrize("options", [["--prompt", ""], ["--prompt-ids", ""], ["--prompt", "x", "--prompt", ""]])
def test_empty_prompt(refused: Refuse, engine: Path, options: list[str]) -> None:
    for more in ([], ["--json"]):
        err = refused("generate", engine, *options, *more)
        assert err == "gatework: error: the prompt is empty; expected at least one token\n"


def test_empty_file(refused: Refuse, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "the prompt is empty" in refused("generate", engine, "--file", tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-ids", "2048"], "a token id is out of range; got 2048; expected 0 to 2047"),
        (["--prompt-ids=-1"], "a token id is out of range; got -1"),
        (["--chat", "Hello"], "has no chat template"),
        (["--prompt", "x", "--system", "y"], "--system goes with --chat"),
        (["--prompt", "x", "--temperature", "-1"], "error: --temperature is not valid"),
        (
            ["--prompt", "x", "--top-p", "0"],
            "error: --top-p is not valid; got 0.0; expected a number above 0 and at most 1\n",
        ),
        (["--prompt", "x", "--max-tokens", "0"], "error: --max-tokens is not valid"),
        (["--prompt", "x", "--stop", ""], "error: --stop is not valid"),
        (["--prompt", "\udce9"], "no UTF-8 form"),  # an argument in Latin-1
        (["--prompt", "x", "--seed", "-1"], "error: --seed is not valid"),
        (["--prompt", "x", "--stage-processes"], "fix: leave --stage-processes out, or build it with --stages N"),
        (["--file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt: No such file or directory"),
    ],
)
def test_other_bad_requests(refused: Refuse, engine: Path, options: list[str], message: str) -> None:
    assert message in refused("generate", engine, *options)


def test_file_that_is_no_text(refused: Refuse, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt is not UTF-8 text" in refused("generate", engine, "--file", tmp_path / "latin.txt")
    options = ["--reference", TINY, "--text", tmp_path / "latin.txt"]
    assert "latin.txt is not UTF-8 text" in refused("verify", engine, *options)


def test_reports_that_cannot_be_written_are_refused_at_once(refused: Refuse, tmp_path: Path) -> None:
    for place, found in (
        (tmp_path, "a folder"),
        (tmp_path / "none" / "x", "no such folder"),
        ("/proc/x", "No such file"),
    ):
        for kind in ("--html", "--json", "--junit"):
            err = refused("verify", tmp_path, "--reference", tmp_path, kind, place)
            assert f"cannot write {place}; got {found}" in err


def test_text_without_a_tokenizer(refused: Refuse, engine: Path) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: facts for name, facts in manifest["files"].items() if "tokenizer" not in name}

    edit_json(engine / "manifest.json", forget)
    for file in engine.glob("tokenizer*"):
        file.unlink()
    options = ["--reference", TINY, "--text", TINY / "heldout.txt"]
    err = refused("verify", engine, *options)
    assert "this engine has no tokenizer; got a text; expected token ids; fix: leave --text out, or" in err


def test_verifying_against_another_checkpoint(refused: Refuse, engine: Path, checkpoint: Path) -> None:
    assert "was not built from" in refused("verify", engine, "--reference", checkpoint)
    assert "does not exist" in refused("verify", engine, "--reference", checkpoint / "none")


# ---- a full disk


def build_in_a_process(checkpoint: Path, out: Path, file_limit: int = resource.RLIM_INFINITY) -> tuple[int, str]:
    """Exit code and standard error of a build whose files may have at most `file_limit` bytes each."""
    command = [sys.executable, "-m", "gatework.runtime.cli", "build", checkpoint, "--out", out]
    limit = (file_limit, file_limit)
    done = subprocess.run(
        command,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["weights.safetensors", "experts.safetensors"])
def test_files_that_may_not_grow(checkpoint: Path, name: str) -> None:
    """The limit is met by the weights, or by the experts once the weights are written."""
    sizes = {"weights.safetensors": 4096, "experts.safetensors": 100_000}
    folder = checkpoint.parent / "engines"
    folder.mkdir()
    status, err = build_in_a_process(checkpoint, folder / "one", sizes[name])
    check_refusal(status, err)
    assert "no room to write" in err
    assert f"{name}; got a full disk" in err
    assert list(folder.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=False)
        if done.returncode:
            pytest.skip("no right to mount: a disk that is really full is not tried")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="not root: no real full disk is tried")
@pytest.mark.parametrize("room", ["for nothing", "for weights", "for weights and experts"])
def test_full_disk(checkpoint: Path, tmp_path: Path, small_disk: Callable[[int], Path], room: str) -> None:
    sizes = {file.name: file.stat().st_size for file in build_engine(checkpoint, tmp_path / "engine").iterdir()}
    names = [name for name in ("weights.safetensors", "experts.safetensors") if name.split(".")[0] in room]
    pages = sum(-(-sizes[name] // 4096) for name in names)
    disk = small_disk((pages + 1) * 4096)
    status, err = build_in_a_process(checkpoint, disk / "engine")
    check_refusal(status, err)
    assert "no room to write" in err or "no space left" in err
    assert list(disk.iterdir()) == []
