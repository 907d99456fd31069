"""The command line: what each command prints, exit codes, and how it ends when it is interrupted."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import pytest

from gatework import LLM, SamplingParams
from gatework.export.checkpoint import Checkpoint
from gatework.export.sharing import CLONES, LINKS
from gatework.plugins.errors import GateworkWarning
from gatework.runtime.cli import main
from gatework.runtime.commands import bench as bench_command
from gatework.runtime.formatting import counted, numbers, size
from tests.checkpoints import DENSE_FIRST, EXPERTS_LAST, hf_config, make_checkpoint
from tests.refusals import Refuse
from tests.switch import switch_config

TINY = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
PROMPT = "def read(path):\n"
COMMANDS = ("build", "export", "calibrate", "generate", "verify", "bench", "inspect")
GREEDY = SamplingParams(max_tokens=12, temperature=0)
MIXTRAL = (
    '{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8, '
    '"norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8}}'
)

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    """Runs a command line that has to succeed, with nothing on standard error, and gives its output."""

    def call(*argv: object) -> str:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return str(out)

    return call


def process(*argv: object, **options: object) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "gatework.runtime.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint with a chat template, built by the command."""
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for file in TINY.iterdir():
        if file.name != "heldout.txt":
            (checkpoint / file.name).write_bytes(file.read_bytes())
    (checkpoint / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    argv = ["build", checkpoint, "--out", folder / "tiny", "--max-seq", 128, "--max-batch", 3, "--prefill-chunk", 16]
    assert main([str(word) for word in argv]) == 0
    return folder / "tiny"


@pytest.fixture(scope="module")
def llm(engine: Path) -> LLM:
    return LLM(engine)


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine without a tokenizer."""
    folder = tmp_path_factory.mktemp("mute")
    checkpoint = make_checkpoint(folder, "llama2", num_layers=1)
    argv = ["build", checkpoint, "--out", folder / "engine", "--precision", "fp32", "--quiet"]
    assert main([str(word) for word in argv]) == 0
    return folder / "engine"


# ---- help


def test_version() -> None:
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"gatework {version('gatework')}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"examples:\n  gatework {command} " in out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "build",
            "with an encoder (Switch Transformer) take no --target cuda, --calibration-text, --stages, --strip-weights",
        ),
        ("export", "in Polygraphy's format, of models without an encoder"),
        ("verify", "1: not;\n2: a mistake in use"),
    ],
)
def test_help_tells_limits(command: str, words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert words in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["build", "x"],
        ["calibrate", "x", "--text", "y"],
        ["calibrate", "x", "--text", "y", "--ids", "z", "--out", "o"],
        ["verify", "x"],
        ["generate", "x"],
        ["generate", "x", "--prompt", "a", "--chat", "b"],
        ["generate", "x", "--prompt-ids", "1,two"],
        ["generate", "x", "--prompt", "a", "--temperature", "hot"],
        ["generate", "x", "--prompt", "a", "--threads", "257"],
        ["verify", "x", "--reference", "y", "--threads", "257"],
        ["build", "x", "--out", "y", "--max-seq", "many"],
        ["build", "x", "--out", "y", "--device-memory", "0GB"],
        ["inspect", "x", "--fits", "24GiB,lots"],
        ["inspect", "x", "--fits", "9" * 400 + "GB"],
        ["bench", "x", "--repeat", "0"],
        ["bench", "x", "y", "--fast"],
    ],
)
def test_usage_errors(argv: list[str], refused: Refuse) -> None:
    command = argv[0] if argv and argv[0] in COMMANDS else None
    assert refused(*argv).endswith(f"; fix: see `gatework{f' {command}' if command else ''} --help`\n")


def test_a_bad_value_is_named_with_its_option(refused: Refuse) -> None:
    assert "argument --batch: got 'two'; expected a whole number; fix" in refused("bench", "x", "--batch", "two")
    assert "argument --batch: got 0; expected at least 1; fix" in refused("bench", "x", "--batch", "0")
    assert "unknown arguments: y --fast; fix: see" in refused("bench", "x", "y", "--fast")


# ---- build, export


def test_build_says_what_it_made(tmp_path: Path, run: Run) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama2", num_layers=1)
    out = run("build", checkpoint, "--precision", "int4", "--group-size", 16, "--out", tmp_path / "engine")
    assert out.startswith(f"built {tmp_path / 'engine'}: int4 for cpu, ")
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert manifest["limits"] == {"max_batch": 8, "max_seq": 64, "prefill_chunk": 64}
    assert manifest["tensors"]["layers.0.attn.o.weight.scales"]["shape"] == [64 // 16, 64 // 16, 16]
    assert run("build", checkpoint, "--out", tmp_path / "engine", "--force", "--quiet") == ""


def test_build_passes_limits_on(engine: Path) -> None:
    limits = json.loads((engine / "manifest.json").read_text())["limits"]
    assert limits == {"max_batch": 3, "max_seq": 128, "prefill_chunk": 16}


def test_export(tmp_path: Path, run: Run) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama2", num_layers=1)
    out = tmp_path / "onnx"
    options = ["--dtype", "float16", "--max-seq", 32, "--all-logits"]
    assert run("export", checkpoint, "--out", out, *options).startswith(f"wrote {out}: float16, ")
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input
    }
    assert shapes["past.0.k"][2] == 32
    (logits,) = [value for value in graph.output if value.name == "logits"]
    assert logits.type.tensor_type.shape.dim[1].dim_param  # not 1


def test_export_without_copies(tmp_path: Path, run: Run) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama2", num_layers=1)
    weights, linked = Checkpoint.open(checkpoint).nbytes, tmp_path / "linked"
    found = run("export", checkpoint, "--link", "--out", linked, "--max-seq", 8).splitlines()
    assert found[0].startswith(f"wrote {linked}: float32, ")
    assert found[1:] in ([f"weights: {size(weights)} of the checkpoint's files, {how}"] for how in (CLONES, LINKS))
    assert main(["export", str(checkpoint), "--link"]) == 2
    found = run("export", checkpoint, "--max-seq", 8).splitlines()
    assert found[0].startswith(f"wrote {checkpoint / 'model.onnx'}: float32, ")
    assert found[1:] == [f"weights: {size(weights)} of the checkpoint's files, in place"]


# ---- generate


def test_text_streams_out(engine: Path, llm: LLM, run: Run) -> None:
    text = llm.generate(PROMPT, GREEDY)[0].text
    assert run("generate", engine, "--prompt", PROMPT, "--max-tokens", 12) == text + "\n"
    assert run("generate", engine, "--prompt", PROMPT, "--max-tokens", 12, "--echo") == PROMPT + text + "\n"


def test_text_appears_while_it_is_made(engine: Path) -> None:
    command = [sys.executable, "-m", "gatework.runtime.cli", "generate", engine, "--prompt", PROMPT, "--ignore-eos"]
    with subprocess.Popen([*command, "--max-tokens", "100"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        first = os.read(child.stdout.fileno(), 1 << 16)
        rest = child.stdout.read()
    assert child.returncode == 0
    assert first
    assert rest


def test_prompts_from_files_and_standard_input(
    engine: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = run("generate", engine, "--prompt", PROMPT, "--max-tokens", 12)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert run("generate", engine, "--file", tmp_path / "prompt.txt", "--max-tokens", 12) == want
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run("generate", engine, "--file", "-", "--max-tokens", 12) == want


def test_several_prompts(engine: Path, llm: LLM, run: Run) -> None:
    prompts = [PROMPT, "class Stack:\n"]
    texts = [completion.text for completion in llm.generate(prompts, GREEDY)]
    out = run("generate", engine, "--prompt", prompts[0], "--prompt", prompts[1], "--max-tokens", 12)
    assert out == f"[1]\n{texts[0]}\n[2]\n{texts[1]}\n"


def test_json_has_everything(engine: Path, llm: LLM, run: Run) -> None:
    out = run("generate", engine, "--prompt", PROMPT, "--max-tokens", 4, "--json", "--logprobs", 2)
    (line,) = out.splitlines()
    result = json.loads(line)
    want = llm.generate(PROMPT, SamplingParams(max_tokens=4, temperature=0, logprobs=2))[0]
    assert want.logprobs is not None
    assert result == {
        "text": want.text,
        "token_ids": want.token_ids,
        "logprobs": [{str(token): value for token, value in row.items()} for row in want.logprobs],
        "finish_reason": "length",
        "prompt_token_ids": want.prompt_token_ids,
    }


def test_logprobs_are_listed(engine: Path, llm: LLM, run: Run) -> None:
    out = run("generate", engine, "--prompt", PROMPT, "--max-tokens", 3, "--logprobs", 1)
    want = llm.generate(PROMPT, SamplingParams(max_tokens=3, temperature=0, logprobs=1))[0]
    assert out.startswith(want.text + "\n")
    lines = out[len(want.text) + 1 :].splitlines()
    assert [int(line.split()[0]) for line in lines] == want.token_ids
    assert want.logprobs is not None
    values = [row[token] for row, token in zip(want.logprobs, want.token_ids, strict=True)]
    assert [float(line.split()[1]) for line in lines] == pytest.approx(values, abs=1e-4)


def test_sampling_options_arrive(engine: Path, llm: LLM, run: Run) -> None:
    options = {"max_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 3}
    options |= {"repetition_penalty": 1.2}
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    want = llm.generate(PROMPT, SamplingParams(**options))[0]  # type: ignore[arg-type]
    for _ in range(2):
        assert run("generate", engine, "--prompt", PROMPT, *flags) == want.text + "\n"
    stop = llm.generate(PROMPT, GREEDY)[0].text[3:5]
    want = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0, stop=["\0", stop]))[0]
    out = run("generate", engine, "--prompt", PROMPT, "--max-tokens", 12, "--stop", "\0", "--stop", stop)
    assert out == want.text + "\n"
    assert want.finish_reason == "stop"


def test_chat(engine: Path, llm: LLM, run: Run) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sort a list"}]
    want = llm.chat(messages, GREEDY)
    out = run("generate", engine, "--chat", "Sort a list", "--system", "Be brief.", "--max-tokens", 12, "--json")
    assert json.loads(out)["token_ids"] == want.token_ids
    assert json.loads(out)["prompt_token_ids"] == want.prompt_token_ids


def test_token_ids_without_a_tokenizer(mute: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    want = LLM(mute).generate([1, 2, 3], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))[0].token_ids
    monkeypatch.setattr(LLM, "generate", None)  # they stream out, as text does
    out = run("generate", mute, "--prompt-ids", "1,2,3", "--max-tokens", 5, "--ignore-eos")
    assert out == " ".join(map(str, want)) + "\n"
    assert run("generate", mute, "--prompt-ids", "1,2,3", "--max-tokens", 5, "--ignore-eos", "--echo") == "1 2 3 " + out
    out = run("generate", mute, "--prompt-ids", "1, 2, 3", "--max-tokens", 5, "--ignore-eos", "--logprobs", 0)
    assert [int(line.split()[0]) for line in out.splitlines()[1:]] == want


def test_what_an_engine_without_a_tokenizer_takes(mute: Path, refused: Refuse) -> None:
    for kind in ("--prompt", "--chat"):
        assert "no tokenizer; got text; expected token ids; fix: give token ids (--prompt-ids 1,2,3)" in refused(
            "generate", mute, kind, "x"
        )
    assert "fix: leave --stop out, or" in refused("generate", mute, "--prompt-ids", "1", "--stop", "x")


def test_a_prompt_longer_than_the_models_context(mute: Path, refused: Refuse) -> None:
    err = refused("generate", mute, "--prompt-ids", "5 " * 65)
    assert (
        "got 65 tokens; expected at most 64; fix: shorten the prompt: the engine has the model's whole context" in err
    )


# ---- inspect


def test_inspect_params_json(tmp_path: Path, run: Run) -> None:
    (tmp_path / "params.json").write_text(MIXTRAL)
    out = run("inspect", tmp_path / "params.json")
    for text in ("46,702,792,704", "12,879,925,248", "93,407,682,560", "131,072", "8, top 2", "1,000,000", "none"):
        assert text in out, text
    assert run("inspect", tmp_path).splitlines()[1:] == out.splitlines()[1:]
    facts = json.loads(run("inspect", tmp_path / "params.json", "--json", "--fits", "93 GB,94GB,1TiB"))
    assert facts["num_parameters"] == 46_702_792_704
    moe = {"num_experts": 8, "top_k": 2, "renormalize": True, "shared_width": None, "bias": False}
    assert facts["model"]["moe"] == moe | {"alpha": 1.0, "beta": 0.0, "limit": 0.0}
    assert facts["weight_bytes"]["bf16"] == 93_405_585_408 + 2 * 32 * 8 * 4096  # routers are in float32
    assert facts["kv_bytes_per_token"] == {"fp32": 262_144, "bf16": 131_072}
    assert facts["kv_bytes_at_context"]["bf16"] == 131_072 * 32_768
    # weights alone would fit into 94 GB
    assert facts["fits"]["bf16"] == {"93 GB": False, "94GB": False, "1TiB": True}
    assert facts["devices"]["bf16"] == {"93 GB": 2, "94GB": 2, "1TiB": 1}


def test_inspect_checkpoint(run: Run) -> None:
    out = run("inspect", TINY, "--fits", "7MB,7MiB,20MB")
    assert "stored as bfloat16, 7,093,632 bytes" in out
    assert "3,546,816" in out
    (row,) = [line for line in out.splitlines() if line.startswith("int8")]
    assert row.split()[-3:] == ["fits", "fits", "fits"]
    (row,) = [line for line in out.splitlines() if line.startswith("fp32 ") and "fits" in line]
    assert row.split()[-5:] == ["on", "3", "on", "3", "fits"]


def test_inspect_engine(engine: Path, run: Run) -> None:
    out = run("inspect", engine)
    assert "cpu, int8" in out
    assert "3 sequences of 128 tokens, prefill by 16" in out
    facts = json.loads(run("inspect", engine, "--json"))
    manifest = json.loads((engine / "manifest.json").read_text())
    assert facts["weight_bytes"]["int8"] == manifest["weight_bytes"]["total"]
    assert facts["context"] == 128
    assert facts["engine"]["files"] == {name: file["size"] for name, file in manifest["files"].items()}


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        (hf_config("mixtral"), ""),
        (hf_config("qwen2_moe", num_layers=5, **DENSE_FIRST), "4 of 5: 1 to 4; the others are 192 wide"),
        (hf_config("qwen3_moe", **EXPERTS_LAST), "1 of 4: 3; the others are 192 wide"),
        (switch_config(8, 8), "4 of 8: 1, 3, … 7, as in the encoder; the others are 96 wide"),
        (switch_config(4, 6), "3 of 6: 1, 3, 5, and in the encoder 2 of 4: 1, 3; the others are 96 wide"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_inspect_says_which_layers_have_experts(tmp_path: Path, run: Run, config: Any, experts: str) -> None:
    """And that what a prompt's keys and values take is counted where an encoder reads it."""
    config.save_pretrained(tmp_path)
    out = run("inspect", tmp_path)
    assert re.findall(r"^layers with experts +(.*)", out, re.MULTILINE) == [experts] * bool(experts)
    assert ("half of the total is cross-attention's: keys" in out) == (config.model_type == "switch_transformers")


def test_counts_and_numbers_in_words() -> None:
    assert [counted(n, "token") for n in (0, 1, 2048)] == ["0 tokens", "1 token", "2,048 tokens"]
    assert [counted(n, "matrix", "matrices") for n in (1, 2)] == ["1 matrix", "2 matrices"]
    assert numbers([0, *range(3, 8), 9, 10]) == "0, 3 to 7, 9, 10"
    assert numbers([3, 7, 11, 15, 23], 4) == "3, 7, … 15, 23"
    assert numbers([]) == ""


# ---- what is loaded, and what if it is not there


def test_running_an_engine_loads_no_build_tool(mute: Path) -> None:
    script = f"""if True:
        import sys
        from gatework.runtime.cli import main
        assert main(["generate", {str(mute)!r}, "--prompt-ids", "1"]) == 0
        assert main(["bench", {str(mute)!r}, "--new-tokens", "1", "--repeat", "1"]) == 0
        assert main(["inspect", {str(mute)!r}]) == 0
        loaded = {{"torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "transformers"}} & set(sys.modules)
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", ["build", "export", "calibrate", "verify", "inspect"])
def test_a_missing_extra_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    rest = {"verify": ["--reference", "y"], "inspect": []}.get(command, ["--out", str(tmp_path / "out")])
    rest += ["--text", "y"] if command == "calibrate" else []
    assert main([command, "x", *rest]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith("got no torch; fix: pip install 'gatework[build]'\n")


# ---- endings


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(MIXTRAL)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gatework.runtime.cli", "inspect", tmp_path / "params.json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_text_that_the_output_cannot_hold_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    (tmp_path / "é" / "params.json").write_text(MIXTRAL)
    done = process("inspect", tmp_path / "é", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/\\xe9: ")


def test_closed_streams(mute: Path, refused: Refuse, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed; fix: give --prompt" in refused("generate", mute, "--file", "-")
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", str(mute)]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: output to a full disk is not tried")
def test_output_to_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(MIXTRAL)
    command = [sys.executable, "-m", "gatework.runtime.cli", "inspect", tmp_path / "params.json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "gatework: error: no space left; fix: free some, or write elsewhere\n")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), 2, "out of memory"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "error: /root/x: Permission denied"),
    ],
)
def test_endings(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(bench_command, "run", fail)
    assert main(["bench", "x"]) == status
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == (status == 2)


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def warn(args: object) -> int:
        warnings.warn("slower than it could be", GateworkWarning, stacklevel=2)
        return 0

    monkeypatch.setattr(bench_command, "run", warn)
    assert main(["bench", "x"]) == 0
    assert capsys.readouterr() == ("", "gatework: warning: slower than it could be\n")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(bench_command, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["bench", "x"])
