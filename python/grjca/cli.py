"""The command line: ``grjca <command>``, or ``python -m grjca <command>``."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NamedTuple, NoReturn

from grjca import config
from grjca.errors import UserError, printable


class Command(NamedTuple):
    """A command of the command line."""

    settings: type
    module: str
    """Module with a function of the command's name, which takes the settings and returns the exit code."""


COMMANDS = {
    "synth": Command(config.SynthConfig, "grjca.data.synth"),
    "prepare": Command(config.PrepareConfig, "grjca.data.prepare"),
    "extract": Command(config.ExtractConfig, "grjca.model.extract"),
    "train": Command(config.TrainConfig, "grjca.training.train"),
    "evaluate": Command(config.EvaluateConfig, "grjca.evaluation.evaluate"),
    "predict": Command(config.PredictConfig, "grjca.evaluation.predict"),
    "doctor": Command(config.DoctorConfig, "grjca.doctor"),
    "study": Command(config.StudyConfig, "grjca.evaluation.study"),
    "demo": Command(config.DemoConfig, "grjca.demo"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 1 after an error, which is printed in one sentence; or 130 if interrupted.

    Raises:
        SystemExit: with 2 if the command line itself is wrong, and with 0 after ``--help``.
    """
    words = sys.argv[1:] if arguments is None else arguments
    name = _top().parse_args(words[:1]).command
    try:
        return _run(name, words[1:])
    except KeyboardInterrupt:
        print(f"grjca {name}: interrupted.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("grjca", "grjca_kernels"):
            raise
        print(
            f"grjca {name}: expected the module {error.name}, which is not installed; "
            "pip install 'grjca-kernels[train]' brings what training needs.",
            file=sys.stderr,
        )
    except (UserError, OSError) as error:
        print(f"grjca {name}: {printable(str(error))}", file=sys.stderr)
    return 1


class _Top(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print ``message`` in one sentence and exit with 2."""
        self.exit(2, f"grjca: {message}. See grjca --help.\n")


def _top() -> argparse.ArgumentParser:
    parser = _Top(
        prog="grjca",
        description="Train, evaluate and predict valence or arousal with gated recursive joint cross-attention.",
        epilog="\n".join(["commands:", *(f"  {name:<10}{_summary(c.settings)}" for name, c in COMMANDS.items())])
        + "\n\ngrjca COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return parser


def _summary(settings: type) -> str:
    return (settings.__doc__ or "").strip().partition("\n")[0]


def _run(name: str, words: list[str]) -> int:
    from grjca import settings

    command = COMMANDS[name]
    parser = settings.parser(command.settings, prog=f"grjca {name}")
    extra = {}
    if name == "train":
        parser.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
        words = _with_settings_of_the_run(words)
    words = settings.with_groups(words)
    try:
        namespace = parser.parse_args(words)
    except Exception as error:  # jsonargparse does not pass all errors to the parser's error()
        parser.error(str(error))
    if name == "train":
        extra["resume"] = namespace.pop("resume")
    run = getattr(importlib.import_module(command.module), name)
    try:
        result = run(settings.build(command.settings, parser, namespace), **extra)
    finally:
        _leave_other_processes()
    return result if isinstance(result, int) else 0


def _leave_other_processes() -> None:
    """Leave the process group: a process that ends without leaving it may abort the others."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _with_settings_of_the_run(words: list[str]) -> list[str]:
    """Put the settings of the run before ``words`` if these resume it, so that ``--resume --out RUN`` suffices."""
    from pathlib import Path

    some = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    some.add_argument("--resume", action="store_true")
    some.add_argument("--out", type=Path)
    given, _ = some.parse_known_args(words)
    if given.resume and given.out:
        from grjca.training.runs import CONFIG

        if (given.out / CONFIG).is_file():
            return ["--config", str(given.out / CONFIG), *words]
    return words
