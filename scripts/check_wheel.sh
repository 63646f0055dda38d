#!/usr/bin/env bash
# Builds the wheel, installs it in a fresh virtual environment, and runs it there on a made-up image, far from the source.
#
#   scripts/check_wheel.sh PYTHON...
#
# What it builds with and depends on comes from the package index; with SITE=FOLDER, the site-packages of the one PYTHON
# that is given, nothing is fetched. Without CUDA. The first step that fails ends it with an exit code other than 0.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH
export HISTOSEG_CUDA=0 PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
cp -r pyproject.toml setup.py MANIFEST.in LICENSE README.md CHANGELOG.md Makefile csrc histoseg_fast "$work/source"
find "$work/source" \( -name '*.so' -o -name '*.c' -o -name __pycache__ \) -prune -exec rm -r {} +

for python in "$@"; do
    python=$(command -v "$python")
    root=$work/$(basename "$(dirname "$(dirname "$python")")")-$("$python" -c 'import sys; print(sys.implementation.cache_tag)')
    mkdir "$root"
    "$python" -m venv "$root/venv"
    in_venv=$root/venv/bin/python
    if [ -n "${SITE:-}" ]; then
        "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$root" "$work/source"
        "$in_venv" -m pip install -q --no-deps "$root"/histoseg_fast-*.whl
        # Behind the environment's own packages; what installs the source there, if anything, is not followed.
        echo "$SITE" >"$("$in_venv" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/site.pth"
    else
        "$in_venv" -m pip wheel -q --no-deps -w "$root" "$work/source"
        "$in_venv" -m pip install -q "$root"/histoseg_fast-*.whl
    fi
    cd "$root"
    "$in_venv" - "$root" <<'PYTHON'
import sys, zipfile
from pathlib import Path

import numpy as np

import histoseg_fast
from histoseg_fast.images import write_png

root = Path(sys.argv[1])
assert Path(histoseg_fast.__file__).is_relative_to(root / "venv"), histoseg_fast.__file__
names = zipfile.ZipFile(next(root.glob("*.whl"))).namelist()
wanted = ("py.typed", "_core.pyi", "plans/final.plan", "reporting/report.html", "reporting/report.css", "reporting/report.js")
missing = [name for name in wanted if f"histoseg_fast/{name}" not in names]
assert not missing, f"the wheel lacks {missing}"
strays = [name for name in names if not name.startswith(("histoseg_fast/", "histoseg_fast-"))]
strays += [name for name in names if name.endswith((".cpp", ".h", ".cu", ".pyx", ".c", ".o"))]
assert not strays, f"the wheel holds {strays}"
write_png(root / "in" / "a.png", np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
PYTHON
    "$root/venv/bin/histoseg-fast" infer in --out out
    "$in_venv" -c '
from histoseg_fast.images import read_image
assert read_image("out/masks/a.png").shape == (300, 400, 3)'
    cd - >/dev/null
    echo "ok: $("$in_venv" -VV | head -1), $(cd "$root" && echo histoseg_fast-*.whl)"
done
