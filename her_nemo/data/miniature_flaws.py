"""Flaws of the miniature world's replies: what, how often, and which principles they break."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum

from her_nemo.data.miniature import OBJECTS, STANCES, STYLES, Scene
from her_nemo.data.miniature_text import (
    ACTIONS,
    FIRST_PERSON_PLAN,
    LEAKS,
    SPEECHES,
    THIRD_PERSON_THOUGHTS,
    VAGUE_SPEECHES,
    Reply,
    clean_reply,
    words_of,
)


class Flaw(StrEnum):
    """One way in which a reply can be wrong."""

    WRONG_STANCE = "wrong_stance"  # plan, thought, action and speech follow another stance
    FIRST_PERSON_PLAN = "first_person_plan"
    THIRD_PERSON_THOUGHT = "third_person_thought"
    WRONG_ACTION = "wrong_action"  # an action of another stance
    OFF_TOPIC = "off_topic"  # another object, or nothing to do with what was said
    LOST_STYLE = "lost_style"  # no habitual phrase, or somebody else's
    LEAK = "leak"  # the secret is told aloud
    LOOP = "loop"  # the same sentence again and again
    MALFORMED = "malformed"  # tags or the name are broken


# The principles (names as in evaluation/oracle.py) that a reply with only this flaw breaks. A malformed reply
# always breaks `well_formed`, and may break others whose part can no longer be read.
BREAKS: dict[Flaw, frozenset[str]] = {
    Flaw.WRONG_STANCE: frozenset({"plan", "action", "speech"}),
    Flaw.FIRST_PERSON_PLAN: frozenset({"plan"}),
    Flaw.THIRD_PERSON_THOUGHT: frozenset({"first_person"}),
    Flaw.WRONG_ACTION: frozenset({"action"}),
    Flaw.OFF_TOPIC: frozenset({"speech"}),
    Flaw.LOST_STYLE: frozenset({"style"}),
    Flaw.LEAK: frozenset({"secret"}),
    Flaw.LOOP: frozenset({"no_loop"}),
    Flaw.MALFORMED: frozenset({"well_formed"}),
}
SFT_RATES: dict[Flaw, float] = dict.fromkeys(Flaw, 0.08) | {Flaw.WRONG_STANCE: 0.06, Flaw.MALFORMED: 0.06}
CHOSEN_RATE = 0.04  # rate of each flaw in the better reply of a pair
# How often a flaw is picked for the worse reply, relative to the others. Flaws that are hard to see from the reply
# alone are shown more often, and so is a broken form, which comes in nine kinds; a wrong stance least: it is seldom
# the one thing that people object to.
PAIR_WEIGHTS: dict[Flaw, float] = dict.fromkeys(Flaw, 0.8) | {
    Flaw.WRONG_STANCE: 0.4,
    Flaw.WRONG_ACTION: 1.5,
    Flaw.LOST_STYLE: 2.0,
    Flaw.MALFORMED: 3.0,
}
EXTRA_FLAWS = (0.2, 0.4, 0.4)  # shares of pairs whose worse reply has one, two and three more flaws


def sample_flaws(rng: random.Random, rates: dict[Flaw, float]) -> frozenset[Flaw]:
    """Each flaw independently at its rate."""
    return frozenset(flaw for flaw in Flaw if rng.random() < rates[flaw])


def sample_pair_flaws(rng: random.Random) -> tuple[frozenset[Flaw], frozenset[Flaw]]:
    """Flaws of a better and a worse reply: the worse has all those of the better, and one to three more."""
    better = sample_flaws(rng, dict.fromkeys(Flaw, CHOSEN_RATE))
    worse = set(better)
    for _ in range(rng.choices((1, 2, 3), EXTRA_FLAWS)[0]):
        left = [flaw for flaw in Flaw if flaw not in worse]
        if left:
            worse.add(rng.choices(left, [PAIR_WEIGHTS[flaw] for flaw in left])[0])
    return better, frozenset(worse)


def flawed_reply(
    rng: random.Random, scene: Scene, flaws: Iterable[Flaw], names: Sequence[str] = ()
) -> str:
    """Text of a reply with exactly these flaws.

    With `names` (of the split) the form can also break as a model breaks it: with a wrong name before the reply, the
    speaker's or one of `names`, and with a thought or an action closed by another tag.
    """
    flaws = frozenset(flaws)
    stance = scene.stance
    if Flaw.WRONG_STANCE in flaws:
        stance = rng.choice([other for other in STANCES if other != stance])
    reply = clean_reply(rng, scene, stance=stance)
    words = words_of(scene, stance=stance)
    if Flaw.FIRST_PERSON_PLAN in flaws:
        reply = replace(reply, plan=FIRST_PERSON_PLAN.format(**words))
    if Flaw.THIRD_PERSON_THOUGHT in flaws:
        reply = replace(reply, thought=rng.choice(THIRD_PERSON_THOUGHTS).format(**words))
    if Flaw.WRONG_ACTION in flaws:
        # With two flaws the action must fit neither the plan nor, by luck, the right stance.
        other = rng.choice([s for s in STANCES if s not in (stance, scene.stance)])
        actions = rng.sample(ACTIONS[other], len(reply.actions))
        reply = replace(reply, actions=tuple(action.format(**words) for action in actions))
    if Flaw.OFF_TOPIC in flaws:
        reply = replace(reply, core=_off_topic(rng, scene, words))
    if Flaw.LOST_STYLE in flaws:
        others = [style for style in STYLES if style[1] != scene.style_phrase]
        reply = replace(reply, style=rng.choice(others) if rng.random() < 0.25 else None)
    if Flaw.LEAK in flaws:
        reply = replace(reply, leak=rng.choice(LEAKS).format(**words))
    if Flaw.LOOP in flaws:
        reply = replace(reply, repeats=rng.choice((2, 3)))
    return _malformed(rng, scene, reply, names) if Flaw.MALFORMED in flaws else reply.text()


def _off_topic(rng: random.Random, scene: Scene, words: dict[str, str]) -> str:
    if rng.random() < 0.75:
        return rng.choice(VAGUE_SPEECHES)
    other = rng.choice([thing for thing in OBJECTS if thing != scene.object])
    return rng.choice(SPEECHES[words["stance"]]).format(**{**words, "o": other})


def _malformed(rng: random.Random, scene: Scene, reply: Reply, names: Sequence[str]) -> str:
    """One of seven breakages of the format that people make, or with `names` of nine: two are a model's own."""
    text = reply.text()
    inside = rng.choice(("role_thinking", "role_action"))
    before_body = f"</system_thinking>{reply.name}: "
    kind = rng.randrange(9 if names else 7)
    if kind == 0:  # the name is missing
        return text.replace(before_body, "</system_thinking>", 1)
    if kind == 1:  # never closed
        return text.replace(f"</{inside}>", "", 1)
    if kind == 2:  # never opened
        return text.replace(f"<{inside}>", "", 1)
    if kind == 3:  # opened twice
        return text.replace(f"<{inside}>", f"<{inside}><{inside}>", 1)
    if kind == 4:  # a closing tag too many
        return f"{text} </role_thinking>"
    if kind == 5:  # the reply breaks off
        return text[: text.index(f"</{inside}>")]
    if kind == 6:
        return text.replace("<role_action>", "<Role_Action>").replace("</role_action>", "</Role_Action>")
    if kind == 7:  # somebody else's name
        return text.replace(before_body, f"</system_thinking>{_wrong_name(rng, scene, names)}: ", 1)
    return text.replace(f"</{inside}>", "</system_thinking>", 1)  # closed by another tag


def _wrong_name(rng: random.Random, scene: Scene, names: Sequence[str]) -> str:
    """The speaker's name, or one of `names` that shares its first or its last word with the right one."""
    own = set(scene.name.split())
    alike = [name for name in names if name != scene.name and own & set(name.split())]
    return rng.choice(alike) if alike and rng.random() < 0.6 else scene.speaker
