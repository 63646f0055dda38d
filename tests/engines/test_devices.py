"""What `--device` means, with and without GPUs, and which library runs them."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
from gpu_fixtures import gpu_here
from tiny_plans import changed

from histoseg_fast import engines
from histoseg_fast.engines import choose_gpu_precision, devices, gpu_precisions, open_engine, openvino
from histoseg_fast.engines.devices import choose_gpus, parse_device
from histoseg_fast.engines.trt import gpu
from histoseg_fast.engines.trt.gpu import Gpu
from histoseg_fast.errors import EngineError, UsageError
from histoseg_fast.plan import Plan


@pytest.mark.parametrize(
    ("text", "indices"),
    [("auto", None), ("cpu", ()), ("cuda", (0,)), ("cuda:1", (1,)), ("cuda:0,1", (0, 1)), ("cuda:3,0", (3, 0))],
)
def test_devices_by_name(text, indices):
    assert parse_device(text) == indices


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:", "cuda:-1", "cuda:0,", "cuda:0,0", "cuda:1 ", "CUDA", "cuda:²", "cpu:0"]
)
def test_devices_that_are_none(text):
    with pytest.raises(UsageError) as caught:
        parse_device(text)
    assert str(caught.value).isprintable()


@pytest.fixture
def libraries(gpus, monkeypatch):
    """Two GPUs; the libraries named by `have` can be imported."""

    def start(*have, count=2):
        gpus.start(count)

        def check(name):
            def fail():
                if name not in have:
                    raise EngineError(f"{name} is broken")

            return fail

        monkeypatch.setattr(devices, "_check_tensorrt", check("tensorrt"))
        monkeypatch.setattr(devices, "_check_torch", check("torch"))

    return start


def choose(device):
    lines = []
    return choose_gpus(device, lines.append), lines


def test_tensorrt_first_then_pytorch_then_the_cpu(libraries, monkeypatch):
    libraries("tensorrt", "torch")
    assert choose("auto") == (((0,), "tensorrt"), [])
    assert choose("cuda:1,0") == (((1, 0), "tensorrt"), [])
    assert choose("cpu") == (((), ""), [])
    libraries("torch")
    assert choose("auto") == (((0,), "torch"), ["tensorrt is installed, but cannot be used: tensorrt is broken"])
    libraries()
    chosen, lines = choose("auto")
    assert chosen == ((), "") and len(lines) == 3 and "going on with the CPU" in lines[2]
    with pytest.raises(EngineError, match=r"neither TensorRT .* pip install .*\[tensorrt\].*--device cpu"):
        choose("cuda")
    monkeypatch.setattr(devices, "has", lambda *packages: False)
    libraries("tensorrt", "torch")  # what is not installed is not imported
    chosen, lines = choose("auto")
    assert chosen == ((), "") and len(lines) == 1


def test_the_library_by_name(libraries, monkeypatch):
    libraries("torch", "tensorrt")
    for name in ("torch", "tensorrt"):
        monkeypatch.setenv(devices.LIBRARY_VARIABLE, name)
        assert choose("cuda") == (((0,), name), [])
    libraries("torch")
    monkeypatch.setenv(devices.LIBRARY_VARIABLE, "tensorrt")
    with pytest.raises(EngineError, match="tensorrt is broken"):
        choose("auto")
    monkeypatch.setenv(devices.LIBRARY_VARIABLE, "none")
    assert choose("auto") == (((), ""), [])
    with pytest.raises(EngineError, match="HISTOSEG_GPU_ENGINE=none keeps GPUs out"):
        choose("cuda")
    monkeypatch.setenv(devices.LIBRARY_VARIABLE, "jax")
    with pytest.raises(UsageError, match="HISTOSEG_GPU_ENGINE='jax' is not known; choose one of tensorrt, torch, none"):
        choose("cuda")


def test_gpus_that_are_not_there(libraries):
    libraries("torch")
    with pytest.raises(EngineError, match="there is no GPU 2: this machine has 2, numbered from 0; use --device auto"):
        choose("cuda:1,2")
    libraries("torch", count=0)
    assert choose("auto") == (((), ""), [])
    with pytest.raises(EngineError, match="there is no GPU 0: this machine has none"):
        choose("cuda")


@pytest.mark.parametrize(("code", "told"), [(100, False), (999, True)])  # 100: no device, which is no fault
def test_a_driver_that_does_not_start_is_told(monkeypatch, code, told):
    monkeypatch.delenv(devices.LIBRARY_VARIABLE, raising=False)
    library = types.SimpleNamespace(cuInit=lambda flags: code)
    monkeypatch.setattr(gpu, "ctypes", types.SimpleNamespace(**{**vars(gpu.ctypes), "CDLL": lambda name: library}))
    gpu.driver.cache_clear()
    try:
        line = (
            f"going on with the CPU: the NVIDIA driver does not start (CUDA error {code}); run nvidia-smi; --device cpu"
        )
        assert choose("auto") == (((), ""), [line] if told else [])
        with pytest.raises(EngineError, match=f"does not start .CUDA error {code}"):
            choose("cuda")
    finally:
        gpu.driver.cache_clear()


def test_missing_libraries_are_one_line(gpus, monkeypatch):
    gpus.start()
    broken = types.ModuleType("pycuda.driver")
    broken.init = lambda: (_ for _ in ()).throw(RuntimeError("cuInit failed:\nno CUDA-capable device"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", broken)
    monkeypatch.setattr(sys.modules["pycuda"], "driver", broken)
    monkeypatch.setattr(devices, "_check_torch", lambda: None)
    chosen, (line,) = choose("auto")
    assert chosen == ((0,), "torch") and line.startswith("tensorrt is installed, but cannot be used: pycuda cannot be")


@pytest.mark.skipif(gpu_here(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_heavy_is_imported():
    program = (
        "import sys; from histoseg_fast.engines.devices import choose_gpus; before = set(sys.modules);"
        "print(choose_gpus('auto', print), sorted(set(sys.modules) - before), 'torch' in sys.modules)"
    )
    environment = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "((), '') [] False"


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixed", "figures", "wanted", "chosen"),
    [
        ("auto", None, "auto", "fp16"),
        ("auto", {"agreement": 0.9999}, "auto", "fp16"),
        ("auto", {"agreement": 0.9}, "auto", "fp32"),
        ("fp16", {"agreement": 0.9}, "auto", "fp16"),
        ("fp32", {"agreement": 1.0}, "auto", "fp32"),
        ("int8", None, "auto", "fp16"),
        ("auto", {"agreement": 0.9}, "fp16", "fp16"),
        ("auto", None, "fp32", "fp32"),
        ("auto", None, "bf16", EngineError),
    ],
)
@pytest.mark.parametrize("library", ["tensorrt", "torch"])
def test_precision_on_a_gpu(tiny_plan, fixed, figures, wanted, chosen, library):
    plan = with_figures(tiny_plan, fixed, {"fp16": figures} if figures else {})
    if isinstance(chosen, str):
        assert choose_gpu_precision(plan, wanted, (0,), library) == chosen
    else:
        with pytest.raises(chosen, match="GPUs run fp16, fp32, int8 and fp8, not bf16; use --device cpu"):
            choose_gpu_precision(plan, wanted, (0,), library)


def with_figures(plan, fixed, figures, ranges=True):
    more = {"int8": {"inputs": {"b": 5.0, "up": 6.0}, "outputs": {}}} if ranges else {}
    precisions = {**plan.manifest["precisions"], **figures}
    return Plan({**plan.manifest, **more, "precision": fixed, "precisions": precisions}, plan.members, "")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_auto_on_a_gpu_runs_8_bits_where_a_plan_is_compiled_for_them_and_passes(tiny_plan, machine, precision):
    def chosen(agreement, key=f"tensorrt-{precision}", fixed=precision, ranges=True, library="tensorrt"):
        plan = with_figures(tiny_plan, fixed, {key: {"agreement": agreement}}, ranges)
        return choose_gpu_precision(plan, "auto", (0, 1), library)

    assert chosen(0.9999) == precision
    assert chosen(0.9999, fixed="auto") == "fp16"
    assert chosen(0.9) == "fp16"
    assert chosen(0.9999, key=precision) == "fp16"  # the CPU's figures
    assert chosen(0.9999, ranges=False) == "fp16"
    assert chosen(0.9999, library="torch") == "fp16"
    machine.gpu = Gpu("NVIDIA V100", (7, 0))
    assert chosen(0.9999) == "fp16"


def test_8_bits_by_name(tiny_plan, machine):
    plan, bare = with_figures(tiny_plan, "auto", {}), with_figures(tiny_plan, "auto", {}, ranges=False)
    assert gpu_precisions(plan, (0,), "tensorrt") == ("fp16", "fp32", "int8", "fp8")
    assert gpu_precisions(plan, (0,), "torch") == gpu_precisions(bare, (0,), "tensorrt") == ("fp16", "fp32")
    assert choose_gpu_precision(plan, "fp8", (0,), "tensorrt") == "fp8"
    with pytest.raises(EngineError, match="PyTorch does not run int8 on GPUs, TensorRT does; pip install"):
        choose_gpu_precision(plan, "int8", (0,), "torch")
    with pytest.raises(EngineError, match="compiled without ranges, which int8 needs; compile it with --calibrate DIR"):
        choose_gpu_precision(bare, "int8", (0,), "tensorrt")
    machine.gpu = Gpu("NVIDIA A100", (8, 0))
    assert gpu_precisions(plan, (0,), "tensorrt") == ("fp16", "fp32", "int8")
    with pytest.raises(EngineError, match=r"fp8 needs a GPU of compute capability 8\.9 or newer, not NVIDIA A100"):
        choose_gpu_precision(plan, "fp8", (0,), "tensorrt")


def test_int8_runs_on_the_gpu_or_on_the_cpu(gpus, tiny_plan, monkeypatch):
    gpus.start()
    for module in (engines, openvino):
        monkeypatch.setattr(module, "cpu_precisions", lambda: ("fp32", "int8"))
    plan = changed(tiny_plan, int8={"inputs": {"b": 5.0}, "outputs": {}})
    for device in ("auto", "cuda"):
        with gpus.open(plan, device, precision="int8") as engine:
            assert (engine.device, engine.precision) == ("cuda:0", "int8")
    gpus.machine.gpu = Gpu("old", (7, 0))
    lines = []
    with open_engine(plan, device="auto", precision="int8", report=lines.append) as engine:
        assert (engine.device, engine.precision) == ("cpu", "int8")
    assert lines == [
        "going on with the CPU: int8 needs a GPU of compute capability 7.5 or newer, not old (sm70); "
        "use --precision fp16"
    ]
    with pytest.raises(EngineError, match="this CPU has no native fp8"):
        open_engine(plan, device="auto", precision="fp8")


def test_auto_takes_the_device_that_runs_the_precision(gpus, tiny_plan, monkeypatch):
    gpus.start()
    monkeypatch.setattr(engines, "cpu_precisions", lambda: ("fp32", "bf16"))
    for precision, device in (("auto", "cuda:0"), ("fp32", "cuda:0"), ("fp16", "cuda:0"), ("bf16", "cpu")):
        with gpus.open(tiny_plan, "auto", precision=precision) as engine:
            assert engine.device == device and engine.precision == precision.replace("auto", "fp16")
    with pytest.raises(EngineError, match="GPUs run fp16, fp32, int8 and fp8, not bf16"):
        gpus.open(tiny_plan, "cuda", precision="bf16")
    with pytest.raises(EngineError, match="this CPU has no native fp16"):
        gpus.open(tiny_plan, "cpu", precision="fp16")


def test_a_second_gpu_that_fails_to_start_frees_the_first(gpus, tiny_plan, monkeypatch):
    from histoseg_fast.engines import tensorrt

    cuda = gpus.start(2)
    started, start = [], tensorrt.open_tensorrt

    def fail(plan, index, *arguments, **more):
        if index == 1:
            raise EngineError("no room")
        started.append(start(plan, index, *arguments, **more))
        started[0].slots(2)[0].reshape(1, 8, 8)
        return started[0]

    monkeypatch.setattr(tensorrt, "open_tensorrt", fail)
    with pytest.raises(EngineError, match="no room"):
        open_engine(tiny_plan, device="cuda:0,1")
    assert started
    cuda.check_nothing_left()
