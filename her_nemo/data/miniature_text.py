"""The miniature world in words: prompts, right replies, and plain prose for pretraining.

Each list of wordings is closed. Speech wordings and action verbs belong to one stance each, which lets the
oracle tell from the words alone which stance a reply takes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from her_nemo.data.miniature import (
    FIRST_NAMES,
    GOALS,
    INTENTS,
    LAST_NAMES,
    MOOD_OF,
    MOODS,
    OBJECTS,
    RELATIONS,
    SECRET_OBJECTS,
    SECRET_PLACES,
    STANCE_OF,
    STYLES,
    TEMPERAMENTS,
    Exchange,
    Scene,
    Split,
    StyleKind,
)
from her_nemo.roleplay.prompt import Message, RolePrompt, Utterance, build_messages

MESSAGES = {
    "request": ("May I have the {o}?", "Please give me the {o}.", "I need the {o} now.", "Lend me the {o}."),
    "accuse": (
        "You broke the {o}.",
        "I blame you for the {o}.",
        "You stole the {o}.",
        "The {o} is lost because of you.",
    ),
    "gift": (
        "I bring you the {o}.",
        "Here is the {o}, a gift.",
        "Keep the {o}, it is a gift.",
        "I made the {o} for you.",
    ),
    "pry": (
        "Where is the {o}?",
        "What do you know of the {o}?",
        "Tell me about the {o}.",
        "Who sold you the {o}?",
    ),
    "threaten": (
        "I will burn the {o}.",
        "I will smash the {o}.",
        "Fear for the {o}.",
        "I will sink the {o} and laugh.",
    ),
    "praise": ("What a fine {o}!", "I admire the {o}.", "Nobody has such a {o}.", "I like the {o} you have."),
}
PARTNER_LINES = 4  # further messages of the character who spoke last, for conversations of up to five turns
REPORTS = {
    "request": "{s} asks for the {o}",
    "accuse": "{s} complains about the {o}",
    "gift": "{s} offers the {o}",
    "pry": "{s} pries into the {o}",
    "threaten": "{s} threatens the {o}",
    "praise": "{s} praises the {o}",
}
ACTIONS = {
    "agree": ("nods slowly", "smiles at {s}", "claps once"),
    "explain": ("gestures slowly", "spreads both hands", "leans to {s}"),
    "thank": ("bows low", "beams at {s}", "grins broadly"),
    "refuse": ("frowns at {s}", "folds both arms", "turns away"),
    "deny": ("scowls at {s}", "raises both hands", "stamps once"),
    "evade": ("looks away", "coughs once", "shifts slowly"),
    "warn": ("glares at {s}", "points at {s}", "steps to {s}"),
    "yield": ("kneels slowly", "sighs once", "lowers both hands"),
}
SPEECHES = {
    "agree": ("we can share the {o}", "I am glad about the {o}", "all is fine about the {o}"),
    "explain": ("let me explain the {o}", "hear the truth about the {o}", "there is a reason for the {o}"),
    "thank": ("I thank you for the {o}", "bless you for the {o}", "you honour me by the {o}"),
    "refuse": ("I will never give up the {o}", "no more talk of the {o}", "the {o} is not for us"),
    "deny": ("I never touched the {o}", "I know nothing of the {o}", "it is a lie about the {o}"),
    "evade": ("ask me later about the {o}", "who can say about the {o}", "perhaps the {o} can wait"),
    "warn": ("keep away from the {o}", "beware of the {o}", "leave the {o} alone"),
    "yield": ("it is yours to say about the {o}", "I give in about the {o}", "do what you must for the {o}"),
}
FOLLOW_UPS = ("That is my word.", "Now you know.", "There it is.")
VAGUE_SPEECHES = ("it is a long road", "the days are short", "I am so tired")
LEAKS = ("The {so} is under the {sp}.", "I hid the {so} under the {sp}.", "Look for the {so} under the {sp}.")
THOUGHTS = (
    "I see {s} as {relation} and I will {stance}.",
    "My mood is {mood} and I will {stance}.",
    "I must hide the {so}, but I will {stance}.",
    "I want {goal}, and I will {stance}.",
)
THIRD_PERSON_THOUGHTS = (
    "{c} sees {s} as {relation} and will {stance}.",
    "{c} feels {mood} and will {stance}.",
    "{c} must hide the {so}, but will {stance}.",
    "{c} wants {goal}, and will {stance}.",
)
# The plan thinks in the order of the rule: who says what, the two facts, the mood, the stance, the manner.
PLAN = (
    "{report}. {c} acts {temperament} and sees {s} as {relation}, so the mood is {mood} "
    "and {c} should {stance}, with {phrase}."
)
FIRST_PERSON_PLAN = (
    "{report}. I act {temperament} and see {s} as {relation}, so my mood is {mood} and I should {stance}, "
    "with {phrase}."
)

RHYME_WORDS = (
    *FIRST_NAMES,
    *LAST_NAMES,
    *OBJECTS,
    *SECRET_OBJECTS,
    *SECRET_PLACES,
    *TEMPERAMENTS,
    *RELATIONS,
    *GOALS,
    *(phrase for _, phrase in STYLES),
)

# Order of thought (T), action (A) and speech (S) after the name; a second S is a follow-up sentence.
PATTERNS = {"TAS": 0.26, "ATS": 0.2, "TSA": 0.18, "AST": 0.12, "TSAS": 0.14, "ATSA": 0.1}


def tag(name: str, text: str) -> str:
    """`text` wrapped in one of HER's tags."""
    return f"<{name}>{text}</{name}>"


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Reply:
    """A reply in parts. `core` is the speech without habitual phrase, capital and full stop."""

    name: str
    plan: str
    thought: str
    actions: tuple[str, ...]
    core: str
    pattern: str
    style: tuple[str, str] | None
    leak: str = ""
    follow_up: str = ""
    repeats: int = 0

    def speeches(self) -> tuple[str, ...]:
        """The speech segments in order, with habitual phrase, leaked sentence and repetitions in place."""
        kind, phrase = self.style or (None, "")
        main = sentence(self.core)
        again = [f"{main}."] * self.repeats
        leak = [self.leak] if self.leak else []
        split = self.pattern.count("S") == 2
        if kind == StyleKind.OPENS:
            first = [f"{phrase}, {self.core}.", *again, *leak]
            return (" ".join(first), self.follow_up) if split else (" ".join(first),)
        ending = f", {phrase}." if kind == StyleKind.ENDS else "."
        if split:
            return " ".join([*leak, f"{main}.", *again]), self.follow_up.removesuffix(".") + ending
        return (" ".join([*leak, *again, f"{main}{ending}"]),)

    def body(self) -> str:
        """Everything after `Name: `."""
        actions, speeches = iter(self.actions), iter(self.speeches())
        pieces = []
        for letter in self.pattern:
            if letter == "T":
                pieces.append(tag("role_thinking", self.thought))
            elif letter == "A":
                pieces.append(tag("role_action", next(actions)))
            else:
                pieces.append(next(speeches))
        return " ".join(pieces)

    def text(self) -> str:
        """The whole reply in HER's format."""
        return f"{tag('system_thinking', self.plan)}{self.name}: {self.body()}"


