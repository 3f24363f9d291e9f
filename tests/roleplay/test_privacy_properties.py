"""Thousands of mangled texts: no crash, no thought shown, no visible text lost, views stable.

Thoughts are written in Greek letters, all else in Latin ones, so that a leak is a Greek letter in a view.
"""

from __future__ import annotations

import itertools
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from her_nemo.roleplay.turn import Kind, Turn, parse_turn, render_turn
from her_nemo.roleplay.views import VIEWS, Reader, Style, view

TAGS = ["system_thinking", "role_thinking", "role_action"]
GREEK = re.compile(r"[\u03b1-\u03c9]")
OTHERS = (Reader.OTHER_CHARACTER, Reader.USER, Reader.JUDGE_COSER)  # who sees no thought at all
# Whose view can be read again as HER's dialect; the judges' is CoSER's.
HER_READERS = [reader for reader in Reader if reader not in (Reader.JUDGE_COSER, Reader.JUDGE_COSER_HER)]
BLANKS = re.compile(r"\s+")

latin = st.text(alphabet="abc ,.:'[]*\n", max_size=12)
greek = st.text(alphabet="αβγδ ,.:\n", min_size=1, max_size=12).filter(lambda text: GREEK.search(text))
mangled = st.lists(
    st.one_of(
        st.sampled_from(
            [f"<{tag}>" for tag in TAGS]
            + [f"</{tag}>" for tag in TAGS]
            + [
                "<Role_Thinking>",
                "</ROLE_THINKING>",
                "<think>",
                "</think>",
                "<role_thinking",
                "</role_action",
            ]
            + [
                "[role_thinking]",
                "<role_thinking x>",
                "</ role_thinking>",
                "<b>",
                "<",
                ">",
                "</",
                "role_",
                "thinking",
            ]
            + ["Lear: ", "\n", " ", "&lt;role_thinking&gt;", "<|im_end|>", "<rol", "<role_action bows>"]
        ),
        latin,
        greek,
        st.text(max_size=5),
    ),
    max_size=14,
).map("".join)


@st.composite
def good_parts(draw: st.DrawFn) -> list[str]:
    """A well-formed turn as a list of tags and texts; thoughts in Greek."""
    parts = ["<system_thinking>", draw(greek), "</system_thinking>", "Lear: "]
    for kind in draw(st.lists(st.sampled_from([*TAGS[1:], "speech"]), min_size=1, max_size=6)):
        if kind == "speech":
            parts.append(draw(latin))
        else:
            body = draw(greek if kind == "role_thinking" else latin.filter(str.strip))
            parts += [f"<{kind}>", body, f"</{kind}>"]
    return parts


def squeezed(text: str) -> str:
    return BLANKS.sub("", text)


def tiles(turn: Turn) -> str:
    spans = sorted([(s.start, s.end) for s in turn.segments] + ([turn.name_span] if turn.name_span else []))
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    return "".join(turn.text[a:b] for a, b in spans)


@settings(max_examples=500, deadline=None)
@given(mangled, st.booleans(), st.sampled_from([None, "Lear"]))
def test_any_text_parses_and_is_covered(text: str, plan: bool, name: str | None) -> None:
    turn = parse_turn(text, expect_plan=plan, expect_name=name)
    assert tiles(turn) == text
    if turn.well_formed:
        assert render_turn(turn) == text
    for reader in Reader:
        view(turn, reader)


