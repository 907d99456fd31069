"""Which kernels one call of `gatework::MoE` launches, in order, with what: a pure function, for every caller the same.

    launches(sm, sizes, attributes, dtype, has_bias=False)   the launches of a call of sizes.T tokens
    variants(sm, sizes, attributes, dtype, has_bias=False)   the kernels that any number of tokens up to sizes.T needs

Everything but T is fixed when a kernel is compiled. A launch passes addresses of the operator's inputs (`spec.INPUTS`), of
the buffers in the workspace (`workspace`) and of `y`, by these names, and 32-bit integers.

    few tokens    (T <= 16)  tiles of 16 rows: every chosen expert's weights are read once; quantised weights are
                             converted to x's type as they arrive, x itself is not quantised
    some tokens   (T <= 64)  tiles of 64 rows: still once
    many tokens              tiles of 64 rows, or of 128 where experts have so many on average

With int4 weights few tokens have tiles of 8 rows and some tokens of 32: weights are the left operand there, and it is the
right one that is cut finely. Their gated products have tiles of 128 rows, on sm_90, where experts have 128 on average.
Above 16 tokens, int8 and fp8 weights with one scale per row are multiplied by x in 8 bits, with a scale per token, unless
the operator's keep_activations says otherwise: then they are converted as for few tokens.
Tiles for sm_90 were timed on an H100. sm_89 and sm_120, with 99 KiB per block, use those of sm_80, which have not been timed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import MoEAttributes, MoESizes
from gatework.plugins.moe.workspace import HIDDEN_CODES

SMS = (80, 89, 90, 120)
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16"}  # x's dtype, as Triton writes pointers to it
STORED = {"fp8_e4m3": "*fp8e4nv", "int8": "*i8", "int4": "*u8"}
LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0}
FEW, SOME = 16, 64
MOST_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes that a block may have
MOST_CHOICES = 2**31 - 1

Constant = int | float | str | bool | None


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with all that is fixed when it is compiled.

    arguments: (name, type) of each argument in the kernel's order; "*..." are addresses, "i32" integers.
    constants: (name, value) of the kernel's other parameters; an absent input's is None.
    """

    kernel: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int = 4
    num_stages: int = 1

    @property
    def name(self) -> str:
        """Distinct for distinct variants; usable as a file's name."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.kernel}_{digest[:12]}"


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch. values: for each of the variant's arguments, the buffer's name or the integer."""

    variant: Variant
    grid: tuple[int, int, int]
    values: tuple[str | int, ...]