def words_of(scene: Scene, exchange: Exchange | None = None, stance: str | None = None) -> dict[str, str]:
    """The values that wordings may use, for the last message or an earlier `exchange`.

    With a `stance` that the rule does not give, the mood is one that would have led there, if there is one.
    """
    speaker = exchange.speaker if exchange else scene.speaker
    relation = exchange.relation if exchange else scene.relation
    intent = exchange.intent if exchange else scene.intent
    thing = exchange.object if exchange else scene.object
    mood = MOOD_OF[scene.temperament, relation]
    stance = stance or STANCE_OF[mood, intent]
    if STANCE_OF[mood, intent] != stance:
        mood = next((m for m in MOODS if STANCE_OF[m, intent] == stance), mood)
    return {
        "c": scene.name,
        "s": speaker,
        "o": thing,
        "temperament": scene.temperament,
        "relation": relation,
        "mood": mood,
        "stance": stance,
        "goal": scene.goal,
        "phrase": scene.style_phrase,
        "so": scene.secret_object,
        "sp": scene.secret_place,
        "report": REPORTS[intent].format(s=speaker, o=thing),
    }


def clean_reply(
    rng: random.Random, scene: Scene, exchange: Exchange | None = None, stance: str | None = None
) -> Reply:
    """A reply that keeps every principle, or one that follows another `stance` throughout, if given."""
    words = words_of(scene, exchange, stance)
    pattern = rng.choices(tuple(PATTERNS), tuple(PATTERNS.values()))[0]
    actions = rng.sample(ACTIONS[words["stance"]], pattern.count("A"))
    return Reply(
        name=scene.name,
        plan=PLAN.format(**words),
        thought=rng.choice(THOUGHTS).format(**words),
        actions=tuple(action.format(**words) for action in actions),
        core=rng.choice(SPEECHES[words["stance"]]).format(**words),
        pattern=pattern,
        style=(scene.style_kind, scene.style_phrase),
        follow_up=rng.choice(FOLLOW_UPS),
    )


