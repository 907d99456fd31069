#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in under 8 minutes; written for an H100 or H200.
#
#     make gpu-setup                              # once: two environments, kernels, a model; needs no GPU but for its kind
#     benchmarks/on_gpu.sh [OUT [STEP...]]        # default: benchmarks/results, all steps
#
# Each step writes OUT/NAME.log and has a time limit; one that fails does not stop the rest. At the end stands which aims were
# met, missed or not measured; exit status 0 only if all were met.
set -uo pipefail
cd "$(dirname "$0")/.."
WORK=build/on-gpu
OUT=${1:-benchmarks/results}
BIN=${BIN:-.venv/bin}
CUDA_BIN=${CUDA_BIN:-$WORK/.venv-cuda/bin} # with ONNX Runtime for GPUs
shift $(($# > 0))
ONLY=" $* "
mkdir -p "$OUT"

"$BIN/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    { echo "no CUDA GPU, or no PyTorch with CUDA in $BIN: see make gpu-setup" >&2; exit 2; }
if [[ "$ONLY" == "  " ]]; then
    "$CUDA_BIN/python" -c \
        'import sys, onnxruntime as ort; sys.exit("CUDAExecutionProvider" not in ort.get_available_providers())' 2>/dev/null ||
        { echo "no ONNX Runtime with CUDAExecutionProvider in $CUDA_BIN: see make gpu-setup" >&2; exit 2; }
    [ -f "$WORK/tokens.json" ] || { echo "no $WORK/tokens.json: see make gpu-setup" >&2; exit 2; }
fi

[[ "$ONLY" != "  " ]] || rm -f "$OUT/steps.txt" "$OUT/moe.json" "$OUT/rtx-plan.log" # steps run apart add to what is there
step() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    [[ "$ONLY" == "  " || "$ONLY" == *" $name "* ]] || return 0
    timeout --kill-after 5 "$seconds" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    touch "$OUT/steps.txt"
    sed -i "/^$name /d" "$OUT/steps.txt"
    echo "$name $status $((SECONDS - start))" >>"$OUT/steps.txt"
    echo "$name: exit $status, $((SECONDS - start)) s, $OUT/$name.log"
    tail -n 1 "$OUT/$name.log" | cut -c 1-400
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | tee "$OUT/device.txt"

# The MoE kernels: right on the device, how fast, and clean under compute-sanitizer.
step gpu-tests 60 "$BIN/python" -m pytest -q tests/plugins/test_moe_gpu.py
step moe-bench 110 "$BIN/python" -m gatework.plugins.moe.bench --seconds 95 --out "$OUT/moe.json"
# cuda-bindings looks for functions of newer drivers: errors of calls are no errors of kernels.
sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all --report-api-errors no)
step sanitizer 35 "${sanitize[@]}" "$BIN/python" -m pytest -q tests/plugins/test_moe_gpu.py -k 'T100-E64'
step racecheck 30 "${sanitize[@]}" --tool racecheck \
    "$BIN/python" -m pytest -q tests/plugins/test_moe_gpu.py -k 'int8 and T100-E64'

# The runtime: slots, graphs, plans and cuda engines of every family, end to end.
step plan-tests 60 "$BIN/python" -m pytest -q tests/test_gpu.py
step cuda-tests 100 "$CUDA_BIN/python" -m pytest -q tests/test_gpu.py -m 'not tensorrt'

# A Mixtral of 12 layers with random weights: the same tokens on the GPU as on the CPU, and how fast.
step cuda-tokens 20 "$CUDA_BIN/python" benchmarks/same_tokens.py "$WORK/random-cuda" --against "$WORK/tokens.json"
step cuda-bench 20 "$CUDA_BIN/gatework" bench "$WORK/random-cuda"

# TensorRT-RTX on a device that it may not list.
step rtx-plan 44 "$BIN/python" benchmarks/rtx_plan_on_gpu.py examples/tiny-mixtral "$WORK/random"

echo "$SECONDS s"
"$BIN/python" -m benchmarks.gpu_summary "$OUT"
