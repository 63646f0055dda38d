#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: builds the core with its CUDA kernels, runs tests/gpu, the kernels'
# tests under compute-sanitizer, and the benchmarks.
#
#     scripts/gpu_check.sh [FOLDER]        logs and figures go to FOLDER (default: gpu-check)
#
# Needs nvcc and an environment with what the tests need (pip install -e '.[test]'), PyTorch for CUDA among it; TensorRT
# (pip install '.[tensorrt]') is tested where it is installed. PYTHON says which Python. Exit code 0: all that could be
# run succeeded; what was skipped is in the logs.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-check}
python=${PYTHON:-python}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0

step() { # step NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
        tail -n 15 "$out/$name.log"
    else
        echo "FAILED ($?), the end of $out/$name.log:"
        tail -n 40 "$out/$name.log"
        failed=1
    fi
}

nvidia-smi >"$out/nvidia-smi.log" 2>&1 || { echo "no NVIDIA GPU: nvidia-smi failed"; exit 1; }
head -n 15 "$out/nvidia-smi.log"
step build 240 env HISTOSEG_CUDA=1 "$python" setup.py build_ext --inplace
step doctor 60 "$python" -m histoseg_fast doctor
step tests 300 "$python" -m pytest -rs tests/gpu
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -x tests/gpu/test_kernels.py -k "large_tiles or every_half or outside or decode"
    done
else
    echo "== no compute-sanitizer on PATH: the kernels' tests run without it"
fi
for library in torch tensorrt; do
    for plan in final fast; do
        if "$python" -c "import $library" 2>/dev/null; then
            step "bench-$library-$plan" 150 "$python" benchmarks/bench_gpu.py --library "$library" --engine "$plan" \
                --images 200 --json "$out/bench-$library-$plan.json"
        fi
    done
done
exit $failed
