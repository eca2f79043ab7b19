"""A verifier over HTTP that answers in JSON, and the base class of verifiers over HTTP."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from PIL.Image import Image
from pydantic import TypeAdapter, ValidationError

from rflow_jax.errors import InputError
from rflow_jax.openai_client import (
    Answer,
    Chat,
    ChatError,
    ChatRequest,
    ResponseSchema,
    vision_messages,
)
from rflow_jax.openai_client.endpoint import Connection
from rflow_jax.openai_client.messages import PROBE_PROMPT, probe_picture
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.verifiers.base import MissingVerdict, Verdict
from rflow_jax.verifiers.config import OpenAIVerifierConfig
from rflow_jax.verifiers.grades import OVERALL, read_grades
from rflow_jax.writers.prompt_template import read_prompt


def required(item: Mapping[str, Any]) -> str:
    """What the image must show: ``2 x clock; 1 x dog (right of the teddy bear)``."""
    objects = item.get("include")
    if not objects:
        return "what the prompt says"
    found = []
    try:
        for thing in objects:
            details = [thing["color"]] if "color" in thing else []
            if "position" in thing:
                relation, other = thing["position"]
                details.append(f"{relation} the {objects[other]['class']}")
            found.append(f"{thing['count']} x {thing['class']}" + (f" ({', '.join(details)})" if details else ""))
        return "; ".join(found)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return json.dumps(objects)  # metadata of another kind


def excluded(item: Mapping[str, Any]) -> str:
    """What must not be there: ``3 or more x clock``."""
    objects = item.get("exclude")
    if not objects:
        return "whatever contradicts the prompt"
    try:
        return "; ".join(f"{thing['count']} or more x {thing['class']}" for thing in objects)
    except (KeyError, TypeError, IndexError):
        return json.dumps(objects)


SHIPPED = Path(__file__).parent / "prompts"


def yes_no_template(template: str) -> Template:
    """What a yes/no verifier asks about the picture beside it; ``$prompt`` is the prompt.

    Args:
        template: ``raw`` (the prompt alone, as the original asks NVILA), ``question`` (a question around it), or
            the path of a file.

    Raises:
        InputError: there is no such file, or it lacks ``$prompt``.
    """
    if template == "raw":
        return Template("$prompt")
    path = SHIPPED / "yesno.md" if template == "question" else Path(template)
    asked = Template(read_prompt(path).strip())
    if "prompt" not in asked.get_identifiers():
        raise InputError(f"{path}: does not contain $prompt")
    return asked


class ChatVerifier:
    """Asks one question an image; a subclass says which, and parses the answer to a ``Verdict``.

    ``question`` is called here already, for a first question.

    Args:
        kind: first word of the name.

    Attributes:
        service: model and address, for messages; records do not have it, since it may change.
    """

    batch_size = 1

    def __init__(self, kind: str, config: Connection, meter: UsageTracker | None) -> None:
        self._meter = meter or UsageTracker()
        self._chat = Chat(config.endpoint(), self._meter, self.question(probe_picture(), {"prompt": PROBE_PROMPT}))
        self.name, self.service = f"{kind} {config.model_name}", self._chat.name
        self.concurrency = config.concurrency

    def question(self, image: Image, item: Mapping[str, Any]) -> ChatRequest:
        """The request about one image."""
        raise NotImplementedError

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order; an image without a usable answer is unscored with the reason."""
        answers = self._chat.ask_all([self.question(*pair) for pair in zip(images, items, strict=True)])
        return [
            (MissingVerdict if answer.missing else Verdict)(None, error=str(answer))
            if isinstance(answer, ChatError)
            else answer
            for answer in answers
        ]

    def probe(self) -> None:
        """Asks about a small picture; raises ServiceError if there is no such server, or no usable answer."""
        self._chat.probe()

    def close(self) -> None:
        """Cancels pending calls; those images are unscored, with ``CLOSED`` as the reason."""
        self._chat.close()


class OpenAIVerifier(ChatVerifier):
    """Scores images by asking a vision-language model; one question an image.

    Raises:
        InputError: no key for OpenAI's own address, or the folder of prompts is incomplete.
    """

    def __init__(self, config: OpenAIVerifierConfig, meter: UsageTracker | None = None) -> None:
        folder = Path(config.prompts) if config.prompts else SHIPPED
        judge = Template(read_prompt(folder / "judge.md"))
        self._judge = judge if "form" in judge.get_identifiers() else Template(f"{judge.template}\n\n$form")
        self._question = Template(read_prompt(folder / "question.md"))
        path = folder / "aspects.json"
        try:
            self._aspects = TypeAdapter(dict[str, dict[str, str]]).validate_json(read_prompt(path))
        except ValidationError as error:
            raise InputError(f"{path}: expected {{tag: {{aspect: meaning}}}} in JSON") from error
        if "default" not in self._aspects:
            raise InputError(f"{path}: a table 'default' is missing; it is used for tags without one of their own")
        if any(OVERALL in aspects for aspects in self._aspects.values()):
            raise InputError(f"{path}: {OVERALL!r} is always graded; rename that aspect")
        super().__init__("openai", config, meter)

    def question(self, image: Image, item: Mapping[str, Any]) -> ChatRequest:
        """The image with its prompt, the aspects of its tag, and the form of the answer."""
        tag = item.get("tag")
        tag = tag if isinstance(tag, str) else None
        aspects = self._aspects.get(tag or "default", self._aspects["default"])
        # The form of the answer in words, for servers that do not enforce a schema.
        mark = '{"reason": "<what can be seen>", "score": <number from 0 to 10>}'
        lines = ",\n".join(f"  {json.dumps(name)}: {mark}" for name in (*aspects, OVERALL))
        system = self._judge.safe_substitute(
            aspects="\n".join(f"- {name}: {meaning}" for name, meaning in aspects.items()),
            form=f"Answer with one JSON object of this form and nothing else:\n{{\n{lines}\n}}",
        )
        text = self._question.safe_substitute(
            prompt=item["prompt"],
            tag="free text" if tag is None else tag,
            include=required(item),
            exclude=excluded(item),
        )
        form = ResponseSchema("grades", _schema(aspects))
        expected = f"JSON with a score from 0 to 10 for {', '.join((*aspects, OVERALL))}"
        return ChatRequest(
            vision_messages(system, text, image), partial(self._verdict, aspects), form, expected=expected
        )

    def _verdict(self, aspects: Mapping[str, str], answer: Answer) -> Verdict:
        grades = read_grades(tuple(aspects), answer)
        if grades.converted:
            self._meter.add(Usage(converted=1))
        marks = grades.marks
        explanation = "\n".join(
            f"{name} ({mark.score:g}/10): {mark.reason}".removesuffix(": ") for name, mark in marks.items()
        )
        raw = grades.answer if grades.converted else {name: mark.model_dump() for name, mark in marks.items()}
        return Verdict(score=marks[OVERALL].score, explanation=explanation, raw=raw)


def _schema(aspects: Mapping[str, str]) -> dict[str, Any]:
    """A strict JSON schema; the range is given in words, since not every server takes numeric bounds."""

    def mark(meaning: str) -> dict[str, Any]:
        score = {"type": "number", "description": "from 0 to 10"}
        return _strict({"reason": {"type": "string"}, "score": score}) | {"description": meaning}

    marks = {name: mark(meaning) for name, meaning in aspects.items()}
    return _strict(marks | {OVERALL: mark("How well the picture shows the prompt as a whole.")})


def _strict(properties: dict[str, Any]) -> dict[str, Any]:
    closed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}
