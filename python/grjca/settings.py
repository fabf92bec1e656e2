"""Conversion of the dataclasses in config.py from the command line, and from and to YAML, with jsonargparse."""

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
    import_path_denylist=["*"],  # otherwise jsonargparse imports, and so runs, any module that a value names
)

GROUPS = ("--model", "--networks")
"""Options that stand for a group of settings and accept a YAML file of them."""
OTHER_NAMES = {"--source": "--from"}
"""Alternative spellings of options that cannot be names of dataclass fields."""

_REPLACED = re.compile(r"model\b.{0,40}\b(visual|audio)_(features|channels)\b")
_REPLACEMENT = (
    ". The settings visual_features and audio_features are now model.modalities, as in {visual: 512, audio: 128}, and "
    "visual_channels and audio_channels are model.channels, as in {visual: [512, 256], audio: [128]}"
)

MOST, DEEPEST, LONGEST = 1 << 20, 20, 4096
"""Limits of a settings file: its bytes, its nesting depth, and the characters of a value, such as a path."""


class _Careful(ArgumentParser):
    def parse_path(self, path: Any, *_: Any, **options: Any) -> Namespace:
        """Parse a file that :func:`read_yaml` accepts."""
        try:
            text = read_yaml(Path(path))
        except (UserError, OSError) as error:
            raise TypeError(str(error)) from error  # the type that jsonargparse expects
        return self.parse_string(text, **options)


class Parser(_Careful):
    """A parser that reports each error in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print ``message`` and exit with 2."""
        if "Union subtypes" in message:  # one "- Expected" line per type of the union
            name, value = message.partition("\n")[0], message.rpartition("Given value: ")[2]
            message = f"{name} Expected {' or '.join(re.findall('- Expected (.*)', message))}. Got value: {value}"
        message = re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)
        message = re.sub(r"a (?:typing\.)?Literal\[(.*?)\]", r"one of \1", message)
        message = re.sub(r"<class '(.*?)'>", r"\1", message).replace("NoneType", "null")
        sentence = printable(_with_replacement(" ".join(message.split()).rstrip(".")))
        print(f"{self.prog}: {sentence}. See {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


def parser(kind: type, **options: Any) -> Parser:
    """A parser with an option for every field of the dataclass ``kind``, and ``--config`` for a YAML file of them."""
    result = Parser(description=(kind.__doc__ or "").strip(), **options)
    result.add_argument(
        "--config", action="config", help="YAML file of options; options given after it take precedence"
    )
    result.add_class_arguments(kind, as_group=False)
    for name, other in OTHER_NAMES.items():
        if name in result._option_string_actions:
            result._option_string_actions[other] = result._option_string_actions[name]
            result._option_string_actions[name].option_strings = [name, other]
    return result


def with_groups(words: list[str]) -> list[str]:
    """Return ``words`` with the files in ``--model FILE`` and ``--networks FILE`` replaced by their contents.

    Raises:
        UserError: if a file is not a settings file.
    """
    result: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if option in GROUPS and equals:
            result.append(f"{option}={_group(option, value)}")
        else:
            result.append(_group(result[-1], word) if result[-1:] and result[-1] in GROUPS else word)
    return result


def _group(option: str, value: str) -> str:
    if value.lstrip().startswith("{"):
        return value
    try:
        return read_yaml(Path(value))
    except OSError as error:
        raise UserError(f"{option}: expected a file of settings, got {value} ({error.strerror}).") from error


def build(kind: type[Config], options: ArgumentParser, namespace: Namespace) -> Config:
    """Build the dataclass ``kind`` from what ``options`` has parsed."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {name: value for name, value in options.instantiate(namespace).items() if name in names}
    return kind(**values)


def read_yaml(path: Path) -> str:
    """Return the text of a settings file.

    Raises:
        UserError: if the file is not YAML, is too large or nested too deeply, names another settings file, or has tags
            or aliases (ten lines of aliases can expand to gigabytes).
        OSError: if the file cannot be read.
    """
    depth, loader = 0, getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = files.read_bytes(path, MOST).decode()
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise UserError(f"{path}: expected settings without aliases and tags, got some.")
            if depth > DEEPEST or len(getattr(event, "value", "")) > LONGEST:
                raise UserError(
                    f"{path}: expected {DEEPEST} levels and {LONGEST} characters a value at most, got more."
                )
        node = yaml.compose(text, Loader=loader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: expected names of settings and their values, got something else.")
        for key, value in node.value:
            group = f"--{key.value}" in GROUPS
            if key.value == "config" or (group and not isinstance(value, yaml.MappingNode)):
                raise UserError(f"{path}: {key.value}: expected settings, got the name of a file or something else.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected settings in YAML, got something else ({error}).") from error
    return text


def to_yaml(config: Any) -> str:
    """Write every field of ``config``, defaults included, as YAML."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def from_yaml(kind: type[Config], path: Path) -> Config:
    """Read what :func:`to_yaml` has written.

    Raises:
        UserError: if the file is missing or invalid.
    """
    options = _Careful(exit_on_error=False)
    options.add_class_arguments(kind, as_group=False)
    try:
        return build(kind, options, options.parse_path(path))
    except Exception as error:
        reason = _with_replacement(" ".join(str(error).split()))
        raise UserError(f"{path}: expected the settings of a {kind.__name__}, got: {reason}") from error


def _with_replacement(reason: str) -> str:
    """Return ``reason``, followed by the new name if it concerns a setting of an earlier version."""
    return reason + _REPLACEMENT if _REPLACED.search(reason) else reason


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
