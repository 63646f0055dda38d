"""Plan files: equal content gives equal bytes, and whatever is damaged or hostile gets PlanError in one line."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from histoseg_fast.errors import PlanError, UsageError
from histoseg_fast.plan import (
    DEFAULT_GATE,
    MANIFEST,
    MAX_MEMBERS,
    MODEL,
    VERSION,
    Ranges,
    pack,
    read_plan,
    unpack,
    write_plan,
)
from histoseg_fast.postprocess import NO_STEPS, CrfOptions, PostProcessing

ADDED = ("format", "version", "members")
FIXTURES = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def manifest(tiny_plan):
    return {key: value for key, value in tiny_plan.manifest.items() if key not in ADDED}


@pytest.fixture(scope="session")
def members(tiny_plan):
    return {MODEL: tiny_plan.members[MODEL], "engines/cpu.xml": b"<net/>"}


@pytest.fixture(scope="session")
def good(manifest, members):
    return pack(manifest, members)


def refused(data, *words):
    """The message of the PlanError that `data` gets: one line, and not endless."""
    with pytest.raises(PlanError) as caught:
        unpack(data)
    message = str(caught.value)
    assert message.isprintable() and 0 < len(message) < 600
    for word in words:
        assert word in message
    return message


def archive(entries, compression=zipfile.ZIP_STORED):
    """A ZIP of (name, bytes) pairs, as a hostile writer makes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as target:
        for name, data in entries:
            info = zipfile.ZipInfo("x", date_time=(1980, 1, 1, 0, 0, 0))
            info.filename = name
            info.compress_type = compression
            target.writestr(info, data)
    return stream.getvalue()


def entries(data):
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        return [(info.filename, source.read(info)) for info in source.infolist()]


def with_manifest(good, change):
    """The plan with its manifest's JSON values put through `change`, or its text if `change` is bytes."""
    changed = []
    for name, data in entries(good):
        if name == MANIFEST:
            data = change if isinstance(change, bytes) else json.dumps(change(json.loads(data))).encode()
        changed.append((name, data))
    return archive(changed)


# -- sound plans -----------------------------------------------------------------------------------


def test_round_trip(tmp_path, manifest, members):
    written = write_plan(tmp_path / "deep" / "a.plan", manifest, members)
    plan = read_plan(tmp_path / "deep" / "a.plan")
    assert plan == written
    assert {key: plan.manifest[key] for key in manifest} == manifest
    assert plan.members == members
    assert (plan.name, plan.stride, plan.halo, plan.tile) == ("tiny", 2, 8, 128)
    assert plan.palette.names == ("background", "cancer", "stroma")
    assert plan.agreement("fp32") == 1.0 and plan.agreement("bf16") is None


@settings(FIXTURES, max_examples=100)
@given(
    st.builds(
        PostProcessing,
        st.integers(0, 1000),
        st.integers(0, 1000),
        st.none() | st.builds(CrfOptions, st.integers(0, 100), st.floats(0, 1000), st.floats(0.5, 1e4)),
    )
)
def test_post_processing_is_recorded(manifest, members, steps):
    plan = unpack(pack(manifest | {"postprocess": steps.as_json()}, members))
    assert plan.postprocess == plan.choose_postprocess("plan") == steps
    assert plan.choose_postprocess("none") == NO_STEPS
    assert plan.choose_postprocess("min_island=7") == PostProcessing(7)


def test_plans_without_post_processing(good):
    plan = unpack(good)
    assert "postprocess" not in plan.manifest and plan.postprocess == plan.choose_postprocess("plan") == NO_STEPS
    with pytest.raises(UsageError, match="'plam' is no post-processing"):
        plan.choose_postprocess("plam")


def test_plans_without_gate_and_int8(good):
    """Those of before: the default gate, and no int8."""
    plan = unpack(good)
    assert not {"gate", "int8", "temperature"} & set(plan.manifest)
    assert plan.ranges is None and plan.passes("fp32") and not plan.passes("bf16") and not plan.passes("int8")
    old = unpack(with_manifest(good, lambda m: m | {"precisions": {"bf16": {"agreement": DEFAULT_GATE["agreement"]}}}))
    assert old.passes("bf16") and not old.passes("fp32")


