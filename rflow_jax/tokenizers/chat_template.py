"""A model folder's chat template, which is a program: it sees the messages alone, and its time and memory are bounded.

Transformers runs such templates in Jinja's sandbox, which keeps them from Python's objects, but not from loops within
loops or from texts of gigabytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_replace
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 2**24  # characters of a chat
_BUDGET = 2**28  # characters of all results, and of what lies in variables at each line, with _A_LINE for the line
_A_LINE = 1000
_left: ContextVar[list[int]] = ContextVar("budget")
_FILE = "<template>"  # as Jinja calls the program of a text
# The others may make a long text of a short one before any line ends.
_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int"),
    *("items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper"),
)


class ChatTemplate:
    """A compiled template; raises Jinja's errors if it is none."""

    def __init__(self, text: str) -> None:
        self._text = text
        with _bounded():
            self._template = _Environment().from_string(text)

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str]]:
        return ChatTemplate, (self._text,)  # Jinja's own objects do not go to worker processes

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a chat; raises whatever the template does, and SecurityError where it goes on for too long."""
        pieces, length = [], 0
        with _bounded():
            for piece in self._template.generate(messages=messages, tools=None, documents=None, **variables):
                pieces.append(piece)
                if (length := length + len(piece)) > LONGEST:
                    raise SecurityError(f"more than {LONGEST:,} characters")
        return "".join(pieces)


class _Generation(Extension):
    """The mark of a model's own words, which says nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements within."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    """Jinja's, with a bound for the operator ``~``."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concatenated((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as Transformers sets it up, without what makes much of little."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.filters |= {"tojson": _as_json, "replace": _replace, "join": _join(self.filters["join"])}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "joiner", "cycler")}
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}

    def concatenated(self, values: Sequence[Any]) -> str:
        """The operator ``~``."""
        texts = [str(value) for value in values]
        _require_small(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result, unless it may be large."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"the operator {operator}")
        sizes = _size(left), _size(right)
        _require_small(sizes[0] + sizes[1] if operator == "+" else sizes[0] * sizes[1])
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a function or method, unless it may be large."""
        owner = getattr(__obj, "__self__", None)
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            raise SecurityError("format, which pads to any length")
        if isinstance(owner, str | list | tuple | bytes):
            _require_small((1 + len(owner)) * (1 + max(map(_size, (*args, *kwargs.values())), default=0)))
        return super().call(__context, __obj, *args, **kwargs)


def _size(value: Any) -> int:
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, Sized) else 1


def _require_small(size: int) -> None:
    if size > LONGEST:
        raise SecurityError(f"a value of up to {size:,} characters or numbers")
    _spend(size)


def _spend(characters: int) -> None:
    """Raises SecurityError when a template has used up its budget."""
    left = _left.get()
    left[0] -= characters
    if left[0] < 0:
        raise SecurityError("too many steps, or texts too long")


def _as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    _require_small(sum(map(_size, (options.get("indent") or 0, *(options.get("separators") or ())))) * 100)
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _replace(context: Any, text: str, old: str, new: str, count: int | None = None) -> str:
    _require_small((1 + len(str(text))) * (1 + len(str(new))))
    return do_replace(context, text, old, new, count)


_replace.jinja_pass_arg = do_replace.jinja_pass_arg  # pyright: ignore[reportFunctionMemberAccess]


def _join(inner: Any) -> Any:
    def join(context: Any, values: Any, d: str = "", attribute: Any = None) -> str:
        values = list(values)
        _require_small(len(values) * len(str(d)) + sum(map(_size, values)))
        return inner(context, values, d, attribute)

    join.jinja_pass_arg = inner.jinja_pass_arg  # pyright: ignore[reportFunctionMemberAccess]
    return join


def _raise(message: str) -> None:
    raise TemplateError(message)


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends a template within by SecurityError when it has used up its budget."""
    budget = _left.set([_BUDGET])

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        spent = _A_LINE
        for name, value in frame.f_locals.items():
            if isinstance(value, str | list) and name.startswith("l_"):
                spent += len(value)
            elif value.__class__.__name__ == "Namespace":
                held = getattr(value, "_Namespace__attrs", {}).values()
                spent += sum(len(one) for one in held if isinstance(one, str | list))
        _spend(spent)
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if frame.f_code.co_filename == _FILE else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)
        _left.reset(budget)
