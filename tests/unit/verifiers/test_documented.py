"""The examples of docs/verifiers.md, as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rflow_jax.verifiers import VERIFIERS, make_verifier
from rflow_jax.verifiers.base import Verifier
from tests.kit.asking import pictures

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/verifiers.md").read_text()


def blocks(language: str, section: str) -> list[str]:
    """The code of a section."""
    start = PAGE.index(f"\n## {section}")
    text = PAGE[start : PAGE.find("\n## ", start + 1)]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The file of the example, and images."""
    (code,) = blocks("python", "A verifier of your own")
    assert code.count("\n") < 30
    (tmp_path / "sharpness.py").write_text(code)
    for name, image in zip("ab", pictures(2), strict=True):
        image.save(tmp_path / f"{name}.png")
    PIL.Image.new("RGB", (1, 9)).save(tmp_path / "thin.png")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("sharpness", None)


def sharpness(path: Path) -> float:
    with PIL.Image.open(path) as image:
        return float(np.abs(np.diff(np.asarray(image.convert("L"), np.float32))).mean())


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "infer.py"), *argv]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_verifier_of_ones_own_scores_by_the_command_that_is_shown(folder):
    (command,) = blocks("bash", "A verifier of your own")
    python, script, *argv = shlex.split(command)
    assert (python, script) == ("python", "infer.py")
    done = run(folder, *argv)
    assert done.returncode == 0, done.stderr
    want = [f"{2 * sharpness(folder / name):.6g}\t-\t{name}" for name in ("a.png", "b.png")]
    assert done.stdout.splitlines() == want
    thin = run(folder, *[*argv[:1], "thin.png", *argv[1:]])
    assert thin.returncode == 1
    assert thin.stdout.splitlines() == ["-\t-\tthin.png\ttoo small to tell", *want]


def test_it_follows_the_protocol_and_can_be_a_member(folder):
    own = {"name": "sharpness:Sharpness"}
    verifier = make_verifier(VERIFIERS.parse(own))
    assert isinstance(verifier, Verifier)
    ensemble = make_verifier(VERIFIERS.parse({"name": "ensemble", "members": [own, own]}))
    images, items = pictures(3), [{"prompt": "x"}] * 3
    alone, together = verifier.score(images, items), ensemble.score(images, items)
    ensemble.close()
    assert [[member.verdict for member in verdict.members] for verdict in together] == [[one, one] for one in alone]