def test_ranges_are_recorded(manifest, members):
    given = {"inputs": {"b": 4.5, "up": 9}, "outputs": {"b": 1e-29}}
    assert unpack(pack(manifest | {"int8": given}, members)).ranges == Ranges(given["inputs"], given["outputs"])
    nothing = {"inputs": {}, "outputs": {}}
    assert unpack(pack(manifest | {"int8": nothing}, members)).ranges == Ranges({}, {})


@pytest.mark.parametrize(
    ("found", "exact", "passes"),
    [
        ({"agreement": 0.9}, {}, True),
        ({"agreement": 0.9 - 1e-6}, {}, False),
        ({}, {}, False),
        ({"mean_iou": 0.9}, {"mean_iou": 0.5}, False),
        ({"agreement": None}, {}, False),
        ({"agreement": 1.0, "mean_iou": 0.45}, {"mean_iou": 0.5}, True),
        ({"agreement": 1.0, "mean_iou": 0.449}, {"mean_iou": 0.5}, False),
        ({"agreement": 1.0, "mean_iou": 0.9}, {"mean_iou": 0.5}, True),
        ({"agreement": 1.0, "mean_iou": 0.1}, {}, True),
        ({"agreement": 1.0}, {"mean_iou": 0.5}, True),
    ],
)
def test_the_gate(manifest, members, found, exact, passes):
    fields = {"gate": {"agreement": 0.9, "mean_iou": 0.05}, "precisions": {"fp32": exact, "int8": found}}
    assert unpack(pack(manifest | fields, members)).passes("int8") == passes


def test_equal_content_gives_equal_bytes(tmp_path, manifest, members):
    other = dict(reversed(manifest.items())), dict(reversed(members.items()))
    write_plan(tmp_path / "a", manifest, members)
    write_plan(tmp_path / "b", *other)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_plan_that_would_not_be_read_is_not_written(tmp_path, manifest, members):
    for change in ({"stride": 0}, {"scores": {"x": float("nan")}}, {"training": {"x": object()}}):
        with pytest.raises(PlanError):
            write_plan(tmp_path / "a", manifest | change, members)
    with pytest.raises(PlanError, match=r"lacks model\.onnx"):
        write_plan(tmp_path / "a", manifest, {})
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path, manifest, members):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"file/a\.plan: cannot be written"):
        write_plan(tmp_path / "file" / "a.plan", manifest, members)


# -- files that are no plans -----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"P", b"PK\x03\x04", b"hello", b"\0" * 100, b"PK\x05\x06" + b"\0" * 18])
def test_other_files(tmp_path, content):
    (tmp_path / "x.plan").write_bytes(content)
    with pytest.raises(PlanError, match=r"x\.plan: is (not a plan|damaged)"):
        read_plan(tmp_path / "x.plan")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PlanError, match="no such plan"):
        read_plan(tmp_path / "missing.plan")
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path)


def test_other_zip_files(good, members):
    refused(archive([("readme.txt", b"hello")]), "readme.txt")
    refused(archive([(MANIFEST, b"{}"), (MODEL, b"")]), "not a plan")
    refused(archive([(MANIFEST, b"[1]"), (MODEL, b"")]), "not a plan")
    refused(archive([(MODEL, members[MODEL])]), "lacks manifest.json")
    refused(archive([entries(good)[0]]), "lacks model.onnx")


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.5, True, "x" * 10_000])
def test_other_versions(good, version):
    refused(with_manifest(good, lambda m: m | {"version": version}), "version", f"reads {VERSION}")


# -- damage ----------------------------------------------------------------------------------------


def test_truncation_anywhere(good):
    for end in range(0, len(good), 23):
        refused(good[:end])
    refused(good[:-1])


@settings(deadline=None, max_examples=600)
@given(data=st.data())
def test_flipped_bytes(good, data):
    """ZIP leaves some bytes unprotected (dates, attributes): flipping those must not change what is read."""
    plan = unpack(good)
    damaged = bytearray(good)
    headers = good.rindex(b"PK\x01\x02", 0, good.rindex(b"PK\x01\x02"))  # where flips find the most code
    place = st.integers(0, len(good) - 1) | st.integers(0, 60) | st.integers(headers - 60, len(good) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(place)] ^= data.draw(st.integers(1, 255))
    try:
        survived = unpack(bytes(damaged))
    except PlanError as error:
        assert str(error).isprintable()
    else:
        assert (survived.manifest, survived.members) == (plan.manifest, plan.members)


