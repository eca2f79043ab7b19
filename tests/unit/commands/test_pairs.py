"""``rflow pairs``."""

import json

import numpy as np
import PIL.Image
import pytest

from rflow_jax.commands.pairs import PairsConfig, pairs, read_pairs
from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.utils.images import png_bytes
from tests.kit.fake_pipeline import instead_of_loading
from tests.kit.searching import files

SETTINGS = SamplingConfig(height=32, width=32, condition_size=16, batch_size=2)


@pytest.fixture
def pipe(monkeypatch):
    return instead_of_loading(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    """Five pairs of pictures, wide and high ones."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(5):
        for kind in ("bad", "good"):
            pixels = rng.integers(0, 256, (40 + 8 * number, 60, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / f"in/{kind}{number}.png")
    return tmp_path


def entry(number, **more):
    return {
        "bad_image": f"bad{number}.png",
        "good_image": f"good{number}.png",
        "prompt": f"prompt {number}",
        "reflection": f"change {number}",
        **more,
    }


def listed(folder, entries, lines=False):
    path = folder / "in/pairs.json"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n" if lines else json.dumps(entries, indent=1))
    return path


def config(folder, entries=None, **more):
    file = listed(folder, [entry(n) for n in range(5)] if entries is None else entries)
    return PairsConfig(str(file), str(folder / "out"), "m", "l", **{"sampling": SETTINGS} | more)


@pytest.mark.parametrize("lines", [False, True])
def test_a_list_and_lines_are_read_alike(folder, lines):
    found = read_pairs(listed(folder, [entry(n, image_id=f"x{n}") for n in range(3)], lines))
    assert [(p.number, p.bad_image.name, p.good_image.name, p.prompt, p.reflection, p.name) for p in found] == [
        (n, f"bad{n}.png", f"good{n}.png", f"prompt {n}", f"change {n}", f"x{n}") for n in range(3)
    ]
    assert found[0].bad_image.parent == folder / "in"


@pytest.mark.parametrize("name", ["reflection", "reflection_prompt", "instruction", "edited_prompt_list"])
def test_a_reflection_goes_by_several_names(folder, name):
    text = ["first", "last"] if name == "edited_prompt_list" else "last"
    (found,) = read_pairs(listed(folder, [{**entry(0), "reflection": "", name: text}]))
    assert found.reflection == "last"


def test_text_with_separators_is_one_line(folder):
    path = folder / "in/pairs.jsonl"
    path.write_text(json.dumps(entry(0, prompt="a\u2028b"), ensure_ascii=False) + "\r\n\n", encoding="utf-8-sig")
    assert read_pairs(path)[0].prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no pairs"),
        ("[]", "contains no pairs"),
        ("[{]", "pairs.json:1: cannot be read as JSON"),
        ("{}\n{half", "pair 0: bad_image must be a text"),
        ('["a"]', "pair 0: expected an object with bad_image"),
        ('[{"bad_image": "bad0.png", "good_image": "good0.png", "prompt": "x"}]', "pair 0: reflection must be a text"),
        (
            '[{"bad_image": "bad0.png", "good_image": "good0.png", "prompt": "x", "edited_prompt_list": [3]}]',
            "pair 0: reflection must be a text",
        ),
        (
            r'[{"bad_image": "bad0.png", "good_image": "good0.png", "prompt": "\ud800", "reflection": "y"}]',
            "pair 0: prompt: contains an unpaired surrogate",
        ),
        (
            '[{"bad_image": "bad0.png", "good_image": "good0.png", "prompt": " ", "reflection": "y"}]',
            "pair 0: prompt must be a text",
        ),
        (
            '[{"bad_image": "none.png", "good_image": "good0.png", "prompt": "x", "reflection": "y"}]',
            "none.png: no such file",
        ),
    ],
)
def test_a_list_that_cannot_be_used_is_said(folder, content, message):
    path = folder / "in/pairs.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    assert message in str(caught.value)
    assert "pairs.json" in str(caught.value)


def test_a_broken_line_is_named_and_files_that_are_none(folder):
    path = listed(folder, [entry(0)], lines=True)
    path.write_text(path.read_text() + "\n{half")
    with pytest.raises(InputError, match=r"pairs\.json:3: not a JSON object"):
        read_pairs(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_pairs(path)
    with pytest.raises(InputError, match="cannot read the list of pairs"):
        read_pairs(folder / "none")


def test_bad_good_and_generated_lie_side_by_side(pipe, folder, capsys):
    assert pairs(config(folder, seed=3)) == 0
    out = folder / "out"
    assert capsys.readouterr().out == f"5 pairs in {out}\n"
    assert [len(sent.requests) for sent in pipe.batches] == [2, 2, 1]
    assert all(sent.lora for sent in pipe.batches)
    for number, request in enumerate(pipe.requests):
        assert (request.prompt, request.seed) == (f"prompt {number}", (3, number))
        assert (request.reflection, request.refined_prompt) == (f"change {number}", None)
        assert request.condition.size == (16, 16)
        with PIL.Image.open(out / f"{number:05d}.png") as row:
            # bad (the condition, 16), good (32) and generated (the fake one's 16), as high as the highest
            assert row.size == (96, 32)
            good = np.asarray(row)[:, 32:64]
            bad = row.crop((0, 0, 32, 32)).resize((16, 16))
        with PIL.Image.open(folder / f"in/good{number}.png") as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            expected = image.crop((left, top, left + side, top + side)).resize((32, 32), PIL.Image.Resampling.BICUBIC)
        assert np.abs(good.astype(int) - np.asarray(expected, int)).mean() < 12
        assert np.abs(np.asarray(bad, int) - np.asarray(request.condition, int)).mean() < 25
        record = json.loads((out / f"{number:05d}.json").read_text())
        assert (record["seed"], record["prompt"], record["lora"]) == ([3, number], f"prompt {number}", "l")
        assert record["settings"]["num_inference_steps"] == 30
        with PIL.Image.open(out / f"generated/{number:05d}.png") as image:
            assert image.size == (16, 16)


def test_what_is_there_already_is_not_made_again(pipe, folder, capsys):
    assert pairs(config(folder)) == 0
    before = files(folder / "out")
    (folder / "out/00003.png").unlink()
    (folder / "out/generated/00001.png").unlink()  # its row is there: it is done
    made = len(pipe.requests)
    assert pairs(config(folder)) == 0
    assert [request.prompt for request in pipe.requests[made:]] == ["prompt 3"]
    assert files(folder / "out") == {k: v for k, v in before.items() if k != "generated/00001.png"}
    capsys.readouterr()
    assert pairs(config(folder)) == 0
    assert capsys.readouterr().out == f"{folder / 'out'}: all 5 pairs are done; nothing to do\n"
    assert len(pipe.requests) == made + 1


def test_a_picture_that_cannot_be_made_is_told_and_the_others_are_made(pipe, folder, capsys):
    pipe.fails = lambda request: "its pixels became NaN or infinite" if request.reflection == "change 3" else None
    assert pairs(config(folder)) == 1
    said = capsys.readouterr()
    assert said.out == f"4 pairs in {folder / 'out'}; 1 could not be made\n"
    assert "left out: pair 3: its pixels became NaN or infinite" in said.err
    assert len(list((folder / "out/generated").iterdir())) == 4


def test_a_picture_that_cannot_be_read_is_told_and_the_others_are_made(pipe, folder, capsys):
    (folder / "in/bad1.png").write_bytes(b"no picture")
    whole = (folder / "in/good4.png").read_bytes()
    (folder / "in/good4.png").write_bytes(whole[: len(whole) // 2])
    assert pairs(config(folder)) == 1
    said = capsys.readouterr()
    assert said.out == f"3 pairs in {folder / 'out'}; 2 could not be read\n"
    assert [line.split(":")[0] for line in said.err.splitlines() if line.startswith("left out")] == ["left out"] * 2
    assert "pair 1" in said.err
    assert "pair 4" in said.err
    assert [request.prompt for request in pipe.requests] == ["prompt 0", "prompt 2", "prompt 3"]
    # Repaired, they are made by the next start, each with its own seed.
    (folder / "in/good4.png").write_bytes(whole)
    assert pairs(config(folder)) == 1
    assert pipe.requests[-1].seed == (0, 4)


def test_a_random_crop_follows_from_the_seed(pipe, folder):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        file = listed(folder, [entry(0)])
        pairs(PairsConfig(str(file), str(folder / out), "m", "l", seed=seed, crop="random", sampling=SETTINGS))
    first, second, third = (png_bytes(request.condition) for request in pipe.requests)
    assert first == second != third


def test_settings_that_do_not_fit_are_said(folder):
    with pytest.raises(InputError, match="pairs are squares"):
        pairs(config(folder, sampling=SamplingConfig(height=32, width=16)))
    with pytest.raises(InputError, match="the LoRA acts on condition tokens only"):
        pairs(config(folder, sampling=SamplingConfig(height=32, width=32, union_cond_attn=False)))
    with pytest.raises(InputError, match="seed is -1"):
        config(folder, seed=-1)


def test_pictures_are_turned_as_their_exif_data_say(pipe, folder):
    turned = PIL.Image.Exif()
    turned[0x112] = 6
    for name in ("bad0", "good0"):
        with PIL.Image.open(folder / f"in/{name}.png") as image:
            image.load()
            PIL.Image.fromarray(np.rot90(np.asarray(image), -1)).save(folder / f"in/{name[:-1]}1.png")
            image.save(folder / f"in/{name}.png", exif=turned)
    assert pairs(config(folder, [entry(0), entry(1)])) == 0
    first, second = (request.condition.tobytes() for request in pipe.requests)
    assert first == second
