"""Property tests draw the same examples every time and leave their caches under build/."""

from pathlib import Path

from hypothesis import configuration, settings

configuration.set_hypothesis_home_dir(Path(__file__).parents[2] / "build" / "cache" / "hypothesis")
settings.register_profile("gatework", database=None, deadline=None, derandomize=True)
settings.load_profile("gatework")
