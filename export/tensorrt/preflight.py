"""What a GPU build is going to make, known before any work: sizes on disk and in the device's memory."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from gatework.export.config import ModelConfig
from gatework.export.options import BuildOptions
from gatework.export.sizes import GPU_VALUE, caches, gpu_weight_bytes
from gatework.export.tensorrt.kernels import engine_kernels, largest_call, most_tokens
from gatework.export.tensorrt.toolchain import Compiler, require_gpu
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.workspace import layout

_ROPE_TABLES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """Bytes, but for the names and `kernels`.

    plan: dense weights and tables, of the encoder's plan as well; its kernels come on top, a few megabytes. experts: their
    weights and scales. kv_cache: of max_batch sequences of max_seq positions, and of their prompts where an encoder reads them.
    scratch: the largest workspace of a MoE layer, hidden states and
    logits, as estimated. memory: of the device. kernels: how many of the MoE operator's will be compiled.
    """

    config: ModelConfig
    options: BuildOptions
    compiler: Compiler
    plan: int
    experts: int
    kv_cache: int
    scratch: int
    memory: int
    kernels: int

    @property
    def needed(self) -> int:
        """Bytes in use on the device when the engine is full."""
        return self.plan + self.experts + self.kv_cache + self.scratch

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.needed <= self.memory


def preflight(config: ModelConfig, options: BuildOptions, compiler: Compiler) -> Preflight:
    """Sizes of a build, from the model's description alone.

    Raises GateworkError, naming what would fit, when the device cannot hold the engine; a build of the plan only goes on. And
    where a folder is in the way of the timing cache.
    """
    if options.strip_weights:  # TensorRT-RTX as well compiles refittable plans through CUDA only
        require_gpu("compiling a plan with --strip-weights")
    if options.timing_cache is not None and options.timing_cache.is_dir():
        what, fix = f"{options.timing_cache} is in the way", "choose another --timing-cache"
        raise GateworkError(what, got="a folder", expected="a file to write", fix=fix)
    assert options.max_seq is not None
    if (length := config.within(options.max_seq).ntk_length) is not None:
        what = "plans have no dynamic NTK, which this model takes beyond the length it was trained on"
        raise GateworkError(what, got=f"a context of {options.max_seq}", fix=f"--max-seq {length}, or --target cpu")
    found = _measure(config, options, compiler)
    if not (found.fits or options.plan_only):
        cache = f"KV cache {_megabytes(found.kv_cache)} for {options.max_batch} sequences of {options.max_seq}"
        raise GateworkError(
            f"the engine does not fit the {_megabytes(found.memory)} of {options.target}",
            got=f"{_megabytes(found.needed)}: weights {_megabytes(found.plan + found.experts)}, {cache}",
            fix=_alternatives(config, options, compiler),
        )
    return found


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _measure(config: ModelConfig, options: BuildOptions, compiler: Compiler) -> Preflight:
    assert options.max_seq is not None and options.device.memory is not None
    dense, experts = gpu_weight_bytes(config, options.precision, options.group, weight_only=options.weight_only)
    tables = _ROPE_TABLES * options.max_seq * config.rotary_dim // 2 * GPU_VALUE
    tables += config.vocab_size * config.hidden_size * GPU_VALUE if config.encoder_layers else 0  # both plans embed
    return Preflight(
        config=config,
        options=options,
        compiler=compiler,
        plan=dense + tables,
        experts=experts,
        kv_cache=caches(config) * options.max_batch * options.max_seq * config.kv_bytes_per_token(GPU_VALUE),
        scratch=_scratch(config, options),
        memory=options.device_memory or options.device.memory,
        kernels=len(engine_kernels(config, options)),
    )


def _scratch(config: ModelConfig, options: BuildOptions) -> int:
    assert options.max_seq is not None
    tokens = most_tokens(config, options)
    widest = max(config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    total = 4 * tokens * widest * GPU_VALUE + 4 * options.max_batch * config.vocab_size
    if config.encoder_layers:  # the bias of every pair of a prompt's tokens, and what the encoder made of a prompt
        total += config.num_heads * options.max_seq**2 * GPU_VALUE
        total += options.max_seq * config.kv_bytes_per_token(GPU_VALUE)
    dense = (config.matrices + 1) * tokens * config.mlp_width * GPU_VALUE
    if config.moe is None:
        return total + dense
    sizes, attributes, _ = largest_call(config, options)
    if config.moe_layers < config.num_layers or config.extra_mlp:
        total += dense
    return total + layout(sizes, attributes, GPU_VALUE).total


def _alternatives(config: ModelConfig, options: BuildOptions, compiler: Compiler) -> str:
    """What the user could change, one thing at a time."""

    def fits(**changes: object) -> bool:
        return _measure(config, replace(options, **changes), compiler).fits  # type: ignore[arg-type]

    words = []
    lengths = (length for length in (1 << n for n in range(20, 6, -1)) if length < (options.max_seq or 0))
    if (length := next((length for length in lengths if fits(max_seq=length)), None)) is not None:
        words.append(f"--max-seq {length}")
    batches = (batch for batch in (1 << n for n in range(12, -1, -1)) if batch < options.max_batch)
    if (batch := next((batch for batch in batches if fits(max_batch=batch)), None)) is not None:
        words.append(f"--max-batch {batch}")
    of_precision = ("calibration", "calibration_text", "group_size", "taps", "weight_only")
    plain = {each.name: each.default for each in fields(BuildOptions) if each.name in of_precision}
    others = (each for each in options.device.precisions if each != options.precision)
    words += [f"--precision {each}" for each in others if fits(precision=each, **plain)]
    return " or ".join(words) or "use a larger device, or --plan-only for the plan alone"
