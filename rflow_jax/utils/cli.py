"""What the command lines share: parsers over dataclasses, and errors that are one line.

Exit status: 0 done, 2 bad input (one line, no traceback), 130 interrupted, 1 otherwise. A full disk or an error of a
device is one line too, and a bug a traceback.
"""

import errno
import json
import os
import re
import sys
from argparse import SUPPRESS, ArgumentError, HelpFormatter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from rflow_jax.errors import InputError, RunError
from rflow_jax.utils.checks import RENAMED, current_key, flatten, nearest
from rflow_jax.utils.recipes import CONFIGS, find_recipe
from rflow_jax.utils.registry import Component, Registry, Word

T = TypeVar("T")

_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|[Oo]ption |[Kk]ey )['\"]?([A-Za-z_][\w.-]*)")
_NO_SECTION = re.compile(r"""Parser key "([\w.]+)": Unable to load config ('.*?'|".*?") - (.*)""")
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "keys with values",
    "NoneType": "null",
}
_OF_THE_MACHINE = {
    errno.ENOSPC: "the disk is full; free some space or choose another path",
    errno.EDQUOT: "your share of the disk is used up; free some space or choose another path",
    errno.EIO: "the device reports an error; check the disk, or copy the file again",
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
}


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        configs: dataclasses; their fields are the flags, and nested dataclasses give dotted ones.
        run: called with an instance of each.
        words: the flags that take the words without one, such as a folder, in their order; one that is a list takes all
            but what those after it need.
        kin: dataclasses of other commands, whose YAML files this one reads too.
        shared: the keys that it takes from such a file; the others of ``kin`` are left out.
        recipe: the one that counts where neither a configuration nor a model is named.
    """

    configs: tuple[type, ...]
    run: Callable[..., int | None]
    words: tuple[str, ...] = ()
    kin: tuple[type, ...] = ()
    shared: tuple[str, ...] = ()
    recipe: str = ""


def run(main: Callable[[], int | None]) -> int:
    """Runs a command line; an error that a user can act on becomes one line on stderr.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # a path need not fit the terminal's encoding
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
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE | _OF_THE_USER.keys():
            raise
        return _fail(_of_files(error), 1 if error.errno in _OF_THE_MACHINE else 2)
    except Exception as error:
        # JAX has no exception class of its own for this, only the status in the text.
        if _OUT_OF_MEMORY not in str(error):
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
    registries = _registries(command)
    parser = _parser(command, registries, prog, description)
    argv = list(sys.argv[1:] if argv is None else argv)
    for step in (
        _underscored,
        _short_flags,
        _default_recipe,
        _named_recipes,
        _spelled_out_switches,
        _numbers_in_lists,
        _named_words,
    ):
        argv = step(argv, command)
    by_default = _own_recipe(command) in argv
    components = {}
    try:
        if not {"-h", "--help"} & set(argv):
            components, argv = _components(argv, registries)
        argv = _known_keys(argv, command)
        namespace = parser.parse_args(argv)
        _require_values(namespace, command.configs)
    except ArgumentError as error:
        raise InputError(_explain(error, argv, command)) from error
    except UnicodeDecodeError as error:
        raise InputError("a file that the command line names for a section is not a text in UTF-8") from error
    except RecursionError as error:
        raise InputError(
            f"{_config_file(argv)}: a section contains itself, or sections are nested too deeply"
        ) from error
    ready = vars(parser.instantiate(namespace)) | components
    configs = [config(**{f.name: ready[f.name] for f in fields(config)}) for config in command.configs]
    if by_default:
        print(f"no --config and no --model: the recipe {command.recipe}", file=sys.stderr)
    return command.run(*configs)


def early_value(argv: Sequence[str], key: str, default: str) -> str:
    """The value of one key of a command line or of its YAML files, before there is a parser for the others.

    A flag goes before files, and of several files the last one counts; what is wrong with a file the parser will say.
    """
    if flags := _values_of(argv, f"--{key}"):
        return flags[-1][1]
    for _, file in reversed(_values_of(argv, "--config")):
        if key in (content := _yaml(find_recipe(file))):
            return str(content[key])
    return default


