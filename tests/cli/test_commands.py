"""inspect, doctor, compile, eval and demo as a user runs them: what they print, their exit codes, one line an error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from data_folders import easy_folder
from PIL import Image
from random_networks import checkpoint, noise
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score, log_loss

from histoseg_fast import cli, plans, postprocess
from histoseg_fast.cli import doctor
from histoseg_fast.compiling import calibrate
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.evaluation.evaluate import evaluate
from histoseg_fast.labels import encode
from histoseg_fast.machine import cpu_precisions
from histoseg_fast.plan import MODEL, pack, read_plan, write_plan
from histoseg_fast.postprocess import NO_STEPS, CrfOptions, PostProcessing


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["histoseg-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return caught.value.code, out, err

    return command


@pytest.fixture
def fails(run):
    """Run a command that must fail with `code` and one line that holds `words`."""

    def command(*arguments, code=1, words=()):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "")
        assert err.count("\n") == 1 and err.startswith("histoseg-fast: ") and "unexpected" not in err
        for word in words:
            assert word in err
        return err

    return command


@pytest.fixture
def data(tmp_path):
    """Three labelled images, two of them in the test split, and their label ids."""
    ids, random = {}, np.random.default_rng(5)
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i, (height, width) in enumerate([(40, 51), (150, 33), (9, 9)]):
        ids[i] = np.repeat(random.integers(0, 3, (height, 1), np.uint8), width, axis=1)
        Image.fromarray(noise(height, width, i)).save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray(encode(ids[i])).save(tmp_path / "data" / "labels" / f"{i}.png")
    (tmp_path / "data" / "split.csv").write_text("name,split\n0.png,test\n1.png,test\n2.png,train\n")
    return tmp_path / "data", ids


def rewritten(plan, path, **changes):
    fields = {k: v for k, v in plan.manifest.items() if k not in ("format", "version", "members")}
    write_plan(path, fields | changes, plan.members)
    return path


# -- the command line as a whole -------------------------------------------------------------------


def test_as_a_program(tiny_plan_path):
    """The real program, with what only a process of its own shows: no torch is imported."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from histoseg_fast.cli import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tiny_plan_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "False\n") and "tiny" in done.stdout


def test_version_help_and_wrong_options(run):
    assert run("--version")[:2] == (0, f"histoseg-fast {cli.__version__}\n")
    code, out, _ = run("--help")
    assert code == 0 and all(name in out for name in ("infer", "demo", "inspect", "doctor", "compile", "eval", "train"))
    for arguments in (["inspect", "--bogus"], ["nonsense"], ["compile"], ["demo", "--images", "0"]):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and "Error" in err


def test_a_bug_is_one_line_too(run, monkeypatch, tiny_plan_path):
    def broken(name):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(plans, "open_plan", broken)
    monkeypatch.delenv("HISTOSEG_TRACEBACK", raising=False)
    code, out, err = run("inspect", tiny_plan_path)
    assert (code, out, err.count("\n")) == (1, "", 1) and "unexpected ZeroDivisionError: two\\nlines" in err


def test_interrupts_and_a_reader_that_has_gone(run, monkeypatch, tiny_plan_path):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "open_plan", interrupted)
    assert run("inspect", tiny_plan_path)[0] == 130


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect(run, tmp_path, tiny_plan):
    scores = {"test": {"cross_entropy": 0.5, "pixel_accuracy": 0.75, "mean_iou": 0.625, "images": 3}, "note": "x"}
    measured = {"fp32": {"agreement": 1.0}, "bf16": {"agreement": 0.99875}, "int8": {}}
    path = rewritten(tiny_plan, tmp_path / "a.plan", scores=scores, precisions=measured, made_with={"maker": "1.2"})
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    for text in (str(path), "stride 2, halo 8, tile 128", "1 cancer (255, 0, 0)", "bf16 (99.88% of pixels as fp32)",
                 "model.onnx 0.0 MiB", "maker 1.2", "postprocess    none\n",
                 "cross entropy 0.5000, accuracy 0.7500, mIoU 0.6250, images 3"):  # fmt: skip
        assert text in out


