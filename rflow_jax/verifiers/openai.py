"""A verifier behind an OpenAI-compatible endpoint, such as GPT-4o.

The model answers in JSON against a schema: per GenEval tag three aspects of its own and an overall grade,
each 0-10 with a reason. Its prompts are files that users can replace (``prompts`` in the config).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, Literal

from PIL.Image import Image
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from rflow_jax.chat import Chat, ChatError, Endpoint, Question, UnusableAnswer, look_and_say
from rflow_jax.errors import InputError
from rflow_jax.verifiers.base import Verdict

_PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class VerifierConfig(Endpoint):
    """Which verifier scores the images.

    Attributes:
        name: "openai" (any compatible endpoint), or "none" to generate without scoring (noise only).
        prompts: folder with judge.md, question.md and aspects.json instead of the ones shipped here.
    """

    name: Literal["openai", "none"] = "openai"
    prompts: str | None = None


class Mark(BaseModel):
    """One graded aspect of an answer."""

    reason: str
    score: float = Field(ge=0, le=10, allow_inf_nan=False)


_MARKS = TypeAdapter(dict[str, Mark])


class OpenAIVerifier:
    """Scores images by asking a vision-language model; one question an image.

    Raises:
        InputError: no key for OpenAI's own address, or the folder of prompts is incomplete.
    """

    def __init__(self, config: VerifierConfig) -> None:
        folder = Path(config.prompts) if config.prompts else _PROMPTS
        self._judge = Template(read_prompt(folder / "judge.md"))
        self._question = Template(read_prompt(folder / "question.md"))
        self._aspects = _read_aspects(folder / "aspects.json")
        self._chat = Chat(config)
        self.concurrency = config.concurrency

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order; an image without a usable answer is unscored with the reason."""
        answers = self._chat.ask_all([self._ask_about(*pair) for pair in zip(images, items, strict=True)])
        return [
            Verdict(score=None, error=str(answer)) if isinstance(answer, ChatError) else _verdict(answer)
            for answer in answers
        ]

    def close(self) -> None:
        """Gives up what is waiting."""
        self._chat.close()

    def _ask_about(self, image: Image, item: Mapping[str, Any]) -> Question:
        aspects = self._aspects.get(item.get("tag", "default"), self._aspects["default"])
        listed = "\n".join(f"- {name}: {meaning}" for name, meaning in aspects.items())
        text = self._question.safe_substitute(
            prompt=item["prompt"],
            tag=item.get("tag", "free text"),
            include=json.dumps(item.get("include", "what the prompt says")),
            exclude=json.dumps(item.get("exclude", [])),
        )
        return Question(
            look_and_say(self._judge.safe_substitute(aspects=listed), text, image),
            partial(_parse, aspects),
            _response_format(aspects),
        )


def _verdict(marks: Mapping[str, Mark]) -> Verdict:
    explanation = "\n".join(f"{name} ({mark.score:g}/10): {mark.reason}" for name, mark in marks.items())
    raw = {name: mark.model_dump() for name, mark in marks.items()}
    return Verdict(score=marks["overall"].score, explanation=explanation, raw=raw)


def _parse(aspects: Mapping[str, str], answer: str) -> dict[str, Mark]:
    # Servers without enforced schemas like to wrap the object in a code fence.
    body = answer[answer.find("{") : answer.rfind("}") + 1]
    try:
        marks = _MARKS.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "answer"
        raise UnusableAnswer(f"the answer does not fit its schema: {where}: {first['msg']}") from error
    missing = [name for name in (*aspects, "overall") if name not in marks]
    if missing:
        raise UnusableAnswer(f"the answer lacks {', '.join(missing)}")
    return {name: marks[name] for name in (*aspects, "overall")}


def _response_format(aspects: Mapping[str, str]) -> dict[str, Any]:
    """A strict JSON schema; the range stands in words, since not every server takes numeric bounds."""

    def mark(meaning: str) -> dict[str, Any]:
        score = {"type": "number", "description": "from 0 to 10"}
        return _strict({"reason": {"type": "string"}, "score": score}) | {"description": meaning}

    marks = {name: mark(meaning) for name, meaning in aspects.items()}
    schema = _strict(marks | {"overall": mark("How well the picture shows the prompt as a whole.")})
    return {"type": "json_schema", "json_schema": {"name": "grades", "strict": True, "schema": schema}}


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
    return tables


def read_prompt(path: Path) -> str:
    """The text of a prompt file.

    Raises:
        InputError: there is no such file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read this prompt file ({error.strerror})") from error
