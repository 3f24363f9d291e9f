"""From YAML files and overrides to one typed, checked configuration, with every problem reported at once.

Hydra composes the files and the groups (`model=qwen3_8b`). Value overrides keep Hydra's syntax (`a.b=c`, `+a=b`,
`~a`) but are applied here: a key may then be set although no YAML file mentions it, as long as the schema knows
it, and one unknown key does not hide the problems behind it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from her_nemo.config import dialect
from her_nemo.config.errors import ConfigErrors, Problem, UserError, nearest, spoken
from her_nemo.config.problems import from_validation
from her_nemo.config.schema import STAGES, StageConfig

COMMAND_LINE = "command line"


def conf_dir() -> Path:
    """The packaged conf/: at the root of a clone, or inside the installed package."""
    here = Path(__file__).resolve()
    for folder in (here.parents[2] / "conf", here.parents[1] / "conf"):
        if (folder / "sft.yaml").is_file():
            return folder
    raise UserError(
        f"conf/ is missing: looked in {here.parents[2]} and {here.parents[1]}. Install her-nemo again."
    )


def assign(key: str, value: str | Path) -> str:
    """The override `key=value` for text of any kind: quoted, so that spaces, commas and equal signs are kept."""
    # Hydra's quoting: backslashes count only in front of a quote, where each is doubled.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value))
    return f"{key}='{escaped}'"


def known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a schema with its pydantic field; a section comes before the keys inside it."""
    for name, info in section.model_fields.items():
        yield prefix + name, info
        inner = subsection(info.annotation)
        if inner is not None:
            yield from known_keys(inner, f"{prefix}{name}.")


def subsection(annotation: Any) -> type[BaseModel] | None:
    """The section a field holds, or None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


@dataclass
class _Request:
    """The overrides, sorted: groups for Hydra, values and deletions for us, and what is wrong with the rest."""

    groups: dict[str, str | None] = field(default_factory=dict)
    values: list[tuple[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def load(
    stage: str,
    overrides: list[str],
    config_dir: str | Path | None = None,
    config_name: str | None = None,
    notes: list[str] | None = None,
) -> StageConfig:
    """The configuration of `stage`: conf/<stage>.yaml, its groups, then `overrides`, checked against the schema.

    `config_dir` and `config_name` name another file to start from; the packaged groups stay available.
    `notes` receives what became of NeMo-Aligner's own keys, one line each (config/dialect.py).
    Raises ConfigErrors with every problem found; UserError when there is no such stage or file.
    """
    if stage not in STAGES:
        close = nearest(stage, STAGES)
        raise UserError(
            f"no stage named {stage!r}: "
            + (f"did you mean {close!r}? " if close else "")
            + f"stages: {', '.join(map(spoken, STAGES))}"
        )
    schema = STAGES[stage]
    roots, name = _roots(config_dir), config_name or stage
    if not any((root / f"{name}.yaml").is_file() for root in roots):
        raise UserError(
            f"no file {name}.yaml in {roots[0]}: give --config-dir and --config-name of a file that exists"
        )
    request = _sort_overrides(schema, overrides, roots)
    raw, sources = _compose(roots, name, request)
    return _validate(stage, schema, raw, sources, request, [] if notes is None else notes)


def origins(
    stage: str, overrides: list[str], config_dir: str | Path | None = None, config_name: str | None = None
) -> Callable[[str], str]:
    """Who set a key last, as a function of the key: "command line", a file, or "" for nobody. As `load` composes."""
    roots = _roots(config_dir)
    request = _sort_overrides(STAGES[stage], overrides, roots)
    _, sources = _compose(roots, config_name or stage, request)
    return lambda key: _who_set(key, sources, request)


def _roots(config_dir: str | Path | None) -> list[Path]:
    """Folders to look in for configuration files, first hit wins."""
    if config_dir is None:
        return [conf_dir()]
    folder = Path(config_dir).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"--config-dir {config_dir}: no such directory")
    return [folder, conf_dir()]


def _choices(group: str, roots: list[Path]) -> list[str]:
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})


def _sort_overrides(schema: type[StageConfig], overrides: list[str], roots: list[Path]) -> _Request:
    """Check each override's syntax, key and group choice; collect what is wrong and keep the rest."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, keys, request = OverridesParser.create(), dict(known_keys(schema)), _Request()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            hint = "write key=value, e.g. trainer.devices=2; quote values with spaces, commas or brackets"
            request.problems.append(Problem("", f"cannot read the override {text!r}", COMMAND_LINE, hint))
            continue
        key = override.key_or_group
        info = keys.get(key)
        is_section = info is not None and subsection(info.annotation) is not None
        if override.is_sweep_override():
            hint = "give one value; write a list as [a,b] and quote text that holds commas"
            request.problems.append(
                Problem(key, "a sweep over several values is not supported", COMMAND_LINE, hint)
            )
        elif (
            (info is None or is_section) and isinstance(override.value(), str | None) and _choices(key, roots)
        ):
            _take_group(request, key, None if override.is_delete() else override.value(), roots)
        elif info is None and dialect.fate(key) is None:
            request.problems.append(_unknown(key, [*keys, *_group_names(roots)], COMMAND_LINE))
        elif override.is_delete():
            request.deleted.append(key)
        else:
            request.values.append((key, override.value()))
    return request


def _group_names(roots: list[Path]) -> list[str]:
    return sorted({folder.name for root in roots for folder in root.iterdir() if folder.is_dir()})


def _unknown(key: str, known: list[str], where: str) -> Problem:
    close = nearest(key, known)
    return Problem(key, "no such key", where, f"did you mean {close}?" if close else "")


