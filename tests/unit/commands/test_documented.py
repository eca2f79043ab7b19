"""Every command that README, docs/ and configs/ show is one that the program takes: each is parsed, none is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from rflow_jax.commands.main import COMMANDS
from rflow_jax.errors import InputError
from rflow_jax.utils import cli

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
OURS = {"rflow": [], "python infer.py": [], "python train.py": ["train"], "python -m convert_weights": ["convert"]}
SERVER = "python -m rflow_jax.testing.openai_server"
OTHERS = (
    *("pip install", "python3.11 -m venv", ". .venv/bin/activate", "pytest", "hf download", "export "),
    *("python -m sglang", 'python -c "from rflow_jax', SERVER),
)


def shown() -> Iterator[tuple[str, str, bool]]:
    """(where, a command, whether it stands in a block) of every page, and of the recipes' headers."""
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield from ((page.name, command.strip(), True) for command in line.partition(" #")[0].split("&&"))
        for span in re.findall(r"`((?:rflow|python) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if not re.search(r"\.\.\.|(^| )[A-Z]+\b", span):  # no gaps to fill
                yield page.name, " ".join(span.split()), False
    for recipe in sorted(ROOT.glob("configs/*.yaml")):
        header = recipe.read_text().partition("\n\n")[0].replace("\\\n#", " ")
        for line in re.findall(r"^# (?:Command:| {6,}) *(rflow .*|python .*)$", header, re.MULTILINE):
            yield recipe.name, re.sub(r" \[.*?\]| +\(.*| shows .*", "", line), True  # what may be left out, and remarks


def of_the_program(command: str) -> list[str]:
    """The words after ``rflow`` of a command, also where it is called otherwise; none for another program."""
    if command.startswith(SERVER) and " -- " in command:
        command = command.partition(" -- ")[2]
    for call, words in OURS.items():
        if command == call or command.startswith(f"{call} "):
            return [*words, *shlex.split(command.removeprefix(call))]
    return []


COMMANDS_SHOWN = sorted({one for one in shown() if one[1]})


def test_there_are_commands_of_every_page():
    assert len(COMMANDS_SHOWN) > 50
    assert {where for where, *_ in COMMANDS_SHOWN} >= {"README.md", "training.md", "verifiers.md", "debug.yaml"}


@pytest.mark.parametrize(("where", "command", "complete"), COMMANDS_SHOWN, ids=lambda word: str(word)[:60])
def test_it_is_taken(where, command, complete, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = of_the_program(command)
    if not words:
        module = re.match(r"python -m (benchmarks|rflow_jax)\.([\w.]+)", command)
        known = module and (ROOT / module[1] / f"{module[2].replace('.', '/')}.py").exists()
        assert known or command in OURS or command.startswith(OTHERS), f"{where}: what is {command}?"
        return
    name = next((known for length in (2, 1) if (known := " ".join(words[:length])) in COMMANDS), "")
    argv = words[len(name.split()) :]
    if argv in ([], ["--help"], ["--version"]) or not name:  # a command or a group of them is mentioned
        assert name or argv or any(known.startswith(f"{words[0]} ") for known in COMMANDS), f"{where}: {command}"
        return
    command_made = import_module(COMMANDS[name].module).command(name, argv)
    try:
        cli.run_command(replace(command_made, run=lambda *configs: 0), argv)
    except InputError as error:
        # A sentence may show the flags that it is about, and no others.
        if complete or not str(error).startswith("missing: "):
            raise
