"""A configuration that checks the names and types of what is merged into it.

YAML files may inherit with ``_BASE_`` (fvcore).
"""

import contextlib
import difflib
import functools
import operator
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as FvcoreNode

from sim_m2f.config.shipped import find_config
from sim_m2f.errors import UserError

LARGEST = 100_000  # bytes of a file; PyYAML takes seconds for as many
LONGEST = 200  # characters of a key
# The first element of each list and tuple of the defaults, by key: what one that has become empty may hold.
ELEMENTS: dict[str, Any] = {}


class CfgNode(FvcoreNode):
    """A configuration that names the nearest known key when one is unknown."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[Any]:
        """Called for a file and for those that its ``_BASE_`` names.

        Raises:
            UserError: it is no file, is too large, or a key stands twice.
        """
        file = Path(filename)
        if file.exists() and not file.is_file():
            raise UserError(f"{file}: not a file; give the path of a YAML file")
        if file.exists() and file.stat().st_size > LARGEST:
            raise UserError(f"{file}: is larger than {LARGEST} bytes, no configuration; give another file")
        _refuse_twice(file)
        return super()._open_cfg(filename)

    def merge_from_file(self, cfg_filename: str | Path, allow_unsafe: bool = False) -> None:
        """Merge a YAML file (and the files that its ``_BASE_`` names); see ``find_config``.

        Raises:
            UserError: the file is missing or not YAML, its ``_BASE_`` leads back to itself, a key is unknown,
                or a value has the wrong type.
        """
        cfg_filename = find_config(cfg_filename)
        try:
            loaded = self.load_yaml_with_base(str(cfg_filename), allow_unsafe=False)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; give the path of a YAML file") from error
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{cfg_filename}: not a YAML file: {' '.join(str(error).split())}") from error
        except AssertionError as error:  # of a group in one file that is none in its base
            raise UserError(f"{cfg_filename}: {error}") from error
        except (TypeError, AttributeError):  # of an empty file, and of a _BASE_ that is no path
            loaded = None
        except RecursionError as error:
            raise UserError(f"{cfg_filename}: {_endless(str(cfg_filename))}") from error
        if not isinstance(loaded, Mapping):
            kind = type(loaded).__name__
            raise UserError(f"{cfg_filename}: a configuration is a YAML mapping of keys, not a {kind}")
        own = {key: value for key, value in loaded.items() if key != BASE_KEY}
        try:
            self.merge_values(own, str(cfg_filename))
        except RecursionError as error:
            raise UserError(f"{cfg_filename}: {_endless('')}") from error

    def merge_from_list(self, cfg_list: list[str]) -> None:
        """Merge ``[KEY, VALUE, KEY, VALUE, ...]`` as given on a command line.

        Raises:
            UserError: a key without a value, an unknown key, or a value of the wrong type.
        """
        for item in cfg_list[::2]:
            if item.startswith("--"):
                raise UserError(f"{item}: flags stand before the overrides KEY VALUE; move it there")
            if "=" in item:
                raise UserError(f"{item}: an override is KEY VALUE; write {item.replace('=', ' ', 1)}")
        if len(cfg_list) % 2:
            raise UserError(f"overrides are pairs KEY VALUE; {cfg_list[-1]} has no value")
        for key, value in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            nested: Any = value
            for part in reversed(str(key).split(".")):
                nested = {part: nested}
            self.merge_values(nested, "command line")

    def merge_values(self, values: Mapping[str, Any], source: str) -> None:
        """Merge nested keys, all of them or none; ``source`` is where they come from.

        Raises:
            UserError: a key is unknown, or a value has the wrong type.
        """
        for group, key, value in list(_checked(values, self, self, "", source)):
            setattr(group, key, value)


def _refuse_twice(file: Path) -> None:
    """Raises UserError for a key that stands twice in a mapping, of which PyYAML takes the last."""
    waiting, seen = [yaml.compose(file.read_bytes())], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key, count in Counter(keys).items() if count > 1]:
                raise UserError(f"{file}: the key {twice[0]} stands twice in one group; leave one out")
            waiting += [value for _, value in node.value]
        else:
            waiting += node.value


def _endless(file: str) -> str:
    """Why a file never ends: its ``_BASE_`` leads back to it, or else it is nested too deeply."""
    with contextlib.suppress(RecursionError):
        if circle := " -> ".join(_base_circle(file) if file else ()):
            return f"_BASE_ runs in a circle: {circle}; leave one out"
    return "is nested too deeply, or contains itself; correct it"


def _base_circle(file: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The files whose ``_BASE_`` name each other in a circle, the first one also at the end; or nothing."""
    file = os.path.abspath(file)
    if file in above:
        return (*above[above.index(file) :], file)
    bases = yaml.safe_load(Path(file).read_bytes()).get(BASE_KEY, [])
    names = [bases] if isinstance(bases, str) else bases
    paths = (Path(file).parent / os.path.expanduser(name) for name in names)
    return next(filter(None, (_base_circle(str(path), (*above, file)) for path in paths)), ())


def _checked(
    values: Mapping[str, Any], group: CfgNode, root: CfgNode, prefix: str, source: str
) -> Iterator[tuple[CfgNode, str, Any]]:
    """Every group, key and value with the type of its default.

    Raises:
        UserError: a key is unknown, or a value has the wrong type.
    """
    for key, value in values.items():
        path = " ".join(f"{prefix}{key}".split())[:LONGEST]
        if key not in group:
            raise UserError(f"{source}: unknown key {path}; did you mean {_nearest(path, root)}?")
        default = group[key]
        if isinstance(default, CfgNode):
            if not isinstance(value, Mapping):
                first = f"{path}.{next(iter(default))}"
                raise UserError(f"{source}: {path} is a group of keys; did you mean {first}?")
            yield from _checked(value, default, root, f"{path}.", source)
        else:
            yield group, key, _coerced(value, default, path, source)


def _coerced(value: Any, default: Any, path: str, source: str) -> Any:
    try:
        decoded = value if isinstance(value, Mapping) else CfgNode._decode_cfg_value(value)
    except (RecursionError, MemoryError) as error:
        raise UserError(f"{source}: {path} is nested too deeply; correct it") from error
    if isinstance(default, str):
        decoded = value
    elif isinstance(default, float) and type(decoded) is int:
        decoded = float(decoded)
    elif isinstance(default, (list, tuple)) and isinstance(decoded, (list, tuple, str)):
        elements = [decoded] if isinstance(decoded, str) else decoded
        numbered = enumerate(elements)
        first = default[0] if default else ELEMENTS.get(path, "")
        decoded = type(default)(_coerced(item, first, f"{path}[{i}]", source) for i, item in numbered)
    if isinstance(decoded, Mapping) or (default is not None and type(decoded) is not type(default)):
        expected, found = type(default).__name__, type(decoded).__name__
        given = f"not {reprlib.repr(value)} ({found})"
        raise UserError(f"{source}: {path} takes a {expected} such as {default!r}, {given}")
    return decoded


def leaf_keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key that holds a value, with its path, such as "SOLVER.BASE_LR"."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaf_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def value_of(node: CfgNode, path: str) -> Any:
    """The value of a key such as "SOLVER.BASE_LR"."""
    return functools.reduce(operator.getitem, path.split("."), node)


def _nearest(path: str, root: CfgNode) -> str:
    """The known key that is most like an unknown one; first of all one of the same last part."""
    known = list(leaf_keys(root))
    by_name = [key for key in known if key.split(".")[-1] == path.split(".")[-1]]
    return (by_name or difflib.get_close_matches(path, known, n=1, cutoff=0.0))[0]
