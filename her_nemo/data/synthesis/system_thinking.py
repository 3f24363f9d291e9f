"""System thinking: a plan before each turn. First forward, from the past alone; then rewritten to lead to the gold.

Both steps see the conversation as the character does, so a plan cannot rest on others' thoughts. The gold turns
are never sent back by the model: only plans are, and they are stored beside the turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from her_nemo.config.synthesis import SystemThinking
from her_nemo.data.synthesis import language
from her_nemo.data.synthesis.asker import Answer, Asked, Asker, Fault
from her_nemo.data.synthesis.endpoint import Completion
from her_nemo.data.synthesis.part import CharacterPart
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.data.synthesis.runner import Unit, all_of
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.prompt import Message, RolePrompt, build_messages
from her_nemo.roleplay.tags import find_tags
from her_nemo.roleplay.turn import parse_turn

QUOTED_RUN = 8  # words in a row that are a quotation and no accident
PRIVATE_RUN = 6
NO_PLAN = "(none)"


class ForwardAnswer(Answer):
    """What the prompt system_thinking_forward asks for when it asks for JSON."""

    reasoning: str = Field(min_length=1)
    reply: str


class RewrittenPlan(Answer):
    """The plan of one turn."""

    turn: int
    action: Literal["keep", "third_person", "write"]
    plan: str


class RewriteAnswer(Answer):
    """What the prompt system_thinking_rewrite asks for."""

    plans: list[RewrittenPlan]


def unit(
    part: CharacterPart, asker: Asker, forward: PromptFile, rewrite: PromptFile, rules: SystemThinking
) -> Unit[dict[int, str]]:
    """The work on one character of one conversation: plans by turn index."""

    async def work() -> tuple[dict[int, str], Sequence[Asked]]:
        drawn = await all_of(_raw_plan(part, index, asker, forward, rules) for index in part.my_turns)
        raw = {index: plan for index, (plan, _) in zip(part.my_turns, drawn, strict=True)}
        messages = rewrite.messages(
            **part.given(),
            lines=part.lines({index: plan or NO_PLAN for index, plan in raw.items()}),
            numbers=", ".join(str(index + 1) for index in part.my_turns),
            **{key: value for key, value in rules.model_dump().items() if key != "forward"},
        )
        given = await asker.ask(
            rewrite, messages, RewriteAnswer, lambda answer: check(part, raw, answer, rules)
        )
        trace = [asked for _, answers in drawn for asked in answers]
        return plans_of(raw, given.answer), [*trace, *given.trace]

    return Unit(part.name, work)


async def _raw_plan(
    part: CharacterPart, index: int, asker: Asker, prompt: PromptFile, rules: SystemThinking
) -> tuple[str, tuple[Asked, ...]]:
    """The raw plan of one turn: the one it has already, or the model's reasoning as it plays on."""
    plan = part.conversation.turns[index].plan
    if plan and plan.strip():
        return plan.strip(), ()
    structured = rules.forward == "structured"
    messages = forward_messages(part, index, prompt, rules)
    if structured:
        given = await asker.ask(prompt, messages, ForwardAnswer, lambda answer: [])
        return given.answer.reasoning.strip(), given.trace
    completion, trace = await asker.plain(prompt, messages, _reasoned)
    return completion.reasoning, trace


def _reasoned(completion: Completion) -> list[Fault]:
    if completion.finish_reason == "length":
        return [Fault("truncated", "the answer was cut off; raise sampling.max_tokens")]
    if not completion.reasoning:
        message = "the endpoint gave no reasoning; use system_thinking.forward=structured for such a model"
        return [Fault("no_reasoning", message)]
    return []


