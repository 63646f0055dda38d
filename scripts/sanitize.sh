#!/usr/bin/env bash
# The tests of the C++ core with the core under gcc's sanitizers (Linux), built aside into build/sanitize.
#
#   scripts/sanitize.sh address|thread [PYTHON] [TESTS OR OTHER ARGUMENTS OF PYTEST, in place of the core's tests...]
#
# address: AddressSanitizer and UBSan; thread: ThreadSanitizer. PYTHON needs the test extra; by default .venv's. Python
# and its libraries are not instrumented, so what is found is the core's. Leaks are not looked for: Python frees little at its end.
# What a sanitizer says is printed at the end, whatever became of the process, and makes the run fail.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?address or thread}
python=$(command -v "${2:-.venv/bin/python}")
shift $(($# < 2 ? $# : 2))
lib=$PWD/build/sanitize/$kind
HISTOSEG_SANITIZE=$kind HISTOSEG_CUDA=0 "$python" setup.py -q build --build-temp "$lib.objects" --build-lib "$lib"

case $kind in
    address) runtime=libasan.so ;;
    thread) runtime=libtsan.so ;;
esac
core=(tests/test_{labels,stitch,tiling,outlines,crf,regions,overlay,postprocess}.py tests/cuda/test_threads.py
    tests/images/test_{png_filters,resample,geojson,pyramid}.py)
if [ "$kind" = address ]; then
    core+=(tests/fuzz/test_fuzz.py)
fi
# The runtime has to be the first library, with libstdc++ right behind, or it does not see exceptions being thrown.
preload="$(gcc -print-file-name="$runtime") $(gcc -print-file-name=libstdc++.so.6)"
# OpenVINO loads a library in a way that hides the runtime from it, unless told so.
export TBB_ENABLE_SANITIZERS=1
report=$lib.report
rm -f "$report".*
export ASAN_OPTIONS=detect_leaks=0:log_path="$report" UBSAN_OPTIONS=print_stacktrace=1:log_path="$report"
export TSAN_OPTIONS=exitcode=66:report_signal_unsafe=0:ignore_noninstrumented_modules=1:die_after_fork=0:log_path="$report"
# The sources in the working directory, beside which lies an ordinary core or none, are not to be found first.
export PYTHONSAFEPATH=1 PYTHONPATH=$lib:$PWD/tests/sanitize:$PWD/tests:$PWD/tests/fuzz:$PWD/benchmarks
export PYTHONMALLOC=malloc HISTOSEG_SANITIZE=$kind
# Not under a sanitizer: what needs a limit on addresses (sanitizers map terabytes), watches memory and open files, or
# starts a browser, which ends when it finds the runtime. ThreadSanitizer gives no signal to a forked child of threads.
without="not take_all_memory and not memory_does_not_hold and not stay_where_they_are and not test_browser"
if [ "$kind" = thread ]; then
    without+=" and not sigterm and not clock_that_runs_backwards and not folder_that_may_only_be_read"
fi
status=0
# Without randomised addresses: newer kernels use more bits for them than ThreadSanitizer knows of.
setarch -R env LD_PRELOAD="$preload" "$python" -c 'import sys; sys.path = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())' \
    -p sanitized -p no:cacheprovider -m "not slow" -k "$without" "${@:-"${core[@]}"}" || status=$?
if compgen -G "$report.*" >/dev/null; then
    cat "$report".*
    exit 1
fi
exit "$status"
