"""Made-up searches, finished and in the folder layout of a real one, for tests of what reads them.

A correction mends a defect of its parent's scene, sometimes; scores and texts follow from the defects that are left.
"""

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.ranking import best_first
from tests.kit.scenes import DEFECTS, Scene, picture, png, possible_defects, said_of

TALK = "the picture shows its main object near a soft edge with light that falls from above"
MANNERS = ("in soft daylight", "seen from the front", "on a clear day", "the whole of it in view", "in simple shapes")


@dataclass
class Plan:
    """How a made-up search goes.

    Attributes:
        noise, reflect: rounds and branches of the two stages.
        skill: probability that a correction mends something.
        unscored: probability that an image has no score.
        decides: the verifier says yes (no more than a small thing is wrong) or no.
        verified: whether there is a verifier.
        talk: words added to each explanation.
        drawn: pictures of the scenes, 256 pixels wide; otherwise all are one small square.
        usage: content of usage.json.
    """

    noise: tuple[int, int] = (2, 2)
    reflect: tuple[int, int] = (0, 2)
    skill: float = 0.75
    unscored: float = 0.0
    decides: bool = False
    verified: bool = True
    talk: int = 0
    drawn: bool = False
    seed: int = 0
    verifier: str = "gpt-4o"
    usage: Mapping[str, float] = field(default_factory=dict)


def write_run(folder: Path, entries: Sequence[Mapping[str, Any]], plan: Plan = Plan(), running: int = 0) -> Path:
    """Writes a search; ``running`` more prompts have begun."""
    folder.mkdir(parents=True)
    config = {
        "strategy": "reflect" if plan.reflect[0] else "noise",
        "model": "black-forest-labs/FLUX.1-dev",
        "lora": "checkpoints/FLUX-Corrector" if plan.reflect[0] else None,
        "verifier": {"name": "openai" if plan.verified else "none", "model": plan.verifier},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if plan.usage:
        (folder / "usage.json").write_text(json.dumps(plan.usage))
    for index, one in enumerate(entries):
        write_prompt(folder / f"{index:05d}", one, plan, index)
    for index in range(len(entries), len(entries) + running):
        (folder / f"{index:05d}").mkdir()
        (folder / f"{index:05d}/journal.jsonl").write_text("{}\n")
    return folder


def write_prompt(folder: Path, entry: Mapping[str, Any], plan: Plan, index: int) -> None:
    """Writes one finished prompt."""
    rng = random.Random(f"{plan.seed} {index}")
    scenes: list[Scene] = []
    records: list[dict[str, Any]] = []

    def add(round_number: int, branch: int, scene: Scene, **more: Any) -> None:
        name = f"midimg/{round_number}_round@{plan.seed}-{index}-{round_number}-{branch}.png"
        seed = [plan.seed, index, round_number, branch]
        record = {"index": index, "id": len(records), "file": name, "prompt": entry["prompt"], "round": round_number}
        record |= {"branch": branch, "stage": "noise", "seed": seed, "parent": None, "parent_file": None}
        record |= {"refined_prompt": None, "reflection": None, "text_errors": [], "verdict": _verdict(scene, plan, rng)}
        records.append(record | more)
        scenes.append(scene)

    rounds, branches = plan.noise
    choice = possible_defects(entry)
    for round_number in range(rounds):
        for branch in range(branches):
            wrong = set(rng.choices(choice, [3] * (len(choice) - 1) + [1], k=rng.randint(2, 4)))
            add(round_number, branch, Scene(entry, wrong, rng.randrange(10**6), rng.randrange(10**6)))
    parents = sorted(sorted(range(len(records)), key=lambda k: scenes[k].score)[-plan.reflect[1] :])
    for round_number in range(rounds, rounds + plan.reflect[0]):
        for branch, parent in enumerate(parents):
            scene, texts = _correct(scenes[parent], plan, rng)
            add(
                round_number,
                branch,
                scene,
                stage="reflect",
                parent=parent,
                parent_file=records[parent]["file"],
                **texts,
            )
        parents = list(range(len(records) - len(parents), len(records)))
    _write(folder, entry, records, [picture(scene) for scene in scenes] if plan.drawn else None)


def _correct(scene: Scene, plan: Plan, rng: random.Random) -> tuple[Scene, dict[str, Any]]:
    said = max(scene.defects, key=lambda defect: DEFECTS[defect][0], default="dull")
    left = set(scene.defects)
    if rng.random() < plan.skill:
        left.discard(said)
    elif rng.random() < 0.3:
        left.add(rng.choice(possible_defects(scene.entry)))
    refined = f"{scene.entry['prompt']}, {rng.choice(MANNERS)}, {rng.choice(MANNERS)}"
    texts = {"reflection": said_of(said, scene.entry), "refined_prompt": refined}
    return Scene(scene.entry, left, scene.look, rng.randrange(10**6)), texts


def _verdict(scene: Scene, plan: Plan, rng: random.Random) -> dict[str, Any] | None:
    if not plan.verified:
        return None
    if rng.random() < plan.unscored:
        return {
            "score": None,
            "label": None,
            "explanation": "",
            "raw": None,
            "error": "the model refused: I cannot help with that.",
        }
    wrong = " ".join(said_of(defect, scene.entry).split(". ")[0].rstrip(".") + "." for defect in sorted(scene.defects))
    talk = " ".join(rng.choice(TALK.split()) for _ in range(plan.talk))
    verdict = {
        "score": scene.score,
        "label": None,
        "explanation": f"{wrong or 'All is as the prompt says.'} {talk}".strip(),
    }
    if plan.decides:
        verdict |= {"label": "yes" if scene.score > 8 else "no", "score": round(abs(scene.score - 8) + 1, 3)}
    return verdict | {"raw": {"score": scene.score}, "error": None}


def _write(
    folder: Path, entry: Mapping[str, Any], records: Sequence[dict[str, Any]], pictures: Sequence[bytes] | None
) -> None:
    (folder / "midimg").mkdir(parents=True)
    (folder / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for k, record in enumerate(records):
        if pictures is None and k:
            os.link(folder / records[0]["file"], folder / record["file"])
        else:
            (folder / record["file"]).write_bytes(pictures[k] if pictures else png(Image.new("RGB", (64, 64), "#8aa")))
    if records[0]["verdict"]:
        verdicts = [Verdict(**record["verdict"]) for record in records]
        best = best_first(verdicts)[0]
        (folder / "samples_best").mkdir()
        os.link(folder / records[best]["file"], folder / "samples_best/00000.png")