def test_every_header_byte_flipped(good):
    """All of the directory at the end, one byte at a time, with the values that hurt most."""
    plan = unpack(good)
    for place in (*range(42), *range(good.index(b"PK\x01\x02"), len(good))):
        for value in (0x00, 0xFF, good[place] ^ 0x80):
            damaged = good[:place] + bytes([value]) + good[place + 1 :]
            try:
                survived = unpack(damaged)
            except PlanError as error:
                assert str(error).isprintable()
            else:
                assert (survived.manifest, survived.members) == (plan.manifest, plan.members)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
@example(b"PK\x05\x06" + b"\xff" * 18)
def test_garbage_behind_the_magic(tail):
    refused(b"PK\x03\x04" + tail)


# -- hostile archives ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x", "engines/../x", "/etc/passwd", "engines\\x", "C:x", "engines/", "engines/.hidden", "engines/a/b", "",
     "ENGINES/X", "engines/" + "x" * 200, "engines/\n", "engines/caf\u00e9", "\u202emodel.onnx"],
)  # fmt: skip
def test_path_tricks(good, name):
    refused(archive([*entries(good), (name, b"x")]), "no plan has")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [MODEL, MANIFEST, "MODEL.ONNX", "engines/cpu.xml", "engines/CPU.xml"])
def test_one_name_twice(good, name):
    """Names that differ in case only would be one file on some systems."""
    refused(archive([*entries(good), (name, b"x")]), "one twice")


def test_many_members(manifest, members):
    extra = {f"engines/{i}": b"" for i in range(MAX_MEMBERS - 2)}
    assert len(unpack(pack(manifest, {MODEL: members[MODEL], **extra})).members) == MAX_MEMBERS - 1
    with pytest.raises(PlanError, match="too many members"):
        unpack(pack(manifest, {MODEL: members[MODEL], **extra, "engines/x": b""}))


def test_deflated_and_encrypted_members(good):
    refused(archive(entries(good), zipfile.ZIP_DEFLATED), "compressed or encrypted")
    encrypted = bytearray(good)
    encrypted[good.index(b"PK\x01\x02") + 8] |= 1
    refused(bytes(encrypted), "compressed or encrypted")


def directory_entry(good, name):
    """Where the central directory's entry of `name` begins."""
    return good.index(name.encode(), good.index(b"PK\x01\x02")) - 46


@pytest.mark.parametrize("claimed", [1 << 20, (1 << 32) - 2])
def test_sizes_claimed_beyond_the_file(good, claimed):
    place = directory_entry(good, MODEL)
    refused(good[: place + 20] + struct.pack("<II", claimed, claimed) + good[place + 28 :], f"claims {claimed}")


def test_members_that_overlap(good):
    """Sixty-four members that are all the same bytes of the file would take sixty-four times its size."""
    data = bytes(1 << 20)
    made = bytearray(archive([*entries(good), *((f"engines/{i}", b"") for i in range(50)), ("engines/big", data)]))
    last = made.index(b"engines/big", made.index(b"PK\x01\x02")) - 46
    for i in range(50):
        place = made.index(f"engines/{i}".encode(), made.index(b"PK\x01\x02")) - 46
        made[place + 16 : place + 28] = made[last + 16 : last + 28]
        made[place + 42 : place + 46] = made[last + 42 : last + 46]
    refused(bytes(made), "overlap")


def test_offsets_beyond_any_file(good):
    """A ZIP64 record may claim an offset that no integer of the system holds."""
    names = entries(good)
    record = struct.pack("<HHQ", 1, 8, (1 << 64) - 1)
    place = directory_entry(good, names[-1][0])
    entry = bytearray(good[place : place + 46 + len(names[-1][0])])
    entry[30:32], entry[42:46] = struct.pack("<H", len(record)), b"\xff" * 4
    tail = good.rindex(b"PK\x05\x06")
    end = bytearray(good[tail:])
    end[12:16] = struct.pack("<I", struct.unpack("<I", end[12:16])[0] + len(record))
    refused(good[:place] + bytes(entry) + record + bytes(end), "damaged")


