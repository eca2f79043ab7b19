"""The words of a command line, made into what jsonargparse takes."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from rflow_jax.errors import InputError
from rflow_jax.utils.checks import flatten
from rflow_jax.utils.parser_messages import unknown_key
from rflow_jax.utils.recipes import CONFIGS, find_recipe
from rflow_jax.utils.registry import Component, Registry, Word
from rflow_jax.utils.yaml_files import read_yaml


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


def early_value(argv: Sequence[str], key: str, default: str) -> str:
    """The value of one key of a command line or of its YAML files, before there is a parser for the others.

    A flag goes before files, and of several files the last one counts; what is wrong with a file the parser will say.
    """
    if flags := values_of(argv, f"--{key}"):
        return flags[-1][1]
    for _, file in reversed(values_of(argv, "--config")):
        if key in (content := _yaml(find_recipe(file))):
            return str(content[key])
    return default


def values_of(argv: Sequence[str], flag: str) -> list[tuple[int, str]]:
    """Where among the words a flag's values stand, and the values."""
    alone = [(k + 1, argv[k + 1]) for k, word in enumerate(argv[:-1]) if word == flag]
    return sorted([*alone, *((k, w.partition("=")[2]) for k, w in enumerate(argv) if w.startswith(f"{flag}="))])


def registries_of(command: Command) -> dict[str, Registry[Any]]:
    """The fields whose class is chosen by a name, and from what."""
    every = [one for config in command.configs for one in fields(config)]
    return {one.name: one.metadata["registry"] for one in every if "registry" in one.metadata}


def components_of(
    argv: Sequence[str], registries: Mapping[str, Registry[Any]]
) -> tuple[dict[str, Component], list[str]]:
    """(the components that files and flags describe, the words for the parser)."""
    files = {file: _yaml(file) for _, file in values_of(argv, "--config")}
    components: dict[str, Component] = {}
    for role, registry in registries.items():
        for file, content in files.items():
            if dotted := [key for key in content if str(key).startswith(f"{role}.")]:
                raise InputError(f"{file}: {dotted[0]}: give it as a key of the section {role}")
        sections = [_section(content[role], role, f"{file}: ") for file, content in files.items() if role in content]
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


def _section(value: Any, role: str, place: str = "") -> dict[str, Any]:
    if value is None:
        raise InputError(f"{place}{role} is null: give keys with values, or leave it out")
    if not isinstance(value, dict):
        raise InputError(f"{place}{role}: expected keys with values, or a YAML file of them")
    return value


def prepare(argv: Sequence[str], command: Command) -> list[str]:
    """A command line as the parser takes it: whole flags, recipes by their files, nothing without a flag."""
    steps = (
        _underscored,
        _short_flags,
        _own_recipe,
        _named_recipes,
        _spelled_out_switches,
        _numbers_in_lists,
        _texts_in_lists,
        _named_words,
    )
    for step in steps:
        argv = step(argv, command)
    return [*argv]


def _underscored(argv: Sequence[str], command: Command) -> list[str]:
    """``--num-images`` means ``--num_images``."""
    flags = [word.partition("=") for word in argv]
    return [
        f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else name + equals + value
        for name, equals, value in flags
    ]


def _short_flags(argv: Sequence[str], command: Command) -> list[str]:
    """``--height`` means ``--sampling.height``."""
    nested = [f"--{key}" for key, _ in keys(command.configs) if key.startswith("sampling.")]
    whole = {key.replace("sampling.", "", 1): key for key in nested}
    flags = [word.partition("=") for word in argv]
    return [whole.get(name, name) + equals + value for name, equals, value in flags]


def takes_own_recipe(argv: Sequence[str], command: Command) -> bool:
    """Whether the words name no configuration, no model and no LoRA, so that the command's own recipe counts."""
    named = any(values_of(argv, flag) for flag in ("--config", "--model", "--lora"))
    return bool(command.recipe) and not named and not {"-h", "--help"} & set(argv)


def _own_recipe(argv: Sequence[str], command: Command) -> list[str]:
    """The command's own recipe, where it counts, as a flag."""
    return ["--config", str(CONFIGS / f"{command.recipe}.yaml"), *argv] if takes_own_recipe(argv, command) else [*argv]


def _named_recipes(argv: Sequence[str], command: Command) -> list[str]:
    """``--config debug`` means the recipe of this name, where there is no such file."""
    result = list(argv)
    for k, file in values_of(argv, "--config"):
        result[k] = f"{'--config=' * result[k].startswith('--')}{find_recipe(file)}"
    return result


def _spelled_out_switches(argv: Sequence[str], command: Command) -> list[str]:
    """``--latent_lora`` alone means ``--latent_lora true``, also in front of a word that goes by itself.

    ``--no_latent_lora`` means ``--latent_lora=false``.
    """
    switches = {f"--{key}" for key, kind in keys(command.configs) if kind is bool}
    off = {f"--no_{switch[2:]}": f"{switch}=false" for switch in switches}
    argv = [off.get(word, word) for word in argv]

    def alone(after: str) -> bool:
        return after.startswith("--") or (command.words != () and after.lower() not in ("true", "false"))

    following = [*argv, "--"][1:]
    return [f"{w}=true" if w in switches and alone(after) else w for w, after in zip(argv, following, strict=True)]


