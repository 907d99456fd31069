"""Checkpoints made to harm: refused in one line, soon and in little memory, with nothing run, read outside or left behind.

Most cases run one after another in one process, which has to stay below the bound over all of them; one of each kind goes
through the real command. A case that hangs is ended by its alarm.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gatework.export import build, engine_writer
from gatework.export.checkpoint import Checkpoint
from gatework.export.config import ModelConfig
from gatework.plugins.errors import GateworkError
from gatework.runtime.engine import Engine
from tests import hostile, hostile_ckpt, hostile_t5x
from tests.checkpoints import make_checkpoint
from tests.formats import convert
from tests.hostile import GB, Record, call, nested, number, state, tensor, tensor_entry, text
from tests.refusals import check_refusal
from tests.tiny_tokenizers import make_byte_level

MAX_RSS = 500 << 20  # bytes, of which importing torch takes about half
SECONDS = 20  # for a case on a busy machine; the aim is 2

Craft = Callable[[Path], object]  # spoils a checkpoint folder; files beside it are outside


@dataclass(frozen=True)
class Case:
    """What is done to a checkpoint of some format (tests/formats.py), and what the refusal says."""

    form: str
    craft: Craft
    message: str


# ---- safetensors


def safetensors(header: Any, data: int = 8, length: int | None = None, name: str = "model.safetensors") -> Craft:
    return lambda path: hostile.write_safetensors(path / name, header, data, length)


def many_tensors(count: int) -> bytes:
    one = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(one % i for i in range(count)) + b"}"


A = tensor_entry([2], [0, 8])
TWICE = b'{"a":%b,"a":%b}' % ((json.dumps(A).encode(),) * 2)
DAMAGED = "model.safetensors is damaged"
SAFETENSORS = {
    "header longer than the file": (safetensors({"a": A}, length=10**6), DAMAGED),
    "header of 2^63 bytes": (safetensors({"a": A}, length=2**63), DAMAGED),
    "header of 2^64 - 1 bytes": (safetensors({"a": A}, length=2**64 - 1), DAMAGED),
    "header of 95 MB": (safetensors(b"{", data=95_000_000, length=95_000_000), DAMAGED),
    "header of 2 GB": (safetensors(b"{", data=2 * GB, length=2 * GB), DAMAGED),
    "header of 400,000 tensors": (safetensors(many_tensors(400_000), data=0), DAMAGED),
    "header nested deeply": (safetensors(b"[" * 1_000_000), DAMAGED),
    "entry nested deeply": (safetensors(f'{{"a":{nested(500)}}}'.encode()), DAMAGED),
    "tensor named twice": (safetensors(TWICE), DAMAGED),
    "tensors that overlap": (safetensors({"a": A, "b": tensor_entry([2], [4, 12])}, 12), DAMAGED),
    "tensors with a hole between": (safetensors({"a": A, "b": tensor_entry([2], [12, 20])}, 20), DAMAGED),
    "offsets outside the file": (safetensors({"a": tensor_entry([GB], [0, 4 * GB])}), DAMAGED),
    "offsets that run backwards": (safetensors({"a": tensor_entry([2], [8, 0])}), DAMAGED),
    "negative shape": (safetensors({"a": tensor_entry([-2], [0, 8])}), DAMAGED),
    "fractional shape": (safetensors({"a": tensor_entry([2.5], [0, 8])}), DAMAGED),
    "shape of words": (safetensors({"a": tensor_entry(["2"], [0, 8])}), DAMAGED),
    "shape that overflows": (safetensors({"a": tensor_entry([2**32, 2**32], [0, 8])}), DAMAGED),
    "shape larger than its bytes": (safetensors({"a": tensor_entry([2], [0, 8], "F64")}), DAMAGED),
    "unknown dtype": (safetensors({"a": tensor_entry([2], [0, 8], "Q9")}), DAMAGED),
    "metadata that is no text": (safetensors({"__metadata__": {"a": {}}, "a": A}), DAMAGED),
    "name that clears the screen": (safetensors({"\x1b[2J\nfine": A}), r"is missing from"),
    "file that leads outside": (lambda path: outside(path, "model.safetensors"), "outside the checkpoint folder"),
    "file that is a device": (
        lambda path: hostile.link(path / "model.safetensors", "/dev/zero"),
        "is not a file; got a",
    ),
    "file that is a pipe": (lambda path: hostile.pipe(path / "model.safetensors"), "is not a file; got a pipe"),
    "file that leads nowhere": (lambda path: hostile.link(path / "model.safetensors", "none"), "a link that leads now"),
    "file that is empty": (
        lambda path: (path / "model.safetensors").write_bytes(b""),
        "it has 0 bytes, and the size of",
    ),
    "file of Git LFS": (
        lambda path: (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "got one that begins with the text 'version '.*; in a git repository that has it in Git LFS, run git lfs pull",
    ),
}


def outside(path: Path, name: str) -> None:
    """Move a file out of the checkpoint, and leave a link to it."""
    shutil.move(path / name, path.parent / name)
    (path / name).symlink_to(path.parent / name)


# ---- the index


def indexed(shard: str, make: Callable[[Path], object] = lambda path: None) -> Craft:
    """Name a shard in the index, after making it."""

    def craft(path: Path) -> None:
        make(path / shard)
        file = path / "model.safetensors.index.json"
        weight_map = json.loads(file.read_text())["weight_map"]
        hostile.edit_json(file, weight_map=dict.fromkeys(weight_map, shard))

    return craft


def copy_outside(path: Path) -> None:
    shutil.copy(path.parent / "checkpoint" / "model-00001-of-00003.safetensors", path)


def two_links(path: Path) -> None:
    path.symlink_to("other.safetensors")
    (path.parent / "other.safetensors").symlink_to(path.name)


OUTSIDE, NO_FILE = "outside the checkpoint folder", "names a file that is missing"
NO_PATH = "no path leads to"
INDEX = {
    "shard in the parent folder": (indexed("../x.safetensors", copy_outside), OUTSIDE),
    "shard by a roundabout way": (indexed("a/../../x.safetensors"), OUTSIDE),
    "shard with a full path": (indexed("/etc/passwd"), OUTSIDE),
    "index naming itself": (indexed("model.safetensors.index.json"), r"index\.json names itself as a file of weights"),
    "index naming the config": (indexed("config.json"), r"config\.json is no safetensors file"),
    "shard that leads outside": (indexed("x.safetensors", partial(hostile.link, target="/etc/passwd")), OUTSIDE),
    "shard that is a device": (indexed("x.safetensors", partial(hostile.link, target="/dev/zero")), OUTSIDE),
    "shard that links to itself": (indexed("x.safetensors", partial(hostile.link, target="x.safetensors")), NO_PATH),
    "shards that link to each other": (indexed("x.safetensors", two_links), NO_PATH),
    "shard that is the folder": (indexed("."), NO_FILE),
    "shard that is a folder": (indexed("x.safetensors", Path.mkdir), NO_FILE),
    "shard that is a pipe": (indexed("x.safetensors", hostile.pipe), NO_FILE),
    "shard with a null in its name": (indexed("x\x00"), "no path leads to"),
    "index of 2 GB": (lambda path: hostile.sparse(path / "model.safetensors.index.json", 2 * GB), "too large"),
    "index of empty lists": (
        lambda path: (path / "model.safetensors.index.json").write_text(f"[{'[],' * 3_000_000}[]]"),
        r"index\.json",
    ),
    "index that leads outside": (lambda path: outside(path, "model.safetensors.index.json"), OUTSIDE),
}

# ---- torch.save


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def trace_of(path: Path) -> Path:
    """What the code in a hostile pickle would make."""
    return path.parent / "ran"


def shell(path: Path, *, zipped: bool) -> None:
    value = {"a": Shell(f"touch {trace_of(path)}")}
    if zipped:
        torch.save(value, path / BIN)
    else:
        (path / BIN).write_bytes(pickle.dumps(value))


def pickled(code: bytes) -> Craft:
    return lambda path: hostile.write_torch(path / BIN, code)


def archive(*records: Record, code: bytes | None = None) -> Craft:
    """A sound archive with more records, each instead of one of its name."""
    code = state(text("a") + tensor([4], [1])) if code is None else code
    names = {record.name for record in records}
    kept = [record for record in hostile.torch_records(code) if record.name not in names]
    return lambda path: hostile.write_zip(path / BIN, [*kept, *records])


def one_tensor(shape: list[int], strides: list[int], offset: int = 0, key: str = "0") -> Craft:
    return pickled(state(text("a") + tensor(shape, strides, offset, key)))


def huge_directory(path: Path) -> None:
    """An archive whose directory has 2 GB."""
    hostile.sparse(path / BIN, 2 * GB)
    with (path / BIN).open("ab") as file:
        file.write(hostile.end_record(1, 2 * GB, 0))


BIN = "pytorch_model.bin"
PICKLE = "archive/data.pkl"
DOUBLING = b")" + b"q\0h\0\x86" * 60  # a tuple of two of the one before, sixty times: hashing it takes for ever
MORE = rf"{BIN} holds more than tensors"
BAD = rf"{BIN} is (damaged|cut short)"
NOT_ROWS, NO_RECORD = "is not stored row by row", "lies outside its record"
BOMB = hostile.deflated_zeros(4 * GB - (16 << 20))


def many_dicts() -> bytes:
    return b"\x80\x02" + b"".join(b"}r%b0" % i.to_bytes(4, "little") for i in range(500_000)) + b"."


def many_records(path: Path) -> None:
    """An archive whose directory just may be read."""
    records = [Record(f"a/{i:06}") for i in range(38_000)]
    directory = b"".join(hostile.central_header(record, 0) for record in records)
    start = hostile.local_header(records[0])
    (path / BIN).write_bytes(start + directory + hostile.end_record(len(records) & 0xFFFF, len(directory), len(start)))


TORCH = {
    "code in an archive": (partial(shell, zipped=True), MORE + ".*system"),
    "code in a bare pickle": (partial(shell, zipped=False), BIN),
    "code through getattr": (pickled(state(text("a") + call("builtins getattr", text("x") + text("y")))), MORE),
    "code as a storage's class": (pickled(state(text("a") + b"(" + text("storage") + b"cos\nsystem\ntQ")), MORE),
    "2 GB of zeros in one call": (pickled(state(text("a") + call("builtins bytearray", number(2 * GB)))), MORE),
    "tensor made at once": (pickled(state(text("a") + b"ctorch\nTensor\n" + number(GB) + b"\x85\x81")), MORE),
    "tuples that double": (pickled(state(text("a") + DOUBLING)), "."),
    "tuples that double, as a name": (pickled(state(DOUBLING + number(1))), "."),
    "memo with a far place": (pickled(b"\x80\x02}r\xff\xff\xff\x7f."), "."),
    "text of 4 GB": (pickled(b"\x80\x02X\xff\xff\xff\xff."), "."),
    "a million dicts": (pickled(b"\x80\x02" + b"}" * 1_000_000 + b"."), "."),
    "pickle of 16 MB": (pickled(b"\x80\x02" + b"}0" * 8_000_000 + b"."), "."),
    "pickle of two million steps": (pickled(b"\x80\x02}" + b"q\0" * 2_000_000 + b"."), "."),
    "pickle of 500,000 dicts in its memo": (pickled(many_dicts()), "."),
    "pickle that is empty": (pickled(b""), BAD),
    "pickle that takes what is not there": (pickled(b"\x80\x020000u."), BAD),
    "pickle that ends early": (pickled(state(text("a"))[:-3]), BAD),
    "pickle that unpacks to 4 GB": (archive(Record(PICKLE, BOMB, method=8, size=2**32 - (16 << 20))), BAD),
    "storage that unpacks to 4 GB": (archive(Record("archive/data/0", BOMB, method=8, size=2**32 - (16 << 20))), BAD),
    "pickle of 2 GB of nothing": (archive(Record(PICKLE, hole=2 * GB)), "."),
    "byte order of 2 GB": (archive(Record("archive/byteorder", hole=2 * GB)), "."),
    "version of 2 GB": (archive(Record("archive/version", hole=2 * GB)), "."),
    "directory of 2 GB": (huge_directory, "."),
    "directory of 38,000 records": (many_records, BAD),
    "record larger than the file": (archive(Record("archive/data/0", bytes(16), size=GB, packed_size=GB)), BAD),
    "record of two sizes": (archive(Record("archive/data/0", bytes(16), packed_size=8)), BAD),
    "pickle that is encrypted": (archive(Record(PICKLE, state(b""), flags=1)), BAD),
    "record in the parent folder": (archive(Record("../../evil", b"x")), BAD),
    "record with a full path": (archive(Record("/tmp/evil", b"x")), BAD),
    "record twice": (archive(Record("archive/data/1"), Record("archive/data/1")), BAD),
    "two directories": (lambda path: hostile.write_two_directories(path / BIN, trace_of(path)), "."),
    "file of Git LFS": (
        lambda path: (path / BIN).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "got one that begins with the text 'version '.*; in a git repository that has it in Git LFS, run git lfs pull",
    ),
    "no pickle": (lambda path: hostile.write_zip(path / BIN, [Record("archive/version", b"3\n")]), BAD),
    "tensor larger than its record": (one_tensor([400], [1]), NO_RECORD),
    "tensor of 2^120 bytes": (one_tensor([2**59, 2**59], [2**59, 1]), NO_RECORD),
    "tensor that starts before its record": (one_tensor([4], [1], -1), f"{BAD}|{NO_RECORD}"),
    "negative size": (one_tensor([-4], [1]), "."),
    "rows over each other": (one_tensor([4, 4], [0, 1]), NOT_ROWS),
    "negative stride": (one_tensor([4], [-1]), "."),
    "storage in another record": (one_tensor([4], [1], 0, "../version"), f"{BAD}|{NO_RECORD}"),
    "tensor of ten thousand axes": (one_tensor([1] * 10_000, [1] * 10_000), "."),
}

# ---- shards of Meta's files

PTH = "consolidated.01.pth"
WQ = "layers.0.attention.wq.weight"
META = {
    "shard that is a pipe": (lambda path: hostile.pipe(path / PTH), PTH),
    "shard that is a folder": (lambda path: hostile.folder(path / PTH), PTH),
    "shard that leads outside": (lambda path: outside(path, PTH), OUTSIDE),
    "shard that links to itself": (lambda path: hostile.link(path / PTH, PTH), "."),
    "shard that is a device": (lambda path: hostile.link(path / PTH, "/dev/zero"), OUTSIDE),
    "shard with code": (lambda path: torch.save({"a": Shell(f"touch {trace_of(path)}")}, path / PTH), PTH + ".*system"),
    "shard without a tensor": (lambda path: hostile.resave(path / PTH, **{WQ: None}), f"{WQ} is missing"),
    "shard of other columns": (lambda path: hostile.resave(path / PTH, **{WQ: torch.ones(32, 60)}), WQ),
    "shard of another dtype": (lambda path: hostile.resave(path / PTH, **{WQ: torch.ones(32, 64).half()}), WQ),
    "shard with a tensor of its own": (
        lambda path: hostile.resave(path / PTH, extra=torch.ones(2)),
        "extra is missing",
    ),
    "first shard missing": (lambda path: (path / "consolidated.00.pth").unlink(), "is missing"),
}

# ---- configs


def config(name: str = "config.json", **fields: Any) -> Craft:
    return lambda path: hostile.edit_json(path / name, **fields)


def config_text(content: str, name: str = "config.json") -> Craft:
    return lambda path: (path / name).write_text(content)


BAD_VALUES = (-1, 0, 1.5, float("nan"), float("inf"), "4", True, [4], {}, 10**4000)
CONFIG: dict[str, tuple[Craft, str]] = {
    "a billion layers": (config(num_hidden_layers=10**9), "too large"),
    "ten thousand layers": (config(num_hidden_layers=10_000), "too large"),
    "a trillion tokens": (config(vocab_size=10**12), "vocab_size is too large"),
    "500,000 experts": (config(num_local_experts=500_000), "too large"),
    "width of 2^40": (config(hidden_size=2**40), "hidden_size is too large"),
    "context of a trillion": (config(max_position_embeddings=10**12), "max_position_embeddings"),
    "more experts taken than there are": (config(num_experts_per_tok=9), "top_k is out of range"),
    "no expert taken": (config(num_experts_per_tok=0), "top_k is out of range"),
    "base that is not finite": (config(rope_parameters={"rope_theta": float("inf")}), "rope_theta"),
    "epsilon that is not a number": (config(rms_norm_eps=float("nan")), "norm_eps"),
    "nested deeply": (config_text('{"a":' * 100_000), "nested too deeply"),
    "nested more deeply": (config_text("[" * 200_000), "nested too deeply; expected at most 100 objects and lists"),
    "nested to just below Python's limit": (config_text(f'{{"model_type": {nested(900)}}}'), "nested too deeply"),
    "dtype nested to just below Python's limit": (
        config_text(f'{{"model_type":"mixtral","dtype":{nested(950)}}}'),
        ".",
    ),
    "100 MB": (lambda path: hostile.sparse(path / "config.json", 100 << 20), "too large"),
    "empty lists": (config_text(f'{{"a":[{"[]," * 3_000_000}[]]}}'), r"config\.json"),
    "a million empty lists": (config_text(f'{{"a":[{"[]," * 1_000_000}[]]}}'), "too large"),
    "4 MB of short strings": (config_text('{"a":[' + '"ab",' * 800_000 + '""]}'), "unknown model_type"),
    "number of 5,000 digits": (
        config_text('{"vocab_size": ' + "9" * 5000 + "}"),
        "got 5000 digits; expected at most 4000",
    ),
    "model type that clears the screen": (config(model_type="\x1b[2J\nfine"), "unknown model_type"),
    "model type of 4 MB": (config(model_type="x" * 4_000_000), "unknown model_type"),
    "leads outside": (lambda path: outside(path, "config.json"), OUTSIDE),
    "is a pipe": (lambda path: hostile.pipe(path / "config.json"), r"config\.json is not a file; got a pipe"),
    "is a folder": (lambda path: hostile.folder(path / "config.json"), r"config\.json is not a file; got a folder"),
    "no heads": (
        config(num_attention_heads=0, head_dim=None),
        "number of attention heads is wrong; got 0; expected at",
    ),
    "end-of-text ids outside": (lambda path: outside(path, "generation_config.json"), OUTSIDE),
}
CONFIG |= {
    f"{field} {str(value)[:8]}": (config(**{field: value}), ".")
    for field in (
        "num_hidden_layers",
        "vocab_size",
        "num_attention_heads",
        "num_local_experts",
        "max_position_embeddings",
    )
    for value in BAD_VALUES
    if (field, value) != ("num_hidden_layers", 1)
}
PARAMS: dict[str, tuple[Craft, str]] = {
    "a billion layers": (config("params.json", n_layers=10**9), "too large"),
    "width of 2^40": (config("params.json", dim=2**40), "."),
    "multiple of 2^60": (config("params.json", multiple_of=2**60), "."),
    "more experts taken than there are": (
        config("params.json", moe={"num_experts": 2, "num_experts_per_tok": 3}),
        "top_k is out of range",
    ),
    "100 MB": (lambda path: hostile.sparse(path / "params.json", 100 << 20), "too large"),
    "nested deeply": (config_text(nested(100_000), "params.json"), "nested too deeply"),
    "a field of its own": (config("params.json", surprise=1), "surprise"),
    "leads outside": (lambda path: outside(path, "params.json"), OUTSIDE),
}
PARAMS |= {
    f"{field} {str(value)[:8]}": (config("params.json", **{field: value}), ".")
    for field in ("n_layers", "dim", "n_heads", "multiple_of")
    for value in BAD_VALUES
}

# ---- tokenizers, which a build refuses


def tokenizer(name: str, make: Craft) -> Craft:
    return lambda path: make(path / name)


def written(content: str) -> Craft:
    return lambda path: path.write_text(content)


JSON, SETTINGS, SPM = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"


def sentencepiece(path: Path) -> None:
    (path / JSON).unlink()
    (path / SPM).write_bytes(b"\x0a\x05" * 1000)


def many_pieces(path: Path) -> None:
    (path / JSON).unlink()
    (path / SPM).write_bytes(b"\x0a\x00" * (2 << 20))


TOKENIZERS: dict[str, tuple[Craft, str]] = {
    "broken": (tokenizer(JSON, written('{"version": "1.0", "model":')), rf"{JSON} is damaged"),
    "of something else": (tokenizer(JSON, written("{}")), rf"{JSON} is damaged"),
    "nested deeply": (tokenizer(JSON, written(nested(1_000_000))), rf"{JSON} is damaged"),
    "of 2 GB": (tokenizer(JSON, partial(hostile.sparse, size=2 * GB, start=b"{")), JSON),
    "of empty lists": (tokenizer(JSON, written(f'{{"model":[{"[]," * 3_000_000}[]]}}')), JSON),
    "leads outside": (lambda path: outside(path, JSON), OUTSIDE),
    "leads nowhere": (tokenizer(JSON, partial(hostile.link, target="nothing")), JSON),
    "links to itself": (tokenizer(JSON, partial(hostile.link, target=JSON)), "."),
    "is a pipe": (tokenizer(JSON, hostile.pipe), JSON),
    "is a folder": (tokenizer(JSON, hostile.folder), JSON),
    "settings nested deeply": (tokenizer(SETTINGS, written('{"a":' * 100_000)), SETTINGS),
    "settings nested a little": (tokenizer(SETTINGS, written(f'{{"bos_token": {nested(900)}}}')), SETTINGS),
    "settings of 2 GB": (tokenizer(SETTINGS, partial(hostile.sparse, size=2 * GB)), SETTINGS),
    "settings of empty lists": (tokenizer(SETTINGS, written(f'{{"a":[{"[]," * 3_000_000}[]]}}')), SETTINGS),
    "settings that lead outside": (lambda path: outside(path, SETTINGS), OUTSIDE),
    "template that leads outside": (
        tokenizer("chat_template.jinja", partial(hostile.link, target="/etc/passwd")),
        OUTSIDE,
    ),
    "added token of 5,000 digits": (
        tokenizer(SETTINGS, written(json.dumps({"added_tokens_decoder": {"9" * 5000: "x"}}))),
        SETTINGS,
    ),
    "SentencePiece of something else": (sentencepiece, SPM),
    "SentencePiece of two million pieces": (many_pieces, SPM),
    "SentencePiece of 2 GB": (tokenizer(SPM, partial(hostile.sparse, size=2 * GB)), SPM),
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # kind -> format of the checkpoint that is spoilt, cases
    "safetensors": ("hf", SAFETENSORS),
    "index": ("sharded", INDEX),
    "torch": ("bin", TORCH),
    "meta": ("meta-mp2", META),
    "config": ("hf", CONFIG),
    "params": ("meta-mp2", PARAMS),
    "tokenizer": ("hf", TOKENIZERS),
    "ckpt": (hostile_ckpt.FORM, hostile_ckpt.CASES),
    "t5x": (hostile_t5x.FORM, hostile_t5x.CASES),
}
CASES = {
    f"{kind}: {name}": Case(form, craft, message)
    for kind, (form, cases) in KINDS.items()
    for name, (craft, message) in cases.items()
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """See `sound_checkpoints`."""
    return sound_checkpoints(tmp_path_factory.mktemp("sound"))


def sound_checkpoints(folder: Path) -> dict[str, Path]:
    """A checkpoint in every format that cases start from."""
    mixtral = make_checkpoint(folder, "mixtral", num_layers=1)
    make_byte_level(mixtral)
    llama = make_checkpoint(folder, "llama2", num_layers=1)
    forms = {"hf": mixtral, "sharded": convert(mixtral, "sharded"), "bin": convert(mixtral, "bin")}
    forms |= {hostile_ckpt.FORM: hostile_ckpt.make(folder), hostile_t5x.FORM: hostile_t5x.make(folder)}
    return forms | {"meta-mp2": convert(llama, "meta-mp2"), "stacked": convert(mixtral, "stacked")}


def spoilt(name: str, forms: dict[str, Path], folder: Path) -> Path:
    """A new checkpoint, in a folder of its own."""
    path = Path(shutil.copytree(forms[CASES[name].form], folder / "checkpoint"))
    CASES[name].craft(path)
    return path


# Reads lines {path, out}, and answers each with the refusal, and the most memory that the process took meanwhile. That is
# /proc's VmHWM: ru_maxrss counts the process that started this one.
DRIVER = """
import json, re, resource, signal, sys, time
from pathlib import Path
from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from gatework.export.config import ModelConfig
from gatework.plugins.errors import GateworkError
from gatework.runtime.engine import Engine
from gatework.plugins.errors import GateworkError
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
for line in sys.stdin:
    case = json.loads(line)
    Path("/proc/self/clear_refs").write_text("5")
    signal.alarm(int(sys.argv[1]))
    start = time.perf_counter()
    error = raised = None
    try:
        build_engine(case["path"], case["out"]) if case["out"] else Checkpoint.open(case["path"])
    except GateworkError as refusal:
        error = str(refusal)
    except BaseException as other:
        raised = f"{type(other).__name__}: {str(other)[:200]}"
    signal.alarm(0)
    seconds = time.perf_counter() - start
    peak = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    print(json.dumps({"error": error, "raised": raised, "peak": peak, "seconds": seconds}), flush=True)
