"""Principles from preference pairs: asked case by case, embedded, clustered, and each cluster distilled to one."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from her_nemo.config.errors import UserError
from her_nemo.config.synthesis import PrinciplesStage
from her_nemo.data.synthesis import language
from her_nemo.data.synthesis.asker import Answer, Asked, Asker, Fault
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.data.synthesis.runner import Unit
from her_nemo.roleplay.principles import Dimension, Level, Polarity, Principle

MIN_CHARACTERS, MAX_CHARACTERS = 40, 400  # of a definition
MAX_PER_CASE = 3
EMBEDDING_BATCH = 64
_NAMED = re.compile(r"You are (.+?) from (.+?)\.\n")
_OTHERS = re.compile(r"^\*\*(.+?)\*\*: ", re.MULTILINE)


class CasePrinciple(Answer):
    """Why one reply was preferred to another."""

    dimension: Dimension
    name: str = Field(min_length=1, max_length=80)
    definition: str
    level: Level
    polarity: Polarity
    evidence: str


class CaseAnswer(Answer):
    """What the prompt principles_case asks for."""

    principles: list[CasePrinciple]


class DistilledPrinciple(Answer):
    """What the prompt principles_distil asks for."""

    name: str = Field(min_length=1, max_length=80)
    definition: str
    level: Level
    polarity: Polarity


@dataclass(frozen=True)
class Cluster:
    """Case principles of one dimension and polarity that mean much the same."""

    dimension: Dimension
    polarity: Polarity
    cases: tuple[CasePrinciple, ...]


def require_scikit_learn() -> None:
    """Before anything is asked and paid for. Raises UserError without it."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(
            "stage=principles clusters with scikit-learn, which is not installed: pip install 'her-nemo[synthesis]'"
        )


# ---------------------------------------------------------------- by case


def case_unit(pair: Mapping[str, Any], asker: Asker, prompt: PromptFile) -> Unit[list[CasePrinciple]]:
    """The work on one preference pair (`messages`, `chosen`, `rejected`)."""

    async def work() -> tuple[list[CasePrinciple], Sequence[Asked]]:
        messages = prompt.messages(
            messages=pair["messages"],
            chosen=pair["chosen"],
            rejected=pair["rejected"],
            max_principles=MAX_PER_CASE,
            dimensions="; ".join(Dimension),
            min_characters=MIN_CHARACTERS,
            max_characters=MAX_CHARACTERS,
        )
        given = await asker.ask(prompt, messages, CaseAnswer, lambda answer: check_case(pair, answer))
        return given.answer.principles, given.trace

    return Unit(pair["trace_id"], work)


def check_case(pair: Mapping[str, Any], answer: CaseAnswer) -> list[Fault]:
    """How many, how long, about no one in particular, and with evidence."""
    faults = []
    if not 1 <= len(answer.principles) <= MAX_PER_CASE:
        message = f"{len(answer.principles)} principles; give 1 to {MAX_PER_CASE}"
        faults.append(Fault("principle_count", message))
    replies = " \n ".join(" ".join(language.words(pair[key])) for key in ("chosen", "rejected"))
    named = names_in(pair["messages"])
    for index, principle in enumerate(answer.principles, start=1):
        for fault in definition_faults(
            f"{principle.name}. {principle.definition}", principle.definition, named
        ):
            faults.append(Fault(fault.kind, f"principle {index}: {fault.message}"))
        evidence = " ".join(language.words(principle.evidence))
        if not evidence or evidence not in replies:
            message = f"principle {index}: the evidence is in neither reply: {principle.evidence[:60]!r}"
            faults.append(Fault("no_evidence", message))
    return faults


