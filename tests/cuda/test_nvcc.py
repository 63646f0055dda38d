"""The CUDA sources compile without a warning, and to the instructions that they are written for.

One architecture, to be quick; HISTOSEG_ALL_ARCHITECTURES=1 compiles for all that setup.py builds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.stem for path in ROOT.glob("csrc/*.cu"))
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="histoseg_setup")
ALL = os.environ.get("HISTOSEG_ALL_ARCHITECTURES") == "1"
WARNINGS = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-warn-spills,-warn-lmem-usage"]


def architecture_flags(nvcc: str) -> list[str]:
    if ALL:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        return ["--threads", "2", *SETUP["architecture_flags"](listing)]
    return ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles a source once; its folder, which holds the object and nvcc's own intermediate files."""
    nvcc = SETUP["find_nvcc"]()
    if nvcc is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or in CUDA_PATH")
    folders: dict[str, Path] = {}

    def compile_once(source: str) -> Path:
        if source not in folders:
            folder = tmp_path_factory.mktemp(source)
            command = [nvcc, "-c", f"csrc/{source}.cu", "-o", str(folder / f"{source}.o"), "--keep"]
            command += ["--keep-dir", str(folder), *SETUP["cuda_flags"](), *WARNINGS, *architecture_flags(nvcc)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            folders[source] = folder
        return folders[source]

    return compile_once


def disassembler() -> str:
    """The toolkit's cuobjdump, or the one that Triton (which PyTorch brings along) carries."""
    beside = os.path.join(os.path.dirname(os.path.realpath(SETUP["find_nvcc"]())), "cuobjdump")
    triton = importlib.util.find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or ()
    carried = [os.path.join(folder, "backends", "nvidia", "bin", "cuobjdump") for folder in folders]
    places = (shutil.which("cuobjdump"), beside, *carried)
    found = next((place for place in places if place and os.path.exists(place)), None)
    if found is None:
        pytest.skip("nvcc is here, but no cuobjdump to disassemble with (it comes with the toolkit and with Triton)")
    return found


def kernels(folder: Path) -> list[tuple[str, str]]:
    """Mangled name and machine code of every kernel in the object, once for each architecture."""
    target = next(folder.glob("*.o"))
    dump = subprocess.run([disassembler(), "--dump-sass", str(target)], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s*Function : (\S+)$", dump.stdout, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_warnings(compiled, source):
    assert (compiled(source) / f"{source}.o").stat().st_size > 0


@pytest.mark.slow
def test_no_multiply_and_add_are_fused(compiled):
    """Else the device's exp, and with it the sums of confidence, would differ from the host's."""
    texts = [path.read_text() for path in compiled("stitch").glob("*.ptx")]
    assert texts
    for text in texts:
        assert "mul.rn.f32" in text or "mul.f32" in text
        assert "rcp.rn.f32" in text
        assert not re.search(r"\b(fma|mad)\.\S*f32|\b(div|rcp)\.(approx|full)|\.ftz", text)


@pytest.mark.slow
def test_the_stitch_kernel_loads_16_bytes_at_a_time(compiled):
    found = kernels(compiled("stitch"))
    for classes in (0, 2, 3, 4):
        codes = [code for name, code in found if f"StitchVariantILi{classes}E" in name]
        assert codes, found
        for code in codes:
            # 8 pixels of a class are two loads in fp32 and one in fp16.
            assert len(re.findall(r"\bLDG\.E\S*\.128", code)) >= 3 * classes
            assert not re.search(r"\b(LDL|STL)\b", code)  # arrays are in registers, all of them


@pytest.mark.slow
def test_the_gather_kernel_copies_16_bytes_at_a_time(compiled):
    found = kernels(compiled("gather"))
    assert found
    for _, code in found:
        assert re.search(r"\bLDG\.E\S*\.128", code)
        assert re.search(r"\bSTG\.E\S*\.128", code)


@pytest.mark.slow
def test_the_layers_that_move_memory_move_16_bytes_at_a_time(compiled):
    found = {name: code for name, code in kernels(compiled("layers")) if "layer_kernel" in name}
    assert len(found) >= 3
    for code in found.values():
        assert re.search(r"\bLDG\.E\S*\.128", code) and re.search(r"\bSTG\.E\S*\.128", code)


@pytest.mark.slow
def test_the_first_and_the_last_convolution_run_on_the_matrix_units(compiled):
    found = [code for name, code in kernels(compiled("layers")) if "first_kernel" in name or "logits_kernel" in name]
    assert len(found) >= 4
    for code in found:
        assert re.search(r"\bHMMA\.", code) and re.search(r"\bLDSM\.", code)
        assert not re.search(r"\b(LDL|STL)\b", code)