"""


class Driver:
    """The process that opens and builds hostile checkpoints."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", DRIVER, str(SECONDS)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, path: Path, out: Path | None) -> dict[str, Any]:
        """What came of opening the checkpoint, or of building an engine from it."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps({"path": str(path), "out": str(out or "")}) + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        assert line, f"{path}: the process ended with {self.child.wait()}"
        return dict(json.loads(line))


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.child.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_every_case_is_refused(kind: str, forms: dict[str, Path], driver: Driver, tmp_path: Path) -> None:
    failures = []
    for place, name in enumerate(name for name in CASES if name.startswith(f"{kind}:")):
        folder = tmp_path / str(place)
        path = spoilt(name, forms, folder)
        answer = driver.answer(path, folder / "engine" if kind == "tokenizer" else None)
        if problem := found_wrong(CASES[name], answer, folder):
            failures.append(f"{name}: {problem}")
        shutil.rmtree(folder)
    assert not failures, "\n".join(failures)


def found_wrong(case: Case, result: dict[str, Any], folder: Path) -> str | None:
    """What is wrong with a refusal; None if nothing is."""
    error = result["error"]
    if error is None:
        return f"not refused; {result.get('raised')}"
    if not re.search(case.message, error):
        return f"said {error!r}"
    if not error.isprintable() or len(error) > 5000:
        return f"not a line to print: {error[:200]!r}"
    if result["peak"] > MAX_RSS:
        return f"took {result['peak'] >> 20} MB"
    if (folder / "ran").exists() or (folder / "engine").exists() or list(folder.glob(".engine*")):
        return "left something behind"
    return None


# ---- weights that are not numbers


def spoil_with_nan(path: Path) -> None:
    """One weight of an expert."""
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"][5, 7] = float("nan")
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite(forms: dict[str, Path], tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    path = Path(shutil.copytree(forms["hf"], tmp_path / "checkpoint"))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    tensors[name][5, 7] = value
    save_file(tensors, path / "model.safetensors")
    checkpoint = Checkpoint.open(path)
    checkpoint.read("layers.0.moe.w_in")
    with pytest.raises(GateworkError, match=rf"tensor {name} in .* not finite.*(nan|inf)"):
        checkpoint.read("layers.0.moe.w_out")


def test_weights_of_small_checkpoints_are_read_before_any_work(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(forms["hf"], tmp_path / "checkpoint"))
    spoil_with_nan(path)
    monkeypatch.setattr(engine_writer, "trace", None)
    for make in (build.build_engine, build.export_onnx):
        with pytest.raises(GateworkError, match="not finite"):
            make(path, tmp_path / "engine")
    checkpoint = Checkpoint.open(path)
    checkpoint.check_small(max_bytes=checkpoint.weight_bytes("layers.0.moe.w_out") - 1)  # others are read in their turn


def test_onnx_is_not_loaded_before_the_checkpoint_is_opened(forms: dict[str, Path], tmp_path: Path) -> None:
    """Loading it takes longer than refusing does."""
    path = Path(shutil.copytree(forms["hf"], tmp_path / "checkpoint"))
    spoil_with_nan(path)
    code = """