@settings(max_examples=500, deadline=None)
@given(mangled, st.sampled_from(list(Reader)))
def test_a_view_is_its_visible_segments_and_nothing_else(text: str, reader: Reader) -> None:
    turn = parse_turn(text, expect_plan=False)
    table = VIEWS[reader]
    if table.verbatim:
        assert view(text, reader) == text
        return
    expected = ""
    pending = turn.name_span
    for segment in turn.segments:
        if pending and segment.start >= pending[0]:
            expected, pending = expected + turn.name_prefix, None
        style = table.styles.get(segment.kind)
        if style is None or (style is not Style.PLAIN and segment.blank):
            continue
        marks = {
            "tagged": (f"<{segment.kind}>", f"</{segment.kind}>"),
            "bracketed": ("[", "]"),
            "parenthesised": ("(", ")"),
            "starred": ("*", "*"),
            "plain": ("", ""),
        }
        before, after = marks[style.value]
        expected += before + segment.text + after
    expected += turn.name_prefix if pending else ""
    assert squeezed(view(text, reader)) == squeezed(expected)


@settings(max_examples=500, deadline=None)
@given(mangled, st.sampled_from(HER_READERS))
def test_a_view_of_a_view_is_the_same(text: str, reader: Reader) -> None:
    once = view(text, reader)
    assert view(once, reader) == once


@settings(max_examples=500, deadline=None)
@given(mangled)
def test_words_stay_apart(text: str) -> None:
    """Every word of a view is a word of a visible segment."""
    turn = parse_turn(text, expect_plan=False)
    words = set(re.findall(r"\w+", turn.name_prefix))
    for segment in turn.segments:
        words |= set(re.findall(r"\w+", segment.text))
    words |= {kind.value for kind in Kind}
    assert set(re.findall(r"\w+", view(text, Reader.OTHER_CHARACTER))) <= words


@settings(max_examples=300, deadline=None)
@given(good_parts())
def test_good_turns_are_exact_and_private(parts: list[str]) -> None:
    text = "".join(parts)
    turn = parse_turn(text, expect_name="Lear")
    assert render_turn(turn) == text
    assert not {d.value for d in turn.defects} - {"empty_reply"}
    latin_only = squeezed("".join(p for p in parts if not p.startswith("<") and not GREEK.search(p)))
    shown = view(turn, Reader.OTHER_CHARACTER)
    assert not GREEK.search(shown)
    assert squeezed(re.sub(r"</?role_action>", "", shown)) == latin_only
    for reader in OTHERS:
        assert not GREEK.search(view(turn, reader))
    # word for word, in order: what is taken out leaves a gap
    gaps = "".join(" " if part.startswith("<") or GREEK.search(part) else part for part in parts)
    for reader in OTHERS:
        words = re.findall(r"\w+", re.sub(r"</?role_action>", " ", view(turn, reader)))
        assert words == re.findall(r"\w+", gaps)


@settings(max_examples=800, deadline=None)
@given(good_parts(), st.data())
def test_one_broken_tag_leaks_nothing(parts: list[str], data: st.DataObject) -> None:
    """Whatever happens to one tag of a good turn, no thought is shown to anybody else."""
    places = [i for i, part in enumerate(parts) if part.startswith("<")]
    at = data.draw(st.sampled_from(places))
    tag = parts[at]
    other = data.draw(st.sampled_from([f"<{t}>" for t in TAGS] + [f"</{t}>" for t in TAGS]))
    damage = data.draw(
        st.sampled_from(
            [
                "",
                tag.upper(),
                tag.title(),
                tag[:-1],
                tag[1:],
                tag.replace("_", "-"),
                tag.replace("_", ""),
                tag.replace("_", " "),
                tag.replace("<", "< "),
                tag.replace(">", " >"),
                tag.replace("n", "", 1),
                tag.replace("<", "[").replace(">", "]"),
                tag.replace("<", "&lt;").replace(">", "&gt;"),
                tag + tag,
                tag + other,
                other + tag,
                other,
                tag.replace("role_thinking", "think").replace("system_thinking", "think"),
            ]
        )
    )
    text = "".join([*parts[:at], damage, *parts[at + 1 :]])
    for name in (None, "Lear"):
        turn = parse_turn(text, expect_name=name)
        for reader in OTHERS:
            assert not GREEK.search(view(turn, reader)), (text, view(turn, reader))