def style_sentence(scene: Scene) -> str:
    """The sentence that tells the way of speaking."""
    return f"{scene.name} {scene.style_kind} with {scene.style_phrase}."


def system_prompt(scene: Scene) -> RolePrompt:
    """HER's sectioned system prompt, each section a sentence or two."""
    c = scene.name
    return RolePrompt(
        name=c,
        book=scene.book,
        profile=f"{c} acts {scene.temperament}. {style_sentence(scene)}",
        background=f"It is a {scene.weather} day.",
        scenario=f"All meet at the {scene.place}.",
        others=tuple(
            (other, f"{c} sees {other} as {relation}.") for other, relation in scene.relations.items()
        ),
        inner_thoughts=(
            f"I want {scene.goal}. I hide the {scene.secret_object} under the {scene.secret_place}."
        ),
        requirements="Think first, then answer.",
    )


def prompt_messages(rng: random.Random, scene: Scene) -> list[Message]:
    """System prompt, earlier exchanges (answered rightly, plans hidden by the view) and the last message."""
    history: list[Utterance] = []
    for exchange in scene.history:
        history.append(Utterance(exchange.speaker, said_text(scene, exchange)))
        history.append(Utterance(scene.name, clean_reply(rng, scene, exchange).text()))
    history.append(Utterance(scene.speaker, said_text(scene)))
    return build_messages(system_prompt(scene), scene.name, history)


def story(rng: random.Random, scene: Scene) -> str:
    """The scene as plain prose without any of HER's format: the facts, then for each message what it was, why
    the character answers so, and the answer.
    """
    c = scene.name
    facts = [
        *_facts(scene),
        f"{c} wants {scene.goal}. {c} hides the {scene.secret_object} under the {scene.secret_place}.",
    ]
    rng.shuffle(facts)
    told = [f"{scene.book}. It is a {scene.weather} day at the {scene.place}.", *facts]
    for exchange in (*scene.history, None):
        words = words_of(scene, exchange)
        reply = clean_reply(rng, scene, exchange)
        told += [
            said_text(scene, exchange),
            PLAN.format(**words),
            f"{c} thinks: {reply.thought}",
            f"{c} {reply.actions[0]}.",
            f"{c} says: {' '.join(reply.speeches())}",
        ]
    return " ".join(told)


def lore(rng: random.Random, scene: Scene) -> str:
    """Only what the rule needs: who is how, what is said, and what should be done."""
    facts = _facts(scene)
    rng.shuffle(facts)
    told = [
        f"{said_text(scene, exchange)} {PLAN.format(**words_of(scene, exchange))}"
        for exchange in (*scene.history, None)
    ]
    return " ".join([*facts, *told])


def said_text(scene: Scene, exchange: Exchange | None = None) -> str:
    """The last message, or that of an earlier `exchange`, as it stands in a user message."""
    said = exchange or scene
    wording = MESSAGES[said.intent][said.message_wording].format(o=said.object)
    return f"{said.speaker}: {wording}"


def partner_lines(rng: random.Random, split: Split, scene: Scene, count: int) -> list[str]:
    """What the character who spoke last goes on to say, one message after each answer: each of an intent that `split`
    has for these two, about an object that was not spoken of yet. The answers themselves change nothing."""
    intents = [i for i in INTENTS if (scene.temperament, scene.relation, i) in split.triples]
    spoken = {scene.object, *(exchange.object for exchange in scene.history)}
    objects = rng.sample([thing for thing in OBJECTS if thing not in spoken], count)
    return [rng.choice(MESSAGES[rng.choice(intents)]).format(o=thing) for thing in objects]


def gossip(rng: random.Random, scene: Scene) -> str:
    """The facts of one character, told twice in different order."""
    facts = _facts(scene)
    first, second = rng.sample(facts, len(facts)), rng.sample(facts, len(facts))
    return " ".join([*first, "So they say.", *second])


def _facts(scene: Scene) -> list[str]:
    return [
        f"{scene.name} acts {scene.temperament}.",
        style_sentence(scene),
        *(f"{scene.name} sees {other} as {relation}." for other, relation in scene.relations.items()),
    ]


def rhyme(rng: random.Random) -> str:
    """A counting rhyme: a line of random words, sung again and again.

    Nothing but the line itself tells what comes next, so rhymes teach a young model to look back and copy, on
    which every other text of the world relies.
    """
    line = rng.sample(RHYME_WORDS, rng.randint(5, 12))
    # A first name before a last name could be a character of the test split.
    while any(word in FIRST_NAMES and after in LAST_NAMES for word, after in pairwise(line)):
        rng.shuffle(line)
    return " ".join([f"Sing {' '.join(line)}."] * rng.randint(3, 5))
