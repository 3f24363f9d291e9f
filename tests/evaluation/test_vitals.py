"""Vitals against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from her_nemo.evaluation.vitals import vitals
from her_nemo.roleplay.measures import distinct, leaks, repetition, self_bleu, speaks_for, words
from her_nemo.roleplay.turn import parse_turn

GOOD = (
    "<system_thinking>Mara should refuse.</system_thinking>Mara: <role_thinking>I must not give in."
    "</role_thinking><role_action>shakes her head</role_action> No, the horse stays."
)
PLAIN = "<system_thinking>Mara should agree.</system_thinking>Mara: Yes."


def split(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def test_shares_patterns_and_lengths_by_hand() -> None:
    broken = "<system_thinking>Mara should refuse.</system_thinking>Mara: <role_thinking>I must not"
    result = vitals([GOOD, GOOD, PLAIN, broken])
    assert result.replies == 4
    assert result.format_valid == 0.75
    assert result.leak_rate == 0.25
    # Patterns: one of share 1/2, two of 1/4.
    assert result.pattern_entropy == pytest.approx(1.5)
    assert result.top1_pattern_share == 0.5
    assert result.top_pattern == "system_thinking role_thinking role_action speech"
    assert result.defects == {"unclosed": 1, "empty_reply": 1}
    assert result.mean_words == {
        "system_thinking": 3.0,
        "role_thinking": pytest.approx((5 + 5 + 0 + 3) / 4),
        "role_action": pytest.approx((3 + 3) / 4),
        "speech": pytest.approx((4 + 4 + 1 + 0) / 4),
    }


def test_all_alike_has_no_entropy_and_self_bleu_one() -> None:
    result = vitals([GOOD] * 5)
    assert (result.pattern_entropy, result.top1_pattern_share) == (0.0, 1.0)
    assert math.copysign(1, result.pattern_entropy) == 1
    assert result.self_bleu == pytest.approx(1.0)


def test_a_malformed_reply_does_not_share_a_valid_pattern() -> None:
    two_plans = PLAIN.replace("Mara: Yes.", "<system_thinking>Again.</system_thinking>Mara: Yes.")
    assert vitals([two_plans, PLAIN]).pattern_entropy == pytest.approx(1.0)
    wrong_name = vitals([PLAIN, PLAIN], names=["Mara", "Odo"])
    assert wrong_name.format_valid == 0.5
    assert wrong_name.pattern_entropy == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("<system_thinking>Plan.</system_thinking>Mara: Hi. <role_thinking>I lie", id="unclosed"),
        pytest.param("Mara should lie.</system_thinking>Mara: Hi.", id="lost its opening tag"),
        pytest.param("<System_Thinking>Mara should lie.</System_Thinking>Mara: Hi.", id="wrong case"),
        pytest.param("<think>Mara should lie.</think>Mara: Hi.", id="another model's tag"),
        pytest.param("<role_thinking>I lie</role_thinking Mara: Hi.", id="mangled close"),
        pytest.param(
            "<system_thinking>She hides the coin under the tower.</system_thinking>"
            "Mara: She hides the coin under the tower, I mean it!",
            id="said aloud",
        ),
    ],
)
def test_leaks(text: str) -> None:
    assert leaks(parse_turn(text))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(GOOD, id="good"),
        pytest.param("Mara: Hello there.", id="no thinking at all"),
        pytest.param("Hm. <system_thinking>Plan.</system_thinking>Mara: Hi.", id="plan late but closed"),
        pytest.param("<system_thinking>I see.</system_thinking>Mara: I see.", id="a short phrase twice"),
        pytest.param("<role_thinking>a <role_action>b</role_action> c</role_thinking>Mara: d", id="nested"),
        pytest.param("<role_thinking> </role_thinking></role_thinking>Mara: d", id="nothing but tags"),
        pytest.param("", id="empty"),
    ],
)
def test_does_not_leak(text: str) -> None:
    assert not leaks(parse_turn(text))


def test_secrets_are_whole_words_in_what_the_user_sees() -> None:
    hidden = "<system_thinking>The coin is safe.</system_thinking>Mara: Nothing here."
    action = "<system_thinking>Plan.</system_thinking>Mara: <role_action>shows the Coin</role_action> Look."
    assert not leaks(parse_turn(hidden), ["coin"])
    assert leaks(parse_turn(action), ["coin"])
    assert not leaks(parse_turn(action.replace("Coin", "coinage")), ["coin"])
    assert leaks(parse_turn("Mara: It is under the old tower."), ["old tower"])
    assert vitals([hidden, action], secrets=[["coin"], ["coin"]]).leak_rate == 0.5


def test_self_bleu_by_hand() -> None:
    texts = split("a b c d e", "a b c d f", "x y z")
    # Text 1 against 2 and 3: 4/5 words, 3/4 pairs, 2/3 triples, 1/2 fours; nearest length 5: no brevity.
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu(texts) == pytest.approx((expected + expected + 0) / 3)


def test_self_bleu_clips_by_the_best_single_other_text_and_is_brief() -> None:
    # "a a a" may match two a's (in one other text), not three; its pair "a a" once of two.
    texts = split("a a a", "a a", "a b a b b")
    first = ((2 / 3) * (1 / 2)) ** (1 / 2)
    # No other text has "a a a", so order 3 gives 0 in spite of the others.
    assert first > 0
    assert self_bleu(texts[:1] + texts[2:]) == 0.0
    # The pair alone: orders 1 and 2 match whole; the nearest other length is 3: exp(1 - 3/2).
    assert self_bleu(texts[:2]) == pytest.approx((0.0 + math.exp(1 - 3 / 2)) / 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=7), min_size=2, max_size=6))
def test_self_bleu_equals_the_plain_quadratic_formula(texts: list[list[str]]) -> None:
    from collections import Counter

    def grams(text: list[str], order: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))

    def bleu(text: list[str], others: list[list[str]]) -> float:
        orders = min(4, len(text))
        precisions = []
        for order in range(1, orders + 1):
            own = grams(text, order)
            top: Counter[tuple[str, ...]] = Counter()
            for other in others:
                top |= grams(other, order)
            precisions.append((own & top).total() / own.total())
        if not orders or not all(precisions):
            return 0.0
        nearest = min((len(other) for other in others), key=lambda n: (abs(n - len(text)), n))
        return math.prod(precisions) ** (1 / orders) * min(1.0, math.exp(1 - nearest / len(text)))

    expected = [bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(texts))


def test_distinct_and_repetition_by_hand() -> None:
    texts = split("a b a", "a b c")
    assert distinct(texts, 1) == 3 / 6
    assert distinct(texts, 2) == 3 / 4  # ab ba ab bc
    assert distinct(split("a"), 2) == 0.0
    # abcd bcda cdab dabc abcd: one of five repeats.
    assert repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert repetition(["a", "b"]) == 0.0


def test_no_replies_is_an_error() -> None:
    with pytest.raises(ValueError, match="no replies"):
        vitals([])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        vitals([GOOD], names=["a", "b"])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(alphabet="<>/_ systemrolethinkingaction:.A", max_size=60), min_size=1, max_size=4))
def test_any_text_has_vitals(replies: list[str]) -> None:
    result = vitals(replies)
    assert 0 <= result.leak_rate <= 1
    assert 0 <= result.self_bleu <= 1 + 1e-9


def test_shares_of_kinds_and_name_slips_by_hand() -> None:
    nameless = "<system_thinking>Mara should agree.</system_thinking>Yes, we go."
    result = vitals([GOOD, PLAIN, nameless, PLAIN], names=["Mara", "Mara", "Mara", "Odo"])
    # Words: GOOD 3 + 5 + 3 + 4, PLAIN 3 + 1 twice, nameless 3 + 3.
    assert result.kind_share == {
        "system_thinking": 1.0,
        "role_thinking": 0.25,
        "role_action": 0.25,
        "speech": 1.0,
    }
    assert result.word_share == {
        "system_thinking": 12 / 29,
        "role_thinking": 5 / 29,
        "role_action": 3 / 29,
        "speech": 9 / 29,
    }
    assert result.name_slips == 0.5  # one without a name, one with another's
    assert result.speaks_for_others is None
    assert vitals(["", ""]).word_share == dict.fromkeys(result.word_share, 0.0)


@pytest.mark.parametrize(
    ("text", "speaks"),
    [
        pytest.param("Mara: No. Odo: But I must!", True, id="a line in his name"),
        pytest.param("Mara: <role_action>Odo nods slowly</role_action> Good.", True, id="acts for him"),
        pytest.param("Mara: <role_action>bows</role_action> Odo: Good.", True, id="his line after an action"),
        pytest.param("Odo: I take the horse.", True, id="the whole turn is his"),
        pytest.param("Mara: <role_action>Odo's cup falls</role_action> Oh.", False, id="a thing of his"),
        pytest.param("Mara: <role_action>looks at Odo</role_action> Well?", False, id="looks at him"),
        pytest.param("Mara: Listen, Odo: the horse stays.", False, id="calls him by name"),
        pytest.param("Mara: <role_thinking>Odo: a fool.</role_thinking> Hm.", False, id="in a thought"),
        pytest.param("沈砚: <role_action>小满点了点头</role_action> 好。", True, id="zh: acts for her"),
        pytest.param("沈砚: <role_action>小满的伞倒了</role_action> 好。", False, id="zh: a thing of hers"),
        pytest.param("沈砚: 别走。小满：我不走。", True, id="zh: a line in her name"),
    ],
)
def test_speaking_for_others(text: str, speaks: bool) -> None:
    others = ["小满"] if text.startswith("沈") else ["Odo"]
    assert speaks_for(parse_turn(text, expect_plan=False), others) is speaks
    plan = f"<system_thinking>x</system_thinking>{text}"
    assert vitals([plan, PLAIN], others=[others, []]).speaks_for_others == float(speaks)


def test_chinese_is_measured_by_the_character() -> None:
    assert words("我不知道 why 3天") == ["我", "不", "知", "道", "why", "3", "天"]
    thought = "<role_thinking>我绝不能告诉她那封信在哪里</role_thinking>"
    assert leaks(parse_turn(f"沈砚: {thought}我绝不能告诉她那封信在哪里。"))
    assert not leaks(parse_turn(f"沈砚: {thought}那封信?"))
    short = "<role_thinking>我不知道</role_thinking>"
    assert not leaks(parse_turn(f"沈砚: {short}我不知道。"))
    assert self_bleu([words("我在书店等你"), words("我在书店等她")]) == pytest.approx(
        (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    )
