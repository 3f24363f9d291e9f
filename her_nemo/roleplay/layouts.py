"""The system prompts of role-play: HER's sections, HER's natural and structured variants, CoSER's.

| layout | opening | headings | in it | dialect |
|---|---|---|---|---|
| HER | You are X from BOOK. | `===X's Profile===` | background | HER |
| HER_NATURAL | You are X from BOOK. | `**Character Profile**` | description, experience, background | HER |
| HER_STRUCTURED | You are roleplaying as X. | `=== Character Profile ===`, `## ..`, `** .. **` | the same | HER |
| COSER | You are X from BOOK. | `===X's Profile===` | description, experience (in the profile) | COSER |

All have the profile, the scenario, the others, the inner thoughts (motivation) and the requirements. What the
table does not name for a layout is left out, as in the data that the layout comes from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from her_nemo.roleplay.dialects import Dialect

HER_REQUIREMENTS = (
    "First write a plan in the third person between <system_thinking> and </system_thinking>: what the "
    "character notices, wants and will do. Then write your name, a colon, and the turn itself: inner "
    "thoughts in the first person between <role_thinking> and </role_thinking>, which nobody else can see; "
    "visible actions between <role_action> and </role_action>; everything else is spoken aloud. Mix them in "
    "any order."
)
COSER_REQUIREMENTS = (
    "Write your name, a colon, and your turn: inner thoughts in square brackets, [like this], which nobody "
    "else can see; visible actions in parentheses, (like this); everything else is spoken aloud. Mix them in "
    "any order."
)
DEFAULT_REQUIREMENTS = HER_REQUIREMENTS
_REQUIREMENTS = {Dialect.HER: HER_REQUIREMENTS, Dialect.COSER: COSER_REQUIREMENTS}

_OTHERS_HER, _OTHERS_COSER = (
    "Information about other Characters",
    "Information about the other Characters",
)
_VARIANT_TITLES = (
    "Character Profile",
    "Recent Experience",
    "Background",
    "Current Scenario",
    "Your Inner State",
    "Other Characters",
    "Response Format",
)


class Layout(StrEnum):
    """How the system prompt is laid out, and with it the dialect of history and reply."""

    HER = "her"
    HER_NATURAL = "her_natural"
    HER_STRUCTURED = "her_structured"
    COSER = "coser"

    @property
    def dialect(self) -> Dialect:
        return Dialect.COSER if self is Layout.COSER else Dialect.HER

    @property
    def expects_plan(self) -> bool:
        """Whether a reply begins with a plan."""
        return self is not Layout.COSER


class Heading(StrEnum):
    """The headings of the structured variant."""

    EQUALS = "==="
    HASHES = "##"
    STARS = "**"

    def write(self, title: str) -> str:
        return f"## {title}" if self is Heading.HASHES else f"{self.value} {title} {self.value}"


@dataclass(frozen=True)
class RolePrompt:
    """What a character is told before the conversation. An empty optional section is left out."""

    name: str
    book: str
    profile: str
    background: str = ""
    scenario: str = ""
    others: tuple[tuple[str, str], ...] = ()
    inner_thoughts: str = ""
    requirements: str = DEFAULT_REQUIREMENTS  # a default is replaced by that of the layout's dialect
    description: str = ""
    experience: str = ""

    def text(self, layout: Layout = Layout.HER, heading: Heading = Heading.EQUALS) -> str:
        """The system prompt; `heading` is for the structured variant."""
        if layout in (Layout.HER, Layout.COSER):
            opening = f"You are {self.name} from {self.book}."
            written = [f"==={title}===\n{body}" for title, body in self._sections(layout) if body]
        else:
            natural = layout is Layout.HER_NATURAL
            opening = f"You are {self.name} from {self.book}." if natural else self._structured_opening()
            written = [self.description] if self.description else []
            for title, body in zip(_VARIANT_TITLES, self._variant_bodies(layout), strict=True):
                head = f"**{title}**" if natural else heading.write(title)
                written += [f"{head}\n{body}"] if body else []
        return "\n\n".join([opening, *written])

    def _structured_opening(self) -> str:
        return f"You are roleplaying as {self.name}."

    def _requirements(self, layout: Layout) -> str:
        return (
            _REQUIREMENTS[layout.dialect]
            if self.requirements in _REQUIREMENTS.values()
            else self.requirements
        )

    def _marked_others(self) -> str:
        return "\n".join(f"**{name}**: {description}" for name, description in self.others)

    def _variant_bodies(self, layout: Layout) -> list[str]:
        return [
            self.profile,
            self.experience,
            self.background,
            self.scenario,
            self.inner_thoughts,
            self._marked_others(),
            self._requirements(layout),
        ]

    def _sections(self, layout: Layout) -> list[tuple[str, str]]:
        profile, requirements = f"{self.name}'s Profile", self._requirements(layout)
        if layout is Layout.HER:
            return [
                (profile, self.profile),
                ("Background", self.background),
                ("Current Scenario", self.scenario),
                (_OTHERS_HER, self._marked_others()),
                ("Your Inner Thoughts", self.inner_thoughts),
                ("Requirements", requirements),
            ]
        about = [part for part in (self.description, self.profile, self.experience) if part]
        return [
            (profile, "\n\n".join(about)),
            ("Current Scenario", self.scenario),
            (_OTHERS_COSER, "\n\n".join(f"{name}: {text}" for name, text in self.others)),
            ("Your Inner Thoughts", self.inner_thoughts),
            ("Requirements", requirements),
        ]

    @classmethod
    def parse(cls, text: str) -> RolePrompt:
        """Read a system prompt of any layout back; see `read_prompt`."""
        return read_prompt(text)[0]


def read_prompt(text: str) -> tuple[RolePrompt, Layout]:
    """Read a system prompt back, and say which layout it has.

    What a layout leaves out comes back empty; CoSER's profile comes back with description and experience in it.
    A sectioned prompt without others is HER's if it could be either.

    Raises:
        ValueError: if it has none of these layouts; says what is missing.
    """
    profile = re.search(r"^===(.+)'s Profile===$", text, re.MULTILINE)
    if profile is not None:
        return _read_sections(text, profile.group(1))
    if text.startswith("You are roleplaying as "):
        return _read_variant(text, Layout.HER_STRUCTURED, r"(?:===|##|\*\*) (.+?) ?(?:===|\*\*)?$")
    if re.search(r"^\*\*Character Profile\*\*$", text, re.MULTILINE):
        return _read_variant(text, Layout.HER_NATURAL, r"\*\*(.+)\*\*$")
    raise ValueError(
        f"not a system prompt of a known layout: it begins {text[:60]!r}, not 'You are X from BOOK.' with a "
        "'===X's Profile===' or '**Character Profile**' section"
    )


def _split(text: str, heading: str, titles: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(what stands before the first section, section bodies). Only headings with these titles, in this order,
    begin a section: a profile may have headings of its own."""
    marks: list[tuple[str, int, int]] = []
    place = -1
    for found in re.finditer("^" + heading, text, re.MULTILINE):
        title = found.group(1).strip()
        if title in titles and titles.index(title) > place:
            place = titles.index(title)
            marks.append((title, found.start(), found.end()))
    ends = [start for _, start, _ in marks[1:]] + [len(text)] * bool(marks)
    bodies = {
        title: text[end:stop].removeprefix("\n").removesuffix("\n\n")
        for (title, _, end), stop in zip(marks, ends, strict=True)
    }
    return text[: marks[0][1]] if marks else text, bodies


