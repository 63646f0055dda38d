"""`export` and `compile --tensorrt` as a user runs them, without TensorRT and with a fake one."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from random_networks import checkpoint
from tiny_plans import tiny_manifest
from trt_fixtures import A100, spoiled

from histoseg_fast import cli
from histoseg_fast.cli import building
from histoseg_fast.engines.trt import gpu, library
from histoseg_fast.plan import MODEL, read_plan, write_plan


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["histoseg-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "unexpected" not in err
        return caught.value.code, out, err

    return command


@pytest.fixture
def no_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    library.tensorrt.cache_clear()
    yield
    library.tensorrt.cache_clear()


# -- without TensorRT ------------------------------------------------------------------------------


def test_onnx(run, tiny_plan_path, tmp_path):
    code, out, err = run("export", tiny_plan_path, "--format", "onnx", "-o", tmp_path / "net.onnx")
    assert (code, err) == (0, "") and out == f"{tmp_path / 'net.onnx'}: tiny, ONNX, fp32\n"
    assert (tmp_path / "net.onnx").read_bytes() == read_plan(tiny_plan_path).members[MODEL]


def test_triton(run, tiny_plan_path, tmp_path, no_tensorrt):
    code, out, _ = run("export", tiny_plan_path, "--format", "triton", "-o", tmp_path / "models", "--batch", "2")
    assert code == 0 and out == f"{tmp_path / 'models' / 'tiny'}: tiny, ONNX, fp32\n"
    assert "max_batch_size: 2\n" in (tmp_path / "models" / "tiny" / "config.pbtxt").read_text()


@pytest.mark.parametrize("options", [("tensorrt",), ("triton", "--platform", "tensorrt")])
def test_engines_need_tensorrt(run, tiny_plan_path, tmp_path, no_tensorrt, options):
    code, out, err = run("export", tiny_plan_path, "-o", tmp_path / "x", "--format", *options)
    assert (code, out) == (1, "") and err.count("\n") == 1 and not (tmp_path / "x").exists()
    assert "TensorRT is not to be had here" in err and "pip install 'histoseg-fast[tensorrt]'" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "openvino"), "unknown format 'openvino'; choose one of onnx, triton, tensorrt"),
        (("--format", "triton", "--platform", "x"), "unknown platform 'x'"),
        (("--format", "tensorrt", "--precision", "bf16"), "unknown precision 'bf16'"),
        (
            ("--format", "tensorrt", "--precision", "fp8", "--hardware-compatible", "ampere+"),
            "no fp8 engine runs on Ampere GPUs; --hardware-compatible none or same-cc",
        ),
        (("--format", "tensorrt", "--hardware-compatible", "x"), "choose one of none, ampere+, same-cc"),
        (("--format", "tensorrt", "--workspace", "0"), "a workspace of 0.0 GiB"),
    ],
)
def test_options_that_are_wrong(run, tiny_plan_path, tmp_path, options, words):
    code, _, err = run("export", tiny_plan_path, "-o", tmp_path / "x", *options)
    assert code == 2 and words in err and not (tmp_path / "x").exists()


def test_a_file_that_cannot_be_written(run, tiny_plan_path, tmp_path):
    code, _, err = run("export", tiny_plan_path, "-o", tmp_path, "--format", "onnx")
    assert code == 2 and "cannot be written" in err


def test_compile_fails_before_anything_slow(run, tmp_path, no_tensorrt):
    source = checkpoint(tmp_path / "c.safetensors", "two")
    code, out, err = run("compile", source, "-o", tmp_path / "x.plan", "--tensorrt")
    assert (code, out) == (1, "") and "TensorRT is not to be had here" in err and not (tmp_path / "x.plan").exists()


def test_compile_without_a_gpu(run, tmp_path, machine, monkeypatch):
    def none():
        raise gpu.EngineError("no NVIDIA driver was found")

    monkeypatch.setattr(gpu, "current_gpu", none)
    source = checkpoint(tmp_path / "c.safetensors", "two")
    code, _, err = run("compile", source, "-o", tmp_path / "x.plan", "--tensorrt")
    assert code == 1 and "no NVIDIA driver" in err and not (tmp_path / "x.plan").exists()


# -- with a fake TensorRT --------------------------------------------------------------------------


def test_a_bare_engine(run, machine, tiny_plan_path, tmp_path):
    machine.run_engines()
    code, out, err = run("export", tiny_plan_path, "-o", tmp_path / "x.engine", "--format", "tensorrt")
    assert code == 0 and "NVIDIA H200 (sm90), TensorRT 11.4.0.106, fp16" in out
    assert "none is in the cache" in err
    assert (tmp_path / "x.engine").read_bytes() == machine.prepare(read_plan(tiny_plan_path)).data
    assert run("export", tiny_plan_path, "-o", tmp_path / "y.engine", "--format", "tensorrt")[2] == ""


def test_engines_in_8_bits(run, machine, tiny_plan, tiny_plan_path, tmp_path):
    machine.run_engines()
    options = ("--format", "tensorrt", "--precision", "int8")
    code, _, err = run("export", tiny_plan_path, "-o", tmp_path / "x.engine", *options)
    assert code == 1 and err.count("\n") == 1 and "compiled without ranges, which int8 needs" in err
    path = tmp_path / "ranged.plan"
    write_plan(path, tiny_manifest(int8={"inputs": {"b": 5.0}, "outputs": {}}), {MODEL: tiny_plan.members[MODEL]})
    code, out, _ = run("export", path, "-o", tmp_path / "x.engine", *options)
    assert code == 0 and "TensorRT 11.4.0.106, int8" in out
    machine.install("11.4.0.106", A100)
    code, _, err = run("export", path, "-o", tmp_path / "y.engine", "--format", "tensorrt", "--precision", "fp8")
    assert code == 1 and "fp8 needs a GPU of compute capability 8.9 or newer, not NVIDIA A100 (sm80)" in err


def test_compile_says_at_once_what_8_bits_lack(run, machine, tmp_path):
    source = checkpoint(tmp_path / "c.safetensors", "two")
    code, _, err = run("compile", source, "-o", tmp_path / "x.plan", "--precision", "fp8")
    assert code == 2 and "fp8 takes its ranges from images; --calibrate DIR" in err
    machine.install("11.4.0.106", A100)
    options = ("--precision", "fp8", "--tensorrt", "--calibrate", tmp_path)
    code, _, err = run("compile", source, "-o", tmp_path / "x.plan", *options)
    assert code == 1 and "fp8 needs a GPU of compute capability 8.9" in err and not (tmp_path / "x.plan").exists()


def test_a_triton_repository_with_an_engine(run, machine, tiny_plan_path, tmp_path):
    machine.run_engines()
    options = ("--format", "triton", "--platform", "tensorrt", "--hardware-compatible", "same-cc", "--workspace", "2")
    code, out, _ = run("export", tiny_plan_path, "-o", tmp_path, *options)
    assert code == 0 and "and others (same-cc)" in out
    assert (tmp_path / "tiny" / "1" / "model.plan").read_bytes().startswith(b"fake engine")


def test_an_engine_with_an_inf_is_not_exported(run, machine, tiny_plan_path, tmp_path):
    machine.run_engines(spoiled(np.inf))
    code, _, err = run("export", tiny_plan_path, "-o", tmp_path / "x.engine", "--format", "tensorrt")
    assert code == 1 and "not finite" in err and not (tmp_path / "x.engine").exists()


def test_compile_puts_the_engine_into_the_plan(run, machine, tmp_path, monkeypatch):
    from histoseg_fast.compiling import calibrate

    whole = calibrate.make_field
    monkeypatch.setattr(calibrate, "make_field", lambda seed: tuple(part[:32, :48] for part in whole(seed)))
    machine.run_engines()
    source = checkpoint(tmp_path / "c.safetensors", "two")
    code, out, err = run("compile", source, "-o", tmp_path / "x.plan", "--tensorrt", "--version-compatible")
    assert code == 0, err
    plan = read_plan(tmp_path / "x.plan")
    assert "engines/sm90-11.4.0.106-fp16-NVIDIA_H200.engine" in plan.members and plan.agreement("fp16") == 1.0
    assert "TensorRT 11.4.0.106 or newer" in out and "fp16: 100.000% of pixels as fp32" in out
    machine.run_engines(spoiled(np.nan))
    code, _, err = run("compile", source, "-o", tmp_path / "y.plan", "--tensorrt", "--workspace", "1")
    assert code == 1 and "not finite" in err and "y.plan was written without the engine" in err
    assert set(read_plan(tmp_path / "y.plan").members) == {MODEL}


# -- progress --------------------------------------------------------------------------------------


def test_progress_in_a_log(capsys, monkeypatch):
    monkeypatch.setattr(building, "REPORT_SECONDS", 0.0)
    with building.BuildDisplay() as display:
        display("Building engine", 0.25)
    assert capsys.readouterr().err.startswith("TensorRT: Building engine, 25% after 0 s")
    monkeypatch.setattr(building, "REPORT_SECONDS", 100.0)
    with building.BuildDisplay() as display:
        display("Building engine", 0.5)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with building.BuildDisplay() as display:
        for share in (0.0, 0.5, 1.0):
            display("Building engine [1]", share)
    assert "Building engine [1]" in capsys.readouterr().err
