"""System thinking and settings: what a character may know, plans that keep the rules, profiles that only grow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import samples
from scripted_endpoint import Reply

from her_nemo.config.synthesis import Settings, SystemThinking
from her_nemo.data.records import ConversationTurn, read_conversations
from her_nemo.data.synthesis.part import CharacterPart, parts
from her_nemo.data.synthesis.settings import (
    Addition,
    Gap,
    GapsAnswer,
    LookupAnswer,
    check_additions,
    check_gaps,
    extended,
    passages,
)
from her_nemo.data.synthesis.system_thinking import RewriteAnswer, RewrittenPlan, check, plans_of
from her_nemo.roleplay.prompt import CONVERSATION_START

ADA, BEN = 0, 1
SECRET = "I moved it."


def part(who: int = ADA, **changes) -> CharacterPart:
    conversation = replace(samples.small(), **changes)
    return CharacterPart(conversation, conversation.characters[who])


def good(request, number=0) -> Reply:
    return Reply(json.dumps(samples.good(request)))


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- system thinking


def test_plans_are_made_of_what_the_character_may_know(serve, settings, synthesise, tmp_path) -> None:
    source = samples.write(tmp_path / "in.jsonl", [samples.small()])
    server = serve(good)
    cfg = settings(server, source, stage="system_thinking")
    synthesise(cfg)
    (after,) = read_conversations(Path(cfg.out) / "conversations.jsonl")
    assert [turn.text for turn in after.turns] == [turn.text for turn in samples.small().turns]
    assert [bool(turn.plan) for turn in after.turns] == [False, True, True, True, True, True, True]
    by_kind: dict[str, list[dict]] = {}
    for request in server.requests:
        by_kind.setdefault(request["response_format"]["json_schema"]["name"], []).append(request)
    assert {kind: len(asked) for kind, asked in by_kind.items()} == {"ForwardAnswer": 6, "RewriteAnswer": 2}
    for request in by_kind["ForwardAnswer"]:
        messages = request["messages"]
        assert messages[0]["content"].startswith(("You are Ada from The Well.", "You are Ben from The Well."))
        assert messages[1]["content"].startswith(CONVERSATION_START)
        assert messages[-1]["role"] == "user"
    whole = {who: "".join(json.dumps(r["messages"]) for r in server.requests if who in json.dumps(r["messages"][0]))
             for who in ("You are Ada", "plans for an actor. A plan is what the one who plays Ada")}  # fmt: skip
    assert all(whole.values())
    for text in whole.values():
        assert SECRET not in text, "Ben's thought shown to Ada"
    assert any(SECRET in json.dumps(r["messages"]) for r in by_kind["RewriteAnswer"]), (
        "Ben's own plans see it"
    )


def test_a_forward_request_ends_before_the_turn_it_plans(serve, settings, synthesise, tmp_path) -> None:
    source = samples.write(tmp_path / "in.jsonl", [samples.small()])
    server = serve(good)
    synthesise(settings(server, source, stage="system_thinking"))
    last = "We shall ask him tonight"
    asked = [
        request["messages"]
        for request in server.requests
        if request["response_format"]["json_schema"]["name"] == "ForwardAnswer"
        and request["messages"][0]["content"].startswith("You are Ada")
    ]
    assert len(asked) == 3
    assert not any(last in json.dumps(messages) for messages in asked)


def test_the_models_own_reasoning_as_raw_plan(serve, settings, synthesise, tmp_path) -> None:
    source = samples.write(tmp_path / "in.jsonl", [samples.small()])

    def script(request, number):
        if "response_format" in request:
            return good(request)
        name = "Ada" if "You are Ada" in request["messages"][0]["content"] else "Ben"
        return Reply(f"{name}: Well then.", reasoning=samples.plan(name, 77))

    server = serve(script)
    cfg = settings(server, source, stage="system_thinking", system_thinking={"forward": "reasoning"})
    synthesise(cfg)
    (after,) = read_conversations(Path(cfg.out) / "conversations.jsonl")
    # The stand-in keeps every other raw plan.
    assert sum("move 77" in (turn.plan or "") for turn in after.turns) == 4
    silent = serve(
        lambda request, number: good(request) if "response_format" in request else Reply("Ada: Hm.")
    )
    cfg = settings(
        silent,
        source,
        stage="system_thinking",
        system_thinking={"forward": "reasoning"},
        out=str(tmp_path / "b"),
    )
    synthesise(cfg)
    faults = {row["faults"][0]["kind"] for row in rows(tmp_path / "b" / "quarantine.jsonl")}
    assert faults == {"no_reasoning"}


def test_plans_that_are_there_are_the_raw_plans(serve, settings, synthesise, tmp_path) -> None:
    conversation = samples.small()
    turns = tuple(
        turn if turn.speaker == "Environment" else replace(turn, plan=samples.plan(turn.speaker, 5))
        for turn in conversation.turns
    )
    source = samples.write(tmp_path / "in.jsonl", [replace(conversation, turns=turns)])
    server = serve(good)
    synthesise(settings(server, source, stage="system_thinking"))
    assert len(server.requests) == 2, "no forward request"
    assert "move 5" in server.requests[0]["messages"][1]["content"]


def rewritten(*entries: tuple[int, str, str]) -> RewriteAnswer:
    return RewriteAnswer(plans=[RewrittenPlan(turn=t, action=a, plan=p) for t, a, p in entries])


def plan(extra: str = "", length: int = 900) -> str:
    text = f"{extra} {samples.plan('Ada', 3)}".strip()
    return text[:length] if len(text) >= length else text + "x" * (length - len(text))


ADAS = (2, 4, 6)  # numbers of Ada's turns
RAW = {1: plan(), 3: plan(), 5: ""}


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ((2, "write", plan(length=799)), "plan_length"),
        ((2, "write", plan(length=1501)), "plan_length"),
        ((2, "third_person", plan(length=199)), "plan_length"),
        ((2, "write", plan("I should look for the lever first.")), "first_person"),
        ((2, "write", plan("Let us ask the miller.")), "first_person"),
        ((2, "write", plan("<system_thinking>Ada looks")), "tag_in_text"),
        (
            (2, "write", plan("Say that the well is dry again, Ben. Someone has moved the stone.")),
            "quotes_reply",
        ),
        (
            (2, "write", plan("Then it was the miller's boy, who else would dare to do it, he will say.")),
            "future",
        ),
        (
            (2, "write", plan("In truth it was the smell of wet rope that frightened him so badly.")),
            "mind_reading",
        ),
        ((6, "keep", ""), "nothing_to_keep"),
        ((7, "write", plan()), "wrong_turn"),
    ],
)
def test_a_plan_that_is_refused(entry, kind) -> None:
    turns = list(samples.small().turns)
    secret = "<role_thinking>It was the smell of wet rope that frightened me.</role_thinking> Not I, Ada."
    turns[2] = ConversationTurn("Ben", secret)
    fine = [(number, "write", plan()) for number in ADAS if number != entry[0]]
    faults = check(part(turns=tuple(turns)), RAW, rewritten(entry, *fine), SystemThinking())
    assert kind in [fault.kind for fault in faults], faults


def test_every_turn_has_one_plan() -> None:
    for numbers in ((2, 4), (2, 4, 4, 6), ()):
        faults = check(part(), RAW, rewritten(*[(n, "write", plan()) for n in numbers]), SystemThinking())
        assert [fault.kind for fault in faults] == ["missing_plan"] * max(1, 3 - len(numbers)), numbers


def test_a_plan_may_repeat_what_the_character_has_heard() -> None:
    heard = plan("Ben says it was the miller\u2019s boy, who else would dare to do it.")
    answer = rewritten((2, "write", plan()), (4, "keep", ""), (6, "write", heard))
    assert check(part(), RAW, answer, SystemThinking()) == []
    assert plans_of(RAW, answer)[3] == RAW[3], "kept as it was"


def test_a_raw_plan_as_i_is_not_kept() -> None:
    raw = RAW | {1: plan("I want to know who moved the stone.")}
    fine = [(number, "write", plan()) for number in (4, 6)]
    faults = check(part(), raw, rewritten((2, "keep", ""), *fine), SystemThinking())
    assert [fault.kind for fault in faults] == ["first_person"]


def test_first_person_inside_quotation_marks_is_anothers() -> None:
    answer = rewritten(
        *[(n, "write", plan("Ben may only say \u201cI saw nothing\u201d to that.")) for n in ADAS]
    )
    assert check(part(), RAW, answer, SystemThinking()) == []


# ---------------------------------------------------------------- settings


def test_a_profile_only_grows(serve, settings, synthesise, tmp_path) -> None:
    silent = replace(samples.small(1), source_text="")
    source = samples.write(tmp_path / "in.jsonl", [samples.small(0), silent])
    server = serve(good)
    cfg = settings(server, source, stage="settings")
    synthesise(cfg)
    after = list(read_conversations(Path(cfg.out) / "conversations.jsonl"))
    for old, new in zip(samples.small(0).characters, after[0].characters, strict=True):
        assert new.profile.startswith(old.profile + "\n\n")
        assert "craftsmen" in new.profile
    assert after[1] == silent, "no source text, nothing to look up"
    assert len(server.requests) == 4
    summary = json.loads((Path(cfg.out) / "summary.json").read_text())
    assert summary["units"]["settings"]["without_work"] == 2
    for request in server.requests:
        if "of Ada" in request["messages"][0]["content"]:
            assert SECRET not in json.dumps(request["messages"]), "Ben's thought shown to Ada's editor"


GAP = Gap(turn=2, behaviour="Reads marks in the stone.", question="marks, stone, mason")
FOUND = {
    "gap": 1,
    "found": True,
    "text": "Ada's father was a mason, and she learned to read tool marks from him.",
    "evidence": "She read marks in stone as others read letters",
}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"evidence": "She read marks in stone as others read books"}, "no_evidence"),
        ({"evidence": "She read marks"}, "no_evidence"),
        ({"evidence": ""}, "no_evidence"),
        ({"text": "A mason's girl."}, "addition_length"),
        ({"text": "I learned to read tool marks from my father, who was a mason."}, "first_person"),
        ({"text": "Ada keeps the village's well and trusts her eyes."}, "repeats_profile"),
        ({"text": "Ada says: there are fresh marks of a lever here, and we shall ask him."}, "quotes_reply"),
        ({"text": "Ada <role_action>reads</role_action> tool marks as letters."}, "tag_in_text"),
        ({"found": False}, "not_found"),
        ({"gap": 2}, "wrong_gap"),
    ],
)
def test_an_addition_that_is_refused(change, kind) -> None:
    turns = list(samples.small().turns)
    turns[3] = ConversationTurn("Ada", "There are fresh marks of a lever here, and we shall ask him.")
    answer = LookupAnswer(additions=[Addition(**FOUND | change)])
    faults = check_additions(part(turns=tuple(turns)), [GAP], answer)
    assert kind in [fault.kind for fault in faults], faults


def test_an_addition_that_is_taken() -> None:
    nothing = Addition(gap=2, found=False, text="", evidence="")
    answer = LookupAnswer(additions=[Addition(**FOUND), nothing])
    assert check_additions(part(), [GAP, GAP], answer) == []
    assert extended("Ada.", answer) == f"Ada.\n\n{FOUND['text']}"
    assert extended("", answer) == FOUND["text"]
    assert extended("Ada.", LookupAnswer(additions=[nothing])) == "Ada."


def test_gaps_are_about_the_characters_turns() -> None:
    other = GapsAnswer(gaps=[Gap(turn=3, behaviour="b", question="q")])
    assert [fault.kind for fault in check_gaps(part(), other, Settings())] == ["wrong_turn"]
    many = GapsAnswer(gaps=[GAP] * 7)
    assert [fault.kind for fault in check_gaps(part(), many, Settings())] == ["too_many"]


def test_passages_of_a_long_book() -> None:
    filler = [f"On day {i} it rained over the hills and nothing else was written down." for i in range(400)]
    filler[321] = "The mason's daughter learned to read marks in stone."
    book = "\n\n".join(filler)
    assert "".join("".join(passages(book, [], 10**6)).split()) == "".join(book.split()), "all of a short text"
    chosen = passages(book, ["marks in stone: mason?"], 3000)
    assert sum(map(len, chosen)) <= 3000
    assert any("mason's daughter" in passage for passage in chosen)
    assert [book.index(passage[:30]) for passage in chosen] == sorted(book.index(p[:30]) for p in chosen)


def test_who_is_asked_about() -> None:
    conversation = samples.small()
    minor = replace(conversation.characters[1], key=False)
    assert [p.character.name for p in parts([conversation])] == ["Ada", "Ben"]
    with_minor = replace(conversation, characters=(conversation.characters[0], minor))
    assert [p.character.name for p in parts([with_minor])] == ["Ada"]
    dumb = replace(conversation, turns=conversation.turns[:2])
    assert [p.character.name for p in parts([dumb])] == ["Ada"]
