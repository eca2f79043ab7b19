"""What is counted in the scaling benchmark, and the writers of its arms."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.models.lora import Adapter
from rflow_jax.search.config import RunConfig
from rflow_jax.shapes.arms import ARMS, ReflectionInPrompt, Rewording, Silence
from rflow_jax.shapes.grammar import held_out_prompts, parse
from rflow_jax.shapes.render import render
from rflow_jax.shapes.scaling import ScalingConfig, run_scaling
from rflow_jax.shapes.scaling_table import AGAIN, ORACLE, Judged, curves_of, markdown, table_of
from rflow_jax.shapes.scenes import make_scene
from rflow_jax.weights.lora.export import save_lora
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.writers.base import WriterInput

X, O = True, False  # noqa: E741


def judged(scores, right, kept=None):
    scores = np.asarray(scores, float)
    return Judged(scores, np.asarray(right, bool), scores == 1 if kept is None else np.asarray(kept, bool))


def test_the_verifier_chooses_the_first_of_the_best():
    one = judged([[0.2, 0.9, 0.9, 1.0]], [[X, O, X, O]])
    assert [bool(one.chosen(count)[0]) for count in (1, 2, 3, 4)] == [X, O, O, O]
    assert [bool(one.any_right(count)[0]) for count in (1, 2, 4)] == [X, X, X]


def test_what_was_not_scored_is_never_chosen():
    assert judged([[-np.inf, 0.0]], [[O, X]]).chosen(2).tolist() == [X]


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        # The chains are the even and the odd images; each stops at its first 1.
        ([0.5, 0.5, 1.0, 0.5, 1.0, 1.0], [O, O, X, O, O, O], {1: O, 2: O, 4: X, 6: X}),
        ([1.0, 0.5, 0.5, 0.5, 0.5, 1.0], [O, O, X, X, X, X], {1: O, 2: O, 4: O, 6: O}),
        # Nothing is ever good: the same as plain noise.
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [O, X, O, X, O, X], {1: O, 2: X, 4: X, 6: X}),
        # The second chain stops at once, so its later, better image is never drawn.
        ([0.5, 0.9, 0.5, 0.95, 0.5, 0.99], [O, O, O, X, O, X], {6: O}),
    ],
)
def test_keep_or_draw_again(scores, right, expected):
    kept = [[(score >= 0.9 and (number % 2 == 1)) or score == 1.0 for number, score in enumerate(scores)]]
    one = judged([scores], [right], kept)
    found = {count: bool(one.again(count, 2)[0]) for count in expected}
    if scores[0] == 0.1:
        assert one.again(6, 2).tolist() == one.chosen(6).tolist()
    assert found == expected


def test_the_table_has_means_deviations_and_errors():
    runs = [judged([[1.0, 0.0], [1.0, 0.0]], right) for right in ([[X, O], [O, O]], [[X, O], [X, X]])]
    table = table_of({"noise": runs, "reflection": runs[:1]}, ["colors", "color_attr"], 2, chains=2)
    assert table["counts"] == [1, 2]
    assert list(table["arms"]) == [ARMS["noise"].title, ORACLE, AGAIN, ARMS["reflection"].title]
    noise = table["arms"][ARMS["noise"].title]
    assert noise["mean"] == [0.75, 0.75]
    assert noise["deviation"] == pytest.approx([0.5**0.5 / 2] * 2)
    assert noise["error"] == pytest.approx([0.25, 0.25])  # the prompts are right in 1 and in 0.5 of the seeds
    assert noise["tags"] == {"colors": [1.0, 1.0], "color_attr": [0.5, 0.5]}
    assert table["arms"][ARMS["reflection"].title]["deviation"] == [0, 0]
    lines = markdown(table).splitlines()
    assert lines[0] == "| images | 1 | 2 |"
    assert lines[2] == f"| {ARMS['noise'].title} | 75.0 ± 35.4 | 75.0 ± 35.4 |"
    assert lines[7] == "The standard error over prompts is at most 50.0."
    assert lines[9:12:2] == ["| with 2 images | colors | color attr |", f"| {ARMS['noise'].title} | 100.0 | 50.0 |"]
    json.dumps(table)
    assert [line.name for line in curves_of(table).lines] == [
        ORACLE,
        ARMS["reflection"].title,
        AGAIN,
        ARMS["noise"].title,
    ]


def write_run(folder: Path, seed: int, images: int, entries) -> None:
    """A finished search: right pictures from the third on, which the verifier finds."""
    from random import Random

    for number, entry in enumerate(entries):
        place = folder / f"{number:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
        prompt, records = parse(entry["prompt"]), []
        for k in range(images):
            picture = render(make_scene(prompt, Random(k))) if k > 1 else Image.new("RGB", (96, 96), "white")
            picture.save(place / "samples" / f"{k}.png")
            verdict = {
                "score": float(k > 1), "label": None, "raw": None, "error": None,
                "explanation": "yes: Is it?" if k > 1 else "no: Is it? Do it.",
            }  # fmt: skip
            records.append(
                {"file": f"samples/{k}.png", "prompt": entry["prompt"], "round": k // 2, "branch": k % 2,
                 "stage": "noise", "parent": None, "refined_prompt": None, "reflection": None, "text_errors": [],
                 "verdict": verdict, "position": k, "best": k == 2, "seed": [seed, number, k // 2, k % 2]}
            )  # fmt: skip
        (place / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text("model: m\n")


def test_arms_are_run_once_and_their_pictures_go(monkeypatch, tmp_path):
    asked = []

    def search(kind, config, run):
        asked.append((kind, config.seed, config.lora, config.reflector.name))
        write_run(
            Path(run.out), config.seed, 4, [json.loads(line) for line in Path(run.prompts).read_text().splitlines()]
        )
        return 0

    monkeypatch.setattr("rflow_jax.search.run.search", search)
    trained = {"single_blocks.0.out": Adapter(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32), 2.0)}
    save_lora(trained, tmp_path / "lora")
    out = tmp_path / "out"
    config = ScalingConfig(
        str(out), "m", str(tmp_path / "lora"), "v", prompts=6, images=4, seeds=(0, 1), arms=("noise", "untrained")
    )
    table = run_scaling(config)
    assert table["arms"][ARMS["noise"].title]["mean"] == [0, 0, 1]
    assert table["arms"][AGAIN]["mean"] == [0, 0, 1]
    assert asked[:2] == [("noise", 0, None, "rules"), ("noise", 1, None, "rules")]
    assert [(kind, lora) for kind, _, lora, _ in asked[2:]] == [("reflect", str(out / "untrained"))] * 2
    (nothing,) = read_lora(out / "untrained").adapters.values()
    assert not nothing.b.any()
    assert nothing.a.all()
    assert not [path for path in out.iterdir() if path.is_dir() and path.name != "untrained"]
    with Image.open(out / "noise_0.png") as sheet:
        assert sheet.size == (8 * 98, 8 * 98)
    assert [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()] == [
        prompt.metadata for prompt in held_out_prompts(6)
    ]
    asked.clear()
    assert run_scaling(config) == table
    assert not asked
    assert (out / "table.md").read_text() == markdown(table)
    drawn = ElementTree.parse(out / "curves.svg").getroot()
    assert [line.text for line in drawn.iter("{http://www.w3.org/2000/svg}title")] == [
        ORACLE, AGAIN, ARMS["noise"].title, ARMS["untrained"].title,
    ]  # fmt: skip
    (out / "noise_1.npz").unlink()
    run_scaling(config)
    assert [(kind, seed) for kind, seed, *_ in asked] == [("noise", 1)]
    with pytest.raises(InputError, match=r"results of another dtype \(bfloat16, not float32\)"):
        run_scaling(replace(config, dtype="float32"))


def test_every_arm_makes_the_same_number_of_images():
    config = ScalingConfig("out", "m", "l", "v", images=8)
    for arm in ARMS.values():
        search = config.search(arm, 0)
        assert search.strategy(arm.kind).images() == 8
        search.require_fit(arm.kind, given=False)
    assert RunConfig("p", "o").end is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("noise", "magic")}, "arms: unknown: magic; known: noise, prompt"),
        ({"images": 5}, r"images is 5: give a multiple of chains \(2\)"),
        ({"prompts": 0}, "prompts"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "none twice"),
    ],
)
def test_settings_that_are_not_usable(options, message):
    with pytest.raises(InputError, match=message):
        ScalingConfig("out", "m", "l", "v", **options)


def case(evaluation, prompt="a photo of a red star and a blue ring", current=None):
    return WriterInput(Image.new("RGB", (4, 4)), prompt, current or prompt, evaluation)


def test_what_the_arms_write():
    missing = "yes: Is there a star?\nno: Is there a ring? Add a blue ring."
    assert Silence(None, Path()).write([case(missing)])[0].text == ""
    blind = ReflectionInPrompt(None, Path())
    assert blind.write([case(missing)])[0].text == "a photo of a red star and a blue ring [Reflexion] Add a blue ring."
    assert blind.write([case("yes: Is it?")])[0].text.endswith("[Reflexion] Keep everything.")
    words = Rewording(None, Path())
    (first,) = words.write([case(missing)])
    assert first.text == "a photo of a blue ring and a red star"
    assert words.write([case(missing, current=first.text)])[0].text == "a photo of a red star and a blue ring"
    assert words.write([case(missing, "a dog")])[0].text == "a dog"
    assert words.write([case("", "a photo of a star")])[0].text == "a photo of a star"
