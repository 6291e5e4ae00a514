"""The pictures of the documentation show what its tables say."""

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.pictures")


PICTURES = ("files_resnet20.png", "compression_resnet20.png", "speed.png")


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_what_the_tables_say(name, pictures):
    """After a change of a table: python -m benchmarks.pictures."""
    assert set(PICTURES) == set(pictures.PICTURES)
    read, _ = pictures.PICTURES[name]
    with Image.open(ROOT / "docs" / "images" / name) as picture:
        assert json.loads(picture.text["Description"]) == read()


def test_pictures_are_drawn(pictures, tmp_path):
    pictures.main(["--out", str(tmp_path)])
    for name in PICTURES:
        with (
            Image.open(tmp_path / name) as ours,
            Image.open(ROOT / "docs" / "images" / name) as theirs,
        ):
            assert ours.text["Description"] == theirs.text["Description"]
            assert ours.getextrema() != ((255, 255),) * 4  # something is drawn


def test_tables_are_read(pictures):
    files = pictures.read_files()
    assert files[0] == {"name": "dense", "bits": 32, "bytes": 1_094_288, "trained": 0.8362}
    assert {"name": "hyperize 4x", "bits": 8, "bytes": 93_223, "trained": 0.8202} in files
    methods = pictures.read_methods()
    assert len(methods) == 14
    channel = {"method": "channel", "ratio": 4, "parameters": 69_022}
    assert methods[0] == channel | {"before": 0.7116, "after": 0.8224}
    speed = pictures.read_speed()
    assert len(speed) == 10
    assert [speed[0][key] for key in ("ratio", "quartiles", "target")] == [
        1.006,
        [0.971, 1.045],
        1.05,
    ]
    with pytest.raises(ValueError, match=r"docs/speed\.md has no table under the heading 'Ten'"):
        pictures.table("speed.md", "Ten")


def test_the_ten_figures_are_rows_of_the_whole_table():
    whole = (ROOT / "docs" / "speed-all.md").read_text()
    ten = (ROOT / "docs" / "speed.md").read_text().partition("## Ten figures")[2]
    rows = [line for line in ten.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    assert all(f"\n{row}\n" in whole for row in rows)
