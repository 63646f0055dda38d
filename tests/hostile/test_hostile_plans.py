"""Plans, models and checkpoints made to harm whoever opens them: one line each, in little memory and time."""

from __future__ import annotations

import itertools
import json
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from children import run_child
from confined import confined
from hypothesis import given, settings
from hypothesis import strategies as st
from running import entries, make_pictures, partials
from tiny_plans import tiny_manifest, tiny_model

from histoseg_fast.errors import HistosegError, PlanError
from histoseg_fast.onnx_graph import MAX_NODES, check_graph
from histoseg_fast.plan import MANIFEST, MAX_DIRECTORY_BYTES, MAX_MEMBERS, MODEL, Plan, pack, unpack, write_plan
from histoseg_fast.plans import SHIPPED, open_plan

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SECONDS = 20
"""Of processor time; what these refusals are for takes for ever."""


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(PlanError) as caught:
        unpack(data)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    for word in words:
        assert word in message


# -- ZIP ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tiny_plan: Plan) -> bytes:
    return pack(tiny_manifest(), {MODEL: tiny_plan.members[MODEL], "engines/a": b"abc"})


def with_end(good: bytes, change: Callable[[bytearray], None]) -> bytes:
    """The plan with its last record changed in place."""
    data, end = bytearray(good), good.rindex(b"PK\x05\x06")
    record = data[end:]
    change(record)
    return bytes(data[:end] + record)


def test_a_directory_of_half_a_million_entries() -> None:
    """Python would make an object of each before anybody could count them: a gigabyte of a plan, ten of memory."""
    count = 500_000
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *[0] * 7, 1, *[0] * 6) + b"x"
    start = struct.pack("<4s5H3I2H", b"PK\3\4", 20, *[0] * 7, 1, 0) + b"x"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, len(entry) * count, len(start), 0)
    with pytest.raises(HistosegError, match="a directory of 23500000 bytes, too many members"):
        confined(unpack_made, start, entry, count, end)
    assert MAX_MEMBERS * (46 + 128 + 32) < MAX_DIRECTORY_BYTES


def unpack_made(start: bytes, entry: bytes, count: int, end: bytes) -> None:
    unpack(start + entry * count + end)


def test_records_that_readers_of_zip_disagree_on(good: bytes) -> None:
    """A comment that holds another end, a second archive behind, ZIP64 records, more than one disk: none is a plan."""
    end = good.rindex(b"PK\x05\x06")
    refused(good + good[end:], "damaged")
    refused(good[:-2] + struct.pack("<H", 22) + good[end:], "damaged")
    refused(good + b"\0", "damaged")
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, 0, 0)
    refused(good[:end] + record + locator + good[end:], "damaged")
    refused(with_end(good, lambda r: r.__setitem__(slice(16, 20), struct.pack("<I", 2**32 - 1))), "damaged")
    refused(with_end(good, lambda r: r.__setitem__(slice(12, 16), struct.pack("<I", 2**31))), "too many members")
    refused(b"PK\x03\x04" + good, "damaged")


def test_a_member_that_has_another_name_where_it_lies(good: bytes) -> None:
    """Some readers go by the directory, others by what stands before the bytes."""
    place = good.index(b"engines/a")
    refused(good[:place] + b"engines/b" + good[place + 9 :], "damaged")


def test_links_in_a_plan_are_bytes(tmp_path: Path, good: bytes) -> None:
    """A member marked as a link, a folder or a device is read into memory like any other, and never unpacked."""
    with zipfile.ZipFile(BytesIO(good)) as source:
        for kind in (0o120777, 0o040777, 0o020666):
            stream = BytesIO()
            with zipfile.ZipFile(stream, "w") as target:
                for info in source.infolist():
                    made = zipfile.ZipInfo(info.filename)
                    made.create_system, made.external_attr = 3, kind << 16
                    target.writestr(made, source.read(info))
            plan = unpack(stream.getvalue())
            assert plan.members["engines/a"] == b"abc"
    (tmp_path / "x.plan").write_bytes(stream.getvalue())
    assert run_child(tmp_path, "export", tmp_path / "x.plan", "--format", "onnx", "-o", tmp_path / "x.onnx").code == 0
    assert (tmp_path / "x.onnx").is_file() and not (tmp_path / "x.onnx").is_symlink()


# -- ONNX ---------------------------------------------------------------------------------------------


def edited(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_from_string(tiny_model())
    change(model)
    return model.SerializeToString()


def put_before_last(graph: onnx.GraphProto, *nodes: onnx.NodeProto) -> None:
    """The last of `nodes` gives "new", which the last convolution then reads."""
    last = onnx.NodeProto.FromString(graph.node[-1].SerializeToString())
    del graph.node[-1]
    last.input[0] = "new"
    graph.node.extend([*nodes, last])


def body(name: str) -> onnx.GraphProto:
    """Of a loop that changes nothing."""
    values = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
    ]
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["v"], ["w"])]
    outputs = [
        helper.make_tensor_value_info("on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, None),
    ]
    return helper.make_graph(nodes, name, values, outputs)


def loop(model: onnx.ModelProto) -> None:
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.int64(2**62), "rounds"))
    graph.initializer.append(numpy_helper.from_array(np.bool_(True), "yes"))
    put_before_last(graph, helper.make_node("Loop", ["rounds", "yes", "x7"], ["new"], body=body("body")))


