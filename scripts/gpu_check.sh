#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: builds the core with its CUDA kernels, runs tests/gpu, the demo
# from files to files, the benchmarks of both plans, and the kernels' tests under compute-sanitizer.
#
#     scripts/gpu_check.sh [FOLDER]       logs and figures go to FOLDER (gpu-check); summary.txt says how each step ended
#
# Nothing is fetched. The machine must have a GPU and its driver, nvcc (on PATH or in CUDA_HOME, else in
# /usr/local/cuda), a C++17 compiler, and a Python of 3.10 or newer with PyTorch for CUDA and the MODULES below. TensorRT
# and pycuda are tested where they are installed, compute-sanitizer is used where it is found (on PATH, or beside nvcc).
#
#     PYTHON=/opt/x/bin/python    which Python (default: the first of python3 and python whose PyTorch finds the GPU)
#     WHEELS=folder               wheels of modules that it lacks, put beside it from this folder alone; made elsewhere by
#                                 pip download --no-deps --only-binary=:all: --python-version 3.12 -d folder openvino ...
#     BUDGET=570                  seconds for all of it: steps that come too late are skipped, and said so
#
# A step that fails or takes too long does not stop the others. Exit code 0: everything that could run succeeded.
set -uo pipefail
cd "$(dirname "$0")/.."
MODULES="setuptools pybind11 Cython numpy tifffile imagecodecs openvino typer rich torch onnx onnxscript safetensors"
MODULES+=" pytest hypothesis"
out=${1:-gpu-check}
budget=${BUDGET:-570}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HISTOSEG_CACHE="$out/cache"
: >"$out/summary.txt"
PATH+=":${CUDA_HOME:-/usr/local/cuda}/bin"
failed=0
versions='
import importlib, sys
print(sys.executable, sys.version.split()[0])
missing = []
for name in sys.argv[1:]:
    try:
        print(name, getattr(importlib.import_module(name), "__version__", ""))
    except ImportError as error:
        missing.append(f"missing: {name} ({error})")
sys.exit("\n".join(missing) or 0)
'

note() { # note RESULT NAME [MORE]
    printf '%-8s %-22s %s\n' "$1" "$2" "${3:-}" >>"$out/summary.txt"
}

step() { # step NAME SECONDS COMMAND...
    local name=$1 seconds=$2 left=$((budget - SECONDS)) started=$SECONDS code
    shift 2
    if ((left < 5)); then
        echo "== $name: no time left"
        note skipped "$name" "no time left of $budget s"
        return 1
    fi
    echo "== $name"
    timeout -k 10 "$((seconds < left ? seconds : left))" "$@" >"$out/$name.log" 2>&1
    code=$?
    if ((code == 0)); then
        tail -n 20 "$out/$name.log"
        note ok "$name" "$((SECONDS - started)) s"
        return 0
    fi
    echo "FAILED ($code; 124 and 137: out of time), the end of $out/$name.log:"
    tail -n 40 "$out/$name.log"
    note FAILED "$name" "exit code $code after $((SECONDS - started)) s"
    failed=1
    return 1
}

has_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

if ! nvidia-smi >"$out/nvidia-smi.log" 2>&1; then
    echo "no NVIDIA GPU: nvidia-smi failed"
    exit 1
fi
head -n 15 "$out/nvidia-smi.log"

python=${PYTHON:-}
for candidate in python3 python; do
    [[ -z $python ]] && has_gpu "$candidate" && python=$candidate
done
if [[ -z $python ]]; then
    echo "neither python3 nor python has a PyTorch that finds the GPU; set PYTHON"
    exit 1
fi
if [[ -n ${WHEELS:-} ]]; then
    step wheels 60 "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" "$WHEELS"/*.whl
fi
# shellcheck disable=SC2086
step environment 90 "$python" -c "$versions" $MODULES
step build 240 env HISTOSEG_CUDA=1 "$python" setup.py build_ext --inplace
step doctor 60 "$python" -m histoseg_fast doctor
step test-kernels 90 "$python" -m pytest -rs --durations 5 tests/gpu/test_kernels.py
step demo-torch 90 env HISTOSEG_GPU_ENGINE=torch "$python" -m histoseg_fast demo --images 16 --out "$out/demo-torch"
for plan in final fast; do
    step "bench-torch-$plan" 100 "$python" benchmarks/bench_gpu.py --library torch --engine "$plan" \
        --json "$out/bench-torch-$plan.json"
done
step test-torch 150 "$python" -m pytest -rs --durations 5 tests/gpu/test_engines_on_a_gpu.py -k torch
if "$python" -c "import pycuda" 2>/dev/null; then
    step test-pycuda 90 "$python" -m pytest -rs tests/gpu/test_pycuda_on_a_gpu.py
else
    note skipped pycuda "it is not installed"
fi
if "$python" -c "import tensorrt, pycuda" 2>/dev/null; then
    step test-tensorrt 200 "$python" -m pytest -rs --durations 5 tests/gpu/test_trt_on_a_gpu.py \
        tests/gpu/test_engines_on_a_gpu.py -k "not torch"
    for plan in final fast; do
        step "bench-tensorrt-$plan" 150 "$python" benchmarks/bench_gpu.py --library tensorrt --engine "$plan" \
            --json "$out/bench-tensorrt-$plan.json"
    done
else
    note skipped tensorrt "tensorrt or pycuda is not installed"
fi
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        # Every tensor an allocation of its own: PyTorch's cache would hide what lies beyond one.
        step "$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -x tests/gpu/test_kernels.py -k "large_ or every_half or outside or decode or broken"
    done
else
    note skipped compute-sanitizer "not on PATH"
fi
echo "== after $SECONDS s, in $out:"
cat "$out/summary.txt"
exit $failed
