"""What the command lines share: parsers over dataclasses, and errors that are one line.

Exit status: 0 done, 2 bad input (one line, no traceback), 130 interrupted, 1 otherwise. A full disk or an error of a
device is one line too, and a bug a traceback.
"""

import errno
import logging
import os
import sys
from argparse import SUPPRESS, ArgumentError, HelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from rflow_jax.errors import InputError, RunError
from rflow_jax.utils.arguments import (
    Command,
    components_of,
    config_files,
    early_value,
    is_component,
    keys,
    known_keys,
    prepare,
    registries_of,
    require_readable_sections,
    settings,
    takes_own_recipe,
    values_of,
)
from rflow_jax.utils.parser_messages import explain
from rflow_jax.utils.registry import Registry
from rflow_jax.utils.secrets import without_secrets
from rflow_jax.utils.shown import one_line
from rflow_jax.utils.yaml_files import parse_yaml

__all__ = ["Command", "early_value", "run", "run_command"]

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "std::bad_alloc", "Cannot allocate memory")

_OF_THE_MACHINE = {
    errno.ENOSPC: "the disk is full; free some space or choose another path",
    errno.EDQUOT: "your share of the disk is used up; free some space or choose another path",
    errno.EIO: "the device reports an error; check the disk, or copy the file again",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "the machine has too many open files; end other programs",
    errno.ENOMEM: "out of memory; end other programs, or lower batch_size and workers",
    errno.EFBIG: "the file is larger than its disk or your limit (ulimit -f) allows; choose another path",
}
_OF_THE_USER = {
    errno.ENOENT: "no such file or folder",
    errno.EEXIST: "a file of this name is in the way",
    errno.ENOTDIR: "a part of this path is a file and no folder",
    errno.EISDIR: "a folder, where a file is expected",
    errno.EACCES: "no permission; change its rights or choose another path",
    errno.EPERM: "not permitted; change its rights or choose another path",
    errno.EROFS: "the disk is read-only; choose another path",
    errno.ENAMETOOLONG: "this name is too long",
    errno.ELOOP: "links that lead in a circle",
    errno.ENXIO: "a pipe or device, where a file is expected",
}


_load_yaml = get_loader("yaml")


def _load_strictly(text: str) -> Any:
    """jsonargparse's meaning of a YAML text, once it is known to be bounded."""
    parse_yaml(text, "<unicode string>")  # as PyYAML calls it; the file's name takes its place
    return _load_yaml(text)


set_loader("yaml", _load_strictly, (InputError, yaml.YAMLError))


def run(main: Callable[[], int | None]) -> int:
    """Runs a command line; an error that a user can act on becomes one line on stderr.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # a path need not fit the terminal's encoding
    if logging.lastResort is not None:  # which prints warnings where no one has set logging up
        logging.lastResort.setFormatter(_OneLine())
    try:
        return main() or 0
    except InputError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python must not try to write the rest of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail("out of memory: lower batch_size, height and width, or workers, or end other programs", 1)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE | _OF_THE_USER.keys() and error.filename is None:
            raise
        return _fail(_of_files(error), 2 if error.errno in _OF_THE_USER else 1)
    except Exception as error:
        # JAX has no exception class of its own for this, only the status in the text.
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        return _fail("out of accelerator memory: lower batch_size, height and width, or condition_size", 1)


def run_command(
    command: Command, argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None
) -> int | None:
    """Parses a command line and runs its command.

    Args:
        argv: the words after the command's name; None: those of this process.
        prog: how the command is called, for its help.
        description: the first line of its help.

    Raises:
        InputError: the command line or its YAML file is not usable; for an unknown key it names the nearest.
    """
    registries = registries_of(command)
    parser = _parser(command, registries, prog, description)
    argv = list(sys.argv[1:] if argv is None else argv)
    by_default = takes_own_recipe(argv, command)
    argv = prepare(argv, command)
    components = {}
    try:
        if not {"-h", "--help"} & set(argv):
            components, argv = components_of(argv, registries)
        argv = known_keys(argv, command)
        require_readable_sections(argv, command)
        namespace = parser.parse_args(argv)
        _require_values(namespace, command.configs, argv)
    except ArgumentError as error:
        known = [*(key for key, _ in keys(command.configs)), *settings(command)]
        raise InputError(explain(error, config_files(argv), known)) from error
    except UnicodeDecodeError as error:
        raise InputError("a file that the command line names for a section is not a text in UTF-8") from error
    except RecursionError as error:
        raise InputError(
            f"{config_files(argv)}: a section contains itself, or sections are nested too deeply"
        ) from error
    ready = vars(parser.instantiate(namespace)) | components
    configs = [config(**{f.name: ready[f.name] for f in fields(config)}) for config in command.configs]
    if by_default:
        print(f"no --config and no --model: the recipe {command.recipe}", file=sys.stderr)
    return command.run(*configs)


class _Parser(ArgumentParser):
    """A parser whose help goes on with the settings of components, by their names."""

    registries: Mapping[str, Registry[Any]] = MappingProxyType({})

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The help, with each kind's own settings; roles that choose among the same kinds share them."""
        roles: dict[int, list[str]] = {}
        for role, registry in self.registries.items():
            roles.setdefault(id(registry), []).append(role)
        return super().format_help(formatter) + "".join(
            _kinds_help(names, self.registries[names[0]]) for names in roles.values()
        )


