"""A verifier behind an OpenAI-compatible endpoint, such as GPT-4o, that grades in JSON.

Per GenEval tag the model grades three aspects and the whole, each 0-10 with a reason. What it is told stands in three
files, which users replace together (``prompts`` in the config names their folder):

- ``judge.md``: the instructions. ``$aspects`` lists the aspects; ``$form`` shows the JSON object to answer with, and
  comes last where the file does not mention it. (In all these files ``$$`` is a dollar sign.)
- ``question.md``: what goes with the image. ``$prompt``; ``$tag``, the kind of prompt; ``$include`` and ``$exclude``,
  what must and must not be there.
- ``aspects.json``: ``{tag: {aspect: meaning}}``; the table ``default`` serves prompts of any other kind. ``overall`` is
  graded in addition and is the score.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rflow_jax.chat import Answer, Form, Question, UnusableAnswer, look_and_say
from rflow_jax.chat.json_text import only_object
from rflow_jax.chat.messages import encodable
from rflow_jax.chat.prompt_file import read_prompt
from rflow_jax.errors import InputError
from rflow_jax.usage import Meter
from rflow_jax.verifiers.asking import ChatVerifier
from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.config import VerifierConfig
from rflow_jax.verifiers.metadata import excluded, required
from rflow_jax.verifiers.templates import SHIPPED

__all__ = ["Mark", "OpenAIVerifier", "VerifierConfig"]

_OVERALL = "overall"


class Mark(BaseModel):
    """One graded aspect of an answer."""

    model_config = ConfigDict(strict=True)

    reason: str
    score: float = Field(ge=0, le=10, allow_inf_nan=False)


class OpenAIVerifier(ChatVerifier):
    """Scores images by asking a vision-language model; one question an image.

    Raises:
        InputError: no key for OpenAI's own address, or the folder of prompts is incomplete.
    """

    def __init__(self, config: VerifierConfig, meter: Meter | None = None) -> None:
        folder = Path(config.prompts) if config.prompts else SHIPPED
        judge = Template(read_prompt(folder / "judge.md"))
        self._judge = judge if "form" in judge.get_identifiers() else Template(f"{judge.template}\n\n$form")
        self._question = Template(read_prompt(folder / "question.md"))
        self._aspects = _read_aspects(folder / "aspects.json")
        super().__init__("openai", config, meter)

    def question(self, image: Image, item: Mapping[str, Any]) -> Question:
        """The image with its prompt, the aspects of its tag, and the form of the answer."""
        tag = item.get("tag")
        tag = tag if isinstance(tag, str) else None
        aspects = self._aspects.get(tag or "default", self._aspects["default"])
        system = self._judge.safe_substitute(
            aspects="\n".join(f"- {name}: {meaning}" for name, meaning in aspects.items()), form=_in_words(aspects)
        )
        text = self._question.safe_substitute(
            prompt=item["prompt"],
            tag="free text" if tag is None else tag,
            include=required(item),
            exclude=excluded(item),
        )
        form = Form("grades", _schema(aspects))
        return Question(look_and_say(system, text, image), partial(_verdict, aspects), form)


def _verdict(aspects: Mapping[str, str], answer: Answer) -> Verdict:
    found = only_object(answer.words())
    if missing := [name for name in (*aspects, _OVERALL) if name not in found]:
        raise UnusableAnswer(f"the answer lacks {', '.join(missing)}")
    marks = {name: _mark(name, found[name]) for name in (*aspects, _OVERALL)}
    explanation = "\n".join(f"{name} ({mark.score:g}/10): {mark.reason}" for name, mark in marks.items())
    raw = {name: mark.model_dump() for name, mark in marks.items()}
    return Verdict(score=marks[_OVERALL].score, explanation=explanation, raw=raw)


def _mark(name: str, value: Any) -> Mark:
    try:
        mark = Mark.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join((name, *map(str, first["loc"])))
        raise UnusableAnswer(f"the answer does not fit its schema: {where}: {first['msg']}") from error
    return mark.model_copy(update={"reason": encodable(mark.reason)})


def _in_words(aspects: Mapping[str, str]) -> str:
    """The form of the answer for servers that do not enforce a schema."""
    mark = '{"reason": "<what can be seen>", "score": <number from 0 to 10>}'
    lines = ",\n".join(f"  {json.dumps(name)}: {mark}" for name in (*aspects, _OVERALL))
    return f"Answer with one JSON object of this form and nothing else:\n{{\n{lines}\n}}"


def _schema(aspects: Mapping[str, str]) -> dict[str, Any]:
    """A strict JSON schema; the range stands in words, since not every server takes numeric bounds."""

    def mark(meaning: str) -> dict[str, Any]:
        score = {"type": "number", "description": "from 0 to 10"}
        return _strict({"reason": {"type": "string"}, "score": score}) | {"description": meaning}

    marks = {name: mark(meaning) for name, meaning in aspects.items()}
    return _strict(marks | {_OVERALL: mark("How well the picture shows the prompt as a whole.")})


def _strict(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _read_aspects(path: Path) -> dict[str, dict[str, str]]:
    try:
        tables = TypeAdapter(dict[str, dict[str, str]]).validate_json(read_prompt(path))
    except ValidationError as error:
        raise InputError(f"{path}: expected {{tag: {{aspect: meaning}}}} in JSON") from error
    if "default" not in tables:
        raise InputError(f"{path}: a table 'default' is missing; it serves the tags that have none")
    if any(_OVERALL in aspects for aspects in tables.values()):
        raise InputError(f"{path}: {_OVERALL!r} is graded anyway; give that aspect another name")
    return tables
