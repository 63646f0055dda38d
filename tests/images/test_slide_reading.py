"""Slides: levels, resolutions, files that belong together, and what is damaged or missing."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import struct
import sys
import threading

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slide_files import SHARED_SLIDES, halves, noise, write_ome, write_philips, write_pyramid, write_svs

from histoseg_fast.errors import ImageError, UsageError
from histoseg_fast.files import sha256_of
from histoseg_fast.images import Resolution, content, open_image, openslide_source, segments
from histoseg_fast.images import slide as slide_module
from histoseg_fast.images.companions import companions

WRITERS = [write_pyramid, write_ome, write_svs]
FIXTURES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
real_slides = pytest.mark.skipif(not SHARED_SLIDES.is_dir(), reason="no real slides (set HISTOSEG_DATA)")


def read(path, resolution=slide_module.NATIVE):
    with open_image(path, resolution) as image:
        out = np.zeros((image.height, image.width, 3), np.uint8)
        image.read_rows(0, image.height, out)
    return out


def refused(path, resolution, *words):
    with pytest.raises(ImageError) as caught:
        open_image(path, resolution)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (path.name, *words)), message


def shrunk(rgb, scale):
    """Area means of pixels that a whole factor takes together, as they are rounded."""
    height, width = len(rgb) // scale, rgb.shape[1] // scale
    blocks = rgb[: height * scale, : width * scale].reshape(height, scale, width, scale, 3)
    return np.floor(blocks.mean(axis=(1, 3)) + 0.5)


@pytest.fixture
def without_openslide(monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)


# ----------------------------------------------------------------------------------------------- levels and resolution


@pytest.mark.parametrize("write", WRITERS)
def test_every_level_is_read_as_it_is_stored(tmp_path, write):
    levels = halves(301, 403, 3)
    path = write(tmp_path / "a.tif", levels)
    for i, level in enumerate(levels):
        np.testing.assert_array_equal(read(path, Resolution(level=i)), level)
        with open_image(path, Resolution(level=i)) as image:
            assert image.slide and image.level == i and not image.warnings
            assert image.mpp == pytest.approx(0.5 * 2**i, rel=0.01)
    refused(path, Resolution(level=3), "has no level 3", "--level N (0 to 2)")


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("mpp", "level", "scale"), [(0.5, 0, 1), (0.49, 0, 1), (1.0, 1, 1), (4.0, 2, 2), (16, 2, 8)])
def test_the_nearest_finer_level_is_taken(tmp_path, write, mpp, level, scale):
    levels = halves(256, 384, 3)
    path = write(tmp_path / "a.tif", levels)
    for resolution in (Resolution(mpp=mpp), Resolution(trained=mpp)):
        with open_image(path, resolution) as image:
            assert image.level == level and image.mpp == pytest.approx(mpp, rel=0.05)
        np.testing.assert_array_equal(read(path, resolution), shrunk(levels[level], scale))


def test_each_axis_has_its_own_factor(tmp_path):
    path = tmp_path / "a.tif"
    level = noise(120, 120)
    resolution = (1e4 / 0.5, 1e4 / 0.25)  # across, down
    options = {"resolution": resolution, "resolutionunit": "CENTIMETER", "mpp": None}
    write_pyramid(path, [level, level[::2, ::2].copy()], **options)
    assert read(path, Resolution(mpp=1.0)).shape == (30, 60, 3)
    with open_image(path) as image:
        assert image.mpp == pytest.approx((0.5 * 0.25) ** 0.5)  # so that its square is a pixel's area


def test_a_slide_that_is_too_coarse_is_enlarged_up_to_a_limit(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", halves(100, 130, 2), mpp=1.5)
    with open_image(path, Resolution(trained=1.0)) as image:
        assert (image.height, image.width, image.level) == (150, 195, 0)
        assert len(image.warnings) == 1 and "enlarged 1.50 times" in image.warnings[0]
    refused(path, Resolution(mpp=0.5), "1.5 micrometres a pixel at best", "--level N")


@settings(FIXTURES)
@given(st.floats(0.3, 5), st.integers(1, 400), st.lists(st.integers(0, 400), max_size=6), st.sampled_from([8, 512]))
def test_bands_of_any_cut_and_overlap_give_the_whole(tmp_path, mpp, height, cuts, kept):
    path = tmp_path / "a.tif"
    if not path.exists():
        write_pyramid(path, halves(401, 211, 2))
    whole = read(path, Resolution(mpp=mpp))
    banded = np.zeros_like(whole)
    with pytest.MonkeyPatch.context() as patch, open_image(path, Resolution(mpp=mpp)) as image:
        patch.setattr(slide_module, "OVERLAP_ROWS", kept)
        patch.setattr(segments, "PARALLEL_PIXELS", 0)
        for y0 in [*cuts, *range(0, len(whole), height)]:
            y0, y1 = min(y0, len(whole)), min(y0 + height + 20, len(whole))
            image.read_rows(y0, y1, banded[y0:y1])
            wide = np.zeros((y1 - y0, whole.shape[1] * 2, 3), np.uint8)[:, ::2]  # pixels that are not packed
            image.read_rows(y0, y1, wide)
            np.testing.assert_array_equal(wide, whole[y0:y1])
    np.testing.assert_array_equal(banded, whole)


def test_what_a_file_does_not_state(tmp_path):
    slide = write_pyramid(tmp_path / "a.tif", halves(80, 90, 2), mpp=None)
    refused(slide, Resolution(trained=1.0), "does not state its resolution", "--level N (0 to 1)")
    refused(slide, Resolution(mpp=1.0), "does not state its resolution", "--level N (0 to 1)")
    refused(slide, Resolution(), "the plan does not record", "--mpp", "--level N")
    refused(write_svs(tmp_path / "b.svs", halves(80, 90, 1), None), Resolution(trained=1.0), "--level 0 to read")


@pytest.mark.parametrize("dpi", [72, 96, 300])
def test_a_resolution_that_no_microscope_has_is_none(tmp_path, dpi):
    tifffile.imwrite(tmp_path / "a.tif", noise(30, 40), resolution=(dpi, dpi), resolutionunit="INCH")
    refused(tmp_path / "a.tif", Resolution(mpp=1.0), "does not state its resolution", "--level 0")


def test_plain_images_stay_as_they_are_unless_mpp_is_given(tmp_path):
    plain = noise(60, 80)
    tifffile.imwrite(tmp_path / "a.tif", plain, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    for resolution in (Resolution(), Resolution(trained=1.0), Resolution(level=0)):
        np.testing.assert_array_equal(read(tmp_path / "a.tif", resolution), plain)
        with open_image(tmp_path / "a.tif", resolution) as image:
            assert not image.slide and image.mpp == 0.5 and image.overview(4) is None
    np.testing.assert_array_equal(read(tmp_path / "a.tif", Resolution(mpp=1.0)), shrunk(plain, 2))
    refused(tmp_path / "a.tif", Resolution(level=1), "has no level 1", "--level 0")


def test_png_states_no_resolution(tmp_path):
    from histoseg_fast.images import write_png

    write_png(tmp_path / "a.png", noise(6, 8))
    assert read(tmp_path / "a.png", Resolution(trained=1.0)).shape == (6, 8, 3)
    refused(tmp_path / "a.png", Resolution(mpp=1.0), "does not state its resolution", "--level 0 to read it as it is")


def test_a_camera_thumbnail_makes_no_slide(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(noise(80, 120), photometric="rgb", metadata=None)
        file.write(noise(40, 60), photometric="rgb", metadata=None, subfiletype=1)
    with open_image(tmp_path / "a.tif", Resolution(trained=1.0)) as image:
        assert not image.slide and (image.height, image.width) == (80, 120)


def test_pages_of_another_shape_are_no_levels(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", [noise(256, 256), noise(128, 64), noise(64, 64), noise(100, 100)])
    with open_image(path, Resolution(level=1)) as image:
        assert (image.height, image.width) == (64, 64)
    refused(path, Resolution(level=2), "(0 to 1)")


@pytest.mark.parametrize(
    "values", [{"level": 0, "mpp": 1.0}, {"level": -1}, {"mpp": 0.0}, {"mpp": -1.0}, {"mpp": 21}, {"mpp": float("nan")}]
)
def test_resolutions_that_make_no_sense(values):
    with pytest.raises(UsageError):
        Resolution(**values)


# -------------------------------------------------------------------------------------------- overview, glass, threads


@pytest.mark.parametrize(
    "resolution", [Resolution(level=0), Resolution(level=1), Resolution(mpp=0.8), Resolution(mpp=3)]
)
@pytest.mark.parametrize("step", [1, 3, 8, 1000])
def test_an_overview_is_the_image_shrunk(tmp_path, resolution, step):
    top = np.repeat(np.repeat(noise(19, 26), 16, 0), 16, 1)[:301, :413]
    levels = [top, shrunk(top, 2).astype(np.uint8), shrunk(top, 4).astype(np.uint8)]
    path = write_pyramid(tmp_path / "a.tif", levels)
    with open_image(path, resolution) as image:
        got = image.overview(step)
        whole = np.zeros((image.height, image.width, 3), np.uint8)
        image.read_rows(0, image.height, whole)  # an overview leaves no trace in what is read after it
    np.testing.assert_array_equal(whole, read(path, resolution))
    assert got.shape == (-(-image.height // step), -(-image.width // step), 3) and got.dtype == np.uint8
    wanted = np.array([[whole[y : y + step, x : x + step].mean(axis=(0, 1)) for x in range(0, image.width, step)]
                       for y in range(0, image.height, step)])  # fmt: skip
    assert np.abs(got - wanted).mean() < 8  # levels are of rounded size, so edges lie a fraction of a pixel apart


def drop_tile(path, page, index):
    """Make one tile of a TIFF as if it had never been written."""
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        tag = file.pages[page].tags[325]
    struct.pack_into("<I", data, tag.valueoffset + 4 * index, 0)
    path.write_bytes(data)


@pytest.mark.parametrize("write", [write_pyramid, write_svs, lambda path, levels: write_philips(path, levels[0])])
def test_tiles_that_were_never_written_are_glass(tmp_path, write):
    levels = halves(200, 300, 2)
    path = write(tmp_path / "a.tif", levels)
    drop_tile(path, 0, 1)
    wanted = levels[0].copy()
    wanted[:64, 64:128] = 255
    np.testing.assert_array_equal(read(path), wanted)


def test_threads_give_the_same_and_end_with_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "PARALLEL_PIXELS", 0)
    monkeypatch.setattr(segments, "available_cores", lambda: 4)
    level = noise(500, 700)
    path, before = write_pyramid(tmp_path / "a.tif", [level]), set(threading.enumerate())
    with open_image(path) as image:
        out = np.zeros_like(level)
        image.read_rows(0, 500, out)
        assert 1 <= len(set(threading.enumerate()) - before) <= 4
    np.testing.assert_array_equal(out, level)
    assert set(threading.enumerate()) == before


def test_an_error_in_a_thread_is_one_line_and_leaves_no_thread_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "PARALLEL_PIXELS", 0)
    monkeypatch.setattr(segments, "available_cores", lambda: 4)
    path = write_pyramid(tmp_path / "a.tif", [noise(500, 700), noise(250, 350)])
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[20]
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    with open_image(path) as image, pytest.raises(ImageError, match="damaged TIFF"):
        image.read_rows(0, 500, np.zeros((500, 700, 3), np.uint8))


# ------------------------------------------------------------------------------------ OpenSlide, and slides without it


def test_openslide_reads_what_our_reader_does_not(tmp_path):
    level = noise(200, 300)
    path = write_philips(tmp_path / "a.tiff", level)
    with open_image(path, Resolution(trained=0.5)) as image:
        assert (image.format, image.slide, image.mpp, image.level) == ("openslide", True, 0.5, 0)
        assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert image.size_bytes == path.stat().st_size
    np.testing.assert_array_equal(read(path), level)
    np.testing.assert_array_equal(read(path, Resolution(mpp=1.0)), shrunk(level, 2))


def test_a_slide_that_openslide_reads_is_digested_once(tmp_path, monkeypatch):
    path, digested = write_philips(tmp_path / "a.tiff", noise(200, 300)), []
    monkeypatch.setattr(content, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(content, "sha256_of", lambda file: (digested.append(file.name), sha256_of(file))[1])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with open_image(path) as image:
        assert (image.format, image.sha256, digested) == ("openslide", sha256, [str(path)])
    image = open_image(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ImageError, match="changed while it was read"):
        image.close()


def test_without_openslide_one_line_says_what_to_install(tmp_path, without_openslide):
    path = write_philips(tmp_path / "a.tiff", noise(200, 300))
    refused(path, Resolution(level=0), "needs OpenSlide", "pip install 'histoseg-fast[slides]'")
    (tmp_path / "b.mrxs").write_bytes(b"\xff\xd8\xff")
    refused(tmp_path / "b.mrxs", Resolution(level=0), "needs OpenSlide")
    (tmp_path / "c.dcm").write_bytes(bytes(128) + b"DICM")
    refused(tmp_path / "c.dcm", Resolution(level=0), "needs OpenSlide")


@pytest.mark.parametrize("write", WRITERS)
def test_pyramids_need_no_openslide(tmp_path, write, without_openslide):
    levels = halves(128, 192, 2)
    np.testing.assert_array_equal(read(write(tmp_path / "a.tif", levels), Resolution(trained=1.0)), levels[1])


def test_the_finest_level_is_the_same_through_openslide(tmp_path):
    for write in (write_pyramid, write_svs):
        path = write(tmp_path / "a.svs", halves(301, 403, 2))
        (theirs, *_), mpp = openslide_source.open_levels(path)
        out = np.zeros((301, 403, 3), np.uint8)
        with theirs:
            theirs.read_rows(0, 301, out)
        np.testing.assert_array_equal(out, read(path))
        assert mpp == pytest.approx((0.5, 0.5))


def test_openslide_that_dies_costs_its_slide(tmp_path):
    image = open_image(write_philips(tmp_path / "a.tiff", noise(200, 300)))
    (worker,) = image._source._workers._all
    worker._process.kill()
    with pytest.raises(ImageError, match=r"a\.tiff: damaged OPENSLIDE data \(OpenSlide ended over it, with code -9\)"):
        image.read_rows(0, 200, np.zeros((200, 300, 3), np.uint8))
    image.close()


def test_openslide_that_is_stuck_costs_its_slide(tmp_path, monkeypatch):
    image = open_image(write_philips(tmp_path / "a.tiff", noise(200, 300)))
    (worker,) = image._source._workers._all
    before = set(threading.enumerate())
    monkeypatch.setattr(openslide_source, "ANSWER_SECONDS", 0.2)
    worker._process.send_signal(signal.SIGSTOP)
    for read in (lambda: image.read_rows(0, 200, np.zeros((200, 300, 3), np.uint8)), lambda: image.overview(4)):
        with pytest.raises(ImageError, match=r"a\.tiff: OpenSlide gave no answer in 0\.2 s; check the disk"):
            read()
        assert worker._process.poll() == -signal.SIGKILL
    image.close()
    assert set(threading.enumerate()) == before


def test_openslide_that_never_opens_costs_its_slide(tmp_path, monkeypatch):
    stuck = tmp_path / "stuck.py"
    stuck.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(openslide_source, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(openslide_source.openslide_worker, "__file__", str(stuck))
    refused(write_philips(tmp_path / "a.tiff", noise(64, 64)), Resolution(level=0), "OpenSlide gave no answer in 0.2 s")


def test_no_process_outlives_a_slide_that_changed(tmp_path):
    path = write_philips(tmp_path / "a.tiff", noise(64, 64))
    image = open_image(path)
    path.unlink()
    with pytest.raises(ImageError, match="changed while it was read"):
        image.close()
    assert all(worker._process.poll() is not None for worker in image._source._workers._all)


def test_odd_tags_cost_no_pixels(tmp_path):
    plain = noise(20, 30)
    tags = [(296, 3, 3, (9, 9, 9), False), (282, 3, 1, 0, False), (305, 3, 1, 7, False)]
    tifffile.imwrite(tmp_path / "a.tif", plain, photometric="rgb", metadata=None, software=False, extratags=tags)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), plain)


@pytest.mark.parametrize("installed", [True, False])
def test_a_coarser_level_that_cannot_be_read_costs_only_itself(tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "openslide", None)
    levels, path = halves(256, 384, 3), tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for i, (level, compression) in enumerate(zip(levels, ("deflate", "png", "deflate"), strict=True)):
            options = {"tile": (64, 64), "compression": compression, "resolution": (20000, 20000)}
            file.write(level, subfiletype=min(i, 1), photometric="rgb", resolutionunit="CENTIMETER", **options)
    warning = "its level of 192 x 128 pixels is left out: TIFF compression 34933 is not supported"
    for resolution, wanted in (
        (Resolution(level=0), levels[0]),
        (Resolution(level=1), levels[2]),
        (Resolution(mpp=1.0), shrunk(levels[0], 2)),
    ):
        with open_image(path, resolution) as image:
            assert image.format == "tiff" and image.slide and image.warnings == [warning]
            assert image.mpp == {0: 0.5, 1: 2.0}[image.level] or image.mpp == resolution.mpp
        np.testing.assert_array_equal(read(path, resolution), wanted)
    refused(path, Resolution(level=2), "has no level 2", "--level N (0 to 1)")


def test_openslide_in_several_processes_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "PARALLEL_PIXELS", 0)
    monkeypatch.setattr(segments, "available_cores", lambda: 3)
    level = noise(1100, 200)
    image = open_image(write_philips(tmp_path / "a.tiff", level))
    out = np.zeros_like(level)
    image.read_rows(0, 1100, out)
    workers = image._source._workers._all
    assert 1 <= len(workers) <= 3
    image.close()
    assert all(worker._process.poll() is not None for worker in workers)
    np.testing.assert_array_equal(out, level)


def test_a_slide_that_changes_while_it_is_read(tmp_path):
    path = write_philips(tmp_path / "a.tiff", noise(64, 64))
    image = open_image(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ImageError, match="changed while it was read"):
        image.close()


@pytest.mark.parametrize("name", ["a.mrxs", "a.vms", "a.vmu", "a.dcm", "a.svs", "a.ndpi", "a.scn", "a.bif", "a.tif"])
@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff\xe0 jpeg", b"II*\0\x08\0\0\0\xff\xff", bytes(128) + b"DICM\x02\0"]
)
def test_rubbish_of_any_name_is_one_line(tmp_path, name, data, capfd):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert str(caught.value).count(name) >= 1 and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@settings(FIXTURES)
@given(st.data())
def test_damaged_slides_are_one_line_or_are_read(tmp_path, data):
    write = data.draw(st.sampled_from([*WRITERS, lambda path, levels: write_philips(path, levels[0])]))
    path = write(tmp_path / "a.tif", halves(130, 140, 2))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):  # most of it in directories and descriptions
        place = data.draw(st.one_of(st.integers(0, 2000), st.integers(0, len(raw) - 1), st.integers(-3000, -1)))
        raw[place % len(raw)] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(1, len(raw))))])
    for resolution in (Resolution(level=0), Resolution(trained=1.0)):
        try:
            with open_image(path, resolution) as image:
                if image.width * image.height > 2**24:
                    continue
                image.read_rows(0, image.height, np.zeros((image.height, image.width, 3), np.uint8))
                image.overview(50)
        except ImageError as error:
            assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------- slides of more than one file


def digest_of_list(folder, names):
    """What `sha256sum NAMES | sha256sum` prints in `folder`."""
    lines = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_companions_of_mrxs_and_vms(tmp_path):
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "a/deep/x.dat", "b.jpg", "c d.jpg", "other.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert companions(tmp_path / "a.mrxs") == [tmp_path / "a" / "Data0000.dat", tmp_path / "a" / "Slidedat.ini"]
    index = "[Virtual Microscope Specimen]\r\nImageFile=b.jpg\r\nImageFile(1,0)= c d.jpg\r\nMapFile=gone.jpg\r\n"
    (tmp_path / "s.vms").write_bytes(index.encode() + b"MacroImage=../a.mrxs\r\nX=/etc/passwd\r\nY=a/Slidedat.ini\r\n")
    assert companions(tmp_path / "s.vms") == [tmp_path / "b.jpg", tmp_path / "c d.jpg"]
    assert companions(tmp_path / "other.jpg") == [] == companions(tmp_path / "gone.mrxs")


@real_slides
def test_a_dicom_series_is_one_slide_whichever_file_is_named(tmp_path):
    pytest.importorskip("pydicom")
    for name in ("boxes_0.dcm", "boxes_1.dcm"):
        shutil.copy(SHARED_SLIDES / name, tmp_path)
    data = (tmp_path / "boxes_1.dcm").read_bytes()
    uid = re.search(rb"\x20\x00\x0e\x00UI..([0-9.]+)", data, re.DOTALL)[1]
    (tmp_path / "other.dcm").write_bytes(data.replace(uid, uid[:-1] + b"9"))
    digests = set()
    for name in ("boxes_0.dcm", "boxes_1.dcm"):
        with open_image(tmp_path / name, Resolution(trained=0.5)) as image:
            assert (image.format, image.slide, image.width, image.height) == ("openslide", True, 16, 16)
            assert image.mpp == pytest.approx(0.499)
            digests.add(image.sha256)
    assert digests == {digest_of_list(tmp_path, ["boxes_0.dcm", "boxes_1.dcm"])}
    assert companions(tmp_path / "other.dcm") == []


# --------------------------------------------------------------------------------------------------------- real slides


@real_slides
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "small.svs", "tcga-cr-7395-01a-01-ts1.svs", "boxes.tiff"])
def test_real_slides_are_as_openslide_reads_them(name):
    (theirs, *_), _ = openslide_source.open_levels(SHARED_SLIDES / name)
    out = np.zeros((theirs.height, theirs.width, 3), np.uint8)
    with theirs:
        theirs.read_rows(0, theirs.height, out)
    np.testing.assert_array_equal(out, read(SHARED_SLIDES / name))


@real_slides
def test_real_slides_at_a_resolution():
    with open_image(SHARED_SLIDES / "CMU-1-Small-Region.svs", Resolution(trained=1.0)) as image:
        assert (image.width, image.height, image.mpp, image.level) == (1108, 1481, 1.0, 0)
        assert image.overview(32).shape == (47, 35, 3)
    assert read(SHARED_SLIDES / "kidney-48-5.tif", Resolution(trained=1.0)).shape == (901, 1493, 3)
    for name in ("tcga-cr-7395-01a-01-ts1.svs", "boxes.tiff"):
        refused(SHARED_SLIDES / name, Resolution(trained=1.0), "does not state its resolution", "--level N")


@real_slides
@pytest.mark.parametrize(("name", "words"), [("broken.svs", "nor a slide"), ("unopenable.tiff", "compression 52479")])
def test_real_files_that_are_broken(name, words):
    refused(SHARED_SLIDES / name, Resolution(trained=1.0), words)


@real_slides
def test_dicom_through_openslide_is_the_same_picture_as_svs():
    small, dicom = read(SHARED_SLIDES / "small.svs"), read(SHARED_SLIDES / "boxes_0.dcm")
    assert small.shape == dicom.shape == (16, 16, 3) and np.abs(small.astype(int) - dicom).mean() < 1
