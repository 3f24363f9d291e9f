"""Judges that follow a rule, and replies for them, for tests whose numbers are worked out by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from her_nemo.rewards.judge import Answer
from her_nemo.rewards.reward import Replies
from her_nemo.roleplay.principles import Dimension, Level
from her_nemo.roleplay.prompt import Message, RolePrompt, Utterance, build_messages
from her_nemo.roleplay.verdict import ChosenPrinciple, Comparison, Verdict, Winner, write_verdict

_SECTIONS = re.compile(r"===cand_1===\n(.*?)\n\n===cand_2===\n(.*)", re.DOTALL)
HISTORY = (
    Utterance("Odo", "Odo: Sell me the horse."),
    Utterance("Mara", "Mara: <role_thinking>He is a thief.</role_thinking> Never."),
    Utterance("Odo", "Odo: Then the cart."),
)
Rule = Callable[[str, str], "Winner | None"]


def messages(*history: Utterance) -> list[dict[str, str]]:
    system = RolePrompt(name="Mara", book="The Salt Road", profile="Mara acts blunt.")
    return build_messages(system, "Mara", history or HISTORY)


def prompt_text(rows: list[dict[str, str]] | None = None) -> str:
    body = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in rows or messages())
    return body + "<|im_start|>assistant\n"


def replies(*texts: str, group: int = 1, prompts: tuple[str, ...] = ()) -> Replies:
    count = len(texts)
    return Replies(
        prompts=prompts or (prompt_text(),) * count, texts=texts, prompt_ids=[[1]] * count, reply_ids=[[2]] * count,
        finished=[True] * count, tokens_BS=torch.ones(count, 2, dtype=torch.long),
        lengths_B=torch.full((count,), 2), group_size=group,
    )  # fmt: skip


def candidates_of(messages: list[Message]) -> tuple[str, str]:
    """The two replies as the judge was shown them."""
    found = _SECTIONS.search(messages[-1]["content"])
    assert found, messages
    return found.group(1), found.group(2)


def verdict_text(winner: Winner) -> str:
    """A well-formed verdict for `winner`, after a little reasoning."""
    dimension, level = next(iter(Dimension)), next(iter(Level))
    chosen = ChosenPrinciple("Word count", dimension, level, "says more", "it decides here")
    verdict = Verdict((chosen,), (Comparison("Word count", winner),), "One says more.", winner)
    return write_verdict(verdict, reasoning="I count the words.")


def longer(first: str, second: str) -> Winner:
    """The reply of more words."""
    difference = len(first.split()) - len(second.split())
    return Winner.TIE if not difference else Winner.CAND_1 if difference > 0 else Winner.CAND_2


class RuleJudge:
    """A `Judge` by a rule over the two replies; None is no verdict. Remembers what it was asked."""

    def __init__(self, rule: Rule = longer, name: str = "rule") -> None:
        self.rule, self.identity = rule, {"judge": name}
        self.questions: list[list[Message]] = []

    def begin(self, conversations: list[list[Message]]) -> None:
        """Answers when asked."""

    def ask(self, conversations: list[list[Message]]) -> list[Answer]:
        self.questions += conversations
        winners = [self.rule(*candidates_of(messages)) for messages in conversations]
        return [Answer("I cannot say." if winner is None else verdict_text(winner)) for winner in winners]
