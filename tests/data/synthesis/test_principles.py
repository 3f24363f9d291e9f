"""From preference pairs to a library, and the file form both have."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from scripted_endpoint import Reply

from her_nemo.config.errors import UserError
from her_nemo.data.synthesis.principles import CaseAnswer, CasePrinciple, check_case, distinct, names_in
from her_nemo.roleplay.principles import (
    Dimension,
    Level,
    Polarity,
    Principle,
    parse_library,
    shipped_library,
    write_library,
)

needs_scikit_learn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn (the extra `synthesis`)"
)
SYSTEM = (
    "You are Ada from The Well.\n\n===Ada's Profile===\nA keeper.\n\n"
    "===Information about other Characters===\n**Ben**: A carpenter."
)
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Ben: Well?"}]
# Two things are seen again and again in other words, one only once.
ACTION, DIALOGUE, WORLD = "Action Description", "Dialogue & Interaction", "Worldview Consistency"
SEEN = [
    (ACTION, "Props in use", "Objects of the scene such as a cup are picked up and used with purpose."),
    (ACTION, "Uses the props", "Objects of the scene are picked up and used with a purpose that shows."),
    (ACTION, "Props have purpose", "Objects of the scene such as tools are used with purpose in the action."),
    (DIALOGUE, "Empty echo", "The reply repeats the question of the partner and adds nothing to it."),
    (DIALOGUE, "Echo without content", "The reply repeats the question and adds nothing of its own."),
    (WORLD, "Fits the age", "Oaths, tools and manners belong to the period that the story is set in."),
]


def case(**changes) -> CasePrinciple:
    values = {
        "dimension": Dimension.ACTION,
        "name": "Props in use",
        "definition": "Objects of the scene are picked up and used with a purpose that one can see.",
        "level": Level.SENTENCE,
        "polarity": Polarity.POSITIVE,
        "evidence": "takes the cup",
    }
    return CasePrinciple(**values | changes)


def pair(number: int = 0) -> dict:
    return {
        "trace_id": f"pair-{number}",
        "messages": MESSAGES,
        "chosen": f"Ada: <role_action>takes the cup</role_action> Well, number {number}.",
        "rejected": "Ada: You ask me well?",
    }


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- the shipped library


def test_the_shipped_library() -> None:
    library = shipped_library()
    assert 45 <= len(library) <= 60
    for dimension in Dimension:
        own = [principle for principle in library if principle.dimension is dimension]
        assert len(own) >= 4
        assert {principle.polarity for principle in own} == set(Polarity)
        assert {principle.level for principle in own} == set(Level)
    definitions = [principle.definition for principle in library]
    assert len(set(definitions)) == len(definitions)
    assert all(40 <= len(definition) <= 400 for definition in definitions)
    assert parse_library(write_library(library)) == library


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- a list", "no dimensions"),
        ("Prettiness: []", "Prettiness"),
        ("Narrative & Plot: [{name: A, definition: B, level: page, polarity: positive}]", "page"),
        ("Narrative & Plot: [{name: A, level: session, polarity: positive}]", "definition"),
        (
            "Narrative & Plot: [&a {name: A, definition: B, level: session, polarity: positive}, *a]",
            "narrative-plot/a comes twice",
        ),
        ("Narrative & Plot: [", "not YAML"),
    ],
)
def test_a_library_that_is_none(text, word) -> None:
    with pytest.raises(ValueError, match=word):
        parse_library(text)


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"definition": "Props are used."}, "definition_length"),
        (
            {"definition": "Whoever plays Ada takes up the objects of the scene with a purpose."},
            "case_specific",
        ),
        ({"definition": "In The Well, objects of the scene are taken up with a purpose."}, "case_specific"),
        ({"name": "What Ben sees"}, "case_specific"),
        ({"evidence": "drops the cup"}, "no_evidence"),
        ({"evidence": ""}, "no_evidence"),
    ],
)
def test_a_case_that_is_refused(change, kind) -> None:
    faults = check_case(pair(), CaseAnswer(principles=[case(**change)]))
    assert kind in [fault.kind for fault in faults]
    assert check_case(pair(), CaseAnswer(principles=[case()])) == []
    assert [f.kind for f in check_case(pair(), CaseAnswer(principles=[]))] == ["principle_count"]


def test_names_of_a_prompt() -> None:
    assert names_in(MESSAGES) == ["Ada", "The Well", "Ben"]
    assert names_in([{"role": "system", "content": "Be a pirate."}]) == []


def test_names_that_come_twice_are_numbered() -> None:
    one = Principle(Dimension.NARRATIVE, "A", "B", Level.SESSION, Polarity.POSITIVE, 2)
    assert [principle.name for principle in distinct([one, one, one])] == ["A", "A (2)", "A (3)"]
    assert parse_library(write_library(distinct([one, one]))) == tuple(distinct([one, one]))


# ---------------------------------------------------------------- the whole way


@pytest.fixture
def source(tmp_path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(len(SEEN))))
    return file


def script(request, number) -> Reply:
    if "input" in request:
        about = [
            ("props" in text.lower(), "echo" in text.lower(), "age" in text.lower())
            for text in request["input"]
        ]
        return Reply(embeddings=[[float(value) + 0.01 for value in row] for row in about])
    user = request["messages"][1]["content"]
    if request["response_format"]["json_schema"]["name"] == "CaseAnswer":
        dimension, name, definition = SEEN[int(user.split("number ")[1].split(".")[0])]
        polarity, evidence = "negative" if dimension == DIALOGUE else "positive", "takes the cup"
        principle = {"dimension": dimension, "name": name, "definition": definition, "level": "sentence",
                     "polarity": polarity, "evidence": evidence}  # fmt: skip
        return Reply(json.dumps({"principles": [principle]}))
    polarity = "negative" if "Dialogue" in user else "positive"
    name = "Echo" if "Dialogue" in user else "Props"
    definition = f"What the cases of {name} have in common, said so that it holds in any story."
    return Reply(
        json.dumps({"name": name, "definition": definition, "level": "sentence", "polarity": polarity})
    )


@needs_scikit_learn
@pytest.mark.parametrize("embedding", [None, "some-embedder"])
def test_pairs_become_a_library(serve, settings, synthesise, source, embedding, capsys) -> None:
    server = serve(script)
    cfg = settings(server, source, stage="principles", principles={"embedding_model": embedding})
    synthesise(cfg)
    out = Path(cfg.out)
    library = parse_library((out / "library.yaml").read_text())
    assert [(p.dimension.value, p.name, p.support) for p in library] == [
        ("Action Description", "Props", 3),
        ("Dialogue & Interaction", "Echo", 2),
    ]
    assert len(rows(out / "cases.jsonl")) == len(SEEN)
    assert "6 case principles: 2 clusters, 1 cases in none" in capsys.readouterr().out
    asked = len(server.requests)
    synthesise(cfg)
    assert len(server.requests) == asked, "cases, vectors and clusters are all cached"


@needs_scikit_learn
def test_texts_without_a_direction_are_clusters_of_their_own() -> None:
    import numpy as np

    from her_nemo.data.synthesis.principles import group_vectors

    labels = group_vectors(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.01]]), 0.5)
    assert labels[1] == labels[3]
    assert len(set(labels)) == 3


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is not None, reason="scikit-learn is installed")
def test_without_scikit_learn_nothing_is_asked(serve, settings, synthesise, source) -> None:
    server = serve(script)
    with pytest.raises(UserError, match=r"her-nemo\[synthesis\]"):
        synthesise(settings(server, source, stage="principles"))
    assert server.requests == []
