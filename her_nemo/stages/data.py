"""`her-nemo data VERB`: what is typed, as a stage with overrides, and which file runs it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from her_nemo.config.compose import assign
from her_nemo.config.errors import UserError, nearest
from her_nemo.config.schema import STAGES, StageConfig

PREFIX = "data_"


def parse(words: Sequence[str]) -> tuple[str, list[str]]:
    """The stage that `data` and these words mean, and the rest as overrides.

    `inspect FILE --row N` is short for `inspect path=FILE row=N`.

    Raises:
        UserError: if there is no such verb.
    """
    verbs = [stage.removeprefix(PREFIX) for stage in STAGES if stage.startswith(PREFIX)]
    if not words or words[0] not in verbs:
        close = nearest(words[0], verbs) if words else None
        raise UserError(
            ("data what?" if not words else f"no `data {words[0]}`:")
            + (f" did you mean `data {close}`?" if close else "")
            + f" her-nemo data {' | '.join(verbs)}, each with --help"
        )
    verb, rest = words[0], list(words[1:])
    return PREFIX + verb, _inspect_words(rest) if verb == "inspect" else rest


def _inspect_words(words: Sequence[str]) -> list[str]:
    """FILE, --row N, --turn N, --tokenizer DIR and --width N as overrides; anything else as it is."""
    overrides: list[str] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name in ("--row", "--turn", "--tokenizer", "--width"):
            given = value if equals else next(remaining, None)
            if not given:
                raise UserError(f"{name} needs a value, e.g. {name}=3")
            key = name.removeprefix("--")
            overrides.append(assign(key, given) if key == "tokenizer" else f"{key}={given}")
        elif equals or word.startswith("-"):
            overrides.append(word)
        else:
            overrides.append(assign("path", word))
    return overrides


def run(cfg: StageConfig) -> int:
    """Run the verb that the configuration is of."""
    stage = next(name for name, schema in STAGES.items() if schema is type(cfg))
    return importlib.import_module(f"her_nemo.stages.{stage}").run(cfg) or 0