def branch(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.bool_(True), "yes"))
    arms = {name: helper.make_graph([helper.make_node("Identity", ["x7"], [name])], name, [], []) for name in "ab"}
    put_before_last(model.graph, helper.make_node("If", ["yes"], ["new"], then_branch=arms["a"], else_branch=arms["b"]))


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[4].input[0] = "x4"


def itself(model: onnx.ModelProto) -> None:
    model.graph.node[4].input[0] = "x1"


def twice(model: onnx.ModelProto) -> None:
    model.graph.node[5].output[0] = "x1"


def shadow(model: onnx.ModelProto) -> None:
    model.graph.node[4].output[0] = "rgb"


def long_chain(model: onnx.ModelProto) -> None:
    names = ["x7", *(f"d{i}" for i in range(MAX_NODES)), "new"]
    put_before_last(model.graph, *(helper.make_node("Relu", [a], [b]) for a, b in itertools.pairwise(names)))


def sparse(model: onnx.ModelProto) -> None:
    made = model.graph.sparse_initializer.add()
    made.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "a"))
    made.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "b"))
    made.dims.extend([2**31, 2**31])


def functions(model: onnx.ModelProto) -> None:
    """Each calls the next one twice: a billion laughs."""
    for i in range(30):
        calls = [helper.make_node(f"f{i + 1}", ["x"], ["y"], domain="own"), helper.make_node("Relu", ["y"], ["z"])]
        made = helper.make_function("own", f"f{i}", ["x"], ["z"], calls, [helper.make_opsetid("", 18)])
        model.functions.append(made)


def nothing(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


HOSTILE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "cycle": (cycle, "reads what no earlier one gives"),
    "reads itself": (itself, "reads what no earlier one gives"),
    "one tensor twice": (twice, "two operators that give one tensor"),
    "input given again": (shadow, "two operators that give one tensor"),
    "loop": (loop, "a loop or a branch"),
    "branch": (branch, "a loop or a branch"),
    "long": (long_chain, f"1 to {MAX_NODES} are allowed"),
    "sparse": (sparse, "sparse tensors"),
    "functions": (functions, "functions of its own"),
    "empty": (nothing, "has 0 operators"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_models_that_no_engine_gets_to_see(name: str) -> None:
    change, words = HOSTILE[name]
    refused(pack_unchecked(edited(change)), "model.onnx ", words)


def pack_unchecked(model: bytes) -> bytes:
    return pack(tiny_manifest(), {MODEL: model})


def test_a_graph_in_two_pieces_is_one(tiny_plan: Plan) -> None:
    """Protobuf adds up a message that comes twice; so nothing hides in the second."""
    second = onnx.ModelProto()
    second.graph.node.append(helper.make_node("Relu", ["nowhere"], ["gone"]))
    refused(pack_unchecked(tiny_plan.members[MODEL] + second.SerializeToString()), "no earlier one gives")


def test_sound_models_pass() -> None:
    """The shipped ones, and the longest that is allowed."""
    for name in SHIPPED:
        check_graph(open_plan(name).members[MODEL])
    check_graph(edited(lambda model: put_before_last(model.graph, helper.make_node("Relu", ["x7"], ["new"]))))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_bytes_are_refused_or_pass_and_nothing_else(data: st.DataObject) -> None:
    model = tiny_model()
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=200))
    else:
        start, length = data.draw(st.integers(0, len(model))), data.draw(st.integers(0, 40))
        content = model[:start] + data.draw(st.binary(max_size=40)) + model[start + length :]
    try:
        check_graph(content)
    except PlanError as error:
        assert str(error).isprintable()


