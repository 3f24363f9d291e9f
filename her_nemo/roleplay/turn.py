"""What a turn is: one character's message, cut into segments of thought, action and speech.

The parser never raises and never hides. It returns every character of the text in exactly one place (the
name prefix or a segment) and a list of typed findings. When the text is malformed the rule is *fail private*:
whatever might be thought is a thinking segment, because a thought shown to another character cannot be taken
back, while a line of speech held back is only a line missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.tags import Tag, find_tags
from her_nemo.roleplay.text import join_cut, join_seam

__all__ = [
    "Defect",
    "Finding",
    "Kind",
    "Segment",
    "Turn",
    "assemble_turn",
    "parse_turn",
    "render_segment",
    "render_turn",
    "write_turn",
]


class Defect(StrEnum):
    """What can be wrong with a turn."""

    UNCLOSED = "unclosed"  # an opening tag without its close
    STRAY_CLOSE = "stray_close"  # a close without an opening tag
    MISNESTED = "misnested"  # a close that does not match the innermost open tag
    TAG_INSIDE = "tag_inside"  # a tag opened inside another one
    WRONG_CASE = "wrong_case"  # <Role_Thinking>
    MALFORMED_TAG = (
        "malformed_tag"  # <role_thinking without '>', [role_thinking], blanks or attributes in a tag
    )
    UNKNOWN_TAG = "unknown_tag"  # <think>, <b>
    FOREIGN_TAG = "foreign_tag"  # HER's tag in a message of another dialect
    WIDE_MARK = "wide_mark"  # a full-width or lenticular bracket, parenthesis or star
    EMPTY_TAG = "empty_tag"  # a tagged segment without text
    TEXT_BEFORE_PLAN = "text_before_plan"
    SEVERAL_PLANS = "several_plans"
    MISSING_PLAN = "missing_plan"
    MISSING_NAME = "missing_name"
    WRONG_NAME = "wrong_name"
    EMPTY_REPLY = "empty_reply"  # neither speech nor action: nobody else would notice the turn


@dataclass(frozen=True)
class Finding:
    """A defect and where it is: [start, end) in the original text."""

    defect: Defect
    start: int
    end: int


@dataclass(frozen=True)
class Segment:
    """One part of a turn. `text` has no tags; [start, end) is its span in the original, tags included."""

    kind: Kind
    text: str
    start: int
    end: int

    @property
    def blank(self) -> bool:
        return not self.text.strip()


@dataclass(frozen=True)
class Turn:
    """One message. The name prefix (`Name: `, with blanks before it) and the segments tile `text` exactly."""

    name: str | None
    segments: tuple[Segment, ...]
    text: str
    findings: tuple[Finding, ...] = ()
    name_span: tuple[int, int] | None = None

    @property
    def defects(self) -> tuple[Defect, ...]:
        """Each defect once, in the order found."""
        return tuple(dict.fromkeys(finding.defect for finding in self.findings))

    @property
    def well_formed(self) -> bool:
        return not self.findings

    @property
    def name_prefix(self) -> str:
        """`Name: ` as written, or '' when the turn has no name."""
        return "" if self.name_span is None else self.text[slice(*self.name_span)]

    @property
    def plan(self) -> str:
        """The text of the plan(s), without tags."""
        return self.text_of(Kind.SYSTEM_THINKING)

    @property
    def pattern(self) -> tuple[Kind, ...]:
        """The order of non-blank segments: what diversity measures count."""
        return tuple(segment.kind for segment in self.segments if not segment.blank)

    def text_of(self, *kinds: Kind) -> str:
        """The text of all segments of these kinds, without tags, joined without running words together."""
        out = ""
        for segment in self.segments:
            if segment.kind in kinds:
                out = join_seam(out, segment.text)
        return out.strip()


@dataclass
class _Builder:
    """Collects segments while the tags go by. `stack` holds the open tags, outermost first."""

    text: str
    body_start: int  # a stray </role_thinking> does not reach back before this (the expected name)
    segments: list[Segment] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    stack: list[Tag] = field(default_factory=list)
    open_kinds: Counter[Kind] = field(default_factory=Counter)
    kind: Kind = Kind.SPEECH
    start: int = 0
    parts: str = ""

    def note(self, defect: Defect, start: int, end: int) -> None:
        self.findings.append(Finding(defect, start, end))

    def add_text(self, start: int, end: int) -> None:
        # Tags inside a segment are cut out of its text: the words on both sides must stay apart.
        self.parts = join_cut(self.parts, self.text[start:end])

    def flush(self, end: int) -> None:
        if end > self.start:
            self.segments.append(Segment(self.kind, self.parts, self.start, end))
        self.start, self.parts = end, ""

    def effective_kind(self) -> Kind:
        """The most private open tag decides: a plan quoted inside an action is still a plan."""
        for kind in (Kind.SYSTEM_THINKING, Kind.ROLE_THINKING, Kind.ROLE_ACTION):
            if self.open_kinds[kind]:
                return kind
        return Kind.SPEECH

    def open(self, tag: Tag) -> None:
        if self.stack:
            self.note(Defect.TAG_INSIDE, tag.start, tag.end)
        nested = bool(self.stack)
        self.stack.append(tag)
        self.open_kinds[tag.kind] += 1
        kind = self.effective_kind()
        if not (nested and kind == self.kind):
            self.flush(tag.start)
            self.kind = kind

    def close(self, tag: Tag) -> None:
        places = range(len(self.stack) - 1, -1, -1)
        match = next((i for i in places if self.stack[i].name == tag.name), None) if tag.closes else None
        if match is None:
            self._stray(tag)
            return
        if match != len(self.stack) - 1:
            self.note(Defect.MISNESTED, tag.start, tag.end)
        self.open_kinds[self.stack.pop(match).kind] -= 1
        kind = self.effective_kind()
        if not (self.stack and kind == self.kind):
            self.flush(tag.end)
            self.kind = kind

    def _stray(self, tag: Tag) -> None:
        """A close that closes nothing: the text before it may be a thought that lost its opening tag."""
        self.note(Defect.MISNESTED if self.stack else Defect.STRAY_CLOSE, tag.start, tag.end)
        if not tag.kind.private:
            return
        self.flush(tag.end)
        self.kind = self.effective_kind()
        first = len(self.segments)
        if tag.kind is Kind.SYSTEM_THINKING:
            first = 0  # a plan stands first, so all that went before may be the plan
        else:
            while first and not self.segments[first - 1].kind.private:
                first -= 1
        merged = self.segments[first:]
        if not merged:
            return
        begin = merged[0].start
        keep = (
            self.body_start
            if tag.kind is Kind.ROLE_THINKING and begin <= self.body_start < tag.end
            else begin
        )
        text = ""
        for segment in merged:
            inside = segment.text if segment.start >= keep else segment.text[keep - segment.start :]
            text = join_cut(text, inside)
        head = [Segment(Kind.SPEECH, self.text[begin:keep], begin, keep)] if keep > begin else []
        self.segments[first:] = [*head, Segment(tag.kind, text, keep, tag.end)]


def parse_turn(text: str, *, expect_plan: bool = True, expect_name: str | None = None) -> Turn:
    """Cut one message into segments. Never raises.

    Args:
        text: the message as written or generated.
        expect_plan: whether a missing `<system_thinking>` is a defect (history turns have none).
        expect_name: the character who must be speaking; None accepts any `Name: `.
    """
    tags, unknown = find_tags(text)
    findings = [Finding(Defect.UNKNOWN_TAG, start, end) for start, end in unknown]
    return assemble_turn(text, tags, findings, expect_plan=expect_plan, expect_name=expect_name)


def assemble_turn(
    text: str,
    tags: list[Tag],
    findings: Iterable[Finding] = (),
    *,
    expect_plan: bool,
    expect_name: str | None,
    needs_name: bool = True,
) -> Turn:
    """The turn that a text's tags make of it; what every dialect's reader shares.

    Args:
        text: the message.
        tags: all tags and marks in order, without overlap.
        findings: what was found amiss while they were looked for.
        expect_plan, expect_name: as in `parse_turn`.
        needs_name: whether a missing name prefix is a defect.
    """
    builder = _Builder(text, body_start=expected_name_end(text, tags, expect_name), findings=[*findings])
    position = 0
    for tag in tags:
        builder.add_text(position, tag.start)
        position = tag.end
        if tag.wrong_case:
            builder.note(Defect.WRONG_CASE, tag.start, tag.end)
        if tag.malformed:
            builder.note(Defect.MALFORMED_TAG, tag.start, tag.end)
        if tag.unknown:
            builder.note(Defect.UNKNOWN_TAG, tag.start, tag.end)
        builder.close(tag) if tag.closing else builder.open(tag)
    builder.add_text(position, len(text))
    builder.flush(len(text))
    for tag in builder.stack:
        builder.note(Defect.UNCLOSED, tag.start, tag.end)
    segments, name, name_span = _split_name(text, builder.segments, expect_name)
    turn = Turn(name, tuple(segments), text, (), name_span)
    found = [*builder.findings, *_check(turn, expect_plan, expect_name, needs_name)]
    found.sort(key=lambda finding: finding.start)
    return replace(turn, findings=tuple(found))


_NAME = re.compile(r"(\s*)([^\s:<>\n*][^:<>\n]{0,59}):(?=[\s<]|$)[^\S\n]?")


def _match_name(text: str, start: int, end: int, expect_name: str | None) -> tuple[str, int] | None:
    """(name, end of the prefix) if text[start:end] begins with a name prefix."""
    if expect_name:
        wanted = re.compile(r"\s*" + re.escape(expect_name) + r":[^\S\n]?")
        found = wanted.match(text, start, end)
        if found:
            return expect_name, found.end()
    found = _NAME.match(text, start, end)
    return (found.group(2).strip(), found.end()) if found else None


def expected_name_end(text: str, tags: list[Tag], expect_name: str | None) -> int:
    """End of `Name: ` if the expected name stands at its place (at the start or after the plan), else 0."""
    if not expect_name:
        return 0
    ends = [tag.end for tag in tags[:2] if tag.closing and tag.kind is Kind.SYSTEM_THINKING]
    for start in (0, *ends):
        found = re.compile(r"\s*" + re.escape(expect_name) + r":[^\S\n]?").match(text, start)
        if found:
            return found.end()
    return 0


def _split_name(
    text: str, segments: list[Segment], expect_name: str | None
) -> tuple[list[Segment], str | None, tuple[int, int] | None]:
    """Take the name prefix off the speech that opens the turn or that follows the first plan."""
    places: list[int] = []
    opens = True  # plans and blanks so far
    for index, segment in enumerate(segments):
        if opens and segment.kind is Kind.SPEECH and not segment.blank:
            places.append(index)
        opens = opens and (segment.kind is Kind.SYSTEM_THINKING or segment.blank)
        if segment.kind is Kind.SYSTEM_THINKING:
            after = segments[index + 1 : index + 2]
            if after and after[0].kind is Kind.SPEECH and index + 1 not in places:
                places.append(index + 1)
            break
    best: tuple[int, str, int] | None = None
    for index in sorted(places):
        match = _match_name(text, segments[index].start, segments[index].end, expect_name)
        if match and (best is None or (match[0] == expect_name and best[1] != expect_name)):
            best = (index, *match)
    if best is None:
        return segments, None, None
    index, name, end = best
    old = segments[index]
    rest = [Segment(Kind.SPEECH, old.text[end - old.start :], end, old.end)] if end < old.end else []
    return [*segments[:index], *rest, *segments[index + 1 :]], name, (old.start, end)


def _check(turn: Turn, expect_plan: bool, expect_name: str | None, needs_name: bool) -> Iterable[Finding]:
    """The defects of the whole turn: plan, name, emptiness."""
    plans = [segment for segment in turn.segments if segment.kind is Kind.SYSTEM_THINKING]
    if expect_plan and not plans:
        yield Finding(Defect.MISSING_PLAN, 0, 0)
    for extra in plans[1:]:
        yield Finding(Defect.SEVERAL_PLANS, extra.start, extra.end)
    if plans and turn.text[: plans[0].start].strip():
        yield Finding(Defect.TEXT_BEFORE_PLAN, 0, plans[0].start)
    if turn.name is None or turn.name_span is None:
        at = plans[0].end if plans else 0
        if needs_name:
            yield Finding(Defect.MISSING_NAME, at, at)
    elif expect_name is not None and not same_name(turn.name, expect_name):
        yield Finding(Defect.WRONG_NAME, *turn.name_span)
    for segment in turn.segments:
        if segment.blank and segment.kind is not Kind.SPEECH:
            yield Finding(Defect.EMPTY_TAG, segment.start, segment.end)
    if all(segment.kind.private or segment.blank for segment in turn.segments):
        yield Finding(Defect.EMPTY_REPLY, 0, len(turn.text))


def render_segment(kind: Kind, text: str) -> str:
    """A segment as HER writes it: tagged, or bare for speech."""
    return text if kind is Kind.SPEECH else f"<{kind.value}>{text}</{kind.value}>"


def render_turn(turn: Turn, write: Callable[[Segment], str] | None = None) -> str:
    """The turn as text. Equal to `turn.text` when it is well formed; tags are repaired when it is not.

    `write` writes one segment, in HER's tags unless given.
    """
    write = write or (lambda segment: render_segment(segment.kind, segment.text))
    out: list[str] = []
    named = turn.name_span is None
    for segment in turn.segments:
        if not named and turn.name_span is not None and segment.start >= turn.name_span[0]:
            out.append(turn.name_prefix)
            named = True
        out.append(write(segment))
    if not named:
        out.append(turn.name_prefix)
    return "".join(out)


def write_turn(name: str, parts: Iterable[tuple[Kind, str]]) -> str:
    """Write a turn from parts: plans first, then `Name: `, then the rest, one blank between neighbours.

    Raises:
        ValueError: if the text would not parse back to these parts (a part that contains tags, for instance).
    """
    parts = [(kind, text.strip()) for kind, text in parts]
    plan = "".join(render_segment(kind, text) for kind, text in parts if kind is Kind.SYSTEM_THINKING)
    body = " ".join(render_segment(kind, text) for kind, text in parts if kind is not Kind.SYSTEM_THINKING)
    text = f"{plan}{name}: {body}"
    turn = parse_turn(text, expect_plan=bool(plan), expect_name=name)
    if not turn.well_formed:
        raise ValueError(f"not a well-formed turn ({', '.join(turn.defects)}): {text[:120]!r}")
    return text