def _take_group(request: _Request, group: str, choice: str | None, roots: list[Path]) -> None:
    choices = _choices(group, roots)
    if choice is None or choice in choices:
        request.groups[group] = choice
        return
    close = nearest(choice, choices)
    hint = (f"did you mean {group}={close}? " if close else "") + f"choices: {', '.join(choices)}"
    request.problems.append(Problem(group, f"no file {group}/{choice}.yaml", COMMAND_LINE, hint))


def _compose(roots: list[Path], name: str, request: _Request) -> tuple[Any, list[tuple[str, Any]]]:
    """Compose the files with Hydra. Also the files in rising order of precedence, to say later who set a key."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    chosen = [
        f"~{group}" if choice is None else f"{group}={choice}" for group, choice in request.groups.items()
    ]
    if len(roots) > 1:
        chosen.append(f"hydra.searchpath=[file://{roots[1]}]")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(roots[0])):
            full = compose(name, overrides=chosen, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        _report_composition(error, name, request)
    choices = OmegaConf.to_container(full.hydra.runtime.choices)
    OmegaConf.set_struct(full, False)
    del full["hydra"]
    files = [(name, ""), *((f"{group}/{choice}", group) for group, choice in choices.items() if choice)]
    return full, [_source(roots, file, group) for file, group in files if not group.startswith("hydra")]


def _report_composition(error: Exception, name: str, request: _Request) -> None:
    """Turn what Hydra cannot compose into a problem among the others. Always raises."""
    first = str(error).strip().splitlines()
    message = " ".join(line.strip() for line in first[:3])
    if "Could not override" in message:
        groups = [key for key in request.groups if f"'{key}'" in message]
        hint = f"{name}.yaml has no such group in its defaults list"
        problem = Problem(
            groups[0] if groups else "", "this stage does not take the group", COMMAND_LINE, hint
        )
    else:
        problem = Problem("", f"cannot compose {name}.yaml: {message}", f"{name}.yaml")
    raise ConfigErrors([*request.problems, problem], stage=name) from error


def _source(roots: list[Path], file: str, group: str) -> tuple[str, Any]:
    """(path to show, its content laid out from the configuration's root) of one composed file."""
    from omegaconf import OmegaConf

    path = next(root / f"{file}.yaml" for root in roots if (root / f"{file}.yaml").is_file())
    package = group
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            package = line.split()[2].replace("_global_", "")
    content = OmegaConf.load(path)
    for part in reversed([part for part in package.split(".") if part]):
        content = OmegaConf.create({part: content})
    shown = os.path.relpath(path)
    return (str(path) if shown.startswith("..") else shown), content


def _validate(
    stage: str,
    schema: type[StageConfig],
    raw: Any,
    sources: list[tuple[str, Any]],
    request: _Request,
    notes: list[str],
) -> StageConfig:
    """Lay overrides over files over defaults, resolve the interpolations, and check against the schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from her_nemo.config import resolvers

    resolvers.register()
    for key in request.deleted:
        _delete(raw, key)
    for key, value in request.values:
        OmegaConf.update(raw, key, value, merge=False, force_add=True)
    # Defaults lie underneath so that ${...} may point at any key, also one no file mentions.
    merged = OmegaConf.merge(OmegaConf.create(_defaults(schema)), raw)
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None) or ""
        problem = Problem(
            key, f"cannot resolve: {str(error).splitlines()[0]}", _who_set(key, sources, request)
        )
        raise ConfigErrors([*request.problems, problem], stage=stage) from error
    known = [key for key, _ in known_keys(schema)]
    said, refused = dialect.translate(plain, known, {key for key, _ in request.values})
    notes += said
    request.problems += [replace(problem, where=_who_set(problem.key, sources, request)) for problem in refused]
    try:
        config, found = schema.model_validate(plain), []
    except ValidationError as error:
        found = from_validation(error, known, lambda key: _who_set(key, sources, request))
        config = _without_unknown(schema, plain, error)
    if request.problems or found:
        raise ConfigErrors([*request.problems, *found], stage=stage, rest=config)
    assert config is not None
    return config


def _without_unknown(
    schema: type[StageConfig], plain: dict[str, Any], error: ValidationError
) -> StageConfig | None:
    """The configuration with its unknown keys taken out; None when other things are wrong with it as well."""
    for item in error.errors(include_url=False):
        if item["type"] != "extra_forbidden":
            return None
        section = plain
        for part in item["loc"][:-1]:
            section = section[part]
        del section[item["loc"][-1]]
    return schema.model_validate(plain)


def _delete(raw: Any, key: str) -> None:
    from omegaconf import OmegaConf

    parent, _, leaf = key.rpartition(".")
    section = OmegaConf.select(raw, parent) if parent else raw
    if section is not None and leaf in section:
        del section[leaf]


def _defaults(section: type[BaseModel]) -> dict[str, Any]:
    """The schema's defaults as plain data; keys without a default are left out."""
    plain: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        inner = subsection(info.annotation)
        if inner is not None:
            default = None if info.is_required() else info.get_default()
            plain[name] = _defaults(inner) | (default.model_dump() if isinstance(default, BaseModel) else {})
        elif not info.is_required():
            plain[name] = info.get_default()
    return plain


def _who_set(key: str, sources: list[tuple[str, Any]], request: _Request) -> str:
    """Who set `key` last: the command line, a file, or nobody ("")."""
    from omegaconf import OmegaConf

    if any(key == given or key.startswith(given + ".") for given, _ in request.values):
        return COMMAND_LINE
    for file, content in reversed(sources):
        if _mentions(OmegaConf.to_container(content, resolve=False), key):
            return file
    return ""


def _mentions(content: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True