def _numbers_in_lists(argv: Sequence[str], command: Command) -> list[str]:
    """``--k 1 2 4`` means ``--k [1,2,4]``."""
    lists = [f"--{key}" for key, kind in keys(command.configs) if kind in (list[int], tuple[int, ...])]
    result: list[str] = []
    words = list(argv)
    while words:
        result.append(words.pop(0))
        if result[-1] in lists and words and words[0].isdecimal():
            count = next((k for k, word in enumerate(words) if not word.isdecimal()), len(words))
            result.append(f"[{','.join(words[:count])}]")
            del words[:count]
    return result


def _texts_in_lists(argv: Sequence[str], command: Command) -> list[str]:
    """``--text a b`` means ``--text ["a", "b"]``; words that the command needs without a flag are left to it."""
    lists = {f"--{key}" for key, kind in keys(command.configs) if list[str] in get_args(kind)}
    wanted = [name for name in command.words if not values_of(argv, f"--{name}")]
    result: list[str] = []
    words = list(argv)
    while words:
        result.append(words.pop(0))
        if result[-1] in lists:
            count = next((k for k, word in enumerate(words) if word.startswith("-")), len(words))
            elsewhere = len(_bare_words(result)[0]) + len(_bare_words(words[count:])[0])
            count -= max(0, len(wanted) - elsewhere)
            if count > 1:
                result.append(json.dumps(words[:count]))
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


def known_keys(argv: Sequence[str], command: Command) -> list[str]:
    """The words, once the keys of YAML files and of sections are known ones; without those of other commands alone.

    jsonargparse would name an unknown key without its section.
    """
    own = {f.name for config in command.configs for f in fields(config)}
    others = {f.name for config in command.kin for f in fields(config)}
    known = [key for key, _ in keys((*command.configs, *command.kin))]

    def require_known(content: Mapping[str, Any], place: str = "") -> None:
        unknown = [
            key
            for key in flatten(content)
            if not any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in known)
        ]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise InputError(place + unknown_key(unknown[0], [*known, *settings(command)]) + more)

    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag != "--config" and flag[2:] not in known:
            section = Word(value if equals else after).loaded()
            require_known({flag[2:]: section} if isinstance(section, dict) else {})
    result = list(argv)
    for k, file in values_of(argv, "--config"):
        content = _yaml(file)
        require_known(content, f"{file}: ")
        _require_sections(content, known, f"{file}: ")
        if content.keys() & (others - own):
            kept = {key: value for key, value in content.items() if key in command.shared or key not in others}
            result[k] = f"{'--config=' * result[k].startswith('--')}{json.dumps(kept, default=str)}"
    return result


def _require_sections(content: Mapping[str, Any], known: Sequence[str], place: str, prefix: str = "") -> None:
    """Raises InputError for a section without keys; a text may be the name of a file with them."""
    for key, value in content.items():
        path = f"{prefix}{key}"
        if path not in known and any(one.startswith(f"{path}.") for one in known):
            if isinstance(value, Mapping):
                _require_sections(value, known, place, f"{path}.")
            elif not isinstance(value, str):
                shown = "null" if value is None else repr(value)
                raise InputError(f"{place}{path} is {shown}: give keys with values, or leave it out")


def keys(configs: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of dataclasses; a component, whose keys depend on its name, is one key."""
    for config in configs:
        for name, kind in get_type_hints(config).items():
            section = is_dataclass(kind) and not is_component(kind)
            yield from keys([kind], f"{prefix}{name}.") if section else [(prefix + name, kind)]


def settings(command: Command) -> list[str]:
    """The dotted settings of all kinds of its components."""
    kinds = [(role, kind) for role, registry in registries_of(command).items() for kind, _ in registry.kinds.values()]
    return list(dict.fromkeys(f"{role}.{one.name}" for role, kind in kinds for one in fields(kind)))


def is_component(kind: Any) -> bool:
    """Whether a field's type is chosen by a name, so that its keys depend on it."""
    return isinstance(kind, type) and issubclass(kind, Component)


def _yaml(file: str) -> dict[str, Any]:
    """The keys of a YAML file; none where there is no such file, which the parser will say, or no keys in it.

    Raises:
        InputError: it cannot be read.
    """
    if not os.path.lexists(file):
        return {}
    content = read_yaml(file)
    return content if isinstance(content, dict) else {}


def require_readable_sections(argv: Sequence[str], command: Command) -> None:
    """Raises InputError where a section is a file that cannot be read, which jsonargparse would open as it is."""
    every = [f"--{key}." for key, _ in keys(command.configs)]
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if any(key.startswith(f"{flag}.") and key != f"{flag}." for key in every):
            _yaml(value if equals else after)


def config_files(argv: Sequence[str]) -> str:
    """Where values stand that are no flags, for messages."""
    return ", ".join(file for _, file in values_of(argv, "--config")) or "the command line"