def dims(value: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[2].dims[0] = value

    return change


def short(model: onnx.ModelProto) -> None:
    model.graph.initializer[2].raw_data = b"\0" * 7


def add_largest(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """The network then needs the largest value of "big", which `node` gives."""
    largest = helper.make_node("ReduceMax", ["big"], ["most"], keepdims=1)
    put_before_last(graph, node, largest, helper.make_node("Add", ["x7", "most"], ["new"]))


def constant(model: onnx.ModelProto) -> None:
    """A few bytes that are a tensor of a terabyte before the first image comes."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([2**19, 2**19]), "shape"))
    largest = helper.make_node("ReduceMax", ["big"], ["most"], keepdims=1)
    put_before_last(
        graph,
        helper.make_node("ConstantOfShape", ["shape"], ["big"]),
        largest,
        helper.make_node("Add", ["x7", "most"], ["new"]),
    )


def enlarged(model: onnx.ModelProto) -> None:
    """A terabyte for each tile."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2**12, 2**12]), "times"))
    largest = helper.make_node("ReduceMax", ["big"], ["most"], keepdims=1)
    put_before_last(
        graph,
        helper.make_node("Tile", ["x7", "times"], ["big"]),
        largest,
        helper.make_node("Add", ["x7", "most"], ["new"]),
    )


def doubled(model: onnx.ModelProto) -> None:
    """Forty concatenations of a tensor with itself."""
    names = ["x7", *(f"d{i}" for i in range(40))]
    joins = [helper.make_node("Concat", [a, a], [b], axis=1) for a, b in itertools.pairwise(names)]
    put_before_last(model.graph, *joins, helper.make_node("ReduceMax", [names[-1]], ["new"], axes=[1], keepdims=1))


HUGE = {
    "a claimed size": dims(2**40),
    "a size below zero": dims(-8),
    "short weights": short,
    "a constant of a terabyte": constant,
    "a tile made a terabyte": enlarged,
    "doubled forty times": doubled,
}


@pytest.mark.parametrize("name", HUGE)
def test_models_that_take_all_memory_end_in_one_line(tmp_path: Path, name: str) -> None:
    """Where memory is limited, as a batch system does it; a plan without a limit is as trusted as a program is."""
    make_pictures(tmp_path / "in", 2)
    path = tmp_path / "x.plan"
    path.write_bytes(pack_unchecked(edited(HUGE[name])))
    arguments = ("infer", tmp_path / "in", "--engine", path, "--precision", "fp32", "--out", tmp_path / "out")
    ended = run_child(tmp_path, *arguments, fault=limits)
    assert ended.code == 1 and len(ended.errors) == 1 and ended.errors[0].startswith("histoseg-fast: ")
    assert not partials(tmp_path / "out") if (tmp_path / "out").exists() else True


def limits() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_logits_that_are_not_finite_fail_each_image(tmp_path: Path, value: str) -> None:
    """From weights that no checkpoint of ours has, through the real engine."""

    def poison(model: onnx.ModelProto) -> None:
        bias = next(t for t in model.graph.initializer if t.name == "logits.bias")
        bias.CopyFrom(numpy_helper.from_array(np.array([0, float(value), 0], np.float32), "logits.bias"))

    make_pictures(tmp_path / "in", 3)
    write_plan(tmp_path / "x.plan", tiny_manifest(), {MODEL: edited(poison)})
    arguments = ("--engine", tmp_path / "x.plan", "--precision", "fp32", "--out", tmp_path / "out")
    ended = run_child(tmp_path, "infer", tmp_path / "in", *arguments)
    assert ended.code == 3 and len(ended.errors) == 3
    assert all("NaN or infinite logits at 2000 pixel(s)" in line for line in ended.errors)
    assert {entry["status"] for entry in entries(tmp_path / "out").values()} == {"failed"}
    assert not list((tmp_path / "out").rglob("*.png")) and not partials(tmp_path / "out")


# -- checkpoints --------------------------------------------------------------------------------------


def checkpoint(header: dict[str, object] | bytes, content: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file with a header of `size` bytes, or one that says so."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def described(**tensors: object) -> dict[str, object]:
    from histoseg_fast.training.checkpoint import FORMAT, REQUIRED

    about = {"format": FORMAT, "description": json.dumps(dict.fromkeys(REQUIRED, "x"))}
    return {"__metadata__": about, **tensors}


def tensor(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "a header of 2 GB": lambda: checkpoint(b"{}", size=2**31),
    "a header of all there is": lambda: checkpoint(b"{}", size=2**64 - 1),
    "a header of 90 MB that is not there": lambda: checkpoint(b"{}", size=90 << 20),
    "tensors that overlap": lambda: checkpoint(described(a=tensor([2], 0, 8), b=tensor([2], 0, 8)), bytes(8)),
    "a hole": lambda: checkpoint(described(a=tensor([2], 8, 16)), bytes(16)),
    "a shape beyond numbers": lambda: checkpoint(described(a=tensor([2**40, 2**40], 0, 8)), bytes(8)),
    "a negative side": lambda: checkpoint(described(a=tensor([-1], 0, 4)), bytes(4)),
    "bytes beyond the file": lambda: checkpoint(described(a=tensor([2**30], 0, 2**32)), bytes(4)),
    "an unknown type": lambda: checkpoint(described(a=tensor([1], 0, 4, "X")), bytes(4)),
    "nesting": lambda: checkpoint(b"[" * 1_000_000),
    "nested description": lambda: checkpoint({"__metadata__": {"format": "x", "description": "[" * 100_000}}),
    "too many tensors": lambda: checkpoint(described(**{str(i): tensor([0], 0, 0) for i in range(100_000)})),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_headers_of_checkpoints(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    from histoseg_fast.training.checkpoint import read_checkpoint

    path = tmp_path / "x.safetensors"
    path.write_bytes(CHECKPOINTS[name]())
    started = time.process_time()
    with pytest.raises(PlanError) as caught:
        read_checkpoint(path)
    assert time.process_time() - started < SECONDS
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1000


def test_manifest_names_are_what_they_were() -> None:
    """The archives above are made by hand."""
    assert (MANIFEST, MODEL) == ("manifest.json", "model.onnx")
