"""Weight files and index files that are damaged or hostile: one line that names the file, and nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gatework.export.checkpoint import Checkpoint, read_config
from gatework.export.readers import read_safetensors, read_torch
from gatework.plugins.errors import GateworkError
from tests.checkpoints import make_checkpoint
from tests.formats import convert


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama2", num_layers=1)


def fresh(path: Path, file_format: str, tmp_path: Path) -> Path:
    """A copy in the given format, to spoil."""
    source = path if file_format == "hf" else convert(path, file_format)
    return Path(shutil.copytree(source, tmp_path / "copy"))


# ---- safetensors


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS: dict[str, tuple[Any, int]] = {  # header, bytes of data
    "overlap": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, 12),
    "gap": ({"a": entry([2], [0, 8]), "b": entry([2], [12, 20])}, 20),
    "data left over": ({"a": entry([2], [0, 8])}, 20),
    "shape and size differ": ({"a": entry([3], [0, 8])}, 8),
    "beyond the end": ({"a": entry([2**30], [0, 2**32])}, 8),
    "overflow": ({"a": entry([2**40, 2**40], [0, 8])}, 8),
    "negative": ({"a": entry([-2], [0, 8])}, 8),
    "backwards": ({"a": entry([2], [8, 0])}, 8),
    "unknown dtype": ({"a": entry([2], [0, 8], "Q9")}, 8),
    "list": ([1, 2], 0),
    "number": ({"a": 3}, 0),
    "not JSON": (b"\x00" * 64, 0),
    "nested": (b"[" * 100_000, 0),
    "no UTF-8": (b'{"\xff": 1}', 0),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_safetensors_header(name: str, tmp_path: Path) -> None:
    header, data = BAD_HEADERS[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(GateworkError, match=r"model\.safetensors is damaged"):
        read_safetensors(path)


@pytest.mark.parametrize("header_bytes", [10**6, 2**40, 2**63, 2**64 - 1])
def test_safetensors_header_longer_than_the_file(header_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", header_bytes) + b"{}" * 100)
    with pytest.raises(GateworkError, match=r"model\.safetensors is damaged or cut short"):
        read_safetensors(path)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, -1, -100_000])
@pytest.mark.parametrize(
    ("file_format", "file"),
    [
        ("hf", "model.safetensors"),
        ("sharded", "model-00002-of-00003.safetensors"),
        ("bin", "pytorch_model.bin"),
        ("meta-mp2", "consolidated.01.pth"),
    ],
)
def test_truncated_file(llama: Path, tmp_path: Path, file_format: str, file: str, kept: int) -> None:
    path = fresh(llama, file_format, tmp_path)
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[:kept] if abs(kept) < len(whole) else b"")
    with pytest.raises(GateworkError, match=file):
        Checkpoint.open(path)


def test_file_cut_short_after_open(llama: Path, tmp_path: Path) -> None:
    path = fresh(llama, "hf", tmp_path)
    checkpoint = Checkpoint.open(path)
    os.truncate(path / "model.safetensors", 5000)
    with pytest.raises(GateworkError, match=r"model\.safetensors ended"):
        {name: checkpoint.read(name) for name in checkpoint.weights}


# ---- torch.save


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize(
    ("file_format", "file"),
    [
        ("bin", "pytorch_model.bin"),
        ("meta", "consolidated.00.pth"),
        ("sharded-bin", "pytorch_model-00001-of-00003.bin"),
    ],
)
def test_code_in_a_pickle_is_not_run(llama: Path, tmp_path: Path, file_format: str, file: str) -> None:
    path = fresh(llama, file_format, tmp_path)
    tensors = torch.load(path / file, weights_only=True)
    torch.save(tensors | {"bomb": Bomb(tmp_path / "ran")}, path / file)
    with pytest.raises(GateworkError, match=rf"{file} holds more than tensors .*mkdir"):
        Checkpoint.open(path)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(GateworkError, match=r"pytorch_model\.bin"):
        read_torch(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([torch.ones(2)], "no state dict"),
        ({"model": {"a": torch.ones(2)}}, "no tensor"),
        ({"a": torch.ones(2), "step": 3}, "no tensor"),
        ({3: torch.ones(2)}, "no tensor"),
        ({"a": torch.ones(3, 2).t()}, "not stored row by row"),
        ({"a": torch.ones(3, 2).to_sparse()}, "more than tensors .*_rebuild_sparse_tensor"),
        ({"a": torch.ones(1, 2).expand(5, 2)}, "not stored row by row"),
    ],
    ids=["list", "nested", "number", "int key", "transposed", "sparse", "expanded"],
)
def test_state_dict_of_something_else(state: Any, reason: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(GateworkError, match=rf"model\.pth .*{reason}"):
        read_torch(tmp_path / "model.pth")


def test_views_of_one_storage(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    parameter = torch.nn.Parameter(torch.ones(3))
    torch.save({"whole": whole, "rows": whole[2:5], "parameter": parameter}, tmp_path / "model.pth")
    stored = read_torch(tmp_path / "model.pth")
    rows = torch.empty(2, 4)
    stored["rows"].read_into(rows, 1)
    assert torch.equal(rows, whole[3:5])
    out = torch.empty(3)
    stored["parameter"].read_into(out, 0)
    assert torch.equal(out, parameter)


def test_old_torch_format(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(GateworkError, match=r"model\.pth .*torch\.save"):
        read_torch(tmp_path / "model.pth")


def test_compressed_archive(tmp_path: Path) -> None:
    """Whose pickle could unpack to any size."""
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.pth")
    plain = zipfile.ZipFile(tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(GateworkError, match=r"model\.pth is damaged"):
        read_torch(tmp_path / "model.pth")


def test_storage_larger_than_its_record(tmp_path: Path) -> None:
    """The pickle claims more bytes than the archive has under that name."""
    path = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(7000)}, path)
    data = path.read_bytes()
    claim = b"M" + struct.pack("<H", 7000)  # BININT2, as the pickle writes the element count and the shape
    assert data.count(claim) == 2
    path.write_bytes(data.replace(claim, b"M" + struct.pack("<H", 60_000)))
    with pytest.raises(GateworkError, match=r"tensor a in .*model\.pth lies outside its record"):
        read_torch(path)


def test_bytes_changed_at_random_never_crash(llama: Path, tmp_path: Path) -> None:
    """One byte at a time in headers and directories: the file opens, or it is refused in one line."""
    refused = 0
    for file_format, file in (("hf", "model.safetensors"), ("bin", "pytorch_model.bin")):
        path = fresh(llama, file_format, tmp_path / file_format)
        whole = (path / file).read_bytes()
        places = [*range(0, 4000, 37), *range(len(whole) - 3000, len(whole), 37)]
        for place in places:
            spoilt = bytearray(whole)
            spoilt[place] ^= 0x5A
            (path / file).write_bytes(spoilt)
            try:
                Checkpoint.open(path)
            except GateworkError:
                refused += 1
    assert refused > 50


# ---- shards and their index


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "outside the checkpoint folder"),
        ("../secret.safetensors", "outside the checkpoint folder"),
        ("sub/../../secret.safetensors", "outside the checkpoint folder"),
        ("link.safetensors", "outside the checkpoint folder"),
        ("linked/secret.safetensors", "outside the checkpoint folder"),
        ("loop.safetensors", "loop"),
        ("nothing.safetensors", "missing"),
        ("", "missing"),
        (".", "missing"),
        ("a\x00b", "no path leads to"),
        ("n" * 5000, "missing"),
    ],
)
def test_index_that_leads_astray(llama: Path, tmp_path: Path, name: str, reason: str) -> None:
    path = fresh(llama, "sharded", tmp_path)
    shutil.copy(path / "model-00001-of-00003.safetensors", tmp_path / "secret.safetensors")
    (path / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (path / "linked").symlink_to(tmp_path)
    (path / "loop.safetensors").symlink_to("loop.safetensors")
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": name}}))
    with pytest.raises(GateworkError, match=reason):
        Checkpoint.open(path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "generation_config.json"])
def test_link_out_of_the_folder(llama: Path, tmp_path: Path, file: str) -> None:
    path = fresh(llama, "hf", tmp_path)
    shutil.move(path / file, tmp_path / file)
    (path / file).symlink_to(tmp_path / file)
    with pytest.raises(GateworkError, match="outside the checkpoint folder"):
        Checkpoint.open(path)


def test_links_within_the_folder_are_followed(llama: Path, tmp_path: Path) -> None:
    path = fresh(llama, "hf", tmp_path)
    (path / "model.safetensors").rename(path / "weights")
    (path / "model.safetensors").symlink_to("weights")
    assert Checkpoint.open(path).config == Checkpoint.open(llama).config


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, "model.safetensors"])
def test_index_without_weight_map(llama: Path, tmp_path: Path, weight_map: Any) -> None:
    path = fresh(llama, "sharded", tmp_path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(GateworkError, match=r"index\.json has no weight_map"):
        Checkpoint.open(path)


def test_tensor_that_its_shard_does_not_have(llama: Path, tmp_path: Path) -> None:
    path = fresh(llama, "sharded", tmp_path)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["lm_head.weight"])
    index.write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": other}}))
    with pytest.raises(GateworkError, match=rf"lm_head\.weight is missing from .*{other}"):
        Checkpoint.open(path)


@pytest.mark.parametrize("file_format", ["sharded", "stacked"])
def test_tensor_in_two_shards(tmp_path: Path, file_format: str) -> None:
    path = convert(make_checkpoint(tmp_path, "mixtral", num_layers=1), file_format)
    if file_format == "sharded":
        files = sorted(path.glob("*.safetensors"))
        first, second = (load_file(file) for file in files[:2])
        save_file(second | {name: first[name] for name in sorted(first)[:1]}, files[1])
    else:
        files = sorted(path.glob("*.pt"))
        first, second = (torch.load(file, weights_only=True) for file in files[:2])
        torch.save(second | {name: first[name] for name in sorted(first)[:1]}, files[1])
    with pytest.raises(GateworkError, match=f"is in two files.*{files[0].name} and {files[1].name}"):
        Checkpoint.open(path)


def test_missing_model_parallel_shard(llama: Path, tmp_path: Path) -> None:
    path = fresh(llama, "meta-mp2", tmp_path)
    (path / "consolidated.01.pth").unlink()
    with pytest.raises(GateworkError, match=r"tok_embeddings\.weight .* got \(128, 32\); expected \(128, 64\)"):
        Checkpoint.open(path)


def test_gap_in_model_parallel_shards(llama: Path, tmp_path: Path) -> None:
    path = fresh(llama, "meta-mp2", tmp_path)
    (path / "consolidated.00.pth").unlink()
    for call in (Checkpoint.open, read_config):
        with pytest.raises(GateworkError, match=r"consolidated\.00\.pth is missing"):
            call(path)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("layers.0.attention.wq.weight", None, r"wq\.weight is missing from .*consolidated\.01\.pth"),
        ("layers.0.attention.wq.weight", torch.ones(32, 60), r"wq\.weight do not fit together"),
        ("layers.0.attention.wq.weight", torch.ones(32), r"wq\.weight do not fit together"),
        ("layers.0.attention.wq.weight", torch.ones(32, 64).half(), r"wq\.weight do not fit together"),
        ("layers.0.attention.wq.weight", torch.ones(30, 64), r"wq\.weight .*got \(62, 64\); expected \(64, 64\)"),
        ("surprise", torch.ones(2), r"surprise is missing from .*consolidated\.00\.pth"),
    ],
    ids=["missing", "columns", "vector", "dtype", "rows", "extra"],
)
def test_model_parallel_shards_that_disagree(
    llama: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, reason: str
) -> None:
    path = fresh(llama, "meta-mp2", tmp_path)
    state = torch.load(path / "consolidated.01.pth", weights_only=True)
    state.pop(name, None)
    torch.save(state | ({} if tensor is None else {name: tensor}), path / "consolidated.01.pth")
    with pytest.raises(GateworkError, match=reason):
        Checkpoint.open(path)