def test_external_data(manifest, members):
    """A model whose weights lie in another file would make the reader open that file."""
    onnx = pytest.importorskip("onnx")
    from onnx import external_data_helper

    model = onnx.load_from_string(members[MODEL])
    external_data_helper.set_external_data(model.graph.initializer[2], "../../etc/passwd")
    model.graph.initializer[2].ClearField("raw_data")
    data = model.SerializeToString()
    refused(pack(manifest, {MODEL: data}), "files outside the plan")
    overlong = data.replace(b"\x0a\x08location", b"\x0a\x88\x00location")  # the same length, written longer
    refused(pack(manifest, {MODEL: overlong}), "files outside the plan")


# -- manifests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b'"x"', b"\xff\xfe{}", b"\x00", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000,
     b'{"format": "histoseg-fast plan", "version": 1}'],
)  # fmt: skip
def test_manifests_that_are_none(good, text):
    refused(with_manifest(good, text))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", '{"x": [-1e999]}'])
def test_numbers_that_json_has_not(good, number):
    text = dict(entries(good))[MANIFEST].replace(b'"scores": {}', b'"scores": {"x": %s}' % number.encode())
    assert number.encode() in text
    refused(with_manifest(good, text), "finite")


def test_manifest_of_five_megabytes(good):
    refused(with_manifest(good, lambda m: m | {"training": {"x": "y" * (5 << 20)}}), "claims 5")


@pytest.mark.parametrize("depth", [*range(880, 1000, 7), 5000])
def test_deep_nesting_in_a_field(good, depth):
    text = dict(entries(good))[MANIFEST].replace(b'"stride": 2', b'"stride": ' + b"[" * depth + b"]" * depth)
    refused(with_manifest(good, text))


WRONG = [None, True, -1, 1.5, "x", "", [], [[]], {}, {"x": 1}, "\ud800", "a\nb", "x" * 5000]
FIELDS = ["name", "arch", "precision", "training", "scores", "made_with", "normalisation", "stride", "halo", "tile"]
FIELDS += ["precisions", "classes", "members"]
FITS = {("name", "x"), ("arch", "x"), ("precision", "x")}
FITS |= {(field, json.dumps(value)) for field in FIELDS[3:7] for value in ({}, {"x": 1})} | {("precisions", "{}")}


@pytest.mark.parametrize("field", FIELDS)
def test_required_fields(good, field):
    refused(with_manifest(good, lambda m: {k: v for k, v in m.items() if k != field}))
    for value in WRONG:
        if (field, value if isinstance(value, str) else json.dumps(value)) not in FITS:
            refused(with_manifest(good, lambda m, value=value: m | {field: value}))


@pytest.mark.parametrize(
    "change",
    [{"stride": 0}, {"stride": -2}, {"stride": 1 << 40}, {"stride": 2.0}, {"stride": True}, {"halo": -2},
     {"halo": 1 << 20}, {"halo": 7}, {"tile": {"default": 19}}, {"tile": {"default": 0}},
     {"tile": {"default": 1 << 30}}, {"tile": {}},
     {"precisions": {"fp32": {"agreement": 1.01}}}, {"precisions": {"fp32": {"agreement": -0.1}}},
     {"precisions": {"fp32": {"agreement": "1"}}}, {"precisions": {"bf16": 1}}, {"precisions": {"b\nf": {}}},
     {"precisions": {"int8": {"mean_iou": 1.01}}}, {"precisions": {"int8": {"mean_iou": "x"}}},
     {"precisions": {"int8": None}}],
)  # fmt: skip
def test_values_out_of_range(good, change):
    refused(with_manifest(good, lambda m: m | change))


@pytest.mark.parametrize(
    "classes",
    [[], [{"name": "one", "colour": [0, 0, 0]}], {"name": "x"}, 3, ["ab", "cd"], [{"name": "x"}] * 2,
     [{"name": "x", "colour": [0, 0, 0]}] * 2, [{"name": n, "colour": [i, 0, 256]} for i, n in enumerate("ab")],
     [{"name": n, "colour": 7} for n in "ab"], [{"name": n, "colour": [i, 0, 0]} for i, n in enumerate(["a", "b\n"])],
     [{"name": [], "colour": []}] * 2, [{"name": str(i), "colour": [i, 0, 0]} for i in range(1000)],
     [{"name": n, "colour": ["y" * 9999] * 3} for n in "ab"],
     [{"name": n, "colour": [i, 0, 0]} for i, n in enumerate(["a", "\ud800"])]],
)  # fmt: skip
def test_classes(good, classes):
    refused(with_manifest(good, lambda m: m | {"classes": classes}), "classes")


