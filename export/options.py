"""BuildOptions: what an engine is to be, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gatework.export.config import MAX_SIZE, ModelConfig
from gatework.export.targets import ALL_BUT_CUDA, Target, target_for
from gatework.plugins.errors import GateworkError, option

# Precisions of plans whose rounding verification has a model of, beside fp8 with weight_only.
TAPPED = ("bf16", "fp16", "int4")
TEXT_ROUNDED = ("int4", "fp8")
MAX_TABLE_BYTES = 1 << 30  # of the rotary tables in a graph, [S_max, R/2] twice, float32


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Target, precision and limits of an engine.

    max_seq: S_max, cache positions per sequence, prompt and output together; None: the model's own context length.
    max_batch: sequences decoded at once. prefill_chunk: most prompt tokens in one step.
    group_size: weights that share a scale, at most, a power of two from 16 to 256 (32 to 128 for cuda); a matrix whose rows it
    does not divide takes the largest size that does. None: for int8 128 and for int4 32 on cpu and cuda; 128 for
    int4 of TensorRT, whose int8 has one scale per row; less where a checkpoint's own 8-bit codes can be kept by that.
    calibration_text: UTF-8 file; int4 weights, and experts in fp8, are rounded with knowledge of what it makes of their inputs.
    pure: int4 for ONNX Runtime's targets; 4 bits for attention beside experts and the output head too, which have 8 otherwise.
    stages: parts that the model is cut into at layer boundaries, one graph each; for ONNX Runtime's targets only.
    drop_tokens: experts drop what is beyond their capacity, as the model's own code does; see ModelConfig.

    For TensorRT only. toolchain: None chooses. calibration: file that holds the activations' ranges. strip_weights: leave the
    dense weights out of the plan. plan_only: leave the experts unpacked; the engine cannot run. timing_cache: file shared by
    builds. device_memory: bytes; None: the target's. taps: the plan gives up what it computes inside its layers. weight_only:
    no activation is rounded; for fp8 of models with experts, which then are all that is stored in 8 bits.
    """

    target: str
    precision: str
    max_seq: int | None = None
    max_batch: int = 8
    prefill_chunk: int = 512
    group_size: int | None = None
    calibration_text: Path | None = None
    pure: bool = False
    stages: int = 1
    drop_tokens: bool = False
    toolchain: str | None = None
    calibration: Path | None = None
    strip_weights: bool = False
    plan_only: bool = False
    timing_cache: Path | None = None
    device_memory: int | None = None
    taps: bool = False
    weight_only: bool = False

    def __post_init__(self) -> None:
        target = target_for(self.target, self.precision)
        if self.group_size is not None and self.group_size not in target.group_sizes:
            *sizes, largest = sorted(target.group_sizes)
            expected = f"{', '.join(map(str, sizes))} or {largest}"
            raise GateworkError("--group-size cannot be used", got=self.group_size, expected=expected)
        if self.group_size is not None and not self.group:
            what, got = f"{self.precision} on {self.target} has no groups of weights", f"--group-size {self.group_size}"
            raise GateworkError(what, got=got, fix="leave --group-size out")
        tapped = self.precision in TAPPED or self.weight_only
        if self.taps and target.capability is not None and not tapped:
            what, fix = (
                "a plan that rounds activations shows nothing inside",
                "leave --taps out: verify compares its logits",
            )
            expected = f"{' or '.join(TAPPED)} or fp8 with --weight-only"
            raise GateworkError(what, got=self.precision, expected=expected, fix=fix)
        if self.weight_only and self.precision != "fp8":
            raise GateworkError("--weight-only is for fp8", got=self.precision, fix="leave --weight-only out")
        if self.calibration_text is not None and self.precision not in TEXT_ROUNDED:
            what, expected = "a text helps no weights of this precision", " or ".join(TEXT_ROUNDED)
            raise GateworkError(what, got=self.precision, expected=expected, fix="leave --calibration-text out")
        if self.calibration_text is not None and self.strip_weights:
            got, fix = "--calibration-text and --strip-weights", "leave one of them out"
            raise GateworkError("refitting rounds without a text", got=got, fix=fix)
        if self.pure and (self.precision != "int4" or target.capability is not None):
            got, expected = f"{self.precision} for {self.target}", "int4 for cpu or cuda"
            raise GateworkError("not all weights can have 4 bits", got=got, expected=expected, fix="leave --pure out")
        for name in ("max_batch", "prefill_chunk", "stages"):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                expected = f"1 to {MAX_SIZE}"
                raise GateworkError(f"{option(name)} is out of range", got=getattr(self, name), expected=expected)
        if target.capability is not None and self.stages > 1:
            got, fix = f"--target {self.target}", "leave --stages out, or use --target cpu or cuda"
            raise GateworkError("--stages is for ONNX Runtime's targets", got=got, fix=fix)
        if target.capability is None:
            for name in (
                "toolchain",
                "calibration",
                "strip_weights",
                "plan_only",
                "timing_cache",
                "device_memory",
                "taps",
            ):
                if getattr(self, name):
                    got, fix = f"--target {self.target}", f"leave {option(name)} out"
                    raise GateworkError(f"{option(name)} is for TensorRT's targets", got=got, fix=fix)

    @property
    def device(self) -> Target:
        """The target's entry in the table."""
        return target_for(self.target, self.precision)

    @property
    def group(self) -> int:
        """The group size to use; 0 where the precision has none."""
        default = self.device.groups.get(self.precision, 0)
        return (self.group_size or default) if default else 0

    def fitted_to(self, config: ModelConfig) -> BuildOptions:
        """The same with limits that the model has: max_seq is set, and prefill_chunk at most that.

        Raises:
            GateworkError: a max_seq beyond the model's, more stages than layers, or what is not there for encoders, or without
                experts.
        """
        if self.weight_only and config.moe is None:
            raise GateworkError("--weight-only is for experts", got="a model without", fix="leave --weight-only out")
        if config.encoder_layers:
            self._check_encoder()
        if self.calibration_text is not None and (
            config.encoder_layers or (self.precision == "fp8" and config.moe is None)
        ):
            got = "a model with an encoder" if config.encoder_layers else "fp8 without experts"
            fix = "leave --calibration-text out"
            raise GateworkError("this model's weights are rounded without a text", got=got, fix=fix)
        if self.stages > config.num_layers:
            expected = f"at most {config.num_layers}, the model's layers"
            raise GateworkError("there are more stages than layers", got=f"--stages {self.stages}", expected=expected)
        length = fit_length(config, self.max_seq)
        return replace(self, max_seq=length, prefill_chunk=min(self.prefill_chunk, length))

    def _check_encoder(self) -> None:
        """Raise for what a model with an encoder cannot have."""
        if self.target == "cuda":
            fix = f"use --target {ALL_BUT_CUDA}"
            raise GateworkError("encoders do not run on this target", got=f"--target {self.target}", fix=fix)
        given = {"stages": self.stages > 1, "strip_weights": self.strip_weights, "taps": self.taps}
        for name in (name for name, wanted in given.items() if wanted):
            what, fix = f"{option(name)} is for models without an encoder", f"leave {option(name)} out"
            raise GateworkError(what, got="a model with one", fix=fix)


def fit_length(config: ModelConfig, max_seq: int | None) -> int:
    """The cache length asked for, or the model's own."""
    length, limit = config.max_position_embeddings if max_seq is None else max_seq, config.context_limit
    if not 1 <= length <= limit:
        raise GateworkError("--max-seq is out of range", got=length, expected=f"1 to {limit}, the model's context")
    position_bytes = len(config.ntk_alphas(length)) * config.rotary_dim * 4
    if length * position_bytes > MAX_TABLE_BYTES:
        expected = f"at most {MAX_TABLE_BYTES // position_bytes}"
        raise GateworkError("--max-seq is too large for tables of angles", got=length, expected=expected)
    return length
