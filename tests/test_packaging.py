"""What a user installs: the wheel's contents, and what importing from it loads."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import gatework

ROOT = Path(__file__).parents[1]
ROOMS = {"export", "plugins", "runtime"}
BUILD_TOOLS = {"onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "transformers"}

LoadedBy = Callable[[str], set[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built out of the source distribution, which must therefore hold all that building takes."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(params=["environment", "wheel"])
def loaded_by(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedBy:
    """Maps a statement to the modules that a fresh interpreter has loaded after running it.

    Gatework comes from the environment that runs the tests, usually an editable install, or from the wheel.
    """
    command = [sys.executable, "-P"]  # -P: the working directory is not on sys.path
    env = os.environ.copy()
    if request.param == "wheel":
        zipfile.ZipFile(request.getfixturevalue("wheel")).extractall(tmp_path)
        command.append("-S")  # no .pth files, and so no editable install ahead of the wheel
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])

    def loaded(statement: str) -> set[str]:
        script = f"{statement}\nimport json, sys\nprint(json.dumps([sys.modules['gatework'].__file__, *sys.modules]))"
        output = subprocess.run([*command, "-c", script], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        file, *modules = json.loads(output)
        assert (request.param == "wheel") == (Path(file) == tmp_path / "gatework/__init__.py")
        return set(modules)

    return loaded


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"gatework", f"gatework-{gatework.__version__}.dist-info"}
    assert {"gatework/py.typed", "gatework/runtime/verify/html.css"} <= set(names)
    modules = {f"gatework/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {"gatework/__init__.py", *modules}


def test_wheel_holds_the_cpu_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "gatework/plugins/moe/cpu/libgatework_cpu.so" in names
    assert not any(name.endswith((".cpp", ".h", "CMakeLists.txt")) for name in names)


def test_without_a_compiler_the_wheel_is_pure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, env=os.environ | {"CXX": "false", "CC": "false"})
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())


def test_wheel_declares_license_and_command(wheel: Path) -> None:
    (dist,) = metadata.distributions(path=[str(wheel)])
    assert dist.metadata["License-Expression"] == "Apache-2.0"
    assert dist.metadata.get_all("License-File") == ["LICENSE"]
    assert [(entry.name, entry.value) for entry in dist.entry_points] == [("gatework", "gatework.runtime.cli:main")]


def test_version_matches_the_metadata() -> None:
    assert gatework.__version__ == metadata.version("gatework")


def test_public_names_are_listed_and_others_refused() -> None:
    assert {"LLM", "SamplingParams", "__version__"} <= set(dir(gatework))
    with pytest.raises(AttributeError, match="module 'gatework' has no attribute 'LMM'"):
        _ = gatework.LMM


def test_importing_the_package_loads_no_room(loaded_by: LoadedBy) -> None:
    modules = loaded_by("import gatework")
    assert not {name for name in modules if name.startswith("gatework.")}
    assert not modules & ROOMS


def test_rooms_are_importable_by_their_full_names_only(loaded_by: LoadedBy) -> None:
    modules = loaded_by("import gatework.export, gatework.plugins, gatework.runtime")
    assert {f"gatework.{room}" for room in ROOMS} <= modules
    assert not modules & ROOMS


@pytest.mark.parametrize(
    "statement",
    ["import gatework.runtime", "from gatework import LLM, SamplingParams", "import gatework.runtime.cli"],
)
def test_the_runtime_loads_no_build_tool(loaded_by: LoadedBy, statement: str) -> None:
    assert not loaded_by(statement) & BUILD_TOOLS