def test_inspect_json(run, tiny_plan, tiny_plan_path):
    code, out, err = run("inspect", tiny_plan_path, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert {key: found[key] for key in tiny_plan.manifest} == tiny_plan.manifest
    assert found["sha256"] == tiny_plan.sha256 and found["precision_here"] == "fp32"


def test_inspect_shows_what_a_hostile_plan_says_as_text(run, tmp_path, tiny_plan):
    hostile = {"a\x1b[2J\n": {"mean_iou": "\x1b[31m\nforged", "cross_entropy": None, "images": [1]}, "b": {}}
    path = rewritten(tiny_plan, tmp_path / "a.plan", scores=hostile, made_with={"x\nforged": {"y": "\x07"}})
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    assert all(line.isprintable() for line in out.splitlines()) and "\nforged" not in out


def test_inspect_refuses(fails, tmp_path, tiny_plan_path):
    (tmp_path / "text.plan").write_text("hello")
    (tmp_path / "cut.plan").write_bytes(tiny_plan_path.read_bytes()[:-100])
    fails("inspect", tmp_path / "missing.plan", code=2, words=["missing.plan", "no such plan"])
    fails("inspect", tmp_path / "text.plan", words=["text.plan", "is not a plan file"])
    fails("inspect", tmp_path / "cut.plan", words=["cut.plan", "is damaged"])
    fails("inspect", tmp_path, words=["cannot be read"])
    fails("inspect", "x" * 5000, code=2, words=["no such plan"])


# -- doctor ----------------------------------------------------------------------------------------


@pytest.fixture
def shipped(monkeypatch, tmp_path_factory, tiny_plan):
    """The tiny plan in the place of the shipped ones."""
    folder = tmp_path_factory.mktemp("shipped")
    for name in plans.SHIPPED:
        rewritten(tiny_plan, folder / f"{name}.plan")
    monkeypatch.setattr(plans, "FOLDER", folder)
    return folder


def test_doctor(run, shipped):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    names = ("CPU", "C++ core", "OpenVINO", "shipped plans", "NVIDIA GPU", "TensorRT", "--device auto", "extra [train]")
    for name in (*names, "OpenSlide"):
        assert any(line.startswith(("yes ", "no  ")) and name in line for line in out.splitlines())
    findings = json.loads(run("doctor", "--json")[1])
    assert all(set(finding) == {"what", "ok", "detail", "fix"} for finding in findings)
    assert all(finding["ok"] or finding["fix"] for finding in findings)  # a fix for each lack
    assert next(f for f in findings if f["what"] == "shipped plans")["detail"].startswith("tiny (runs ")


def test_doctor_says_what_auto_comes_to(run, shipped, gpus, monkeypatch):
    def found():
        return next(f for f in json.loads(run("doctor", "--json")[1]) if f["what"] == "--device auto")

    assert "the CPU" in found()["detail"]
    gpus.start()
    assert found()["detail"] == "the first GPU, by tensorrt"
    monkeypatch.setenv("HISTOSEG_GPU_ENGINE", "jax")
    assert not found()["ok"] and "choose one of" in found()["fix"]


def test_doctor_names_a_damaged_plan(run, shipped):
    (shipped / "final.plan").write_bytes(b"PK\x03\x04")
    code, out, _ = run("doctor", "--json")
    found = next(f for f in json.loads(out) if f["what"] == "shipped plans")
    assert code == 1 and not found["ok"] and "final.plan" in found["detail"] and "reinstall" in found["fix"]


@pytest.mark.parametrize(("script", "ok"), [("echo 'Card, 1.2, 3 MiB'", True), ("exit 9", False)])
def test_doctor_asks_the_driver(run, shipped, tmp_path, monkeypatch, script, ok):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    code, out, _ = run("doctor", "--json")
    found = next(f for f in json.loads(out) if f["what"] == "NVIDIA GPU")
    assert code == 0 and found["ok"] == ok and ("Card" in found["detail"]) == ok


def test_doctor_names_what_an_extra_lacks(run, shipped, monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "train", ("numpy", "no_such_package"))
    found = next(f for f in json.loads(run("doctor", "--json")[1]) if f["what"] == "extra [train]")
    assert not found["ok"] and found["detail"] == "lacks no_such_package" and "histoseg-fast[train]" in found["fix"]


# -- eval ------------------------------------------------------------------------------------------


def expected_scores(plan, ids, numbers, steps=NO_STEPS):
    """What scikit-learn says of the same pixels."""
    images = [noise(*ids[i].shape, i) for i in numbers]
    with open_engine(plan, precision="fp32") as engine:
        scores = [run_tiled(engine, plan, image) for image in images]
    guess = np.concatenate([steps.apply(*pair).ids.ravel() for pair in zip(images, scores, strict=True)])
    logits = np.concatenate([s.reshape(3, -1).T.astype(float) for s in scores])
    truth = np.concatenate([ids[i].ravel() for i in numbers])
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances = chances / chances.sum(1, keepdims=True)
    return {
        "cross_entropy": log_loss(truth, chances, labels=[0, 1, 2]),
        "pixel_accuracy": accuracy_score(truth, guess),
        "mean_iou": jaccard_score(truth, guess, average="macro"),
        "iou": jaccard_score(truth, guess, average=None),
        "dice": f1_score(truth, guess, average=None),
        "confusion": confusion_matrix(truth, guess).tolist(),
    }


def check_scores(found, expected):
    for key, value in expected.items():
        shown = list(found[key].values()) if isinstance(found[key], dict) else found[key]
        np.testing.assert_allclose(shown, value, atol=2e-6)


def test_eval(run, data, tmp_path, tiny_plan, tiny_plan_path):
    folder, ids = data
    target = tmp_path / "new" / "scores.json"
    arguments = ("eval", folder, "--engine", tiny_plan_path, "--precision", "fp32", "--split", "test")
    code, out, err = run(*arguments, "--json", target)
    found = json.loads(target.read_text())
    assert (code, err) == (0, "")
    expected = expected_scores(tiny_plan, ids, [0, 1])
    check_scores(found, expected)
    assert f"expected calibration error {found['calibration_error']:.4f}\n" in out and found["calibration_error"] > 0
    assert (found["images"], found["pixels"]) == (2, 40 * 51 + 150 * 33)
    assert (found["engine"][:8], found["precision"], found["device"]) == ("OpenVINO", "fp32", "cpu")
    assert (found["split"], found["plan_sha256"]) == ("test", tiny_plan.sha256)
    for text in (f"cross entropy     {expected['cross_entropy']:.4f}", f"mean IoU          {expected['mean_iou']:.4f}",
                 f"{expected['confusion'][1][2]:,}", "2 images (test), 6,990 pixels"):  # fmt: skip
        assert text in out
    code, out, _ = run(*arguments, "--json", "-")
    assert code == 0 and json.loads(out) == found


def test_eval_of_every_image_and_of_a_checkpoint(run, data, tmp_path, tiny_plan, tiny_plan_path):
    folder, ids = data
    found = json.loads(run("eval", folder, "--engine", tiny_plan_path, "--precision", "fp32", "--json", "-")[1])
    check_scores(found, expected_scores(tiny_plan, ids, [0, 1, 2]))
    path = checkpoint(tmp_path / "c.safetensors", "three")
    code, out, err = run("eval", folder, "--engine", path, "--split", "train", "--json", "-")
    assert (code, err) == (0, "")
    assert json.loads(out)["plan"] == "three" and json.loads(out)["pixels"] == 81


@pytest.mark.parametrize(
    "spec", ["majority_radius=1,min_island=9", "crf,crf.smooth_weight=0.5,crf.appearance_weight=1"]
)
def test_eval_counts_the_classes_after_the_steps(run, data, tmp_path, tiny_plan, tiny_plan_path, spec):
    """Losses stay those of the logits: `expected_scores` takes its cross entropy from them."""
    folder, ids = data
    steps = PostProcessing.parse(spec)
    expected = expected_scores(tiny_plan, ids, [0, 1, 2], steps)
    recorded = rewritten(tiny_plan, tmp_path / "steps.plan", postprocess=steps.as_json())
    runs = {"none": (recorded, "none"), "plan": (recorded, "plan"), "option": (tiny_plan_path, spec)}
    found, shown = {}, {}
    for name, (plan, option) in runs.items():
        target = tmp_path / f"{name}.json"
        arguments = ("--engine", plan, "--precision", "fp32", "--postprocess", option)
        code, shown[name], err = run("eval", folder, *arguments, "--json", target)
        assert (code, err) == (0, "")
        found[name] = json.loads(target.read_text())
    for name in ("plan", "option"):
        check_scores(found[name], expected)
        assert found[name]["postprocess"] == steps.as_json() and f"post-processing {steps}\n" in shown[name]
        assert all(found[name][key] == found["none"][key] for key in ("cross_entropy", "l1", "l2", "calibration_error"))
    check_scores(found["none"], expected_scores(tiny_plan, ids, [0, 1, 2]))
    assert found["none"]["postprocess"] == NO_STEPS.as_json() and "post-processing none\n" in shown["none"]
    assert found["none"]["confusion"] != found["plan"]["confusion"]


def test_eval_leaves_the_crf_out_where_infer_would(run, data, monkeypatch, tiny_plan_path):
    monkeypatch.setattr(postprocess, "MAX_CRF_PIXELS", 1)

    def scores(steps):
        return json.loads(run("eval", data[0], "--engine", tiny_plan_path, "--postprocess", steps, "--json", "-")[1])

    with_crf, without = scores("crf,crf.iterations=1,min_island=9"), scores("min_island=9")
    assert with_crf.pop("postprocessed_in_part") == ["0.png", "1.png", "2.png"]
    assert without.pop("postprocessed_in_part") == []
    assert with_crf.pop("postprocess") != without.pop("postprocess") and with_crf == without
    told = run("eval", data[0], "--engine", tiny_plan_path, "--postprocess", "crf,min_island=9")[2]
    assert told.count("too large for post-processing") == 3 and "scored with min_island=9" in told


def test_eval_refuses(fails, data, tmp_path, tiny_plan_path):
    folder, _ = data
    engine = ("--engine", tiny_plan_path)
    (tmp_path / "bad.safetensors").write_text("hello")
    (tmp_path / "file").write_text("")
    fails("eval", tmp_path / "nowhere", *engine, code=2, words=["no such folder"])
    fails("eval", folder, *engine, "--split", "other", code=2, words=["'other'", "train, val, test"])
    fails("eval", folder, "--engine", tmp_path / "no.plan", code=2, words=["no such plan"])
    fails("eval", folder, "--engine", tmp_path / "bad.safetensors", words=["bad.safetensors"])
    fails("eval", folder, "--engine", tmp_path / "no.safetensors", code=2, words=["no such checkpoint"])
    fails("eval", folder, *engine, "--precision", "int4", code=2, words=["'int4'"])
    fails("eval", folder, *engine, "--postprocess", "median=3", code=2, words=["'median=3' is no post-processing"])
    Image.fromarray(np.full((40, 51, 3), 77, np.uint8)).save(folder / "labels" / "0.png")
    fails("eval", folder, *engine, words=["0.png", "off the palette"])
    (folder / "labels" / "0.png").write_bytes(b"")
    fails("eval", folder, *engine, words=["0.png"])


def test_what_cannot_be_written_is_told_before_the_work(fails, data, tmp_path, tiny_plan_path, monkeypatch):
    monkeypatch.setattr(plans, "open_plan", lambda name: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x", tmp_path):
        words = [f"{target}: cannot be written"]
        fails("eval", data[0], "--engine", tiny_plan_path, "--json", target, code=2, words=words)
        fails("compile", checkpoint(tmp_path / "c.safetensors", "two"), "-o", target, code=2, words=words)


def test_no_command_writes_over_its_input(fails, tmp_path, tiny_plan_path):
    source = checkpoint(tmp_path / "c.safetensors", "two")
    plan = tmp_path / "a.plan"
    plan.write_bytes(tiny_plan_path.read_bytes())
    before = source.read_bytes(), plan.read_bytes()
    fails("compile", source, "-o", tmp_path / "." / "c.safetensors", code=2, words=["is the input itself"])
    fails("export", plan, "--format", "onnx", "-o", plan, code=2, words=["is the input itself"])
    assert (source.read_bytes(), plan.read_bytes()) == before


def test_options_that_would_do_nothing_are_refused(fails, tmp_path):
    source, out = checkpoint(tmp_path / "c.safetensors", "two"), ("-o", tmp_path / "x")
    fails("compile", source, *out, "--mean", "1,2,3", code=2, words=["--mean would do nothing without an .onnx"])
    fails("compile", source, *out, "--workspace", 2, code=2, words=["--workspace would do nothing without --tensorrt"])
    for options in (["--precision", "fp8"], ["--version-compatible"]):
        fails("export", "fast", "--format", "onnx", *out, *options, code=2, words=[f"{options[0]} would do nothing"])
    fails("export", "fast", "--format", "onnx", *out, "--platform", "tensorrt", code=2, words=["--format triton"])
    fails("demo", tmp_path, "--images", 3, code=2, words=["--images"])
    assert not (tmp_path / "x").exists()


# -- compile ---------------------------------------------------------------------------------------


def test_compile(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "_speed", lambda engine, plan: 1.25)
    source, made = checkpoint(tmp_path / "c.safetensors", "two"), tmp_path / "new" / "two.plan"
    spec = "crf,crf.iterations=5,min_island=64"
    arguments = ("--calibrate", data[0] / "images", "--postprocess", spec, "--gate-agreement", 0.25, "--gate-miou", 1)
    arguments += ("--mpp", 0.5)
    code, out, err = run("compile", source, "-o", made, *arguments)
    assert (code, err) == (0, "") and "two.plan" in out
    lines = out.splitlines()
    assert lines[0].startswith("int8 ranges of least error^") and "temperature" not in out
    assert lines[1].startswith("network two: stride 2, halo ")
    for line, precision in zip(lines[2:], cpu_precisions(), strict=False):
        assert line.startswith(f"{precision}: ") and line.endswith("% of pixels as fp32; 1.25 megapixels/s here")
    for precision in cpu_precisions()[1:]:
        assert f"{precision} passes the gate of 25.0% agreement, 1 points of mIoU\n" in out
    shown = run("inspect", made)[1]
    assert "network" in shown and f"postprocess    {spec}\n" in shown and "0.5 micrometres a pixel\n" in shown
    assert f"here --precision auto runs {cpu_precisions()[-1]}" in shown
    plan = read_plan(made)
    assert plan.postprocess == PostProcessing(64, 0, CrfOptions(iterations=5))
    assert plan.manifest["gate"] == {"agreement": 0.25, "mean_iou": 0.01} and plan.ranges is not None
    assert plan.mpp == 0.5


def test_compile_of_a_data_folder(run, data, tmp_path, monkeypatch):
    """Labels a little off the palette, as JPEG leaves them; what was measured stands in the plan."""
    monkeypatch.setattr(calibrate, "_speed", lambda engine, plan: 1.25)
    folder, ids = data
    (folder / "split.csv").write_text("name,split\n0.png,val\n1.png,test\n2.png,train\n")
    Image.fromarray(encode(ids[2]) // 2 * 2 + 1).save(folder / "labels" / "2.png")
    source, made = checkpoint(tmp_path / "c.safetensors", "fast"), tmp_path / "fast.plan"
    arguments = ("compile", source, "-o", made, "--calibrate", folder)
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1) and "2.png" in err and "off the palette" in err
    code, out, err = run(*arguments, "--tolerance", 2, "--precision", "fp32")
    assert (code, err) == (0, "") and out.startswith("temperature ") and "mIoU" in out
    scores = json.loads(run("eval", folder, "--engine", made, "--split", "val", "--json", "-")[1])
    kept = read_plan(made).manifest["precisions"]["fp32"]
    assert (scores["precision"], scores["plan"]) == ("fp32", "fast")
    assert all(kept[key] == pytest.approx(scores[key], abs=1e-4) for key in ("mean_iou", "cross_entropy"))


def test_compile_refuses(run, fails, tmp_path):
    (tmp_path / "bad.safetensors").write_text("hello")
    (tmp_path / "empty").mkdir()
    source, out = checkpoint(tmp_path / "c.safetensors", "two"), ("-o", tmp_path / "a.plan")
    fails("compile", tmp_path / "no.safetensors", *out, code=2, words=["no such checkpoint"])
    (tmp_path / "a.safetensors").write_bytes(pack({}, {}))
    fails("compile", tmp_path / "a.safetensors", *out, words=["is a plan, no checkpoint"])
    fails("compile", tmp_path / "bad.safetensors", *out, words=["bad.safetensors", "cannot be read"])
    fails("compile", source, *out, "--precision", "int4", code=2, words=["'int4'"])
    fails("compile", source, *out, "--precision", "int8", code=2, words=["int8 takes its ranges", "--calibrate DIR"])
    fails("compile", source, *out, "--mpp", "0", code=2, words=["--mpp: 0 is not 0.01 to 20"])
    fails("compile", source, *out, "--postprocess", "plan", code=2, words=["'plan' is no post-processing"])
    fails("compile", source, *out, "--calibrate", tmp_path / "none", code=2, words=["no such file or folder"])
    fails("compile", source, *out, "--calibrate", tmp_path / "empty", code=2, words=["no image found"])
    Image.fromarray(noise(5, 5)).save(tmp_path / "empty" / "one.png")
    fails("compile", source, *out, "--calibrate", tmp_path / "empty", words=["empty: has one image", "two or more"])
    (tmp_path / "empty" / "two.png").write_bytes(b"hello")
    fails("compile", source, *out, "--calibrate", tmp_path / "empty", words=["two.png"])
    folder = easy_folder(tmp_path / "data", val=0, side=8)
    fails("compile", source, *out, "--calibrate", folder, words=["the val split is empty", "split.csv"])
    for option in ("--gate-agreement", "--gate-miou"):
        code, _, err = run("compile", source, *out, option, "-0.5")
        assert code == 2 and option in err
    assert not (tmp_path / "a.plan").exists()


# -- demo ------------------------------------------------------------------------------------------


def test_demo(run, shipped, tmp_path):
    code, out, _ = run("demo", "--images", 1, "--out", tmp_path / "demo")
    assert code == 0
    assert "% of the made-up fields' pixels right" in out and str(tmp_path / "demo" / "fast" / "masks") in out
    mask = np.asarray(Image.open(tmp_path / "demo" / "fast" / "masks" / "field_0.png").convert("RGB"))
    label = np.asarray(Image.open(tmp_path / "demo" / "labels" / "field_0.png").convert("RGB"))
    assert mask.shape == label.shape == (720, 1128, 3)
    assert f"{(mask == label).all(-1).mean():.1%} of the made-up fields' pixels right" in out
    assert (tmp_path / "demo" / "fast" / "overlays").is_dir()


def test_demo_on_a_folder_of_ones_own(run, fails, shipped, data, tmp_path):
    code, out, _ = run("demo", data[0] / "images", "--out", tmp_path / "demo")
    assert code == 0 and "pixels right" not in out and not (tmp_path / "demo" / "images").exists()
    assert len(list((tmp_path / "demo" / "fast" / "masks").iterdir())) == 3
    fails("demo", tmp_path / "nowhere", "--out", tmp_path / "demo", code=2, words=["no such file or folder"])


def test_demo_inside_its_own_folder_with_a_bad_file(run, shipped, data, tmp_path):
    """Both plans run, the exit code is that of `infer`, and neither takes the other's results for images."""
    folder = data[0] / "images"
    (folder / "bad.png").write_bytes(b"hello")
    for again in (False, True):
        code, out, _ = run("demo", folder, "--out", folder / "demo")
        assert code == 3
        for name in ("fast", "final"):
            assert len(list((folder / "demo" / name / "masks").rglob("*.png"))) == 3
            assert f"{name}: already done; look at" in out if again else f"{name}: " in out


# -- the plan that ships ---------------------------------------------------------------------------


def test_shipped_plan_scores_on_real_images(real_data):
    """The floor of the first shipped weights, on the lung test split, in what `--precision auto` runs here."""
    scores = evaluate(plans.open_plan("final"), real_data / "lung", split="test")
    assert scores["images"] == 12
    assert scores["pixel_accuracy"] >= 0.85 and scores["mean_iou"] >= 0.72


def test_shipped_plan():
    path = plans.FOLDER / "final.plan"
    assert path.is_file(), f"{path} is missing: `histoseg-fast compile` writes it from the trained checkpoint"
    assert path.stat().st_size < 16 * 2**20
    plan = plans.open_plan("final")
    assert (plan.manifest["arch"], plan.stride, plan.halo) == ("final", 4, 28)
    assert plan.palette.names == ("background", "cancer", "stroma")
    assert pack({k: plan.manifest[k] for k in plan.manifest}, plan.members) == path.read_bytes()
    with open_engine(plan, precision="fp32") as engine:
        assert np.isfinite(run_tiled(engine, plan, noise(30, 20))).all()
    assert MODEL in plan.members
    text = json.dumps(plan.manifest)
    assert not re.search(r'"[^"]*[/\\\\]\w+[/\\\\]', text), "a path of the machine that made it stands in the plan"


def test_eval_draws_figures(run, data, tmp_path, tiny_plan_path):
    folder, _ = data
    code, _, _ = run("eval", folder, "--engine", tiny_plan_path, "--split", "test", "--figures", tmp_path / "figures")
    drawn = sorted((tmp_path / "figures").iterdir())
    assert code == 0 and len(drawn) == 2
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 3 * 300
