"""Components chosen by name, each with a dataclass of its own settings: built-in ones, and the user's own classes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_type_hints

from rflow_jax.errors import InputError
from rflow_jax.utils.checks import nearest, suggestion
from rflow_jax.utils.ranges import BatchSize, Concurrency
from rflow_jax.utils.yaml_files import parse_yaml

EXECUTION = {"execution": True}
"""Metadata of a field that says when, where or for how much, and changes no result: it may differ at a resume."""
LATER = {"later": True}
"""Metadata of a setting that sections of earlier versions lack; at its default it is the same as none."""

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Word(str):
    """A value of the command line, of which the type of its field decides what it means."""

    def loaded(self) -> Any:
        """What it means as YAML; the text where it is none."""
        with suppress(InputError):
            found = parse_yaml(self, "the value")
            return str(self) if isinstance(found, str) else found
        return str(self)


@dataclass(frozen=True)
class Component:
    """The settings of a component that is chosen by name; each kind of component extends it.

    Attributes:
        name: which kind it is.
    """

    name: str = field(init=False)
    asks_endpoint: ClassVar[bool] = False

    @property
    def claimed_devices(self) -> tuple[Sequence[int], ...]:
        """The devices that each of its models takes for itself."""
        devices = getattr(self, "devices", None)
        return (devices,) if devices else ()


class PluginOptions:
    """What the settings of users' own classes share: ``options`` may name devices."""

    options: dict[str, Any]

    @property
    def claimed_devices(self) -> tuple[Sequence[int], ...]:
        """``options.devices``, if these are numbers; anything else there is left to the class."""
        devices = self.options.get("devices")
        numbers = isinstance(devices, (list, tuple)) and all(type(number) is int for number in devices)
        return (devices,) if devices and numbers else ()


C = TypeVar("C", bound=Component)
T = TypeVar("T", bound=Any)