def _values_of(argv: Sequence[str], flag: str) -> list[tuple[int, str]]:
    """Where among the words a flag's values stand, and the values."""
    alone = [(k + 1, argv[k + 1]) for k, word in enumerate(argv[:-1]) if word == flag]
    return sorted([*alone, *((k, w.partition("=")[2]) for k, w in enumerate(argv) if w.startswith(f"{flag}="))])


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


def _registries(command: Command) -> dict[str, Registry[Any]]:
    """The fields whose class is chosen by a name, and from what."""
    every = [one for config in command.configs for one in fields(config)]
    return {one.name: one.metadata["registry"] for one in every if "registry" in one.metadata}


def _components(argv: Sequence[str], registries: Mapping[str, Registry[Any]]) -> tuple[dict[str, Component], list[str]]:
    """(the components that files and flags describe, the words for the parser)."""
    files = {file: _yaml(file) for _, file in _values_of(argv, "--config")}
    components: dict[str, Component] = {}
    for role, registry in registries.items():
        for file, content in files.items():
            if dotted := [key for key in content if str(key).startswith(f"{role}.")]:
                raise InputError(f"{file}: {dotted[0]}: give it as a key of the section {role}")
        sections = [_section(content[role], role) for content in files.values() if role in content]
        argv, given = _taken(argv, role)
        components[role] = registry.parse(*sections, *given, source=role)
    # To be printed only: the parser repeats words that it rejects, and a component may hold a password.
    if any(word.partition("=")[0] == "--print_config" for word in argv):
        printed = {role: json.dumps(asdict(one), default=str) for role, one in components.items()}
        argv = [*argv, *(f"--{role}={text}" for role, text in printed.items())]
    return components, list(argv)


