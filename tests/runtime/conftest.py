"""Property tests draw the same examples every time and leave their caches under build/; refused command lines are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import configuration, settings

from gatework.runtime.cli import main
from tests.refusals import Refuse, check_refusal

configuration.set_hypothesis_home_dir(Path(__file__).parents[2] / "build" / "cache" / "hypothesis")
settings.register_profile("gatework", database=None, deadline=None, derandomize=True)
settings.load_profile("gatework")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> Refuse:
    """Runs a command line that has to fail as it should, and gives the line on standard error."""

    def call(*argv: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        check_refusal(status, err)
        assert out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return str(err)

    return call