def names_in(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of characters and of the book, from HER's system prompt; none where it is another."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    found = _NAMED.match(system)
    return [*(found.groups() if found else ()), *_OTHERS.findall(system)]


def definition_faults(text: str, definition: str, names: Sequence[str]) -> list[Fault]:
    """A definition that is too short or long, or that only fits its own case."""
    faults = []
    if not MIN_CHARACTERS <= len(definition.strip()) <= MAX_CHARACTERS:
        limits = f"{MIN_CHARACTERS} to {MAX_CHARACTERS}"
        message = f"the definition has {len(definition.strip())} characters, not {limits}"
        faults.append(Fault("definition_length", message))
    spoken = f" {' '.join(language.words(text))} "
    for name in names:
        if f" {' '.join(language.words(name))} " in spoken:
            faults.append(Fault("case_specific", f"it names {name!r}; a principle must hold in any story"))
    return faults


# ---------------------------------------------------------------- embedding and clustering


async def embed(texts: Sequence[str], asker: Asker, rules: PrinciplesStage) -> NDArray[np.float64]:
    """One row per text: TF-IDF over words and pairs of words, or the endpoint's embedding model."""
    if rules.embedding_model is None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), stop_words="english")
        return vectorizer.fit_transform(texts).toarray()
    rows: list[list[float]] = []
    for start in range(0, len(texts), EMBEDDING_BATCH):
        rows += await asker.embed(rules.embedding_model, list(texts[start : start + EMBEDDING_BATCH]))
    return np.array(rows)


async def clusters(
    cases: Sequence[CasePrinciple], asker: Asker, rules: PrinciplesStage
) -> tuple[list[Cluster], int]:
    """Clusters of at least rules.min_cluster cases, by dimension, the largest first; and how many cases are in none.

    Only cases of one dimension and polarity are compared: a virtue and its opposite share their words.
    """
    if not cases:
        return [], 0
    vectors = await embed([f"{case.name}. {case.definition}" for case in cases], asker, rules)
    found: list[Cluster] = []
    for dimension in Dimension:
        for polarity in Polarity:
            group = [i for i, c in enumerate(cases) if (c.dimension, c.polarity) == (dimension, polarity)]
            labels = group_vectors(vectors[group], rules.max_distance)
            for label, size in Counter(labels).most_common():
                if size >= rules.min_cluster:
                    members = (cases[i] for i, own in zip(group, labels, strict=True) if own == label)
                    found.append(Cluster(dimension, polarity, tuple(members)))
    return found, len(cases) - sum(len(cluster.cases) for cluster in found)


def group_vectors(vectors: NDArray[np.float64], max_distance: float) -> list[int]:
    """A label per row: average-linkage clusters by cosine distance, cut at `max_distance`."""
    from sklearn.cluster import AgglomerativeClustering

    empty = ~vectors.any(axis=1)  # no direction, so no cosine: each by itself
    labels = np.arange(len(vectors)) + len(vectors)
    full = np.flatnonzero(~empty)
    if len(full) > 1:
        tree = AgglomerativeClustering(
            n_clusters=None, metric="cosine", linkage="average", distance_threshold=max_distance
        )
        labels[full] = tree.fit_predict(vectors[full])
    return [int(label) for label in labels]


# ---------------------------------------------------------------- distilling


def distil_unit(cluster: Cluster, number: int, asker: Asker, prompt: PromptFile) -> Unit[Principle]:
    """The work on one cluster: the principle behind its cases."""

    async def work() -> tuple[Principle, Sequence[Asked]]:
        messages = prompt.messages(
            dimension=cluster.dimension.value,
            polarity=cluster.polarity.value,
            cases=cluster.cases,
            min_characters=MIN_CHARACTERS,
            max_characters=MAX_CHARACTERS,
        )

        def check(answer: DistilledPrinciple) -> list[Fault]:
            faults = definition_faults(answer.name, answer.definition, ())
            if answer.polarity is not cluster.polarity:
                message = (
                    f"the observations are {cluster.polarity.value}, the principle {answer.polarity.value}"
                )
                faults.append(Fault("polarity", message))
            return faults

        given = await asker.ask(prompt, messages, DistilledPrinciple, check)
        answer = given.answer
        principle = Principle(
            cluster.dimension,
            answer.name.strip(),
            answer.definition.strip(),
            answer.level,
            answer.polarity,
            len(cluster.cases),
        )
        return principle, given.trace

    return Unit(f"{cluster.dimension.value} / cluster {number}", work)


def distinct(principles: Sequence[Principle]) -> list[Principle]:
    """The same principles with a number after a name that another of the dimension has already."""
    taken: set[str] = set()
    found = []
    for principle in principles:
        number, named = 1, principle
        while named.key in taken:
            number += 1
            named = replace(principle, name=f"{principle.name} ({number})")
        taken.add(named.key)
        found.append(named)
    return found
