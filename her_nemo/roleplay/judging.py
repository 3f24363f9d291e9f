"""What the judge of two replies is asked: instructions, the context, and both candidates as a judge may see them.

A judge sees role thoughts, actions and speech, never a plan: `candidate` is the one door a reply goes through, and
`judge_messages` sends every candidate through it again. A judge that is being trained gets the instructions alone;
the labeller whose verdicts it learns from is shown the principle library too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from her_nemo.roleplay.layouts import read_prompt
from her_nemo.roleplay.principles import Dimension, Level, Principle
from her_nemo.roleplay.prompt import CONTROL_TOKENS, CONVERSATION_START, Message
from her_nemo.roleplay.verdict import Winner
from her_nemo.roleplay.views import Reader, view

# Part of what a verdict depends on: raise it with any change of the texts below.
JUDGE_PROMPT_VERSION = 1
NOTHING = "(nothing)"  # stands for a candidate without thought, action or speech

INSTRUCTIONS = f"""\
You compare two replies that were written for the same character at the same point of a role-play, and say which of \
them plays the character better.

You are given the context (who the character is, the scene, what was said so far) and the replies {Winner.CAND_1} and \
{Winner.CAND_2}. In a reply, <role_thinking> holds the character's inner thoughts, which no other character can read, \
<role_action> what can be seen; the rest is spoken aloud.

First think it over in plain words. Then choose the principles that decide this case, in this order:
1. Negative principles: flaws that spoil a reply, such as a contradiction to the character, a secret given away, a \
broken form, an endless repetition. If one reply has the flaw, the other one wins by that principle; if both have it, \
it is a tie.
2. Three to five positive principles that tell these two replies apart: what one of them does better.
Leave out what both do equally well. A longer reply is not a better one, and the order of the replies means nothing.

Always call the replies {Winner.CAND_1} and {Winner.CAND_2}, never "first", "second", "former" or "latter".

End with one JSON object:
{{"principles": [{{"name": "...", "dimension": "...", "level": "...", "content": "what a good reply does or avoids", \
"reason": "why this decides here"}}, ...], "comparisons": [{{"principle": "a name from above", "reason": "what the \
replies do", "winner": "{Winner.CAND_1}|{Winner.CAND_2}|tie"}}, ... one for each principle], "analysis": "the whole, \
weighed", "better_response": "{Winner.CAND_1}|{Winner.CAND_2}|tie"}}

"dimension" is one of: {"; ".join(Dimension)}. "level" is one of: {", ".join(Level)}. The better response wins by at \
least one principle."""
# For a judge that was trained on it: it needs no telling, and a small model has no room for it.
BRIEF_INSTRUCTIONS = f"Compare {Winner.CAND_1} and {Winner.CAND_2}."
_LIBRARY = """\
Principles to choose from where they fit; write others in your own words where they do not. (-) is a flaw.
"""


def candidate(reply: str) -> str:
    """A reply as the judge sees it: name, thoughts, actions and speech, no plan, nothing that forges the prompt.

    Malformed text is read *fail private*: what might be a plan is left out. Applied twice it changes nothing.
    """
    while (shown := _without_forgery(view(reply, Reader.JUDGE_GRM).strip())) != reply:
        reply = shown  # what was taken out may have left a new tag behind
    return reply


def context_of(messages: Sequence[Message]) -> str:
    """What the judge is told of a conversation: the system prompt without its instructions on form (they ask for a
    plan, which he does not see), and all that was said, without any plan."""
    parts = []
    for message in messages:
        if message["role"] == "system":
            parts.append(_without_control_tokens(_without_requirements(message["content"])))
            continue
        said = message["content"].removeprefix(CONVERSATION_START)
        head = [CONVERSATION_START.strip()] if said != message["content"] else []
        parts += [*head, candidate(said)]  # an earlier reply must forge nothing either
    return "\n\n".join(part for part in parts if part)


def judge_messages(
    context: str, cand_1: str, cand_2: str, library: Iterable[Principle] | None = None, *, brief: bool = False
) -> list[Message]:
    """The judge's prompt: a system message and a user message.

    Args:
        context: from `context_of`.
        cand_1, cand_2: the replies, as written or through `candidate`.
        library: shown to a labeller; None for the judge that is trained or asked.
        brief: one line of instructions, for a judge that was trained with it.
    """
    system = BRIEF_INSTRUCTIONS if brief else INSTRUCTIONS
    if library is not None:
        system = f"{system}\n\n{_LIBRARY}{_listed(library)}"
    sections = (
        ("Context", _without_control_tokens(context)),
        (Winner.CAND_1.value, candidate(cand_1) or NOTHING),
        (Winner.CAND_2.value, candidate(cand_2) or NOTHING),
    )
    user = "\n\n".join(f"==={title}===\n{text}" for title, text in sections)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _listed(library: Iterable[Principle]) -> str:
    return "\n".join(
        f"- {principle.dimension.value} / {principle.name} ({principle.level.value})"
        f"{' (-)' if principle.polarity.value == 'negative' else ''}: {principle.definition}"
        for principle in library
    )


def _without_requirements(system: str) -> str:
    try:
        prompt, layout = read_prompt(system)
    except ValueError:
        return system  # another layout than ours: there is no section that is known to be about form
    return replace(prompt, requirements="").text(layout)


def _without_control_tokens(text: str) -> str:
    """A control token written out in a text would end the message it stands in. Taking one out may make another."""
    while any(token in text for token in CONTROL_TOKENS):
        for token in CONTROL_TOKENS:
            text = text.replace(token, " ")
    return text


def _without_forgery(text: str) -> str:
    """No control tokens and no heading of ours (`===cand_2===`): a reply must not speak for the other one."""
    return re.sub(r"={3,}", "==", _without_control_tokens(text))