def forward_messages(
    part: CharacterPart, index: int, prompt: PromptFile, rules: SystemThinking
) -> list[Message]:
    """The role-play prompt before turn `index`, in the layout of training, with a request to think first."""
    conversation, character = part.conversation, part.character
    asked = prompt.messages(
        name=character.name,
        structured=rules.forward == "structured",
        min_characters=rules.min_characters,
        max_characters=rules.max_characters,
    )
    role = RolePrompt(
        name=character.name,
        book=conversation.book,
        profile=character.profile,
        background=conversation.background,
        scenario=conversation.scenario,
        others=tuple((o.name, o.profile) for o in conversation.characters if o.name != character.name),
        inner_thoughts=character.motivation,
        requirements=asked[0]["content"],
    )
    messages = build_messages(role, character.name, part.history(index))
    if messages[-1]["role"] == "user":
        last = messages.pop()
        return [*messages, {"role": "user", "content": f"{last['content']}\n\n{asked[1]['content']}"}]
    return [*messages, asked[1]]


def plans_of(raw: Mapping[int, str], answer: RewriteAnswer) -> dict[int, str]:
    """Plans by turn index; a kept plan is the raw one, whatever the answer wrote beside it."""
    return {
        entry.turn - 1: raw[entry.turn - 1] if entry.action == "keep" else entry.plan.strip()
        for entry in answer.plans
    }


def check(
    part: CharacterPart, raw: Mapping[int, str], answer: RewriteAnswer, rules: SystemThinking
) -> list[Fault]:
    """Every turn once; length by action; third person; nothing quoted, nothing hidden, nothing from later."""
    numbers = [entry.turn for entry in answer.plans]
    faults = []
    for index in part.my_turns:
        if numbers.count(index + 1) != 1:
            message = f"turn {index + 1} has {numbers.count(index + 1)} plans, it needs one"
            faults.append(Fault("missing_plan", message))
    wrong = sorted({number for number in numbers if number - 1 not in raw})
    if wrong:
        faults.append(
            Fault("wrong_turn", f"not turns of {part.character.name}: {', '.join(map(str, wrong))}")
        )
    if faults:
        return faults
    plans = plans_of(raw, answer)
    for entry in answer.plans:
        for fault in _plan_faults(part, entry, plans[entry.turn - 1], raw[entry.turn - 1], rules):
            faults.append(Fault(fault.kind, f"turn {entry.turn}, {entry.action}: {fault.message}"))
    return faults


def _plan_faults(
    part: CharacterPart, entry: RewrittenPlan, plan: str, raw: str, rules: SystemThinking
) -> list[Fault]:
    if entry.action == "keep" and not raw:
        return [Fault("nothing_to_keep", "there is no raw plan; write one")]
    faults = []
    written = entry.action == "write"
    fewest = rules.min_characters if written else rules.min_kept_characters
    most = rules.max_characters if written else rules.max_kept_characters
    if not fewest <= len(plan) <= most:
        faults.append(Fault("plan_length", f"the plan has {len(plan)} characters, not {fewest} to {most}"))
    tags, unknown = find_tags(plan)
    if tags or unknown:
        faults.append(Fault("tag_in_text", "the plan contains a tag"))
    if language.latin(plan) and language.first_person(plan):
        faults.append(Fault("first_person", 'the plan says "I" or "we": write about the character'))
    return [*faults, *_leaks(part, entry.turn - 1, plan)]


def _leaks(part: CharacterPart, index: int, plan: str) -> list[Fault]:
    """What a plan may not contain: this turn's words, later turns' words, others' thoughts."""
    turns = part.conversation.turns
    known = " ".join([*part.given().values(), *(line.text for line in part.lines() if line.number <= index)])
    faults = []
    for place, turn in enumerate(turns[index:], start=index):
        parsed = parse_turn(turn.text, expect_plan=False, expect_name=turn.speaker)
        visible = parsed.text_of(Kind.SPEECH, Kind.ROLE_ACTION)
        mine = parsed.text_of(Kind.ROLE_THINKING) if turn.speaker == part.character.name else ""
        for text in (visible, mine):
            run = language.shared_run(plan, text, QUOTED_RUN, known)
            if run:
                kind, what = (
                    ("quotes_reply", "the turn itself") if place == index else ("future", "a later turn")
                )
                faults.append(Fault(kind, f"the plan quotes {what}: {run!r}"))
    for speaker, thought in part.hidden_thoughts():
        run = language.shared_run(plan, thought, PRIVATE_RUN, known)
        if run:
            faults.append(Fault("mind_reading", f"the plan repeats what only {speaker} thought: {run!r}"))
    return faults