def _taken(argv: Sequence[str], role: str) -> tuple[list[str], list[dict[str, Any]]]:
    """(the other words, the sections of this role: each that is given whole, and its single flags)."""
    rest, whole, single = [], [], {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != f"--{role}" and not flag.startswith(f"--{role}."):
            rest.append(word)
            continue
        if not equals and (value := next(words, None)) is None:
            raise InputError(f"{flag.removeprefix('--')}: give a value")
        key = flag.removeprefix(f"--{role}").removeprefix(".")
        if key:
            single[key] = Word(value)
        else:
            whole.append(_section(_yaml(value) or Word(value).loaded(), role))
    return rest, [*whole, single] if single else whole


def _section(value: Any, role: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{role}: expected keys with values, or a YAML file of them")
    return value


# What jsonargparse has no setting for is put into its words before it parses; each step takes and gives a command line.


def _underscored(argv: Sequence[str], command: Command) -> list[str]:
    """``--num-images`` means ``--num_images``."""
    flags = [word.partition("=") for word in argv]
    return [
        f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else name + equals + value
        for name, equals, value in flags
    ]


def _short_flags(argv: Sequence[str], command: Command) -> list[str]:
    """``--height`` means ``--sampling.height``."""
    keys = [f"--{key}" for key, _ in _keys(command.configs) if key.startswith("sampling.")]
    whole = {key.replace("sampling.", "", 1): key for key in keys}
    flags = [word.partition("=") for word in argv]
    return [whole.get(name, name) + equals + value for name, equals, value in flags]


def _default_recipe(argv: Sequence[str], command: Command) -> list[str]:
    """The command's own recipe, where the words name no configuration, no model and no LoRA of another."""
    named = any(_values_of(argv, flag) for flag in ("--config", "--model", "--lora"))
    if named or not command.recipe or {"-h", "--help"} & set(argv):
        return [*argv]
    return ["--config", _own_recipe(command), *argv]


def _own_recipe(command: Command) -> str:
    return str(CONFIGS / f"{command.recipe}.yaml")


def _named_recipes(argv: Sequence[str], command: Command) -> list[str]:
    """``--config debug`` means the recipe of this name, where there is no such file."""
    result = list(argv)
    for k, file in _values_of(argv, "--config"):
        result[k] = f"{'--config=' * result[k].startswith('--')}{find_recipe(file)}"
    return result


def _spelled_out_switches(argv: Sequence[str], command: Command) -> list[str]:
    """``--latent_lora`` alone means ``--latent_lora true``, also in front of a word that goes by itself."""
    switches = {f"--{key}" for key, kind in _keys(command.configs) if kind is bool}

    def alone(after: str) -> bool:
        return after.startswith("--") or (command.words != () and after.lower() not in ("true", "false"))

    following = [*argv, "--"][1:]
    return [f"{w}=true" if w in switches and alone(after) else w for w, after in zip(argv, following, strict=True)]


def _numbers_in_lists(argv: Sequence[str], command: Command) -> list[str]:
    """``--k 1 2 4`` means ``--k [1,2,4]``."""
    lists = {f"--{f.name}" for config in command.configs for f in fields(config) if str(f.type) == "list[int]"}
    result: list[str] = []
    words = list(argv)
    while words:
        result.append(words.pop(0))
        if result[-1] in lists and words and words[0].isdecimal():
            count = next((k for k, word in enumerate(words) if not word.isdecimal()), len(words))
            result.append(f"[{','.join(words[:count])}]")
            del words[:count]
    return result


def _named_words(argv: Sequence[str], command: Command) -> list[str]:
    """The words without a flag as the values of the flags ``words``."""
    bare, rest = _bare_words(argv)
    kinds = {f.name: str(f.type) for config in command.configs for f in fields(config)}
    flags = []
    for k, name in enumerate(command.words):
        several = "list" in kinds[name]
        count = max(1, len(bare) - len(command.words[k + 1 :])) if several else 1
        taken, bare = bare[:count], bare[count:]
        one = not several or (len(taken) == 1 and "str |" in kinds[name])
        if taken:
            flags.append(f"--{name}={taken[0] if one else json.dumps(taken)}")
    if bare:
        wanted = " and ".join(f"one {name}" for name in command.words) or "flags only"
        raise InputError(f"{bare[0]} is too much; give {wanted}")
    return [*flags, *rest]


def _bare_words(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """(words that are neither flags nor values of flags, the others)."""
    bare, rest = [], []
    takes_value = False
    for word in argv:
        (rest if word.startswith("-") or takes_value else bare).append(word)
        takes_value = word.startswith("--") and "=" not in word  # -h takes none
    return bare, rest


def _known_keys(argv: Sequence[str], command: Command) -> list[str]:
    """The words, once the keys of YAML files and of sections are known ones; without those of other commands alone.

    jsonargparse would name an unknown key without its section.
    """
    own = {f.name for config in command.configs for f in fields(config)}
    others = {f.name for config in command.kin for f in fields(config)}
    known = [key for key, _ in _keys((*command.configs, *command.kin))]

    def require_known(content: Mapping[str, Any], place: str = "") -> None:
        unknown = [
            key
            for key in flatten(content)
            if not any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in known)
        ]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise InputError(place + _unknown(unknown[0], [*known, *_settings(command)]) + more)

    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag != "--config" and flag[2:] not in known:
            section = Word(value if equals else after).loaded()
            require_known({flag[2:]: section} if isinstance(section, dict) else {})
    result = list(argv)
    for k, file in _values_of(argv, "--config"):
        content = _yaml(file)
        require_known(content, f"{file}: ")
        if content.keys() & (others - own):
            kept = {key: value for key, value in content.items() if key in command.shared or key not in others}
            result[k] = f"{'--config=' * result[k].startswith('--')}{json.dumps(kept, default=str)}"
    return result


def _keys(configs: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of dataclasses; a component, whose keys depend on its name, is one key."""
    for config in configs:
        for name, kind in get_type_hints(config).items():
            section = is_dataclass(kind) and not _is_component(kind)
            yield from _keys([kind], f"{prefix}{name}.") if section else [(prefix + name, kind)]


def _settings(command: Command) -> list[str]:
    """The dotted settings of all kinds of its components."""
    kinds = [(role, kind) for role, registry in _registries(command).items() for kind, _ in registry.kinds.values()]
    return list(dict.fromkeys(f"{role}.{one.name}" for role, kind in kinds for one in fields(kind)))


def _is_component(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Component)


def _yaml(file: str) -> dict[str, Any]:
    """The keys of a YAML file; none where the parser had better say what is wrong with it."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text in UTF-8") from error
    except (OSError, ValueError):
        return {}
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    except ValueError as error:  # such as a date in month 13, or a number with thousands of digits
        raise InputError(f"{file}: {error}") from error
    return content if isinstance(content, dict) else {}


def _require_values(namespace: Namespace, configs: Iterable[Any], prefix: str = "") -> None:
    """Raises InputError for a section that is none, and for null where it is no value: jsonargparse takes both."""
    for config in configs:
        for name, kind in get_type_hints(config).items():
            if _is_component(kind) or name not in namespace:
                continue
            value = namespace[name]
            if is_dataclass(kind) and not isinstance(value, Namespace):
                raise InputError(f"{prefix}{name}: expected keys with values, got {value!r}")
            if isinstance(value, Namespace):
                _require_values(value, [kind], f"{prefix}{name}.")
            elif value is None and type(None) not in get_args(kind):
                raise InputError(f"{prefix}{name} is null: give a value, or leave it out")


def _explain(error: ArgumentError, argv: Sequence[str], command: Command) -> str:
    text = plain(error)
    unknown = _UNKNOWN.search(text)
    if unknown is None or "Parser key" in text or text.startswith("Problems parsing"):
        if text.startswith("Unexpected config"):  # repeats the whole file
            return f"{_config_file(argv)}: expected keys with values"
        return text.replace('"<unicode string>"', _config_file(argv))
    # The value behind an unknown key is not repeated: it may be a secret in the wrong place.
    key = unknown[1]
    return _unknown(key, [*(key for key, _ in _keys(command.configs)), *_settings(command)])


def _unknown(key: str, known: Collection[str]) -> str:
    # Of a section that is a file, --data=data.yaml, jsonargparse names the inner key alone.
    inner = (new for old, new in RENAMED.items() if old.endswith(f".{key}") and new in known)
    new = current_key(key) if "." in key else RENAMED.get(key) or next(inner, key)
    if new != key:
        return f"{key} is now called {new}"
    return f"unknown key {key}: {f'did you mean {nearest(key, known)}?' if known else 'give no flags'}"


def plain(error: ArgumentError) -> str:
    """jsonargparse's message in the words of the command line, on one line."""
    text = " ".join(str(error.message).split())
    if required := re.fullmatch(r"the following arguments are required: (.*)", text):
        names = (name.rpartition(".")[2] for name in required[1].split(", "))
        return f"missing: {', '.join(names)}"
    if section := _NO_SECTION.fullmatch(text):
        key, value, reason = section.groups()
        # A word may be the name of a YAML file with the section's keys, and then the reason is of its content.
        if not reason.startswith("Parser key"):
            return f"{key}: {reason}, got {value}"
        if "Unable to load config" in reason:
            return f"{key}: expected keys with values, got {value}"
        text = reason
    # Other messages say more, such as how long a list has to be.
    wrong = re.fullmatch(r'Parser key "([\w.]+)": (.*?)(?: Given value type: .*)?(?:Given|Got) value: (.*)', text)
    kinds = dict.fromkeys(re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", wrong[2])) if wrong else {}
    meant = [_KINDS.get(kind) or choices.replace("'", "").replace(", ", " or ") for kind, choices in kinds]
    if wrong is None or not all(meant) or not meant:
        return text
    return f"{wrong[1]} is {wrong[3]}: give {' or '.join(meant)}"


def _config_file(argv: Sequence[str]) -> str:
    return ", ".join(file for _, file in _values_of(argv, "--config")) or "the command line"


def _of_files(error: OSError) -> str:
    what = (_OF_THE_USER | _OF_THE_MACHINE)[error.errno or 0]
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{where or 'a file'}: {what}"


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