class Tile(NamedTuple):
    """BM rows by BN columns, in steps of BK."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


class Setting(NamedTuple):
    """What a launch table depends on."""

    sm: int
    sizes: MoESizes
    attributes: MoEAttributes
    dtype: Literal["float16", "bfloat16"]
    has_bias: bool

    @property
    def choices(self) -> int:
        return self.sizes.T * self.attributes.top_k

    @property
    def in_codes(self) -> bool:
        """x and hidden are quantised to 8 bits."""
        attributes = self.attributes
        eight_bits = attributes.weight_format in LARGEST and not attributes.group_size
        return eight_bits and not attributes.keep_activations and self.sizes.T > FEW

    @property
    def parts(self) -> int:
        """Codes that add up to one number of hidden."""
        return HIDDEN_CODES[self.attributes.weight_format] if self.in_codes else 1

    @property
    def code_pointer(self) -> str:
        return STORED[self.attributes.weight_format]


def launches(
    sm: int,
    sizes: MoESizes,
    attributes: MoEAttributes,
    dtype: Literal["float16", "bfloat16"],
    *,
    has_bias: bool = False,
) -> tuple[Launch, ...]:
    """All launches of a call, in order; none for no tokens. GateworkError for what the kernels cannot do."""
    setting = Setting(sm, sizes, attributes, dtype, has_bias)
    _check(setting)
    if sizes.T == 0:
        return ()
    listed = [_route(setting)]
    if attributes.capacity_factor > 0:
        listed.append(_drop(setting))
    listed.append(_dispatch(setting))
    if setting.in_codes:
        listed.append(_quantize(setting, "x", sizes.T, sizes.D, 1))
    listed.append(_gemm_in(setting))
    if setting.in_codes:
        listed.append(_quantize(setting, "hidden", setting.choices, sizes.I, setting.parts))
    return (*listed, _gemm_out(setting), _combine(setting))


def variants(
    sm: int,
    sizes: MoESizes,
    attributes: MoEAttributes,
    dtype: Literal["float16", "bfloat16"],
    *,
    has_bias: bool = False,
) -> tuple[Variant, ...]:
    """Each kernel that calls of 1 to sizes.T tokens launch, once."""
    lengths = {T for T in (1, FEW + 1, SOME + 1, _many(sizes, attributes), sizes.T) if T <= sizes.T}
    calls = (launches(sm, sizes._replace(T=T), attributes, dtype, has_bias=has_bias) for T in sorted(lengths))
    return tuple(dict.fromkeys(launch.variant for call in calls for launch in call))


def _check(setting: Setting) -> None:
    sm, sizes, attributes, dtype, _ = setting
    if sm not in SMS:
        raise GateworkError("no MoE kernels for this GPU", got=f"sm_{sm}", expected=" or ".join(f"sm_{n}" for n in SMS))
    if dtype not in POINTERS:
        raise GateworkError("MoE kernels have no such activations", got=dtype, expected=" or ".join(POINTERS))
    if attributes.weight_format == "fp8_e4m3" and sm < 89:
        raise GateworkError(
            "fp8 experts need sm_89 or newer", got=f"sm_{sm}", fix="choose precision int8 or int4 for this GPU"
        )
    if attributes.capacity_rule != "choices":
        fix = "use the CPU, or a capacity without that rule"
        raise GateworkError("GPU kernels drop no choices by this rule", got=attributes.capacity_rule, fix=fix)
    if max(setting.choices, attributes.w_in_rows(sizes.I) * sizes.D) > MOST_CHOICES:
        raise GateworkError("the MoE call is too large for 32-bit indices", got=sizes, expected="T*K, G*I*D < 2^31")


def _launch(
    kernel: str,
    grid: tuple[int, ...],
    arguments: Mapping[str, tuple[str, str | int] | None],
    constants: Mapping[str, Constant],
    num_warps: int = 4,
    num_stages: int = 1,
) -> Launch:
    """arguments: (type, value) by parameter; None: absent."""
    given = {name: pair for name, pair in arguments.items() if pair is not None}
    absent = dict.fromkeys(name for name in arguments if name not in given)
    variant = Variant(
        kernel,
        tuple((name, kind) for name, (kind, _) in given.items()),
        tuple({**absent, **constants}.items()),
        num_warps,
        num_stages,
    )
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(variant, (x, y, z), tuple(value for _, value in given.values()))


def _route(setting: Setting) -> Launch:
    sizes, attributes = setting.sizes, setting.attributes
    BE = _power_of_2(sizes.E)
    BT = max(1, 1024 // BE)
    arguments: dict[str, tuple[str, str | int] | None] = {
        "router_logits": ("*fp32", "router_logits"),
        "topk_ids": ("*i32", "topk_ids"),
        "topk_weights": ("*fp32", "topk_weights"),
        "T": ("i32", sizes.T),
    }
    constants: dict[str, Constant] = {"E": sizes.E, "K": attributes.top_k, "SCORING": attributes.scoring}
    constants |= {"RENORMALIZE": attributes.renormalize, "BT": BT, "BE": BE, "BK": _power_of_2(attributes.top_k)}
    return _launch("route", (_ceil(sizes.T, BT),), arguments, constants)


def _drop(setting: Setting) -> Launch:
    sizes, attributes = setting.sizes, setting.attributes
    arguments: dict[str, tuple[str, str | int] | None] = {
        "topk_ids": ("*i32", "topk_ids"),
        "topk_weights": ("*fp32", "topk_weights"),
        "T": ("i32", sizes.T),
        # No expert has more than T choices, so T stands for all larger capacities.
        "capacity": ("i32", min(attributes.capacity(sizes.T, sizes.E), sizes.T)),
    }
    return _launch("drop", (sizes.E,), arguments, {"K": attributes.top_k, "BT": 1024})


def _dispatch(setting: Setting) -> Launch:
    arguments: dict[str, tuple[str, str | int] | None] = {
        "topk_ids": ("*i32", "topk_ids"),
        "expert_offsets": ("*i32", "expert_offsets"),
        "token_order": ("*i32", "token_order"),
        "choices": ("i32", setting.choices),
    }
    BC = 64 if setting.sizes.T <= FEW else 1024
    return _launch("dispatch", (setting.sizes.E,), arguments, {"E": setting.sizes.E, "BC": BC}, 1 if BC == 64 else 4)


def _quantize(setting: Setting, name: str, rows: int, columns: int, parts: int) -> Launch:
    arguments: dict[str, tuple[str, str | int] | None] = {
        "values": (POINTERS[setting.dtype], name),
        "codes": (setting.code_pointer, f"{name}_codes"),
        "scales": ("*fp32", f"{name}_scale"),
        "rows": ("i32", rows),
    }
    BC = min(_power_of_2(columns), 2048)
    BR = 2048 // BC
    constants: dict[str, Constant] = {"COLUMNS": columns, "LARGEST": LARGEST[setting.attributes.weight_format]}
    constants |= {"PARTS": parts, "BR": BR, "BC": BC}
    return _launch("quantize", (_ceil(rows, BR),), arguments, constants, num_warps=8)


def _gemm_in(setting: Setting) -> Launch:
    sizes, attributes = setting.sizes, setting.attributes
    tile = _tile(setting, attributes.matrices)
    arguments = _gemm_arguments(setting, "x", "w_in", "b_in", "hidden", POINTERS[setting.dtype], tile)
    constants: dict[str, Constant] = {"E": sizes.E, "K": attributes.top_k, "D": sizes.D, "I": sizes.I}
    constants |= {"GLU": attributes.glu, "ACTIVATION": attributes.activation}
    constants |= {"ALPHA": attributes.alpha, "BETA": attributes.beta, "LIMIT": attributes.limit}
    grid = (_row_tiles(setting, tile.BM) * _ceil(sizes.I, tile.BN),)
    constants |= _gemm_constants(setting, tile, sizes.D)
    return _launch("gemm_in", grid, arguments, constants, tile.num_warps, tile.num_stages)


def _gemm_out(setting: Setting) -> Launch:
    sizes = setting.sizes
    tile = _tile(setting, 1)
    arguments = _gemm_arguments(setting, "hidden", "w_out", "b_out", "expert_out", "*fp32", tile)
    constants: dict[str, Constant] = {"E": sizes.E, "D": sizes.D, "I": sizes.I, "PARTS": setting.parts}
    grid = (_row_tiles(setting, tile.BM) * _ceil(sizes.D, tile.BN),)
    constants |= _gemm_constants(setting, tile, sizes.I)
    return _launch("gemm_out", grid, arguments, constants, tile.num_warps, tile.num_stages)


def _combine(setting: Setting) -> Launch:
    sizes, K = setting.sizes, setting.attributes.top_k
    arguments: dict[str, tuple[str, str | int] | None] = {
        "expert_out": ("*fp32", "expert_out"),
        "topk_weights": ("*fp32", "topk_weights"),
        "y": (POINTERS[setting.dtype], "y"),
    }
    BD = min(_power_of_2(sizes.D), 1024)
    return _launch("combine", (sizes.T, _ceil(sizes.D, BD)), arguments, {"K": K, "D": sizes.D, "BD": BD})


def _gemm_arguments(
    setting: Setting, a: str, w: str, bias: str, out: str, out_pointer: str, tile: Tile
) -> dict[str, tuple[str, str | int] | None]:
    x_pointer, quantised = POINTERS[setting.dtype], setting.attributes.weight_format != "dense"
    coded = setting.in_codes
    return {
        a: (setting.code_pointer, f"{a}_codes") if coded else (x_pointer, a),
        f"{a}_scale": ("*fp32", f"{a}_scale") if coded else None,
        w: (setting.code_pointer if quantised else x_pointer, w),
        f"{w}_scale": ("*fp32", f"{w}_scale") if quantised else None,
        bias: (x_pointer, bias) if setting.has_bias else None,
        "expert_offsets": ("*i32", "expert_offsets"),
        "token_order": ("*i32", "token_order"),
        out: (out_pointer, out),
        "m_tiles": ("i32", _row_tiles(setting, tile.BM)),
    }


def _gemm_constants(setting: Setting, tile: Tile, columns: int) -> dict[str, Constant]:
    attributes = setting.attributes
    group, int4 = attributes.group_size, attributes.weight_format == "int4"
    scaling = "none" if attributes.weight_format == "dense" else "row" if not group else "element"
    if scaling == "element" and group % tile.BK == 0:
        # Larger tiles have no registers left for scales of two steps, and of 4 bits none for the sums of a step.
        scaling = "ahead" if tile.BM <= FEW else "weight" if int4 else "step"
    words = setting.sm == 90 and tile.BM >= 16 and tile.BN >= 64 and columns % 8 == 0
    return {
        "SCALING": scaling,
        "GROUP": group or columns,
        "NIBBLES": "none" if not int4 else "words" if words else "bytes",
        "CODES": {"int8": "int8", "fp8_e4m3": "fp8"}[attributes.weight_format] if setting.in_codes else "none",
        "BE": _power_of_2(setting.sizes.E),
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
    }


def _tile(setting: Setting, matrices: int) -> Tile:
    """Tile of a product with `matrices` weight tiles to each tile of x."""
    attributes = setting.attributes
    if attributes.weight_format == "int4":
        return _int4_tile(setting, matrices)
    if setting.sizes.T <= FEW:
        if matrices > 1 and attributes.weight_format != "dense" and not attributes.group_size:
            return Tile(16, 32, 256, 4, 3)
        # The second product has the fewer programs, at one token of Mixtral's two to an SM of an H100, so each has to keep
        # more of its steps under way, the more so the smaller they are: 24 KiB of dense weights, 20 of 8 bits.
        stages = (4 if attributes.weight_format == "dense" else 6) if matrices == 1 else 4
        return Tile(16, 32, _step(attributes, 128), 4, stages)
    hopper, BK = setting.sm == 90, 128 if setting.in_codes else _step(attributes, 64)
    # Gates on groups hold their sums, those of the step and converted weights: in wider tiles more than fits into registers.
    crowded = matrices > 1 and attributes.group_size > 0
    if _many(setting.sizes, attributes) > setting.sizes.T:
        wide = hopper and matrices == 1 and setting.in_codes
        deep = hopper and matrices == 2 and attributes.weight_format == "dense"
        return Tile(64, 128 if wide else 32 if crowded or matrices > 2 else 64, BK, 4, 5 if deep else 3)
    # Groups' partial sums take as many registers again as the sums; converted weights, and a second code, take some.
    most = 0 if attributes.group_size else 1 if attributes.keep_activations else 2
    if hopper and matrices == 1 and most == 2 and setting.parts == 1:
        return Tile(128, 256, BK, 8, 3)
    return Tile(128, 128 if hopper and matrices <= most else 32 if crowded else 64, BK, 8, 3)


def _int4_tile(setting: Setting, matrices: int) -> Tile:
    """Warps share the weights' rows, 16 or more to each, so that none converts what another does."""
    T, attributes = setting.sizes.T, setting.attributes
    if attributes.group_size % 32:
        return Tile(8 if T <= FEW else 64, 64, 64, 4, 2)  # a scale to each weight takes eight times the weight's memory
    BK, BK_long = _step(attributes, 64), _step(attributes, 128)
    if T <= FEW:
        return Tile(8, 16, BK_long, 1, 8) if matrices == 1 else Tile(8, 32, BK_long, 2, 6)
    if T <= SOME:
        return Tile(32, 64, BK_long, 4, 4)
    many = _many(setting.sizes, attributes)
    if matrices == 1:
        return Tile(128, 128, BK, 8, 3) if many <= T else Tile(64, 128, BK_long, 8, 3)
    # Each matrix has its sums, and registers have room for so many.
    return Tile(128, 64, BK, 4, 3) if setting.sm == 90 and matrices == 2 and 2 * many <= T else Tile(64, 64, BK, 4, 4)


def _step(attributes: MoEAttributes, most: int) -> int:
    """The largest BK up to `most` at which a step has one scale per row, where one of at least 32 does."""
    group = attributes.group_size
    return min(most, group & -group) if group % 32 == 0 and group else most


def _many(sizes: MoESizes, attributes: MoEAttributes) -> int:
    """The least T at which experts have 64 rows on average, and more than SOME."""
    return max(SOME + 1, _ceil(64 * sizes.E, attributes.top_k))


def _row_tiles(setting: Setting, BM: int) -> int:
    """Upper bound of the tiles that the experts' rows fill: all experts start one, the remaining rows fill them up."""
    started = min(setting.sizes.E, setting.choices)
    return started + (setting.choices - started) // BM


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_2(least: int) -> int:
    """The smallest power of 2 >= least."""
    return 1 << (least - 1).bit_length()
