"""`her-nemo config explain KEY`: what a key is for, its type, default, and the stages that read it."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from her_nemo.config import compose, dialect
from her_nemo.config.errors import UserError, nearest, spoken
from her_nemo.config.keys import REQUIRED, default, leaves, shown, type_of
from her_nemo.config.paragraphs import MORE
from her_nemo.config.schema import STAGES


def explain(key: str) -> str:
    """A paragraph about one key; about a section, its keys. UserError names the nearest key to an unknown one."""
    found: dict[str, FieldInfo] = {}  # by stage
    every: dict[str, None] = {}
    for stage, schema in STAGES.items():
        for name, info in compose.known_keys(schema):
            every[name] = None
            if name == key:
                found[stage] = info
    if not found:
        theirs = dialect.fate(key)
        if theirs is not None:
            return f"{key}: a NeMo-Aligner key. {theirs.describe(key)}"
        close = nearest(key, every)
        raise UserError(f"no key {key!r}" + (f": did you mean {close}?" if close else ""))
    # A name can mean one thing in one stage and another in the next (`seed`), or be a section there (`reward`).
    meanings: dict[str, list[str]] = {}
    for stage, info in found.items():
        meanings.setdefault(_about(info), []).append(stage)
    return "\n".join(_meaning(key, {stage: found[stage] for stage in stages}) for stages in meanings.values())


def _about(info: FieldInfo) -> str:
    """What tells meanings apart. All sections of one name are one."""
    return "section" if compose.subsection(info.annotation) is not None else info.description or ""


def _meaning(key: str, found: dict[str, FieldInfo]) -> str:
    stages = ", ".join(map(spoken, found))
    sections = {stage: compose.subsection(info.annotation) for stage, info in found.items()}
    if all(sections.values()):
        summaries = dict.fromkeys(section.__doc__.strip().splitlines()[0] for section in sections.values())
        names = dict.fromkeys(name for section in sections.values() for name, _ in leaves(section))
        lines = [f"{key}: {' '.join(summaries)}", f"  stages: {stages}", "  keys:"]
        return "\n".join([*lines, *(f"    {key}.{name}" for name in names)])
    info = next(iter(found.values()))
    value = default(info)
    given = "has to be given" if value is REQUIRED else f"default {shown(value)}"
    more = f" {MORE[key]}" if key in MORE else ""
    lines = [f"{key}: {info.description}{more}", f"  type: {type_of(info)}; {given}", f"  stages: {stages}"]
    defaults = {stage: shown(default(each)) for stage, each in found.items()}
    if len(set(defaults.values())) > 1:
        lines.append(
            "  by stage: " + ", ".join(f"{spoken(stage)} {value}" for stage, value in defaults.items())
        )
    return "\n".join(lines)
