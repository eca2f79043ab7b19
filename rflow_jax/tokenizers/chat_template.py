"""A model folder's chat template, which is a program: it sees the messages alone, and its time and memory are bounded.

Transformers runs such templates in Jinja's sandbox, which keeps them from Python's objects, but not from loops within
loops or from texts of gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from time import monotonic
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_replace
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 2**24  # characters of a chat
_BUDGET = 2**28  # characters of all values that are made, with _A_STATEMENT for each statement
_A_STATEMENT = 1000
_MOST_BITS = 1024  # of a number
_A_NUMBER = 8  # or whatever else is no text
_SECONDS = 4  # what a chat takes is milliseconds
# The others may make a long text of a short one before any line ends.
_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int"),
    *("items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper"),
)


@dataclass
class _Limits:
    """What a template may still use.

    Attributes:
        left: characters.
        deadline: by the monotonic clock.
    """

    left: int
    deadline: float


_limits: ContextVar[_Limits] = ContextVar("limits")


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
        with _bounded():
            return _joined(self._template.generate(messages=messages, tools=None, documents=None, **variables))


class _Generation(Extension):
    """The mark of a model's own words, which says nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements within."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    """Jinja's, with a price for each statement and a bound for what makes a value without a function or an operator."""

    def blockvisit(self, nodes: Iterable[Node], frame: Any) -> None:
        def priced() -> Iterator[Node]:
            self.writeline(f"environment.spend({_A_STATEMENT})")  # a block may be empty
            for node in nodes:
                self.writeline(f"environment.spend({_A_STATEMENT + sum(1 for _ in node.find_all(Node))})")
                yield node

        super().blockvisit(priced(), frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concatenated((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._held(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._held(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._held(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._held(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _held(self, visit: Callable[[Any, Any], None], node: nodes.Node, frame: Any) -> None:
        self.write("environment.held(")
        visit(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as Transformers sets it up, without what makes much of little."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        filters = {name: self.filters[name] for name in _FILTERS}
        filters |= {"tojson": _as_json, "replace": _replace, "join": _join(self.filters["join"])}
        self.filters = {name: _priced(one) for name, one in filters.items()}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "joiner", "cycler")}
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a block."""
        return _joined(pieces)

    def concatenated(self, values: Sequence[Any]) -> str:
        """The operator ``~``."""
        return _joined(map(str, values))

    def spend(self, characters: int) -> None:
        """Pays for a statement."""
        _spend(characters)
        if monotonic() > _limits.get().deadline:
            raise SecurityError(f"more than {_SECONDS} seconds")

    def held(self, value: Any) -> Any:
        """A new list, dict or part of a text; paid for with all that is in it, so that none doubles for long."""
        _spend(_deep_size(value))
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result, unless it may be large."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"the operator {operator}")
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > _MOST_BITS:
                raise SecurityError(f"a number of more than {_MOST_BITS} bits")
            return super().call_binop(context, operator, left, right)
        sizes = _size(left), _size(right)
        _require_small(sizes[0] + sizes[1] if operator == "+" else sizes[0] * sizes[1])
        result = super().call_binop(context, operator, left, right)
        return self.held(result) if isinstance(result, list | tuple) else result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a function or method, unless it may be large."""
        owner = getattr(__obj, "__self__", None)
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            raise SecurityError("format, which pads to any length")
        if isinstance(owner, str | list | tuple | bytes):
            _require_small((1 + len(owner)) * (1 + max(map(_size, (*args, *kwargs.values())), default=0)))
        result = super().call(__context, __obj, *args, **kwargs)
        return __self.held(result) if isinstance(result, str | list | tuple | dict) else result


def _size(value: Any) -> int:
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, Sized) else 1


def _require_small(size: int) -> None:
    if size > LONGEST:
        raise SecurityError(f"a value of up to {size:,} characters or numbers")
    _spend(size)


def _spend(characters: int) -> None:
    """Raises SecurityError when a template has used up its budget."""
    limits = _limits.get()
    limits.left -= characters
    if limits.left < 0:
        raise SecurityError("too many steps, or texts too long")


def _deep_size(value: Any) -> int:
    """The characters and numbers in a value, each as often as it is in it."""
    size, others = 0, [value]
    while others:
        one = others.pop()
        if isinstance(one, str):
            size += len(one)
            continue
        size += _A_NUMBER
        if isinstance(one, list | tuple):
            others += one
        elif isinstance(one, Mapping):
            others += [*one.keys(), *one.values()]
        if size + _A_NUMBER * len(others) > LONGEST:
            raise SecurityError(f"a value of more than {LONGEST:,} characters or numbers")
    return size


def _joined(pieces: Iterable[str]) -> str:
    texts, length = [], 0
    for piece in pieces:
        texts.append(piece)
        length += len(piece)
        if length > LONGEST:
            raise SecurityError(f"more than {LONGEST:,} characters")
    _spend(length)
    return "".join(texts)


def _priced(filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is paid for."""

    @wraps(filter)
    def priced(*args: Any, **kwargs: Any) -> Any:
        result = filter(*args, **kwargs)
        if isinstance(result, Sized):
            _spend(len(result))
        return result

    return priced


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
    """Gives the template within its budget and its time."""
    limits = _limits.set(_Limits(_BUDGET, monotonic() + _SECONDS))
    try:
        yield
    finally:
        _limits.reset(limits)
