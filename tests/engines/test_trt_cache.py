"""The engine cache: kept whole, found again, locked between processes, bounded, and never trusted blindly."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trt_fixtures import A100, H100, H200

from histoseg_fast.cache import FOLDER_VARIABLE, cache_folder
from histoseg_fast.engines.trt import cache as caching
from histoseg_fast.engines.trt.cache import EngineCache
from histoseg_fast.engines.trt.info import MAGIC, EngineInfo, pack_entry, read_info, unpack_entry
from histoseg_fast.engines.trt.options import BuildOptions
from histoseg_fast.errors import EngineError

VERSION = "11.4.0.106"
OPTIONS = BuildOptions(stride=2, tile=1128, batch=4)
ENGINE = b"engine" * 100
FEW = settings(max_examples=40, deadline=None)


def papers(gpu=H200, tensorrt=VERSION, data=ENGINE, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return EngineInfo.of(b"model", options, gpu, tensorrt).sealed(data, {"fp16": 3, "fp32": 1})


@pytest.fixture
def cache(tmp_path):
    return EngineCache("d" * 64, tmp_path)


def entries(tmp_path):
    return sorted(tmp_path.rglob("*.engine"))


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("agreement", [None, 1.0, 0.25])
def test_papers_and_engine_come_back(agreement):
    info = dataclasses.replace(papers(), agreement=agreement)
    assert unpack_entry(pack_entry(info, ENGINE)) == (info, ENGINE)
    assert read_info(json.loads(json.dumps(info.json()))) == info


@FEW
@given(st.data())
def test_truncated_and_changed_files_are_refused(data):
    content = pack_entry(papers(), ENGINE)
    with pytest.raises(ValueError):
        unpack_entry(content[: data.draw(st.integers(0, len(content) - 1))])
    at = data.draw(st.integers(len(content) - len(ENGINE), len(content) - 1))
    with pytest.raises(ValueError):
        unpack_entry(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", MAGIC, MAGIC + b"{}\n", MAGIC + b"[" * 50_000 + b"\n", MAGIC + b"null\nx", MAGIC + b"x" * (1 << 17)],
)
def test_files_that_are_no_engine(content):
    with pytest.raises(ValueError):
        unpack_entry(content)


WRONG = {"model": 3, "gpu": "a\nb", "capability": [9], "size": True, "version_compatible": 1, "agreement": 2}
WRONG |= {"profiles": [], "convolutions": [1], "sha256": "", "tensorrt": "1" * 300, "precision": None}


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.parametrize("absent", [True, False])
def test_papers_that_are_not_sound(key, absent):
    values = json.loads(json.dumps(papers().json()))
    values.pop(key) if absent else values.update({key: WRONG[key]})
    if (key, absent) == ("agreement", True):
        assert read_info(values) == papers()
        return
    with pytest.raises(ValueError):
        read_info(values)


@pytest.mark.parametrize(
    "shapes", [[[1, 2, 2, 3]] * 2, [[1, 2, 2]] * 3, [[1, 2, 2, -3]] * 3, [[1, 2, 2, "3"]] * 3, [3]]
)
def test_profiles_that_are_not_sound(shapes):
    values = papers().json()
    values["profiles"] = [dict(zip(("minimum", "optimum", "maximum"), shapes, strict=False))]
    with pytest.raises(ValueError):
        read_info(values)


# -- what fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "gpu", "version", "misfit"),
    [
        ({}, H200, VERSION, ""),
        ({}, H200, "10.13.0.35", f"is for TensorRT {VERSION}"),
        ({}, H200, "11.5.0.1", f"is for TensorRT {VERSION}"),
        ({}, H100, VERSION, "is for another GPU, NVIDIA H200 (sm90)"),
        ({}, A100, VERSION, "is for another GPU, NVIDIA H200 (sm90)"),
        ({"hardware": "same-cc"}, H100, VERSION, ""),
        ({"hardware": "same-cc"}, A100, VERSION, "is for another GPU, NVIDIA H200 (sm90)"),
        ({"hardware": "ampere+"}, A100, VERSION, ""),
        ({"hardware": "ampere+"}, dataclasses.replace(A100, capability=(7, 5)), VERSION, "is for another GPU"),
        ({"version_compatible": True}, H200, "11.5.0.1", ""),
        ({"version_compatible": True}, H200, "12.0.0", ""),
        ({"version_compatible": True}, H200, "11.3.9", f"is for TensorRT {VERSION}"),
    ],
)
def test_where_an_engine_may_run(built, gpu, version, misfit):
    assert papers(**built).misfit(gpu, version)[: len(misfit) or None] == misfit


@pytest.mark.parametrize(
    ("built", "wanted", "covers"),
    [
        ({}, {}, True),
        ({"tile": 2000}, {}, True),
        ({}, {"tile": 2000}, False),
        ({"batch": 8}, {"batch": 4}, True),
        ({"batch": 4}, {"batch": 8}, False),
        ({}, {"precision": "fp32"}, False),
        ({"hardware": "ampere+"}, {}, True),
        ({}, {"hardware": "ampere+"}, False),
        ({}, {"version_compatible": True}, False),
        ({"version_compatible": True}, {}, True),
    ],
)
def test_what_an_engine_covers(built, wanted, covers):
    assert papers(**built).covers(dataclasses.replace(OPTIONS, **wanted)) == covers


def test_what_it_was_built_for_in_words():
    assert papers().built_for == "NVIDIA H200 (sm90), TensorRT 11.4.0.106"
    every = papers(hardware="ampere+", version_compatible=True)
    assert every.built_for == "NVIDIA H200 (sm90) and others (ampere+), TensorRT 11.4.0.106 or newer"


# -- keep and find ---------------------------------------------------------------------------------


def test_engines_of_several_gpus_and_versions_live_beside_each_other(cache, tmp_path):
    assert cache.find(H200, VERSION) == "none is in the cache"
    for gpu in (H200, A100):
        for version in (VERSION, "10.13.0.35"):
            data = f"{gpu}{version}".encode()
            cache.keep(papers(gpu, version, data), data)
    assert len(entries(tmp_path)) == 4
    for gpu in (H200, A100):
        for version in (VERSION, "10.13.0.35"):
            assert cache.find(gpu, version)[1] == f"{gpu}{version}".encode()
    assert "another GPU" in cache.find(H100, VERSION) or "TensorRT" in cache.find(H100, VERSION)


def test_other_networks_are_not_found(cache, tmp_path):
    cache.keep(papers(), ENGINE)
    assert EngineCache("e" * 64, tmp_path).find(H200, VERSION) == "none is in the cache"


@pytest.mark.parametrize("size", [0, 10, 200, -1])
def test_a_truncated_entry_is_named_and_replaced(cache, tmp_path, size):
    cache.keep(papers(), ENGINE)
    (entry,) = entries(tmp_path)
    entry.write_bytes(entry.read_bytes()[:size])
    assert "the one in the cache is damaged" in cache.find(H200, VERSION)
    cache.keep(papers(), ENGINE)
    assert cache.find(H200, VERSION) == (papers(), ENGINE)


def test_the_least_recently_used_make_room(cache, tmp_path, monkeypatch):
    size = len(pack_entry(papers(), ENGINE))
    monkeypatch.setattr(caching, "MAX_CACHE_BYTES", 2 * size + 50)
    for age, digest in enumerate("abc"):
        EngineCache(digest * 64, tmp_path).keep(papers(), ENGINE)
        newest = max(entries(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 + age, 1000 + age))
    assert len(entries(tmp_path)) == 2
    assert EngineCache("b" * 64, tmp_path).find(H200, VERSION) == (papers(), ENGINE)  # used: now newer than c
    EngineCache("d" * 64, tmp_path).keep(papers(), ENGINE)
    assert {path.parent.name[0] for path in entries(tmp_path)} == {"b", "d"}


def test_what_was_half_written_long_ago_is_removed(cache, tmp_path):
    """A process that was killed as it wrote left it; one that writes now does not lose its own."""
    for name, age in (("old", 2 * caching.LOCK_SECONDS), ("new", 1.0)):
        path = tmp_path / "e" / f".{name}.engine.1-0.partial"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    cache.keep(papers(), ENGINE)
    assert [path.name for path in tmp_path.rglob("*.partial")] == [".new.engine.1-0.partial"]


def test_an_engine_too_large_to_keep(monkeypatch):
    monkeypatch.setattr("histoseg_fast.engines.trt.info.MAX_ENGINE_BYTES", 10)
    with pytest.raises(EngineError, match="more than the"):
        pack_entry(papers(), ENGINE)


def test_timing_caches(cache, tmp_path, monkeypatch):
    assert cache.timing(H200, VERSION) == b""
    cache.keep_timing(H200, VERSION, b"timings")
    assert cache.timing(H200, VERSION) == b"timings"
    assert cache.timing(A100, VERSION) == cache.timing(H200, "10.13.0.35") == b""
    assert EngineCache("e" * 64, tmp_path).timing(H200, VERSION) == b"timings"  # of the GPU, for every network
    (path,) = tmp_path.rglob("*.timing")
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.timing(H200, VERSION) == b""
    monkeypatch.setattr(caching, "MAX_TIMING_BYTES", 3)
    cache.keep_timing(H100, VERSION, b"timings")
    assert cache.timing(H100, VERSION) == b""


# -- where -----------------------------------------------------------------------------------------


def test_the_folder(monkeypatch, tmp_path):
    for name in (FOLDER_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/x"))
    assert cache_folder() == Path("/home/x/.cache/histoseg-fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    assert cache_folder() == Path("/home/x/.cache/histoseg-fast")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "histoseg-fast"
    monkeypatch.setenv(FOLDER_VARIABLE, "/c")
    assert cache_folder() == Path("/c")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path):
    tmp_path.chmod(0o500)
    with EngineCache("d" * 64, tmp_path / "sub").locked(H200, VERSION, pytest.fail):
        pass


def test_a_file_in_the_folders_place_needs_no_lock(tmp_path):
    (tmp_path / "file").write_text("")
    store = EngineCache("d" * 64, tmp_path / "file")
    with store.locked(H200, VERSION, pytest.fail):
        assert store.find(H200, VERSION) == "none is in the cache"
        with pytest.raises(OSError):
            store.keep(papers(), ENGINE)


# -- locks -----------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from histoseg_fast.engines.trt.cache import EngineCache
from histoseg_fast.engines.trt.gpu import Gpu
with EngineCache("d" * 64, Path(sys.argv[1])).locked(Gpu("NVIDIA H200", (9, 0)), "11.4.0.106", lambda: None):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_held_by_another_process_is_waited_for(cache, holder):
    told = threading.Event()
    threading.Timer(0.5, lambda: (holder.stdin.write("\n"), holder.stdin.flush())).start()
    with cache.locked(H200, VERSION, told.set):
        assert told.is_set() and holder.wait(30) == 0


def test_a_lock_of_a_process_that_died_is_free(cache, holder):
    holder.kill()
    holder.wait(30)
    with cache.locked(H200, VERSION, pytest.fail):
        pass


def test_a_lock_that_is_never_freed(cache, holder, monkeypatch):
    monkeypatch.setattr(caching, "LOCK_SECONDS", 0.1)
    waits = []
    with pytest.raises(EngineError, match="too long"), cache.locked(H200, VERSION, lambda: waits.append(1)):
        pytest.fail("the lock is held by another process")
    assert waits == [1]


def test_other_gpus_do_not_wait(cache, holder):
    with cache.locked(A100, VERSION, pytest.fail), cache.locked(H200, "10.13.0.35", pytest.fail):
        pass


def test_threads_of_one_process_wait_for_each_other(cache):
    order = []

    def build(name):
        with cache.locked(H200, VERSION, lambda: None):
            order.extend([name, name])

    threads = [threading.Thread(target=build, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2] and sorted(order[::2]) == [0, 1, 2, 3]
