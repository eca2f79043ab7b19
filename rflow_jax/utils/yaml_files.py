"""Reads YAML as strictly as JSON: in UTF-8, no key twice, bounded size, nesting, numbers and aliases; no classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rflow_jax.errors import InputError
from rflow_jax.utils.files import read_text
from rflow_jax.utils.json_files import DEEPEST, LONGEST_NUMBER

LARGEST = 2**18  # bytes; a recipe has some thousands, and PyYAML needs seconds for a megabyte
MOST_VALUES = 100_000  # with every alias written out: in a kilobyte, aliases of aliases stand for billions


def read_yaml(path: str | Path, what: str = "YAML file") -> Any:
    """The content of a YAML file; raises InputError where it cannot be read, or as :func:`parse_yaml`."""
    return parse_yaml(read_text(path, what, LARGEST), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Args:
        source: the file, which begins messages.

    Raises:
        InputError: it is none, or not as strict as this module reads; says on which line.
    """
    if len(text) > LARGEST:
        raise InputError(f"{source}: has {len(text):,} characters; {LARGEST:,} are read at most")
    try:
        _require_shallow(text, source)
        reader = yaml.SafeLoader(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            _require_bounded(node, source)
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise InputError(f"{place}: not YAML ({' '.join(str(error.problem or error.context).split())})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise InputError(f"{source}: nested more than {DEEPEST} deep") from error
    except InputError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:  # a date in month 13
        raise InputError(f"{source}: {' '.join(str(error).split()) or 'not YAML'}") from error


def _require_shallow(text: str, source: str) -> None:
    deep = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        deep += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if deep > DEEPEST:
            raise InputError(f"{source}:{event.start_mark.line + 1}: nested more than {DEEPEST} deep")


def _require_bounded(root: yaml.Node, source: str) -> None:
    """Raises InputError for keys given twice, values without a bound, and aliases that stand for too much."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        """The number of values, with aliases written out."""
        place = f"{source}:{node.start_mark.line + 1}"
        if id(node) in open_nodes:
            raise InputError(f"{place}: a section that contains itself")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _require_keys_once(node, source)
            if node.tag == "tag:yaml.org,2002:int" and (digits := len(node.value)) > LONGEST_NUMBER:
                raise InputError(f"{place}: a number of {digits:,} digits; {LONGEST_NUMBER} are read at most")
            sizes[id(node)] = 1 + sum(map(size, _members(node)))
            open_nodes.remove(id(node))
        if sizes[id(node)] > MOST_VALUES:
            raise InputError(f"{place}: with its aliases this has more than {MOST_VALUES:,} values")
        return sizes[id(node)]

    size(root)


def _members(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _require_keys_once(node: yaml.MappingNode, source: str) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise InputError(f"{source}:{key.start_mark.line + 1}: the key {key.value[:40]} stands there twice")
            seen.add((key.tag, key.value))
