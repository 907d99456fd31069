"""The calibration file: what it says, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gatework.export.calibrate import calibrate
from gatework.export.calibration import Calibration, Range
from gatework.export.checkpoint import Checkpoint
from gatework.plugins.errors import GateworkError
from tests.checkpoints import make_checkpoint

Q = "layers.0.attn.q.weight"
NORM = "layers.0.attn_norm.weight"

Change = Callable[[str], str]  # of a file's text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("calibration"), "mixtral", num_layers=1))


@pytest.fixture(scope="module")
def made(checkpoint: Checkpoint) -> Calibration:
    return calibrate(checkpoint, list(range(20)), smooth=0.5)


def test_what_is_saved_is_loaded(checkpoint: Checkpoint, made: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    for calibration in (made, calibrate(checkpoint, list(range(20)))):
        calibration.save(path)
        assert Calibration.load(path, checkpoint) == calibration
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert re.search('^ "tokens": 20,$', path.read_text(), re.MULTILINE)


def test_a_save_that_fails_leaves_nothing(made: Calibration, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "calibration.json"):
        with pytest.raises(OSError, match=re.escape(str(path.parent))):
            made.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def signed(fields: dict[str, Any]) -> str:
    """A file's text with the checksum that it should have."""
    fields.pop("checksum", None)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps(fields | {"checksum": hashlib.sha256(canonical.encode()).hexdigest()})


def edit(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change to the fields of a file, signed again."""

    def edited(text: str) -> str:
        fields = json.loads(text)
        change(fields)
        return signed(fields)

    return edited


REFUSED: dict[str, tuple[Change, str]] = {
    "cut short": (lambda text: text[: len(text) // 2], "is not JSON"),
    "no object": (lambda text: "[]", "holds no JSON object"),
    "a field altered": (
        lambda text: text.replace('"tokens": 20', '"tokens": 21'),
        "is damaged: its content was altered",
    ),
    "no checksum": (lambda text: text.replace('"checksum"', '"check"'), "is damaged: its content was altered"),
    "no format version": (edit(lambda f: f.pop("format_version")), "got format_version None; expected 1"),
    "a newer format": (edit(lambda f: f.update(format_version=2)), "got format_version 2; expected 1"),
    "another checkpoint": (edit(lambda f: f.update(fingerprint="0" * 64)), "was not made from"),
    "an unknown field": (edit(lambda f: f.update(more=1)), "does not hold what a calibration does"),
    "a missing field": (edit(lambda f: f.pop("tokens")), "does not hold what a calibration does"),
    "ranges in a list": (edit(lambda f: f.update(ranges=[1])), "does not hold what a calibration does"),
    "factors that are no list": (edit(lambda f: f.update(smooth={NORM: 1.0})), "does not hold what a calibration does"),
    "a range that is a number": (edit(lambda f: f["ranges"].update({Q: 1.0})), "does not hold what a calibration does"),
    "no range": (edit(lambda f: f["ranges"].pop(Q)), f"has no range for {Q}; fix"),
    "no ranges": (edit(lambda f: f.update(ranges={})), f"has no range for {Q}, and 4 more"),
    "a range too many": (
        edit(lambda f: f["ranges"].update(extra=f["ranges"][Q])),
        "has a range for extra, which takes none",
    ),
    "NaN": (edit(lambda f: f["ranges"][Q].update(absmax=math.nan)), f"the range of {Q} is not valid; got absmax nan"),
    "infinite": (
        edit(lambda f: f["ranges"][Q].update(absmax=math.inf)),
        f"the range of {Q} is not valid; got absmax inf",
    ),
    "negative": (edit(lambda f: f["ranges"][Q].update(percentile=-1.0)), f"the range of {Q} is not valid"),
    "percentile above absmax": (
        edit(lambda f: f["ranges"][Q].update(percentile=1e9)),
        f"the range of {Q} is not valid",
    ),
    "text for a number": (edit(lambda f: f["ranges"][Q].update(absmax="1")), f"the range of {Q} is not valid"),
    "a norm without factors": (edit(lambda f: f["smooth"].pop(NORM)), f"has no smoothing factors for {NORM}"),
    "a factor too few": (
        edit(lambda f: f["smooth"][NORM].pop()),
        f"number of smoothing factors for {NORM}; got 63; expected 64",
    ),
    "a factor of zero": (edit(lambda f: f["smooth"][NORM].append(0.0)), f"a smoothing factor of {NORM} is not valid"),
    "factors without alpha": (
        edit(lambda f: f.update(alpha=None)),
        "alpha and smoothing factors go together; got alpha None and 2",
    ),
    "alpha without factors": (
        edit(lambda f: f.update(smooth={})),
        "alpha and smoothing factors go together; got alpha 0.5 and 0",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(
    checkpoint: Checkpoint, made: Calibration, tmp_path: Path, change: Change, message: str
) -> None:
    path = tmp_path / "calibration.json"
    made.save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(GateworkError, match=re.escape(message)) as caught:
        Calibration.load(path, checkpoint)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(GateworkError, match="no such file; fix: make one with `gatework calibrate`"):
            Calibration.load(path, checkpoint)


def test_scales(made: Calibration) -> None:
    ranges = {"a": Range(6.0, 3.0), "zero": Range(0.0, 0.0), "dust": Range(1e-40, 0.0)}
    calibration = replace(made, ranges=ranges)
    assert calibration.scale("a", 127) == 6 / 127
    assert calibration.scale("a", 448, "percentile") == 3 / 448
    assert calibration.scale("zero", 127) == calibration.scale("dust", 448) == 1.0
    with pytest.raises(GateworkError, match="no range for b"):
        calibration.scale("b", 127)
