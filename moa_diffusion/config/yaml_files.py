"""YAML as its writer meant it: numbers and truth values of YAML 1.2, and no key given twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from moa_diffusion.files.text import check_encodable
from moa_diffusion.types import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a file.

    Raises:
        ConfigError: Naming the file, if there is none or it holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"config: should be a YAML file. Found no file `{path}`.")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: `{path}` should be YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config: `{path}` should hold a mapping. Found {values!r}.")
    check_encodable(f"config: `{path}`", values)
    return values


def parse_yaml(text: str) -> Any:
    """Return the value that a text holds.

    Raises:
        yaml.YAMLError: If it is no YAML, or a mapping has a key twice.
    """
    return yaml.load(text, Loader=_Yaml)


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-5 is a number; a bare off is a word, and so is a date.

    A key given twice is refused; YAML libraries silently keep the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key `{key.value}` stands here twice",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "timestamp"))
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    _BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
