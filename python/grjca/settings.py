"""Dataclasses of config.py from the command line and from YAML, and back, by jsonargparse."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from grjca import files
from grjca.errors import UserError, printable

Config = TypeVar("Config")
set_parsing_settings(
    docstring_parse_attribute_docstrings=True,
    import_path_denylist=["*"],  # or a value that names a module would have it imported, and so run
)


MOST, DEEPEST, LONGEST = 1 << 20, 20, 4096
"""Bytes of a file of settings, lists within lists in it, and characters of a value: paths are no longer."""
TABLES = ("model",)
"""Settings that are settings themselves. The command line takes a file of them as well."""


class _Careful(ArgumentParser):
    def parse_path(self, path: Any, *arguments: Any, **options: Any) -> Namespace:
        """Refuse a file that would take for ever to read, or all memory, before it is parsed."""
        try:
            check_yaml(Path(path))
        except (UserError, OSError) as error:
            raise TypeError(str(error)) from error  # what jsonargparse expects here
        return super().parse_path(path, *arguments, **options)


class Parser(_Careful):
    """Says in one sentence what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print ``message`` and exit with 2."""
        if "Union subtypes" in message:  # of which it says what would have fitted each
            name, value = message.partition("\n")[0], message.rpartition("Given value: ")[2]
            message = f"{name} Expected {' or '.join(re.findall('- Expected (.*)', message))}. Got value: {value}"
        message = re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)
        message = re.sub(r"a (?:typing\.)?Literal\[(.*?)\]", r"one of \1", message)
        message = re.sub(r"<class '(.*?)'>", r"\1", message).replace("NoneType", "null")
        sentence = printable(" ".join(message.split()).rstrip("."))
        print(f"{self.prog}: {sentence}. See {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


def parser(kind: type, **options: Any) -> Parser:
    """A parser with an option for every field of the dataclass ``kind``, and ``--config`` for a YAML file of them."""
    result = Parser(description=(kind.__doc__ or "").strip(), **options)
    result.add_argument("--config", action="config", help="YAML file of options; those given after it win")
    result.add_class_arguments(kind, as_group=False)
    return result


def with_tables(words: list[str]) -> list[str]:
    """A command line with ``--model FILE`` replaced by what that file holds.

    Raises:
        UserError: if that is no file of settings.
    """
    result: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if result and result[-1] in [f"--{table}" for table in TABLES]:
            result.append(_table(result[-1], word))
        elif equals and name in [f"--{table}" for table in TABLES]:
            result.append(f"{name}={_table(name, value)}")
        else:
            result.append(word)
    return result


def _table(option: str, value: str) -> str:
    if value.lstrip().startswith("{"):
        return value
    try:
        check_yaml(Path(value))
        return Path(value).read_text("utf-8")
    except OSError as error:
        raise UserError(f"{option}: expected a file of settings, got {value} ({error.strerror}).") from error


def build(kind: type[Config], options: ArgumentParser, namespace: Namespace) -> Config:
    """The dataclass from what ``options`` has parsed."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {name: value for name, value in options.instantiate(namespace).items() if name in names}
    return kind(**values)


def check_yaml(path: Path) -> None:
    """Refuse a file of settings that is too large or too deep, or repeats parts of itself, of which a few lines can
    become a thousand million, or names other files.

    Raises:
        UserError: then, and for what is no text in YAML.
        OSError: if it cannot be read.
    """
    depth, loader = 0, getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = files.read_bytes(path, MOST).decode()
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.ScalarEvent) and (event.tag or len(event.value) > LONGEST):
                raise UserError(f"{path}: expected values without tags, of at most {LONGEST} characters, got others.")
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                got = f"an alias, *{event.anchor}" if isinstance(event, yaml.AliasEvent) else "more"
                raise UserError(f"{path}: expected settings without aliases and at most {DEEPEST} levels, got {got}.")
        node = yaml.compose(text, Loader=loader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: expected names of settings and their values, got something else.")
        for key, value in node.value:
            if key.value == "config" or (key.value in TABLES and not isinstance(value, yaml.MappingNode)):
                raise UserError(f"{path}: {key.value}: expected settings, got the name of a file or something else.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected settings in YAML, got something else ({error}).") from error


def to_yaml(config: Any) -> str:
    """Every field, resolved."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def from_yaml(kind: type[Config], path: Path) -> Config:
    """The inverse of :func:`to_yaml`.

    Raises:
        UserError: if the file is missing or not what it should be.
    """
    options = _Careful(exit_on_error=False)
    options.add_class_arguments(kind, as_group=False)
    try:
        return build(kind, options, options.parse_path(path))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: expected the settings of a {kind.__name__}, got: {reason}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
