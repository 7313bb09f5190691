"""A YAML file. What is wrong with it is said without repeating it, for it may hold a key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .fields import SettingsError


class UniqueFields(yaml.SafeLoader):
    """YAML takes the last of two fields with one name in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise SettingsError(f"{key.value} stands in line {lines[key.value]} and in line {line}; keep one")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """What the file holds.

    Raises:
        SettingsError: not YAML, a field that stands there twice, or a value that cannot be read.
        FileNotFoundError: no such file.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), UniqueFields)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise SettingsError(f"{path}: not a YAML file{where}") from None  # its own message quotes the line
    except IsADirectoryError:
        raise SettingsError(f"{path}: expected a YAML file, got a folder") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: expected a YAML file in UTF-8: {error}") from error
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # as yaml's own readers of values raise them
        raise SettingsError(f"{path}: holds a number, date or tag that cannot be read; put text in quotes") from error
    except RecursionError as error:
        raise SettingsError(f"{path}: holds brackets in brackets too deep to read") from error


def read_mapping(path: str | Path) -> dict:
    """The same, of a file that holds fields.

    Raises:
        SettingsError: also where it holds something else.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise SettingsError(f"{path}: expected 'field: value' lines, got {got}")
    return content
