#!/usr/bin/env bash
# All that needs an NVIDIA GPU, on the first machine that has one, in under 8 minutes; written for an H100 or H200.
#
#     make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130      # PyTorch with CUDA, once
#     benchmarks/on_gpu.sh [OUT]                                         # default: benchmarks/results
#
# Each step writes OUT/NAME.log and has a time limit; one that fails does not stop the rest. Exit status 1 if any failed.
# It has not run yet: no GPU was at hand.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-benchmarks/results}
BIN=${BIN:-.venv/bin}
MODEL=examples/tiny-mixtral
WORK=build/on-gpu
FAILED=()
mkdir -p "$OUT" "$WORK"

step() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || FAILED+=("$name")
    echo "$name: exit $status, $((SECONDS - start)) s, $OUT/$name.log"
    tail -n 1 "$OUT/$name.log" | cut -c 1-400
}

"$BIN/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo 'no CUDA GPU, or a PyTorch without CUDA: nothing to do' >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | tee "$OUT/device.txt"

# The MoE kernels: right on the device, clean under compute-sanitizer, and how fast.
step gpu-tests 60 "$BIN/python" -m pytest -q tests/plugins/test_moe_gpu.py
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 30 compute-sanitizer --error-exitcode 1 --target-processes all \
        "$BIN/python" -m pytest -q tests/plugins/test_moe_gpu.py -k 'test_loads and 100-64'
else
    echo 'compute-sanitizer is not installed: memory accesses are unchecked'
fi
step moe-bench 130 "$BIN/python" -m gatework.plugins.moe.bench --seconds 85

# The runtime on the GPU: slots, graphs, cuda engines and plans of every family, end to end.
step runtime-tests 45 "$BIN/python" -m pytest -q tests/test_gpu.py

# Engines on the GPU, through the runtime and the target `cuda`.
step cuda-build 15 "$BIN/gatework" build "$MODEL" --target cuda --precision fp32 --out "$WORK/tiny-cuda" --force
step cuda-verify 15 "$BIN/gatework" verify "$WORK/tiny-cuda" --reference "$MODEL"

# A Mixtral of 12 layers with random weights: the same tokens on the GPU as on the CPU, and how fast.
step model 25 "$BIN/python" benchmarks/random_mixtral.py "$WORK/random"
for target in cpu cuda; do
    step "build-$target" 20 "$BIN/gatework" build "$WORK/random" --target $target --precision fp32 --max-seq 1024 \
        --out "$WORK/random-$target" --force
done
step cuda-tokens 30 "$BIN/python" benchmarks/same_tokens.py "$WORK/random-cpu" "$WORK/random-cuda"
step cuda-bench 20 "$BIN/gatework" bench "$WORK/random-cuda"

# TensorRT-RTX on a device that it may not list.
step rtx-plan 70 "$BIN/python" benchmarks/rtx_plan_on_gpu.py "$MODEL" "$WORK/random"

echo "${#FAILED[@]} steps failed: ${FAILED[*]:-none}; $SECONDS s"
[ ${#FAILED[@]} -eq 0 ]
