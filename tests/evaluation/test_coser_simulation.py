"""Playing a scene: who sees what, who comes next, what is given, and how it ends."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import coser_script
import pytest
from coser_script import COSER_REPLY, HER_REPLY, cast, role_of, text_of
from scripted_endpoint import QUICK, Reply

from her_nemo.config.endpoints import RequestLimits
from her_nemo.config.errors import UserError
from her_nemo.config.evaluation import ChatModel
from her_nemo.evaluation.coser import benchmark_prompt
from her_nemo.evaluation.coser_judging import dialogue_text, judge_messages, overlap, reference_text
from her_nemo.evaluation.coser_protocol import PROTOCOLS
from her_nemo.evaluation.coser_scenes import CoserScene, read_scenes
from her_nemo.evaluation.coser_simulation import (
    NONE,
    Play,
    Simulation,
    actor_messages,
    next_speaker_messages,
    simulate,
)
from her_nemo.evaluation.endpoint import open_models
from her_nemo.evaluation.results import Line
from her_nemo.evaluation.retrieval import Library
from her_nemo.roleplay.layouts import Layout

ORDER = ("Ann", "Bob", "Environment")


def the_scene(tmp_path: Path, **changed: Any) -> CoserScene:
    (found,) = read_scenes(coser_script.write_scenes(tmp_path / "scenes.json", coser_script.scene(**changed)))
    return found


def played(
    serve, tmp_path: Path, script, protocol: str = "fixed", run: int = 0, seed: int = 0, **keys: Any
) -> tuple[Simulation, list[dict[str, Any]]]:
    """(the dialogue, all requests)."""
    server = serve(script)
    choices = PROTOCOLS[protocol]
    scene = the_scene(tmp_path, **keys.pop("scene", {}))
    chat = ChatModel(endpoint=server.url, model="scripted")

    async def work():
        roles = {"actor": chat, "environment": chat, "next_speaker": chat}
        async with open_models(
            roles, tmp_path / f"cache-{id(script)}", RequestLimits(**QUICK | {"retries": 0})
        ) as models:
            play = Play(
                protocol=choices,
                layout=keys.pop("layout", choices.layout),
                models=models,
                environment_prompt=benchmark_prompt("coser_environment", None),
                next_speaker_prompt=benchmark_prompt("coser_next_speaker", None),
                seed=seed,
                **{"max_rounds": 20, "continue_from": 0} | keys,
            )
            return await simulate(scene, play, run)

    return asyncio.run(work()), server.requests


def speakers(done: Simulation) -> list[str]:
    return [line.speaker for line in done.lines]


def reply_for(protocol: str) -> str:
    return COSER_REPLY if PROTOCOLS[protocol].layout is Layout.COSER else HER_REPLY


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nobody_sees_anothers_thoughts(serve, tmp_path, protocol) -> None:
    done, requests = played(
        serve, tmp_path, cast(order=ORDER, reply=reply_for(protocol), end_after=9), protocol
    )
    assert done.ended == "end_chat"
    assert len(done.lines) == 9
    for request in requests:
        text = text_of(request)
        role = role_of(request)
        system = request["messages"][0]["content"]
        spoke = role == "actor" and any(message["role"] == "assistant" for message in request["messages"])
        for name in ("Ann", "Bob"):
            assert (f"Secret {name}" in text) is (spoke and system.startswith(f"You are {name} ")), (
                role,
                name,
            )
        # HER's fork alone shows an actor his own earlier plans.
        assert ("A plan." in text) is (spoke and protocol == "her")


MALFORMED = (
    "<system_thinking>A plan.</system_thinking>{name}: <role_thinking>Secret {name}. (still secret {n})"
)


def test_a_thought_that_is_never_closed_stays_private(serve, tmp_path) -> None:
    done, requests = played(serve, tmp_path, cast(order=ORDER, reply=MALFORMED, end_after=7))
    others = [r for r in requests if role_of(r) != "actor"]
    assert others
    for request in others:
        assert "ecret" not in text_of(request)
    scene = the_scene(tmp_path)
    for protocol in PROTOCOLS.values():
        shown = dialogue_text(done.lines, protocol)
        assert "A plan." not in shown
        assert ("Secret Ann" in shown) is (protocol.name == "her")
    assert overlap(scene, done, PROTOCOLS["fixed"], 0)["BLEU"] == 0.0


def test_the_dialogue_goes_as_predicted(serve, tmp_path) -> None:
    done, _ = played(serve, tmp_path, cast(order=ORDER, end_after=8), "upstream", layout=Layout.HER)
    # The first of the list begins; then the order, ended by the eighth prediction.
    assert speakers(done) == ["Ann", "Bob", "Environment", "Ann", "Bob", "Environment", "Ann", "Bob"]
    assert done.actor_messages == 6
    assert [line.source for line in done.lines[:3]] == ["actor", "actor", "environment"]
    fixed, _ = played(serve, tmp_path, cast(order=("Bob", "Ann"), end_after=8))
    assert speakers(fixed)[:3] == ["Bob", "Ann", "Bob"], "in the book Bob begins"


@pytest.mark.parametrize(("end_after", "messages"), [(1, 6), (5, 6), (6, 6), (7, 7)])
def test_the_end_is_accepted_from_the_sixth_message_on(serve, tmp_path, end_after, messages) -> None:
    script = cast(order=("Bob", "Ann"), end_after=end_after)
    done, _ = played(serve, tmp_path, script)
    assert (done.ended, len(done.lines)) == ("end_chat", messages)
    early = [prediction for prediction in done.predictions[:-1] if prediction == NONE]
    assert len(early) == max(0, messages - end_after)


def test_no_more_than_max_rounds(serve, tmp_path) -> None:
    script = cast(order=("Ann", "Bob"), end_after=1000)
    done, requests = played(serve, tmp_path, script)
    assert (done.ended, len(done.lines), len(requests)) == ("rounds", 20, 39), (
        "nobody is asked who is next at the end"
    )
    done, _ = played(serve, tmp_path, script, max_rounds=3)
    assert len(done.lines) == 3


def test_a_prediction_that_is_none_is_drawn_from_the_seed(serve, tmp_path) -> None:
    def script(request: dict[str, Any], number: int) -> Reply:
        return Reply("random") if role_of(request) == "next_speaker" else Reply("Hm.")

    one, _ = played(serve, tmp_path, script, seed=1)
    again, _ = played(serve, tmp_path, script, seed=1)
    other, _ = played(serve, tmp_path, script, seed=2)
    assert speakers(one) == speakers(again) != speakers(other)
    assert set(speakers(one)) == {"Ann", "Bob", "Environment"}
    assert all(first != second for first, second in zip(speakers(one), speakers(one)[1:], strict=False))
    assert set(one.predictions) == {NONE}


def test_upstream_reads_its_instructions_again(serve, tmp_path) -> None:
    def script(request: dict[str, Any], number: int) -> Reply:
        return Reply("random") if role_of(request) == "next_speaker" else Reply("Hm.")

    for protocol, times in (("upstream", 3), ("her", 1), ("fixed", 1)):
        _, requests = played(serve, tmp_path, script, protocol, max_rounds=4)
        last = [request for request in requests if role_of(request) == "next_speaker"][-1]
        assert text_of(last).count("You direct a role-play") == times


# ---------------------------------------------------------------- messages from the data


def test_given_messages_keep_their_speakers_in_fixed(serve, tmp_path) -> None:
    script = cast(order=("Ann", "Bob"), end_after=9)
    done, requests = played(serve, tmp_path, script, continue_from=3)
    assert speakers(done)[:4] == ["Bob", "Ann", "Environment", "Bob"], "Bob is next in the book"
    assert [line.source for line in done.lines[:4]] == ["given"] * 3 + ["actor"]
    assert done.given == 3
    assert done.actor_messages == sum(line.source == "actor" for line in done.lines)
    first = next(request for request in requests if role_of(request) == "actor")
    assert [message["role"] for message in first["messages"]] == ["system", "user", "assistant", "user"]
    assert "<role_thinking>She knows.</role_thinking>" in first["messages"][2]["content"]
    assert "I burnt it" not in text_of(first)


def test_given_messages_go_down_the_list_upstream(serve, tmp_path) -> None:
    script = cast(order=("Ann", "Bob"), reply=COSER_REPLY, end_after=9)
    done, _ = played(serve, tmp_path, script, "upstream", continue_from=3)
    # Bob's words in Ann's mouth; then Ann is predicted, who has just spoken, so another is drawn.
    assert speakers(done)[0] == "Ann"
    assert done.lines[0].text == "[She knows.] (bows) Good evening."
    assert done.predictions[0] == NONE
    assert done.actor_messages == sum(line.speaker != "Environment" for line in done.lines)


def test_a_whole_book_given(serve, tmp_path) -> None:
    done, requests = played(serve, tmp_path, cast(order=("Ann", "Bob"), end_after=1), continue_from=9)
    assert speakers(done)[:4] == ["Bob", "Ann", "Environment", "Bob"]
    assert done.given == 4
    assert role_of(requests[0]) == "next_speaker", "the book is at its end: the model is asked"


def test_what_a_character_remembers(tmp_path) -> None:
    book = {
        "plots": [
            {"text": "They hid a letter.", "summary": "s", "key_characters": [], "conversation": []},
        ],
        "character_datasets": {"Ann": {"plots": [{"i_p": 0}], "conversations": [], "utterances": []}},
    }
    (tmp_path / "The Tale.json").write_text(json.dumps(book))
    scene = the_scene(tmp_path)

    def system(protocol: str, name: str) -> str:
        choices = PROTOCOLS[protocol]
        library = Library(tmp_path, "raw_text", held_out=choices.held_out_found)
        prompt = benchmark_prompt("coser_environment", None)
        play = Play(choices, choices.layout, {}, prompt, prompt, 20, 0, 0, library)
        return actor_messages(scene, play, name, [])[0]["content"]

    for protocol in ("upstream", "fixed"):
        ann = system(protocol, "Ann")
        remembered = "===What You Remember===\n# From the book\n\nThey hid a letter.\n\n===Requirements==="
        assert remembered in ann
        assert ("{retrieved_knowledge}" in system(protocol, "Bob")) is (protocol == "upstream")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_name_is_read_first_as_often_as_the_others(tmp_path, protocol) -> None:
    choices, prompt = PROTOCOLS[protocol], benchmark_prompt("coser_next_speaker", None)
    play = Play(choices, choices.layout, {}, prompt, prompt, 20, 0, 0)
    scene = the_scene(tmp_path)
    read = [next_speaker_messages(scene, play, [], [], run)[0]["content"] for run in range(6)]
    lists = [re.search(r"Choose one of: (.+?)\. The Environment", text).group(1).split(", ") for text in read]
    assert all(sorted(names) == ["Ann", "Bob", "Environment"] for names in lists)
    first = Counter(names[0] for names in lists)
    assert first == ({"Ann": 2, "Bob": 2, "Environment": 2} if protocol == "fixed" else {"Ann": 6}), lists


# ---------------------------------------------------------------- what the judge sees


def simulated() -> Simulation:
    lines = [
        Line(
            "Ann",
            "<system_thinking>P.</system_thinking>Ann: <role_thinking>T.</role_thinking>Hello "
            "<role_action>sits</role_action>",
        ),
        Line("Bob", "<role_action>nods</role_action> Yes."),
        Line("Environment", "Rain falls.", "environment"),
    ]
    return Simulation(lines=lines, given=0, actor_messages=2)


@pytest.mark.parametrize(
    ("protocol", "shown"),
    [
        ("upstream", "Ann: Hello (sits)\n\n(nods) Yes.\n\nRain falls."),
        ("her", "Ann: [T.] Hello (sits)\n\n(nods) Yes.\n\nRain falls."),
        ("fixed", "Ann: Hello (sits)\n\nBob: (nods) Yes.\n\nEnvironment: Rain falls."),
    ],
)
def test_the_judge_sees_the_dialogue_as_the_protocol_shows_it(protocol, shown) -> None:
    assert dialogue_text(simulated().lines, PROTOCOLS[protocol]) == shown


@pytest.mark.parametrize(
    ("protocol", "shown"),
    [
        ("upstream", "Bob: (bows) Good evening."),
        ("her", "Bob: [She knows.] (bows) Good evening."),
        ("fixed", "Bob: (bows) Good evening."),
    ],
)
def test_the_judge_sees_the_book_alike(tmp_path, protocol, shown) -> None:
    text = reference_text(the_scene(tmp_path), PROTOCOLS[protocol])
    assert text.split("\n\n")[0] == shown
    assert text.split("\n\n")[2] == "Environment: A door slams [far off]."


def test_the_judges_prompt(tmp_path) -> None:
    scene, done = the_scene(tmp_path), simulated()
    prompt = benchmark_prompt("coser_judge", None)

    def system(protocol: str, dimension: str) -> str:
        return judge_messages(scene, done, prompt, PROTOCOLS[protocol], dimension)[0]["content"]

    assert "the main characters only: Ann, Bob." in system("fixed", "Character Fidelity")
    assert "the main characters only: {major_characters}." in system("upstream", "Character Fidelity")
    assert "square brackets" in system("her", "Anthropomorphism")
    assert "square brackets" not in system("upstream", "Anthropomorphism")
    assert "## Ann\nA lady.\n\nAnn is proud." in system("fixed", "Storyline Quality")
    assert "{{" not in system("fixed", "Storyline Consistency")
    done.given = 2
    for protocol, told in (("upstream", True), ("her", False), ("fixed", True)):
        assert ("The first 2 messages" in system(protocol, "Storyline Quality")) is told


def test_overlap_by_hand(tmp_path) -> None:
    scene = the_scene(tmp_path)
    done = Simulation(
        lines=[
            Line("Bob", "Bob: <role_thinking>No.</role_thinking>Good evening."),
            Line("Ann", "Where is it?"),
        ]
    )
    # fixed: "good evening where is it" against "bows good evening", "where is my letter", "a door slams far off",
    # "i have no letter": four words in common, of 5 and 16.
    fixed = overlap(scene, done, PROTOCOLS["fixed"], 0)
    assert fixed["ROUGE-L"] == pytest.approx(2 * 4 / (5 + 16))
    # Left out: the first two of each.
    assert overlap(scene, done, PROTOCOLS["fixed"], 2) == {}
    # upstream: the book's four names too, and the one that the model wrote: "bob good evening where is", of 6 and 20.
    upstream = overlap(scene, done, PROTOCOLS["upstream"], 0)
    assert upstream["ROUGE-L"] == pytest.approx(2 * 5 / (6 + 20))


# ---------------------------------------------------------------- failures and files


@pytest.mark.parametrize("who", ["actor", "environment", "next_speaker"])
def test_a_call_that_fails_ends_the_scene(serve, tmp_path, who) -> None:
    fine = cast(order=ORDER, end_after=9)

    def script(request: dict[str, Any], number: int) -> Reply:
        if role_of(request) == who and number > 3:
            return Reply(status=400, text="too long")
        return fine(request, number)

    done, _ = played(serve, tmp_path, script)
    assert done.ended == "failed"
    assert done.failure is not None
    assert (done.failure.role, done.failure.kind) == (who, "endpoint")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dialogues": []}, "'dialogues' is empty"),
        ({"plot": {}}, "no field 'summary'"),
        ({"speaking_characters_w_env": ["Ann"]}, "Bob, Environment speaks|Bob speaks"),
        ({"scenario": 7}, "7 is not text"),
    ],
)
def test_a_scene_that_cannot_be_played(tmp_path, changed, said) -> None:
    with pytest.raises(UserError, match=said):
        the_scene(tmp_path, **changed)


def test_files_that_hold_no_scenes(tmp_path) -> None:
    for text, said in (("{}", "not a list"), ("[", "not JSON"), ("[]", "not a list")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read_scenes(tmp_path / "x.json")
    twice = coser_script.write_scenes(tmp_path / "x.json", coser_script.scene(), coser_script.scene())
    with pytest.raises(UserError, match="The Tale-3-1: more than one"):
        read_scenes(twice)


def test_the_public_scenes(shared_data) -> None:
    scenes = read_scenes(shared_data / "coser" / "test_set_sample.json")
    assert [scene.scene_id for scene in scenes] == ["King Lear-17-0", "King Lear-16-0", "Othello-9-0"]
    assert [len(scene.dialogue) for scene in scenes] == [10, 10, 11]
    lear = scenes[0]
    assert lear.speakers == ("Fool", "King Lear", "Environment")
    assert lear.profiles["Fool"].startswith("A witty figure who accompanies King Lear")
    assert lear.dialect.value == "coser"
