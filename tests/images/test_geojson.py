"""GeoJSON of class maps: what QuPath reads, from made-up and from real labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterise import rasterise

from histoseg_fast.data import find_pairs, load_pair
from histoseg_fast.images import GeojsonWriter, OutlineOptions
from histoseg_fast.labels import PAPER_PALETTE

UUID_5 = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
EXACT = OutlineOptions(min_area=0, exact=True)


def write(path: Path, ids: np.ndarray, options: OutlineOptions = EXACT, cuts=(), **given) -> dict:
    """What the file of `ids`, written in bands that end at `cuts`, holds."""
    given = {"names": PAPER_PALETTE.names, "colours": PAPER_PALETTE.array} | given
    with GeojsonWriter(path, ids.shape[1], ids.shape[0], options=options, **given) as writer:
        for band in np.split(ids, sorted(cuts)):
            writer.write_rows(band)
        writer.finish()
    return json.loads(path.read_text("ascii"))


def test_an_annotation_as_qupath_reads_it(tmp_path: Path) -> None:
    ids = np.array([[0, 0, 0], [0, 2, 2], [0, 2, 2]], np.uint8)
    collection = write(tmp_path / "a.geojson", ids, scale=(2.0, 0.5))
    (feature,) = collection.pop("features")
    assert collection == {"type": "FeatureCollection"}
    assert UUID_5.fullmatch(feature.pop("id"))
    assert feature == {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[[1.5, 2], [1.5, 6], [0.5, 6], [0.5, 2], [1.5, 2]]]},
        "properties": {"objectType": "annotation", "classification": {"name": "stroma", "color": [0, 255, 0]}},
    }


def test_an_image_of_background_has_no_annotation(tmp_path: Path) -> None:
    assert write(tmp_path / "a.geojson", np.zeros((3, 4), np.uint8)) == {"type": "FeatureCollection", "features": []}


def test_names_may_be_any_text(tmp_path: Path) -> None:
    names = ("background", 'a "quoted" \\ name', "Übergang 腫瘍 \U0001f52c\n</script>", "\ud800")
    colours = np.arange(12, dtype=np.uint8).reshape(4, 3)
    features = write(tmp_path / "a", np.array([[1, 2, 3]], np.uint8), names=names, colours=colours)["features"]
    told = {f["properties"]["classification"]["name"]: f["properties"]["classification"]["color"] for f in features}
    assert told == dict(zip(names[1:], colours[1:].tolist(), strict=True))


def test_ids_tell_pieces_apart_and_stay(tmp_path: Path) -> None:
    ids = (np.indices((20, 20)).sum(0) % 3).astype(np.uint8)
    first, other = (write(tmp_path / name, ids)["features"] for name in "ab")
    assert first == other and len({f["id"] for f in first}) == len(first) > 50
    moved = write(tmp_path / "c", np.roll(ids, 1, 1))["features"]
    assert not {f["id"] for f in first if f not in moved} & {f["id"] for f in moved if f not in first}


@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), exact=st.booleans(), min_area=st.integers(0, 20))
def test_bytes_depend_on_the_class_map_alone(tmp_path_factory, data, seed: int, exact: bool, min_area: int) -> None:
    folder = tmp_path_factory.mktemp("geojson")
    height, width = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 30))
    ids = np.random.default_rng(seed).integers(0, 3, (height // 3 + 1, width // 3 + 1), np.uint8)
    ids = ids.repeat(3, 0).repeat(3, 1)[:height, :width]
    options, cuts = OutlineOptions(min_area, exact), data.draw(st.lists(st.integers(0, height), max_size=5))
    write(folder / "whole", ids, options)
    write(folder / "cut", ids, options, cuts)
    assert (folder / "whole").read_bytes() == (folder / "cut").read_bytes()


def test_a_class_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class id 3 has no name among 3"):
        write(tmp_path / "a", np.full((2, 2), 3, np.uint8))
    with pytest.raises(ValueError, match="scale"):
        write(tmp_path / "a", np.zeros((2, 2), np.uint8), scale=(0.0, 1.0))
    assert not list(tmp_path.iterdir())


def polygons(collection: dict) -> list[tuple[int, list]]:
    """Class and rings of each piece."""
    return [
        (PAPER_PALETTE.names.index(f["properties"]["classification"]["name"]), f["geometry"]["coordinates"])
        for f in collection["features"]
    ]


@pytest.mark.parametrize("cohort", ["lung", "colon"])
def test_real_labels_come_back(real_data: Path, tmp_path: Path, cohort: str) -> None:
    same = pixels = 0
    for pair in find_pairs(real_data / cohort)[::6]:
        _, ids = load_pair(pair)
        found = polygons(write(tmp_path / "a.geojson", ids, OutlineOptions()))
        for _, rings in found:
            polygon = shapely.Polygon(rings[0], rings[1:])
            assert polygon.is_valid and polygon.exterior.is_ccw and not any(hole.is_ccw for hole in polygon.interiors)
        same += np.count_nonzero(rasterise(found, *ids.shape) == ids)
        pixels += ids.size
        every = polygons(write(tmp_path / "a.geojson", ids, OutlineOptions(min_area=0)))
        np.testing.assert_array_equal(rasterise(every, *ids.shape), ids)
    assert same / pixels >= 0.995  # what is lost are pieces and holes below the default area
