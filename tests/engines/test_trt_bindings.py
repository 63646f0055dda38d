"""Every TensorRT name that we use exists, with the parameters we give it, in the oldest and the newest version for us.

NVIDIA's Python bindings are wheels of a megabyte that load over stand-ins for the libraries of gigabytes behind them.
The names are collected from our sources; `USED` lists them, so that a new one is looked up on purpose.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from fake_execution import Context, rgb_as_logits
from fake_tensorrt import fake_tensorrt
from wheels import unpacked

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "histoseg_fast"
BINDINGS = {"oldest": ("tensorrt-cu12-bindings==10.13.0.35", 10), "newest": ("tensorrt-cu13-bindings<12,>=11", 11)}

USED = {
    "": {
        "Builder",
        "BuilderFlag.TF32",
        "BuilderFlag.VERSION_COMPATIBLE",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "HardwareCompatibilityLevel.AMPERE_PLUS",
        "HardwareCompatibilityLevel.NONE",
        "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        "ILogger.Severity.ERROR",
        "ILogger.Severity.INTERNAL_ERROR",
        "ILogger.Severity.WARNING",
        "ILogger.__init__",
        "IProgressMonitor.__init__",
        "LayerInformationFormat.JSON",
        "MemoryPoolType.WORKSPACE",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser",
        "ProfilingVerbosity.DETAILED",
        "Runtime",
        "__version__",
    },
    "Builder": {
        "build_serialized_network",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    },
    "IBuilderConfig": {
        "add_optimization_profile",
        "clear_flag",
        "create_timing_cache",
        "get_timing_cache",
        "hardware_compatibility_level=",
        "profiling_verbosity=",
        "progress_monitor=",
        "set_flag",
        "set_memory_pool_limit",
        "set_timing_cache",
    },
    "ICudaEngine": {"create_engine_inspector", "create_execution_context"},
    "IExecutionContext": {
        "execute_async_v3",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
        "update_device_memory_size_for_shapes",
    },
    "EngineInspector": {"get_engine_information"},
    "ILogger": {"def log(severity, msg)"},
    "IOptimizationProfile": {"set_shape"},
    "IProgressMonitor": {
        "def phase_finish(phase_name)",
        "def phase_start(phase_name, parent_phase, num_steps)",
        "def step_complete(phase_name, step)",
    },
    "ITimingCache": {"serialize"},
    "OnnxParser": {"get_error", "num_errors", "parse"},
    "ParserError": {"desc"},
    "Runtime": {"deserialize_cuda_engine", "engine_host_code_allowed="},
}
"""By class ("": the module): methods, properties ("=": assigned), enum members, and methods TensorRT calls ("def")."""

OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "runtime": "Runtime",
    "memory": "IHostMemory",
}
"""In the files that talk to TensorRT, these names hold objects of these classes, and nothing else."""
RETURNED = {("OnnxParser", "get_error"): "ParserError"}
COMPUTED = {"HardwareCompatibilityLevel": "HARDWARE"}
"""Enum members chosen by getattr: from the values of this table in options.py."""
PLAIN = {
    "block",
    "captured",
    "contextlib",
    "functools",
    "graph",
    "importlib",
    "re",
    "threading",
    "log",
    "model",
    "monitor",
    "options",
    "p",
    "prepared",
    "rgb",
    "said",
    "scratch",
    "self",
    "text",
    "wanted",
}
"""Other names in those files that have attributes."""


# -- what our sources use --------------------------------------------------------------------------


def sources():
    """Our files that talk to TensorRT: those that name the module `trt`."""
    paths = [path for path in PACKAGE.rglob("*.py") if re.search(r"\btrt\.[A-Z_]", path.read_text(encoding="utf-8"))]
    assert {path.name for path in paths} >= {"build.py", "library.py"}
    return paths


class Collector(ast.NodeVisitor):
    """Collects (class, name) of every attribute, and (class, method, keywords, positional arguments) of every call."""

    def __init__(self):
        self.used, self.calls, self.unknown = set(), set(), set()

    def class_of(self, node):
        """The TensorRT class of an expression ("" is the module, "A.B" a name in it), or None."""
        if isinstance(node, ast.Name):
            return "" if node.id == "trt" else OBJECTS.get(node.id)
        if isinstance(node, ast.Attribute) and isinstance(base := self.class_of(node.value), str):
            return node.attr if base == "" else f"{base}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tensorrt":
            return ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            base = self.class_of(node.func.value)
            return node.func.attr if base == "" else RETURNED.get((base, node.func.attr))
        return None

    def visit_Attribute(self, node):
        base = self.class_of(node.value)
        if base is None:
            root = node.value
            while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
                root = root.func if isinstance(root, ast.Call) else root.value
            if isinstance(root, ast.Name) and root.id not in PLAIN and not hasattr(builtins, root.id):
                self.unknown.add(root.id)
        elif base == "" or (isinstance(node.value, ast.Attribute) and self.class_of(node.value.value) is not None):
            self.used.add(("", re.sub(r"^(trt|tensorrt\(\))\.", "", ast.unparse(node))))
        else:
            self.used.add((base, node.attr + ("=" if isinstance(node.ctx, ast.Store) else "")))
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute) and self.class_of(node.func.value) is not None:
            base, name = self.class_of(node.func.value), node.func.attr
            owner, name = (name, "__init__") if base == "" else (base, name)
            self.calls.add((owner, name, tuple(k.arg for k in node.keywords), len(node.args)))
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and self.class_of(node.args[0]):
            from histoseg_fast.engines.trt import options

            name = self.class_of(node.args[0])
            self.used |= {("", f"{name}.{member}") for member in getattr(options, COMPUTED[name]).values()}
        self.generic_visit(node)

    def visit_ClassDef(self, node):
        for base in filter(self.class_of, node.bases):
            for function in (n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")):
                names = ", ".join(argument.arg for argument in function.args.args[1:])
                self.used.add((self.class_of(base), f"def {function.name}({names})"))
        self.generic_visit(node)

    def visit_arg(self, node):
        """Annotations name classes for the reader; they are not evaluated."""

    def visit_FunctionDef(self, node):
        node.returns = None
        self.generic_visit(node)


@pytest.fixture(scope="module")
def collected():
    collector = Collector()
    for path in sources():
        collector.visit(ast.parse(path.read_text(encoding="utf-8")))
    return collector


def test_the_sources_use_what_is_listed_and_no_more(collected):
    assert collected.unknown == set(), "new names with attributes: TensorRT's go into OBJECTS, others into PLAIN"
    dotted = {name for owner, name in collected.used if not owner}
    found = {"": {name for name in dotted if not any(longer.startswith(f"{name}.") for longer in dotted)}}
    for owner, name in collected.used:
        if owner:
            found.setdefault(owner, set()).add(name)
    assert found == USED


def test_the_fake_has_what_is_listed_and_takes_the_same_arguments(collected):
    trt = fake_tensorrt()
    builder = trt.Builder(None)
    config = builder.create_builder_config()
    context = Context(trt, FakeCuda(), [], rgb_as_logits, None)
    fakes = {"": trt, "Builder": builder, "IBuilderConfig": config, "IExecutionContext": context}
    for name in USED[""]:
        owner = trt
        for part in name.split("."):
            owner = getattr(owner, part)
    for cls, owner in fakes.items():
        for name in USED[cls] if cls else ():
            assert hasattr(owner, name.rstrip("="))
    for cls, method, keywords, count in collected.calls:
        if cls in fakes:
            inspect.signature(getattr(fakes[cls], method)).bind(*[0] * count, **dict.fromkeys(keywords, 0))


# -- what the bindings have ------------------------------------------------------------------------

SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)

LOOK = r"""
import json, sys
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
used, problems, signatures = json.loads(sys.argv[1]), [], {}
for owner, names in used.items():
    cls = getattr(trt, owner) if owner else trt
    for name in names:
        plain = name.removeprefix("def ").partition("(")[0].rstrip("=")
        value = cls
        try:
            for part in plain.split("."):
                value = getattr(value, part)
        except AttributeError:
            problems.append(f"{owner}.{plain} is not there")
            continue
        if name.endswith("="):
            if not isinstance(value, property) or value.fset is None:
                problems.append(f"{owner}.{plain} cannot be assigned")
        elif owner and callable(value):
            signatures[f"{owner}.{plain}"] = value.__doc__ or ""
        elif not owner and isinstance(value, type):
            signatures[f"{plain}.__init__"] = value.__init__.__doc__ or ""
