"""`her-nemo config show|diff|explain`: what is configured, what differs from the defaults and who set it, a key.

No torch. Required keys that were not given are shown as such, so that a file can be looked at before it is complete.
"""

from __future__ import annotations

import json
from typing import Any

from her_nemo.config import arguments, compose, partial
from her_nemo.config.errors import ConfigErrors, UserError
from her_nemo.config.explain import explain
from her_nemo.config.keys import REQUIRED, default, leaves, shown
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
    width = max(len(f"{row['key']} = {shown(row['value'])}") for row in rows)
    return "\n".join(
        f"{row['key'] + ' = ' + shown(row['value']):{width}}   "
        f"({'required' if row['default'] is REQUIRED else 'default ' + shown(row['default'])}"
        f"{'; set by ' + row['set_by'] if row['set_by'] else ''})"
        for row in rows
    )


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config
