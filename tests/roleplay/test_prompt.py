"""Prompts: HER's layout, history by views, and the chat template."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest

from her_nemo.roleplay.prompt import (
    CHAT_TEMPLATE,
    CONVERSATION_START,
    RolePrompt,
    Utterance,
    build_messages,
    drop_oldest_turns,
    render_utterance,
)
from her_nemo.roleplay.views import Reader

PROMPT = RolePrompt(
    name="Ada",
    book="The Mill",
    profile="A miller.",
    background="A village.",
    scenario="The yard.",
    others=(("Bo", "A smith."), ("Cy", "A boy.")),
    inner_thoughts="She is tired.",
    requirements="Plan, then speak.",
)


def test_system_prompt_layout() -> None:
    assert PROMPT.text() == (
        "You are Ada from The Mill.\n\n===Ada's Profile===\nA miller.\n\n===Background===\nA village.\n\n"
        "===Current Scenario===\nThe yard.\n\n===Information about other Characters===\n**Bo**: A smith.\n"
        "**Cy**: A boy.\n\n===Your Inner Thoughts===\nShe is tired.\n\n===Requirements===\nPlan, then speak."
    )
    assert RolePrompt.parse(PROMPT.text()) == PROMPT
    bare = RolePrompt("Ada", "The Mill", "A miller.")
    assert "Background" not in bare.text()
    assert RolePrompt.parse(bare.text()) == bare
    with pytest.raises(ValueError, match="You are X from BOOK"):
        RolePrompt.parse("Hello")


def test_her_rows_are_rebuilt_exactly(shared_data: Path) -> None:
    """System prompt and history of HER's rows come out of our builder character for character."""
    texts = [
        (shared_data / f"her/sft_{kind}_turn_sample.jsonl").read_text("utf-8") for kind in ("single", "multi")
    ]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    assert len(rows) == 124
    for row in rows:
        messages = row["messages"][:-1] if "turn_index" in row else row["messages"]
        prompt = RolePrompt.parse(messages[0]["content"])
        history: list[Utterance] = []
        for message in messages[1:]:
            content = message["content"].removeprefix(CONVERSATION_START)
            for part in [content] if message["role"] == "assistant" else content.split("\n\n"):
                speech = part.split("</system_thinking>")[-1]
                history.append(Utterance(speech.split(": ", 1)[0], part))
        assert prompt.text() == messages[0]["content"]
        rebuilt = build_messages(prompt, prompt.name, history)
        for message in messages[2:]:
            if message["role"] == "assistant":  # sft_multi_turn keeps every plan; the history does not
                message["content"] = message["content"].split("</system_thinking>")[-1]
        assert rebuilt == messages


def test_history_by_views() -> None:
    history = [
        Utterance("Environment", "A cold morning."),
        Utterance(
            "Bo", "<system_thinking>Bo lies.</system_thinking>Bo: <role_thinking>fool</role_thinking> Hi."
        ),
        Utterance(
            "Ada", "<system_thinking>Ada waits.</system_thinking>Ada: <role_thinking>liar</role_thinking> Oh?"
        ),
        Utterance("Cy", "<role_thinking>nothing to see</role_thinking>"),
        Utterance("Cy", "<role_action>runs</role_action>"),
        Utterance("Bo", "Wait!"),
    ]
    assert build_messages("SYSTEM", "Ada", history) == [
        {"role": "system", "content": "SYSTEM"},
        {"role": "user", "content": "===Conversation Start===\n\nEnvironment: A cold morning.\n\nBo: Hi."},
        {"role": "assistant", "content": "Ada: <role_thinking>liar</role_thinking> Oh?"},
        {"role": "user", "content": "Cy: <role_action>runs</role_action>\n\nBo: Wait!"},
    ]


def test_the_conversation_always_begins_with_a_user_message() -> None:
    assert build_messages("S", "Ada", [])[1:] == [{"role": "user", "content": CONVERSATION_START}]
    opened = build_messages("S", "Ada", [Utterance("Ada", "Ada: Hi."), Utterance("Ada", "Ada: Hello?")])
    assert [m["role"] for m in opened] == ["system", "user", "assistant", "assistant"]


def test_render_utterance_names_the_speaker() -> None:
    assert render_utterance(Utterance("Bo", "Hi."), Reader.OTHER_CHARACTER) == "Bo: Hi."
    assert render_utterance(Utterance("Bo", "Bo: Hi."), Reader.OTHER_CHARACTER) == "Bo: Hi."
    assert render_utterance(Utterance("Bo", "I hate him</role_thinking> Hi."), Reader.USER) == "Bo: Hi."


def test_drop_oldest_turns() -> None:
    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    messages = [
        message("system", "S"),
        message("user", CONVERSATION_START + "u1"),
        message("assistant", "a1"),
        message("assistant", "a1b"),
        message("user", "u2"),
        message("assistant", "a2"),
    ]
    assert drop_oldest_turns(messages, 0) == messages
    assert drop_oldest_turns(messages, 1) == [
        message("system", "S"),
        message("user", CONVERSATION_START + "u2"),
        message("assistant", "a2"),
    ]
    assert drop_oldest_turns(messages, 2) is None


def test_chat_template() -> None:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": " u\n"}]
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n u\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(messages=messages) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n u\n<|im_end|>\n"
    )
    # nothing that a caller passes brings a think block back
    for extra in ({"enable_thinking": True}, {"enable_thinking": False}):
        assert "<think>" not in template.render(messages=messages, add_generation_prompt=True, **extra)
