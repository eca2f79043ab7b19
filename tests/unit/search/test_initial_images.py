"""Images that a search begins with."""

import json

import PIL.Image
import pytest

from rflow_jax.errors import InputError
from rflow_jax.search.inputs import given_images

ENTRIES = {0: {"prompt": "a"}, 2: {"prompt": "b"}}


def fill(folder, index, names, entry=None):
    samples = folder / f"{index:05d}" / "samples"
    samples.mkdir(parents=True)
    for name in names:
        PIL.Image.new("RGB", (2, 2)).save(samples / name)
    if entry:
        (samples.parent / "metadata.jsonl").write_text(json.dumps(entry))


def names(found):
    return {index: [file.name for file in files] for index, files in found.items()}


def test_ours_come_in_the_order_of_their_numbers(tmp_path):
    fill(tmp_path, 0, ["00010.png", "00002.png"], ENTRIES[0])
    fill(tmp_path, 2, ["00000.png"], ENTRIES[2])
    fill(tmp_path, 1, ["00000.png"])
    assert names(given_images(tmp_path, ENTRIES)) == {0: ["00002.png", "00010.png"], 2: ["00000.png"]}


def test_the_originals_come_round_by_round(tmp_path):
    order = ["1_round@77.png", "2_round@5.png", "2_round@40.png", "10_round@3.jpg"]
    fill(tmp_path, 0, sorted(order))
    assert names(given_images(tmp_path, {0: ENTRIES[0]})) == {0: order}


def test_only_pictures_count(tmp_path):
    fill(tmp_path, 0, ["1.png"])
    for name in (".2.png.5.tmp", "notes.txt"):
        (tmp_path / "00000/samples" / name).write_text("x")
    assert names(given_images(tmp_path, {0: ENTRIES[0]})) == {0: ["1.png"]}


def test_a_prompt_without_images_or_of_another_text_is_named(tmp_path):
    fill(tmp_path, 0, ["1.png"], {"prompt": "other"})
    with pytest.raises(InputError, match="another prompt than number 0"):
        given_images(tmp_path, ENTRIES)
    fill(tmp_path, 2, [])
    with pytest.raises(InputError, match=r"00002/samples: no images to begin with; prompt 2"):
        given_images(tmp_path, {2: ENTRIES[2]})
    with pytest.raises(InputError, match="no images to begin with"):
        given_images(tmp_path / "none", {2: ENTRIES[2]})
