"""gatework calibrate: what it writes and says, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from gatework.export import calibrate as calibrate_module
from gatework.export.calibrate import calibrate
from gatework.export.calibration import Calibration
from gatework.export.checkpoint import Checkpoint
from gatework.runtime.cli import main
from gatework.runtime.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.refusals import Refuse

TINY = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
TEXT = TINY / "heldout.txt"


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("mute"), "llama2", num_layers=1)


def run(*argv: object) -> None:
    assert main(["calibrate", *map(str, argv)]) == 0


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "calibration.json"
    run(TINY, "--text", TEXT, "--out", out, "--tokens", 100, "--window", 32, "--smooth", 0.6)
    said = capsys.readouterr()
    assert said.out.startswith(f"wrote {out}: 17 ranges over 100 tokens, in ")
    assert said.err == ""
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None
    digest = hashlib.sha256(TEXT.read_bytes()).hexdigest()
    ids = tokenizer.encode(TEXT.read_text())[:100]
    want = calibrate(TINY, ids, window=32, smooth=0.6, text_sha256=digest)
    assert Calibration.load(out, Checkpoint.open(TINY)) == want


def test_the_same_file_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "calibration.json"
    options = [TINY, "--text", TEXT, "--out", out, "--tokens", 64, "--quiet"]
    run(*options)
    first = out.read_bytes()
    run(*options, "--force")
    assert out.read_bytes() == first
    assert capsys.readouterr().out == ""
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


def test_token_ids(mute: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1 2\n3\t127\n")
    run(mute, "--ids", tmp_path / "ids.txt", "--out", tmp_path / "calibration.json")
    found = Calibration.load(tmp_path / "calibration.json", Checkpoint.open(mute))
    assert found.ranges == calibrate(mute, [1, 2, 3, 127]).ranges
    assert (found.tokens, found.window) == (4, 64)


def test_files_that_are_no_text(refused: Refuse, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "calibration.json"
    text.touch()
    assert "the text is empty; fix: give some" in refused("calibrate", TINY, "--text", text, "--out", out)
    assert "the text is too short; got 0 tokens" in refused("calibrate", TINY, "--ids", text, "--out", out)
    text.write_bytes(b"caf\xe9")
    for kind in ("--text", "--ids"):
        assert "text.txt is not UTF-8 text: unexpected end" in refused("calibrate", TINY, kind, text, "--out", out)
    text.unlink()
    assert "text.txt: No such file or directory" in refused("calibrate", TINY, "--text", text, "--out", out)
    text.mkdir()
    assert "text.txt: Is a directory" in refused("calibrate", TINY, "--text", text, "--out", out)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("1", "the text is too short; got 1 tokens; expected at least 2"),
        ("1 two 3", "ids.txt does not hold token ids; got 'two'; expected decimal numbers"),
        ("1 -2", "got '-2'"),
        ("1 ²", "got '²'"),
        ("1 128", "a token id is out of range; got 128; expected 0 to 127"),
        ("1 " + "9" * 5000, "ids.txt does not hold token ids; got '99999999999999999999'"),
    ],
    ids=["one", "a word", "a sign", "another script", "out of range", "huge"],
)
def test_ids_that_are_refused(refused: Refuse, mute: Path, tmp_path: Path, ids: str, message: str) -> None:
    (tmp_path / "ids.txt").write_text(ids)
    assert message in refused("calibrate", mute, "--ids", tmp_path / "ids.txt", "--out", tmp_path / "c.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", 1], "the text is too short; got 1 tokens"),
        (["--window", 1], "window is out of range; got 1"),
        (["--window", 2**20], "window is out of range; got 1048576"),
        (["--smooth", 1.5], "--smooth is out of range; got 1.5; expected between 0 and 1"),
        (["--smooth", "nan"], "--smooth is out of range; got nan"),
    ],
)
def test_bad_options(refused: Refuse, tmp_path: Path, options: list[object], message: str) -> None:
    assert message in refused("calibrate", TINY, "--text", TEXT, "--out", tmp_path / "c.json", *options)


@pytest.mark.parametrize(("name", "found"), [("none/c.json", "no such folder"), ("a" * 300, "File name too long")])
def test_a_file_that_cannot_be_written_is_refused_at_once(
    refused: Refuse, tmp_path: Path, name: str, found: str
) -> None:
    assert found in refused("calibrate", tmp_path, "--text", TEXT, "--out", tmp_path / name)


def test_a_checkpoint_without_a_tokenizer(refused: Refuse, mute: Path, tmp_path: Path) -> None:
    err = refused("calibrate", mute, "--text", TEXT, "--out", tmp_path / "c.json")
    assert f"{mute} has no tokenizer; fix: give token ids instead of text: --ids FILE" in err


def test_output_in_the_way(refused: Refuse, tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"
    out.write_text("mine")
    assert f"{out} exists; fix: pass --force to replace it" in refused("calibrate", TINY, "--text", TEXT, "--out", out)
    assert out.read_text() == "mine"
    (tmp_path / "link").symlink_to("elsewhere")
    for place in (tmp_path, tmp_path / "link"):
        err = refused("calibrate", TINY, "--text", TEXT, "--out", place, "--force")
        assert f"{place} is in the way; got a folder, link or device; expected a file to write" in err
    err = refused("calibrate", TINY, "--text", TEXT, "--out", tmp_path / "none" / "c.json")
    assert "none/c.json; got no such folder; fix: make it, or write elsewhere" in err


def test_an_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "calibration.json"
    out.write_text("old")

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_module, "load_weights", interrupt)
    assert main(["calibrate", str(TINY), "--text", str(TEXT), "--out", str(out), "--force"]) == 130
    assert out.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


def test_a_damaged_checkpoint(refused: Refuse, mute: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(mute, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    (tmp_path / "ids.txt").write_text("1 2 3")
    err = refused("calibrate", broken, "--ids", tmp_path / "ids.txt", "--out", tmp_path / "c.json")
    assert "tensor model.layers.1." in err