import sys
from gatework.runtime.cli import main
status = main(sys.argv[1:])
print(status, sorted({"onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers"} & sys.modules.keys()))
"""
    for words in (["build", path, "--out", tmp_path / "engine"], ["export", path, "--out", tmp_path / "onnx"]):
        command = [sys.executable, "-c", code, *map(str, words)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "2 []\n"


def test_weights_that_are_not_finite_in_turned_rows(forms: dict[str, Path], tmp_path: Path) -> None:
    """Stacked experts are transposed while they are read, query rows are put in another order."""
    path = Path(shutil.copytree(forms["stacked"], tmp_path / "checkpoint"))
    names = {"layers.0.block_sparse_moe.w2": "layers.0.moe.w_out", WQ: "layers.0.attn.q.weight"}
    for file in path.glob("*.pt"):
        tensors = torch.load(file, weights_only=True)
        for name in names.keys() & tensors.keys():
            tensors[name][-1, -1] = float("nan")
        torch.save(tensors, file)
    checkpoint = Checkpoint.open(path)
    for stored, canonical in names.items():
        with pytest.raises(GateworkError, match=f"tensor {stored} in .* not finite"):
            list(checkpoint.parts(canonical))


# ---- the command

# Runs a command, and adds its seconds and its peak memory to what it wrote. The process that measures is a small one: ru_maxrss
# of a child begins with the memory of the process that it was made from.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}))
sys.exit(done.returncode)
"""


