"""Compiles the kernels that the GPU tests and the benchmark launch into Triton's cache, side by side. Needs no GPU.

    python -m benchmarks.compile_kernels --sm 90

Without it they are compiled one by one where they are first launched, a second each. The last line is JSON; exit status 1
if one does not compile.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import gpu_capability, usable_cpus
from gatework.plugins.moe import measure
from gatework.plugins.moe.bench_layers import FORMATS, SHAPES
from gatework.plugins.moe.kernels.compile import compile_variant
from gatework.plugins.moe.kernels.launches import SMS, Variant, launches
from gatework.plugins.moe.launcher import served_by
from gatework.plugins.moe.spec import MoESizes
from tests.plugins.moe_checks import CHECKED, REPLAYED, THROUGH_PYTORCH


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sm", type=int, choices=SMS, help="default: the GPU's here")
    parser.add_argument("--jobs", type=int, default=usable_cpus())
    parser.add_argument("--most", type=int, help="compile no more than this many")
    args = parser.parse_args()
    capability = gpu_capability()
    if args.sm is None and capability is None:
        parser.error("no GPU here: name one with --sm")
    sm = args.sm or served_by(10 * capability[0] + capability[1])
    wanted = sorted(variants(sm), key=lambda variant: not variant.kernel.startswith("gemm"))[: args.most]
    start, failed = time.perf_counter(), []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for error in pool.map(attempt, wanted, [sm] * len(wanted)):
            failed += [error] * (error is not None)
    for error in failed:
        print(error, file=sys.stderr)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"sm": sm, "kernels": len(wanted), "failed": len(failed), "seconds": seconds}))
    return int(bool(failed))


def variants(sm: int) -> set[Variant]:
    """Of the tests' cases and the benchmark's."""
    formats = [name for name in FORMATS if not name.startswith("fp8") or sm >= 89]
    found = measure.variants(sm, SHAPES, formats, measure.TOKENS)
    for case in (*CHECKED, *REPLAYED, *THROUGH_PYTORCH):
        if case.attributes.weight_format != "fp8_e4m3" or sm >= 89:
            sizes = MoESizes(case.T, case.D, case.E, case.I)
            listed = launches(sm, sizes, case.attributes, case.dtype, has_bias=case.bias)
            found |= {launch.variant for launch in listed}
    return found


def attempt(variant: Variant, sm: int) -> str | None:
    """The error, if it does not compile."""
    try:
        compile_variant(variant, sm)
    except GateworkError as error:
        return f"{variant.name}: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
