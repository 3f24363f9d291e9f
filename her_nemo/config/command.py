"""`her-nemo config show|diff|explain`: what is configured, what differs from the defaults and who set it, a key.

No torch. Required keys that were not given are shown as such, so that a file can be looked at before it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from her_nemo.config import arguments, compose, dialect, partial
from her_nemo.config.errors import ConfigErrors, UserError, nearest
from her_nemo.config.schema import STAGES, StageConfig

USAGE = """usage: her-nemo config show STAGE [OVERRIDE ...] [--json]     every key, resolved
       her-nemo config diff STAGE [OVERRIDE ...] [--json]     what differs from the defaults, and who set it
       her-nemo config explain KEY                            what a key is for, its type, default and stages
--config-dir DIR and --config-name NAME as for the stage itself.
"""


def main(words: list[str]) -> int:
    """Run the command; `words` are what follows `her-nemo config`."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0
    verb, rest = words[0], words[1:]
    if verb == "explain":
        if len(rest) != 1:
            raise UserError("give one key, e.g. her-nemo config explain model.optim.lr")
        print(explain(rest[0]))
        return 0
    if verb not in ("show", "diff"):
        raise UserError(f"no verb {verb!r}: use show, diff or explain")
    if not rest:
        raise UserError(f"give a stage, e.g. her-nemo config {verb} sft")
    typed = arguments.parse(rest[1:], "her-nemo config", flags=["--json"])
    config, problems, _ = partial.load(rest[0], typed.overrides, **typed.options)
    as_json = "json" in typed.flags
    print(show(config, as_json=as_json) if verb == "show" else diff(rest[0], config, typed, as_json=as_json))
    if problems:
        raise ConfigErrors(problems, stage=rest[0])
    return 0


# ---------------------------------------------------------------- show and diff


def show(config: StageConfig, *, as_json: bool) -> str:
    """The whole configuration as YAML (or JSON)."""
    plain = config.model_dump()
    if as_json:
        return json.dumps(plain, indent=1)
    import yaml

    return yaml.safe_dump(plain, sort_keys=False).rstrip()


def diff(stage: str, config: StageConfig, typed: arguments.Arguments, *, as_json: bool) -> str:
    """Every key whose value is not its default: value, default, and the file, group or override that set it."""
    who_set = compose.origins(stage, typed.overrides, **typed.options)
    rows = []
    for key, info in leaves(STAGES[stage]):
        value, standard = _value(config, key), default(info)
        if value != standard:
            rows.append({"key": key, "value": value, "default": standard, "set_by": who_set(key)})
    if as_json:
        return json.dumps(rows, indent=1)
    if not rows:
        return f"{stage}: every key has its default"
    width = max(len(f"{row['key']} = {_shown(row['value'])}") for row in rows)
    return "\n".join(
        f"{row['key'] + ' = ' + _shown(row['value']):{width}}   "
        f"({'required' if row['default'] is REQUIRED else 'default ' + _shown(row['default'])}"
        f"{'; set by ' + row['set_by'] if row['set_by'] else ''})"
        for row in rows
    )


REQUIRED = "<required>"


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value, with the default its section gives it."""
    for name, info in section.model_fields.items():
        inner = compose.subsection(info.annotation)
        if inner is None:
            yield prefix + name, info
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def default(info: FieldInfo) -> Any:
    """The default of a key, or REQUIRED."""
    found = info.get_default(call_default_factory=True)
    return REQUIRED if found is PydanticUndefined else found


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


# ---------------------------------------------------------------- explain


def explain(key: str) -> str:
    """A paragraph about one key; about a section, its keys. UserError names the nearest key to an unknown one."""
    readers: dict[str, list[str]] = {}
    about: dict[str, FieldInfo] = {}
    for stage, schema in STAGES.items():
        for name, info in compose.known_keys(schema):
            readers.setdefault(name, []).append(stage)
            about.setdefault(name, info)
    if key not in about:
        theirs = dialect.fate(key)
        if theirs is not None:
            return f"{key}: a NeMo-Aligner key. {theirs.describe(key)}"
        close = nearest(key, about)
        raise UserError(f"no key {key!r}" + (f": did you mean {close}?" if close else ""))
    info = about[key]
    stages = ", ".join(readers[key])
    inner = compose.subsection(info.annotation)
    if inner is not None:
        summary = (inner.__doc__ or "").strip().splitlines()[0]
        lines = [f"{key}: {summary}", f"  stages: {stages}", "  keys:"]
        return "\n".join([*lines, *(f"    {key}.{name}" for name, _ in leaves(inner))])
    found = default(info)
    given = "has to be given" if found is REQUIRED else f"default {_shown(found)}"
    lines = [f"{key}: {info.description}", f"  type {_type(info)}; {given}", f"  stages: {stages}"]
    # A name can be a value in one stage and a section in another (`reward`: a list in the demo).
    values = {stage: dict(leaves(STAGES[stage])).get(key) for stage in readers[key]}
    defaults = {stage: _shown(default(info)) for stage, info in values.items() if info is not None}
    if len(set(defaults.values())) > 1:
        lines.append("  by stage: " + ", ".join(f"{stage} {value}" for stage, value in defaults.items()))
    return "\n".join(lines)


def _type(info: FieldInfo) -> str:
    """The type in plain words, with its limits."""
    text = str(info.annotation)
    for long, short in (
        ("typing.", ""),
        ("<class '", ""),
        ("'>", ""),
        ("Optional", "null or "),
        ("NoneType", "null"),
    ):
        text = text.replace(long, short)
    text = text.split("Annotated[", 1)[-1] if text.startswith("Annotated[") else text
    limits = [
        f"{word} {getattr(limit, name)}"
        for limit in info.metadata
        for name, word in (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most"))
        if hasattr(limit, name)
    ]
    text = (
        text.replace("int", "whole number")
        .replace("float", "number")
        .replace("str", "text")
        .replace("bool", "true/false")
    )
    return text.replace("None", "null") + (f" ({', '.join(limits)})" if limits else "")
