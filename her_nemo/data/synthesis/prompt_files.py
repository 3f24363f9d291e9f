"""Prompts as versioned files: `prompts/<name>.v<number>.jinja`, with a `[system]` and a `[user]` part.

A published version is never changed; a better prompt is a new file. The digest of the file goes into every
record of what was asked, so that two texts under one version would show.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError

from her_nemo.config.errors import UserError
from her_nemo.roleplay.prompt import Message

PACKAGED = Path(__file__).parent / "prompts"
_FILE = re.compile(r"(?P<name>[a-z_]+)\.v(?P<version>[1-9]\d*)\.jinja")
_PARTS = re.compile(r"\A(?:\{#.*?#\}\s*)?\[system\]\n(?P<system>.*?)\n\[user\]\n(?P<user>.*)\Z", re.DOTALL)
_ENVIRONMENT = Environment(
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,  # plain text for a model, not HTML
)


@dataclass(frozen=True)
class PromptFile:
    """One version of a prompt."""

    name: str
    version: int
    digest: str  # SHA-256 of the file, first 16 hexadecimal digits
    system: str
    user: str

    def __str__(self) -> str:
        return f"{self.name}.v{self.version}@{self.digest}"

    def messages(self, **values: Any) -> list[Message]:
        """The filled-in prompt. Values are text as it is: nothing in them is read as a template.

        Raises:
            UserError: if the file asks for a value that the stage does not give.
        """
        try:
            system, user = (
                _ENVIRONMENT.from_string(part).render(values).strip() for part in (self.system, self.user)
            )
        except TemplateError as error:
            raise UserError(f"prompt {self}: {error}. Given: {', '.join(sorted(values))}") from error
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def load_prompt(name: str, version: int | None = None, directory: str | Path | None = None) -> PromptFile:
    """A prompt by name: from `directory` if it has the name, else the packaged one; the newest version by default.

    Raises:
        UserError: if there is no such prompt, no such version, or the file lacks its two parts.
    """
    folders = [Path(directory)] if directory else []
    if directory and not folders[0].is_dir():
        raise UserError(f"prompts_dir {directory}: no such directory")
    for folder in [*folders, PACKAGED]:
        found = {}
        for file in folder.glob("*.jinja"):
            matched = _FILE.fullmatch(file.name)
            if matched and matched["name"] == name:
                found[int(matched["version"])] = file
        if not found:
            continue
        if version is not None and version not in found:
            have = ", ".join(f"v{number}" for number in sorted(found))
            raise UserError(f"prompt_versions.{name}: {folder} has no v{version}; it has {have}")
        number = version or max(found)
        raw = found[number].read_bytes()
        parts = _PARTS.match(raw.decode("utf-8"))
        if parts is None:
            raise UserError(f"{found[number]}: needs a line [system], a text, a line [user], a text")
        digest = hashlib.sha256(raw).hexdigest()[:16]
        return PromptFile(name, number, digest, parts["system"], parts["user"])
    raise UserError(
        f"no prompt named {name!r} in {' or '.join(str(folder) for folder in [*folders, PACKAGED])}"
    )