def _kinds_help(roles: Sequence[str], registry: Registry[Any]) -> str:
    """What each kind of a component takes; what it shares with one before is not repeated."""
    role, shown = roles[0], set()
    text = f"\n--{role}, and --{' and --'.join(roles[1:])} likewise:\n" if len(roles) > 1 else ""
    for name, kind in {**registry.kinds, "package.module:Class": (registry.plugin, "")}.items():
        shared = [one.name for one in fields(kind[0]) if one in shown]
        shown |= set(fields(kind[0]))
        parser = ArgumentParser(usage=SUPPRESS, add_help=False)
        parser.add_class_arguments(kind[0], role, skip={*shared, "name"})
        for action in parser._actions:
            if action.dest == role or action.dest.endswith(".help"):
                action.help = SUPPRESS
        summary = (kind[0].__doc__ or "").partition("\n")[0]
        text += f"\n--{role}.name {name}: {summary}\n{parser.format_help().partition(chr(10))[2]}"
        text += f"  --{role}.{{{','.join(shared)}}}\n                        as above\n" if shared else ""
    return text


def _parser(
    command: Command, registries: Mapping[str, Registry[Any]], prog: str | None, description: str | None
) -> ArgumentParser:
    parser = _Parser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.registries = registries
    default = f"; without it, --model and --lora: {command.recipe}" if command.recipe else ""
    parser.add_argument("--config", action="config", help=f"YAML file; flags take precedence over it{default}")
    for config in command.configs:
        parser.add_class_arguments(config, skip={one.name for one in fields(config) if one.name in registries})
    for role, registry in registries.items():
        words = f"its name and settings, or a YAML file of them; each also as a flag, --{role}.name and those below"
        default = {"name": registry.default}
        parser.add_argument(f"--{role}", type=dict[str, Any], default=default, metavar="CONFIG", help=words)
    return parser


def _require_values(namespace: Namespace, configs: Iterable[Any], argv: Sequence[str], prefix: str = "") -> None:
    """Raises InputError for a section that is none, and for null or nothing where it is no value."""
    for config in configs:
        for name, kind in get_type_hints(config).items():
            if is_component(kind) or name not in namespace:
                continue
            value, key = namespace[name], f"{prefix}{name}"
            if is_dataclass(kind) and not isinstance(value, Namespace):
                raise InputError(f"{_place(key, argv)}: expected keys with values, got {value!r}")
            if isinstance(value, Namespace):
                _require_values(value, [kind], argv, f"{key}.")
            elif value is None and type(None) not in get_args(kind):
                raise InputError(f"{_place(key, argv)} is null: give a value, or leave it out")
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and "\0" in text:
                    raise InputError(f"{_place(key, argv)} contains a NUL: give it without")
                # Path("") is the current folder, which nobody means.
                if text == "" and getattr(config, name, None) != "":
                    raise InputError(f"{_place(key, argv)} is empty: give a value, or leave it out")


def _place(key: str, argv: Sequence[str]) -> str:
    """Where the value of a key stands: its flag, if that is given, else the files."""
    return f"--{key}" if values_of(argv, f"--{key}") else f"{config_files(argv)}: {key}"


def _of_files(error: OSError) -> str:
    what = (_OF_THE_USER | _OF_THE_MACHINE).get(error.errno or 0, error.strerror)
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{where or 'a file'}: {what}"


def _fail(message: str, status: int) -> int:
    print(f"error: {without_secrets(one_line(message))}", file=sys.stderr)
    return status


class _OneLine(logging.Formatter):
    """A warning on one line; a traceback, which only a bug has, follows it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return without_secrets(one_line(super().formatMessage(record)))
