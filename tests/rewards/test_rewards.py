"""Rule rewards, diversity and mixing against replies whose figures are worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from her_nemo.rewards.diversity import CollapseRule, DiversityMonitor, DiversityReward, pattern_novelty
from her_nemo.rewards.reward import Mix, Replies, Scores
from her_nemo.rewards.rules import RULES, RuleReward, leak_rule, length_rule, repetition_rule, told
from her_nemo.roleplay.prompt import RolePrompt, Utterance, build_messages
from her_nemo.roleplay.turn import parse_turn

PLAN = "<system_thinking>Mara should refuse.</system_thinking>"
THOUGHT = "<role_thinking>I must not give in.</role_thinking>"
GOOD = f"{PLAN}Mara: {THOUGHT}<role_action>shakes her head</role_action> No, the horse stays here."
PLAIN = f"{PLAN}Mara: No, I keep the horse for now."
BROKEN = f"{PLAN}Mara: <role_thinking>I must not give in. No."
SECRET = "I hide the coin under the old barn."


def prompt_text(inner: str = f"I want fame. {SECRET}", history: tuple[Utterance, ...] = ()) -> str:
    system = RolePrompt(name="Mara", book="The Salt Road", profile="Mara acts blunt.", inner_thoughts=inner)
    messages = build_messages(system, "Mara", [*history, Utterance("Odo", "Odo: Sell me the horse.")])
    body = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return body + "<|im_start|>assistant\n"


def replies(*texts: str, prompts: tuple[str, ...] = (), group: int = 1) -> Replies:
    count = len(texts)
    return Replies(
        prompts=prompts or (prompt_text(),) * count, texts=texts, prompt_ids=[[1]] * count, reply_ids=[[2]] * count,
        finished=[True] * count, tokens_BS=torch.ones(count, 2, dtype=torch.long),
        lengths_B=torch.full((count,), 2), group_size=group,
    )  # fmt: skip


def rules(**weights: float) -> RuleReward:
    return RuleReward({name: weights.get(name, 0.0) for name in RULES}, shortest=5, longest=10)


def test_what_a_prompt_tells_the_rules() -> None:
    earlier = Utterance("Mara", "Mara: <role_thinking>He will never learn where it is.</role_thinking> Good day.")
    known = told(prompt_text(history=(earlier,)))
    assert known.name == "Mara"
    # "I want fame." is too short to be told from what one may well say
    assert known.hidden == (SECRET, "He will never learn where it is.")
    assert told("<|im_start|>user\nhi<|im_end|>\n").hidden == ()
    assert told("<|im_start|>system\nYou help.<|im_end|>\n").name is None


def test_format_counts_the_name_and_what_does_not_parse() -> None:
    wrong_name = GOOD.replace("Mara:", "Odo:")
    said = rules(format=2.0)(replies(GOOD, PLAIN, BROKEN, wrong_name))
    assert said.scores_B.tolist() == [2.0, 2.0, 0.0, 0.0]
    assert said.counts == {"unparsed": 2.0}
    assert said.scored_B.all()


def test_leaks_of_this_turn_and_of_what_the_prompt_hides() -> None:
    assert leak_rule(parse_turn(GOOD), (SECRET,)) == 1.0
    assert leak_rule(parse_turn(BROKEN)) == 0.0, "an unclosed thought would show in a simple front end"
    tells = f"{PLAN}Mara: Well, I hide the coin under the old barn. There."
    assert leak_rule(parse_turn(tells)) == 1.0
    assert leak_rule(parse_turn(tells), (SECRET,)) == 0.0
    thinks = f"{PLAN}Mara: <role_thinking>{SECRET}</role_thinking> No."
    assert leak_rule(parse_turn(thinks), (SECRET,)) == 1.0, "thinking it is what thoughts are for"
    assert rules(leak=1.0)(replies(GOOD, tells, thinks)).scores_B.tolist() == [1.0, 0.0, 1.0]


def test_length_counts_visible_words_alone() -> None:
    def of(count: int) -> float:
        return length_rule(parse_turn(f"{PLAN}Mara: {THOUGHT}{' word' * count}"), 5, 10)

    # the name is a word that others see, too
    assert [of(count) for count in (4, 9)] == [1.0, 1.0]
    assert of(1) == pytest.approx(2 / 5)
    assert of(14) == pytest.approx(0.5)
    assert of(40) == 0.0


def test_repetition() -> None:
    assert repetition_rule(parse_turn(PLAIN)) == 1.0
    # of its five 4-grams two are different
    text = "Mara: one two one two one two one two"
    assert repetition_rule(parse_turn(text, expect_plan=False)) == pytest.approx(2 / 5)


def test_the_sum_of_rules_and_their_parts() -> None:
    said = rules(format=1.0, leak=0.5, repetition=0.25)(replies(GOOD, BROKEN))
    assert said.scores_B.tolist() == [1.75, 0.25]
    assert set(said.parts) == set(RULES)
    assert said.parts["leak"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="the rules are"):
        RuleReward({"format": 1.0}, shortest=1, longest=2)


def test_mixing_leaves_out_what_one_could_not_judge() -> None:
    def judge(seen: Replies) -> Scores:
        verdict = torch.tensor([1.0, math.nan, -1.0])
        return Scores(verdict, torch.tensor([True, False, True]), {"unparsed": 1.0})

    mixed = Mix({"judge": (2.0, judge), "rules": (0.5, rules(format=1.0))})(replies(GOOD, GOOD, BROKEN))
    assert mixed.scored_B.tolist() == [True, False, True]
    assert mixed.scores_B[mixed.scored_B].tolist() == [2.5, -2.0]
    assert mixed.counts == {"unparsed": 2.0, "judge_unparsed": 1.0, "rules_unparsed": 1.0}
    assert mixed.parts["judge"].tolist() == [1.0, 0.0, -1.0]
    with pytest.raises(ValueError, match="no rewards"):
        Mix({})


def test_novelty_inside_a_group() -> None:
    turns = [parse_turn(text) for text in (GOOD, GOOD, PLAIN, BROKEN)]
    # of the three others of the first, one is well formed and built otherwise
    assert pattern_novelty(turns) == pytest.approx([1 / 3, 1 / 3, 2 / 3, 0.0])
    said = DiversityReward(1.0, 0.0)(replies(GOOD, GOOD, PLAIN, BROKEN, GOOD, GOOD, GOOD, GOOD, group=4))
    assert said.scores_B.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 0, 0, 0, 0, 0])


def test_a_copy_has_no_novelty_of_text_and_breaking_the_format_earns_nothing() -> None:
    other = f"{PLAN}Mara: Ride on, stranger, before night falls over these hills."
    said = DiversityReward(0.0, 1.0)(replies(GOOD, GOOD, other, BROKEN, group=4))
    first, second, third, broken = said.scores_B.tolist()
    assert first == second == pytest.approx(0.0, abs=1e-6)
    assert third > 0.5
    assert broken == 0.0
    with pytest.raises(ValueError, match="no group"):
        DiversityReward(1.0, 0.0)(replies(GOOD))


def test_the_watch_over_a_moving_window() -> None:
    seen = DiversityMonitor(4, CollapseRule(max_top1_share=0.7, patience=2))
    seen.add([GOOD, GOOD, GOOD])
    assert seen.strikes == 0, "not full yet"
    seen.add([PLAIN])
    assert seen.top1_share == 0.75
    assert seen.pattern_entropy == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))
    assert (seen.strikes, seen.collapsed) == (1, False)
    seen.add([GOOD, GOOD])  # window: GOOD PLAIN GOOD GOOD
    assert (seen.strikes, seen.collapsed) == (2, True)
    assert "one pattern in 0.750 of the last 4 replies" in seen.describe()
    seen.add([PLAIN])  # PLAIN GOOD GOOD PLAIN
    assert (seen.strikes, seen.collapsed) == (0, False)
    assert 0.0 < seen.self_bleu() <= 1.0


def test_the_watch_by_entropy_and_its_state() -> None:
    limits = CollapseRule(min_pattern_entropy=0.5)
    seen = DiversityMonitor(3, limits)
    seen.add([GOOD, GOOD, GOOD])
    assert seen.collapsed
    again = DiversityMonitor(3, limits)
    again.load_state_dict(seen.state_dict())
    assert again.state_dict() == seen.state_dict() == {"texts": [GOOD] * 3, "strikes": 1}
    for monitor in (seen, again):
        monitor.add([PLAIN])
        assert (monitor.strikes, monitor.top1_share) == (0, 2 / 3)
    with pytest.raises(ValueError, match="shows no variety"):
        DiversityMonitor(1, limits)