@pytest.mark.parametrize(
    "value",
    [*WRONG, "none", [[[]]] * 9, NO_STEPS.as_json() | {"crf": {}}, NO_STEPS.as_json() | {"more": 0},
     NO_STEPS.as_json() | {"min_island": -1}, NO_STEPS.as_json() | {"min_island": 1.5},
     NO_STEPS.as_json() | {"majority_radius": 10**4000}, NO_STEPS.as_json() | {"majority_radius": True},
     PostProcessing(crf=CrfOptions()).as_json() | {"crf": CrfOptions().__dict__ | {"smooth_sigma": 0.1}}],
)  # fmt: skip
def test_post_processing_that_is_none(good, value):
    refused(with_manifest(good, lambda m: m | {"postprocess": value}))


@pytest.mark.parametrize(
    "value",
    [*WRONG, DEFAULT_GATE | {"more": 1}, {"agreement": 1}, DEFAULT_GATE | {"agreement": 1.01},
     DEFAULT_GATE | {"mean_iou": -0.1}, DEFAULT_GATE | {"mean_iou": "0"}, DEFAULT_GATE | {"agreement": None},
     DEFAULT_GATE | {"agreement": 10**400}, DEFAULT_GATE | {"agreement": [1]}],
)  # fmt: skip
def test_gates_that_are_none(good, value):
    refused(with_manifest(good, lambda m: m | {"gate": value}), "gate")


@pytest.mark.parametrize(
    "value",
    [*WRONG, {"inputs": {}}, {"inputs": {}, "outputs": {}, "more": {}}, {"inputs": [], "outputs": {}},
     {"inputs": {}, "outputs": None}, *({"inputs": {"b": v}, "outputs": {}} for v in (0, -1.0, 0.0, 1e-31, 1e31, "1",
     None, [1], {}, 10**400, -(10**400))), {"inputs": {}, "outputs": {"b": 0}},
     {"inputs": {"x" * 101: 1.0}, "outputs": {}}],
)  # fmt: skip
def test_ranges_that_are_none(good, value):
    refused(with_manifest(good, lambda m: m | {"int8": value}), "int8")


def test_digests_and_listed_members(good):
    for change in (
        lambda m: m[MODEL].update(sha256="0" * 64),
        lambda m: m[MODEL].update(sha256=None),
        lambda m: m[MODEL].update(bytes=1),
        lambda m: m[MODEL].pop("bytes"),
        lambda m: m.update({MODEL: "x"}),
        lambda m: m.pop("engines/cpu.xml"),
        lambda m: m.update({"engines/more": {"bytes": 0, "sha256": "0" * 64}}),
    ):

        def changed(manifest, change=change):
            change(manifest["members"])
            return manifest

        refused(with_manifest(good, changed))
    refused(archive([*entries(good), ("engines/extra", b"x")]), "other members")
    swapped = [(n, b"x" if n == "engines/cpu.xml" else d) for n, d in entries(good)]
    refused(archive(swapped), "engines/cpu.xml does not match its digest")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(field=st.sampled_from([*FIELDS, "postprocess", "gate", "int8", "mpp"]), value=JSON)
def test_any_value_in_any_field(good, field, value):
    try:
        plan = unpack(with_manifest(good, lambda m: m | {field: value}))
    except PlanError as error:
        assert str(error).isprintable() and len(str(error)) < 600
    else:
        assert plan.palette and plan.stride >= 1 and plan.halo % plan.stride == 0
        assert all(plan.agreement(p) is None or 0 <= plan.agreement(p) <= 1 for p in plan.manifest["precisions"])
        assert plan.passes("int8") in (True, False) and (plan.ranges is None) == ("int8" not in plan.manifest)


@pytest.mark.parametrize("value", [0.01, 0.5, 1, 20])
def test_the_resolution_is_recorded(good, value):
    assert unpack(good).mpp is None
    assert unpack(with_manifest(good, lambda m: m | {"mpp": value})).mpp == value


@pytest.mark.parametrize("value", [0, -1, 0.009, 20.1, 10**400, "1", True, [1.0], {}])
def test_resolutions_that_are_none(good, value):
    refused(with_manifest(good, lambda m: m | {"mpp": value}), "'mpp'")


def test_shuffled_members_are_the_same_plan(good):
    order = entries(good)
    random.Random(1).shuffle(order)
    assert unpack(archive(order)).members == unpack(good).members
