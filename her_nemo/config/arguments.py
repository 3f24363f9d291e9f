"""What is typed after a stage: overrides, and the options of the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from her_nemo.config.errors import UserError

CONFIG_OPTIONS = ("--config-dir", "--config-name")


@dataclass(frozen=True)
class Arguments:
    """Words, sorted. Options go by their names as Python writes them: --config-dir is `config_dir`."""

    overrides: list[str]
    options: dict[str, str]
    flags: frozenset[str]


def parse(
    words: Sequence[str], command: str = "her-nemo", *, flags: Sequence[str] = (), options: Sequence[str] = ()
) -> Arguments:
    """Sort the words of a command line.

    Args:
        words: what follows the stage.
        command: whose --help an error names.
        flags: options without a value that the command has.
        options: options with a value (after = or a space) that it has beside --config-dir and --config-name.

    Raises:
        UserError: an option that the command does not have, or one without its value.
    """
    overrides: list[str] = []
    given: dict[str, str] = {}
    raised: set[str] = set()
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if word in flags:
            raised.add(_python_name(word))
        elif name in (*CONFIG_OPTIONS, *options):
            value = value if equals else next(remaining, "")
            if not value:
                raise UserError(f"{name} needs a value, e.g. {name}={'DIR' if name in CONFIG_OPTIONS else 'VALUE'}")
            given[_python_name(name)] = value.removesuffix(".yaml") if name == "--config-name" else value
        elif word.startswith("-"):
            raise UserError(
                f"no option {word!r}: an override has no dashes, e.g. trainer.devices=2 (see {command} --help)"
            )
        else:
            overrides.append(word)
    return Arguments(overrides, given, frozenset(raised))


def _python_name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