def _read_sections(text: str, name: str) -> tuple[RolePrompt, Layout]:
    titles = (
        f"{name}'s Profile",
        "Background",
        "Current Scenario",
        _OTHERS_HER,
        _OTHERS_COSER,
        "Your Inner Thoughts",
        "Requirements",
    )
    before, bodies = _split(text, r"===(.+)===$", titles)
    opening = re.match(rf"You are {re.escape(name)} from (.+)\.\n", before)
    if opening is None:
        raise ValueError(f"not a system prompt: it begins {text[:60]!r}, not 'You are {name} from BOOK.'")
    coser = _OTHERS_COSER in bodies
    if coser:
        others = _read_coser_others(bodies[_OTHERS_COSER])
    else:
        others = _read_marked_others(bodies.get(_OTHERS_HER, ""))
    prompt = RolePrompt(
        name=name,
        book=opening.group(1),
        profile=bodies[titles[0]],
        background=bodies.get("Background", ""),
        scenario=bodies.get("Current Scenario", ""),
        others=others,
        inner_thoughts=bodies.get("Your Inner Thoughts", ""),
        requirements=bodies.get("Requirements", ""),
    )
    coser = coser or (not others and prompt.requirements == COSER_REQUIREMENTS)
    return prompt, Layout.COSER if coser else Layout.HER


def _read_variant(text: str, layout: Layout, heading: str) -> tuple[RolePrompt, Layout]:
    before, bodies = _split(text, heading, _VARIANT_TITLES)
    natural = layout is Layout.HER_NATURAL
    pattern = r"You are (.+?) from (.+)\.\n" if natural else r"You are roleplaying as (.+)()\.\n"
    opening = re.match(pattern, before)
    missing = [title for title in ("Character Profile", "Response Format") if title not in bodies]
    if opening is None or missing:
        what = f"no {' and no '.join(missing)} section" if missing else f"it begins {text[:60]!r}"
        raise ValueError(
            f"not a system prompt in HER's {'natural' if natural else 'structured'} layout: {what}"
        )
    profile, experience, background, scenario, inner, others, requirements = (
        bodies.get(title, "") for title in _VARIANT_TITLES
    )
    prompt = RolePrompt(
        name=opening.group(1),
        book=opening.group(2),
        profile=profile,
        background=background,
        scenario=scenario,
        others=_read_marked_others(others),
        inner_thoughts=inner,
        requirements=requirements,
        description=before[opening.end() :].strip("\n"),
        experience=experience,
    )
    return prompt, layout


def _read_marked_others(text: str) -> tuple[tuple[str, str], ...]:
    pattern = r"^\*\*(.+?)\*\*: (.*?)(?=\n\*\*[^*\n]+\*\*: |\Z)"
    return tuple(re.findall(pattern, text, re.MULTILINE | re.DOTALL))


def _read_coser_others(text: str) -> tuple[tuple[str, str], ...]:
    # A paragraph of a description may have a colon too: only a short first line counts as a name.
    parts = re.split(r"(?:^|\n\n)(?=[^\n:*]{1,60}: )", text)
    return tuple(tuple(part.split(": ", 1)) for part in parts if part)  # type: ignore[misc]