print(json.dumps({"version": trt.__version__, "problems": problems, "signatures": signatures}))
"""

RUN = r"""
import sys
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
from histoseg_fast.engines.trt import build, library
from histoseg_fast.engines.trt.layers import TypedModel
from histoseg_fast.engines.trt.options import BuildOptions
from histoseg_fast.errors import EngineError
print(library.tensorrt() is trt, isinstance(library.logger(), trt.ILogger))
library.logger().log(trt.ILogger.Severity.ERROR, "one\ntwo"); library.logger().log(trt.ILogger.Severity.INFO, "no")
print(library.log.reason())
seen = []
monitor = build._monitor_class()(lambda phase, share: seen.append(share))
monitor.phase_start("a", None, 2); monitor.step_complete("a", 0); monitor.phase_finish("a")
print(isinstance(monitor, trt.IProgressMonitor), seen)
for call in (lambda: build.build_engine(TypedModel(b"", {}), BuildOptions(2, 1152, 4)), lambda: build.load_engine(b"")):
    try:
        call()
    except EngineError as error:
        print(error)
"""


@pytest.fixture(scope="module", params=BINDINGS)
def bindings(request, tmp_path_factory):
    """Runs a program over the real bindings of one version and the stand-ins for its libraries."""
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("the bindings load over stand-ins compiled by a C compiler, on Linux")
    requirement, major = BINDINGS[request.param]
    folder = tmp_path_factory.mktemp("stand-ins")
    (folder / "empty.c").write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = str(folder / f"lib{library}.so.{major}")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", target, str(folder / "empty.c")], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join((str(unpacked(requirement)), str(ROOT)))

    def run(program, *arguments):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def looked(bindings):
    return json.loads(bindings(LOOK, json.dumps({owner: sorted(names) for owner, names in USED.items()})))


def parameters(documentation):
    """Names of the parameters after self of each overload that a pybind docstring lists."""
    for text in re.findall(r"^(?:\d+\. )?\w+\(self: [^,)]+(.*)\) ->", documentation, re.MULTILINE):
        yield re.findall(r"(?:^|, )(\w+):", re.sub(r"\[[^\]]*\]", "", text))


def test_every_name_is_there(looked):
    assert looked["problems"] == []
    assert tuple(map(int, looked["version"].split(".")[:2])) >= (10, 13)


def test_calls_fit_the_signatures(looked, collected):
    """Keywords by name, positional arguments by number; of overloads, one."""
    assert len(collected.calls) > 15
    for owner, method, keywords, count in collected.calls:
        if (method, count) == ("__init__", 1) and owner in ("ILogger", "IProgressMonitor"):
            continue  # called with self by our subclasses
        overloads = list(parameters(looked["signatures"][f"{owner}.{method}"]))
        assert overloads, f"{owner}.{method} shows no signature"
        assert any(count + len(keywords) <= len(o) and set(keywords) <= set(o[count:]) for o in overloads), (
            f"{owner}.{method} takes {overloads}"
        )


def test_methods_that_tensorrt_calls_take_what_it_gives(looked):
    for owner in ("IProgressMonitor", "ILogger"):
        for name in (name for name in USED[owner] if name.startswith("def ")):
            method, _, names = name.removeprefix("def ").rstrip(")").partition("(")
            assert names.split(", ") in list(parameters(looked["signatures"][f"{owner}.{method}"]))


def test_our_code_runs_on_the_real_bindings_up_to_the_library(bindings):
    """Subclasses of pybind's classes are made, and a library that gives nothing becomes one line."""
    lines = bindings(RUN).splitlines()
    assert lines[:3] == ["True True", "one two", "True [0.0, 0.5, 1.0]"]
    assert lines[3].startswith("TensorRT cannot build here (") and lines[4].startswith("TensorRT cannot run here (")
    assert len(lines) == 5