def run_command(*words: object) -> tuple[int, str, dict[str, float]]:
    """Exit code and standard error of a command, and what it took: seconds, bytes of peak memory."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-m", "gatework.runtime.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * SECONDS)
    return done.returncode, done.stderr, json.loads(done.stdout)


def refused_by_command(*words: object) -> str:
    """The line with which the command refuses, in little memory."""
    status, err, took = run_command(*words)
    check_refusal(status, err)
    assert took["peak"] < MAX_RSS, f"{took['peak'] / 1e6:.0f} MB"
    return err


INSPECTED = [
    "safetensors: header of 95 MB",
    "torch: pickle that unpacks to 4 GB",
    "t5x: a trillion chunks",
]


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect(name: str, forms: dict[str, Path], tmp_path: Path) -> None:
    path = spoilt(name, forms, tmp_path)
    assert re.search(CASES[name].message, refused_by_command("inspect", path))
    assert not trace_of(path).exists()


@pytest.mark.parametrize("name", ["tokenizer: broken"])
def test_build(name: str, forms: dict[str, Path], tmp_path: Path) -> None:
    path = spoilt(name, forms, tmp_path)
    assert re.search(CASES[name].message, refused_by_command("build", path, "--out", tmp_path / "new" / "engine"))
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[" * 200_000, "it is not JSON"), ("{" + " " * (9 << 20) + "}", "it is too large")],
    ids=["nested deeply", "9 MB"],
)
def test_manifest_of_an_engine(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(GateworkError, match=rf"manifest\.json is damaged: {message}"):
        Engine.open(tmp_path)


def test_engine_of_a_billion_layers(forms: dict[str, Path]) -> None:
    model = Checkpoint.open(forms["hf"]).config.to_dict()
    with pytest.raises(GateworkError, match="num_layers is too large"):
        ModelConfig.from_dict(model | {"num_layers": 10**9, "moe": None})