@dataclass(frozen=True)
class Registry(Generic[C]):
    """The kinds of a component.

    Attributes:
        role: what they are, for messages.
        base: the type of all settings.
        default: the name where none is given.
        kinds: name -> (its settings, the path ``package.module:Class`` of what is made from them; empty: nothing).
        plugin: the settings of a user's own class.
        endpoint: the settings that every kind had in earlier versions.
    """

    role: str
    base: type[C]
    default: str
    kinds: Mapping[str, tuple[type[C], str]]
    plugin: type[C]
    endpoint: type

    def settings(self, name: str) -> type[C]:
        """The dataclass of a name.

        Raises:
            InputError: it is neither known nor ``package.module:Class``; suggests the nearest.
        """
        if name not in self.kinds and not _PATH.fullmatch(name):
            raise InputError(
                f"unknown {self.role} {name!r}: did you mean {nearest(name.lower(), self.kinds)}? known are "
                f"{', '.join(self.kinds)}; a class of your own is written package.module:Class"
            )
        return self.kinds[name][0] if name in self.kinds else self.plugin

    def parse(self, *sections: Mapping[str, Any], source: str | None = None) -> C:
        """The settings that a section of a configuration contains.

        Args:
            sections: a later one takes precedence. If it names another kind, the settings that this kind does not have
                are dropped from earlier ones.
            source: begins messages; None: the role.

        Raises:
            InputError: the name or a setting is unknown, of another type or missing, or not usable.
        """
        source = source or self.role
        name, merged = self.default, {}
        for section in sections:
            before, name = name, section.get("name", name)
            if not isinstance(name, str):
                raise InputError(f"{source}.name: give a name, one of {', '.join(self.kinds)}")
            with _within(f"{source}.name"):
                kind = self.settings(name)
            with _within(source):
                section = self._upgraded(kind, {**section, "name": name})
            known = [one.name for one in fields(kind)]
            for key in section:
                self._require_known(str(key), name, known, source)
            merged = {key: value for key, value in merged.items() if name == before or key in known} | dict(section)
        kind = self.settings(name)
        hints = get_type_hints(kind)
        values = {key: self._typed(hints[key], value, f"{source}.{key}") for key, value in merged.items()}
        if kind is not self.plugin:
            values.pop("name", None)
        for one in fields(kind):
            if one.init and one.name not in values and one.default is one.default_factory is MISSING:
                raise InputError(f"{source}.{one.name}: {name} needs it; {one.metadata['needs']}")
        with _within(source):
            return kind(**values)

    def _upgraded(self, kind: type[C], section: Mapping[str, Any]) -> dict[str, Any]:
        """A section of an earlier version in today's form; any other as it is.

        It had the settings of an endpoint whatever its name, and those of a model in this process in ``options``; a run
        wrote all of them.
        """
        today = dict(section)
        if kind is not self.plugin and "options" not in section:
            return today
        always = _names(self.endpoint) - later_fields(self.endpoint).keys()
        if always <= section.keys():  # as a run wrote it, with what this kind never used
            own = _names(kind) if kind.asks_endpoint or kind is self.plugin else {"name", "model", "prompt_file"}
            remote = [self.endpoint, *(one for one, _ in self.kinds.values() if one.asks_endpoint)]
            unused = {name for one in remote for name in _names(one)} - own
            today = {key: value for key, value in section.items() if key not in unused and value is not None}
        if kind is self.plugin:
            return today
        options = today.pop("options")
        options = options.loaded() if isinstance(options, Word) else options
        if not isinstance(options, Mapping):
            raise InputError("options: expected keys with values")
        if twice := today.keys() & options.keys():
            raise InputError(f"{min(twice)}: given twice, once in options; leave one of them out")
        return today | dict(options)

    def _require_known(self, key: str, name: str, known: Sequence[str], source: str) -> None:
        if key in known:
            return
        if others := [other for other, (kind, _) in self.kinds.items() if key in _names(kind)]:
            own = ", ".join(key for key in known if key != "name")
            raise InputError(
                f"{source}.{key}: {name} has no such setting ({', '.join(others)} would use it); leave it out"
                f"{f', or give one of {own}' if own else ''}"
            )
        near = suggestion(key, known).replace("did you mean ", f"did you mean {source}.")
        raise InputError(f"unknown key {source}.{key}: {near}")

    def _typed(self, hint: Any, value: Any, source: str) -> Any:
        """The value as its type; strings and containers are not repeated in messages: they may be secret."""
        if get_args(hint)[:1] == (self.base,):
            members = value.loaded() if isinstance(value, Word) else value
            if not isinstance(members, Sequence) or isinstance(members, str):
                raise InputError(f"{source}: give a list of {self.role} sections")
            return tuple(self._member(one, f"{source}[{k}]") for k, one in enumerate(members))
        from pydantic import TypeAdapter, ValidationError

        adapter = TypeAdapter(hint)
        if isinstance(value, Word):
            for meaning in (value.loaded(), str(value)):
                with suppress(ValidationError):
                    return adapter.validate_python(meaning, strict=isinstance(meaning, bool))
            value = value.loaded()
        try:
            return adapter.validate_python(value, strict=isinstance(value, bool))  # true is no 1
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
            given_as = f" is {value!r}" if value is None or isinstance(value, (bool, int, float)) else ""
            reason = first["msg"].replace("valid tuple", "list").replace("valid dictionary", "section")
            raise InputError(f"{source}{path}{given_as}: {reason}") from error

    def _member(self, section: Any, source: str) -> C:
        if isinstance(section, self.base):
            return section
        if not isinstance(section, Mapping):
            raise InputError(f"{source}: give a section, such as {{name: {self.default}}}")
        return self.parse(section, source=source)

    def load(self, name: str) -> Any:
        """Imports the class of a name; None where nothing is made.

        Raises:
            InputError: the name is unknown, or there is no such module or class.
        """
        self.settings(name)
        path = self.kinds[name][1] if name in self.kinds else name
        if not path:
            return None
        module, _, attribute = path.partition(":")
        try:
            made_from = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise InputError(f"{self.role} {name}: cannot import {module} ({error})") from error
        except AttributeError as error:
            raise InputError(f"{self.role} {name}: {module} has no {attribute}") from error
        if not callable(made_from):
            raise InputError(f"{self.role} {name}: is no class")
        return made_from

    def require_limits(self, name: str, made: Any, method: str) -> None:
        """Raises InputError if an instance of a user's class lacks a name, its limits, or a method."""
        what = f"{self.role} {name}"
        if not isinstance(getattr(made, "name", None), str):
            raise InputError(f"{what}: give it a name, a string for the records")
        for limit, hint in (("concurrency", Concurrency), ("batch_size", BatchSize)):
            allowed = get_args(hint)[1]
            value = getattr(made, limit, None)
            if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
                raise InputError(f"{what}: its {limit} is {value!r}: give a whole number {allowed}")
        for needed in (method, "close"):
            if not callable(getattr(made, needed, None)):
                raise InputError(f"{what}: it has no method {needed}")

    def results_follow_from(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a stored section that results depend on, with defaults where it has none.

        Sections of earlier versions and of today compare equal if they mean the same.
        """
        name = section.get("name", self.default)
        if not isinstance(name, str):
            return dict(section)
        kind = self.kinds[name][0] if name in self.kinds else self.plugin
        try:
            section = self._upgraded(kind, {**section, "name": name})
        except InputError:  # a file that was edited differs, and is not to be understood
            return dict(section)
        values = {one.name: section.get(one.name, _default(one)) for one in result_fields(kind)}
        for key, hint in get_type_hints(kind).items():
            if get_args(hint)[:1] == (self.base,) and isinstance(values.get(key), (list, tuple)):
                members = (one for one in values[key])
                values[key] = [self.results_follow_from(m) if isinstance(m, Mapping) else m for m in members]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def probed(made: T) -> T:
    """The component, once its service has answered a first question, if it has a method ``probe`` that asks one.

    Raises:
        ServiceError: there is no such service, or it does not take the question; the component is closed then.
    """
    if callable(probe := getattr(made, "probe", None)):
        try:
            probe()
        except BaseException:
            made.close()
            raise
    return made


def _names(kind: type) -> set[str]:
    return {one.name for one in fields(kind)}


def result_fields(kind: type) -> list[Field[Any]]:
    """The fields of a dataclass that results depend on."""
    return [one for one in fields(kind) if not one.metadata.get("execution")]


def later_fields(kind: type) -> dict[str, Any]:
    """The names of the fields of a dataclass that earlier versions lack, with their defaults."""
    return {one.name: _default(one) for one in fields(kind) if one.metadata.get("later")}


def _default(one: Field[Any]) -> Any:
    if one.default_factory is not MISSING:
        return one.default_factory()
    return None if one.default is MISSING else one.default


@contextmanager
def _within(source: str) -> Iterator[None]:
    """Prefixes the messages of input errors with their source."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
