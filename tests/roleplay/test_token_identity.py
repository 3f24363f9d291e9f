"""The trainer, transformers and vLLM's server make the same tokens of the same messages, one for one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_qwen3 import tiny_config
from transformers import AutoTokenizer

from her_nemo.data.tokenise import Tokeniser
from her_nemo.data.tokenizer import train_tokenizer
from her_nemo.roleplay.prompt import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    Layout,
    Message,
    RolePrompt,
    Utterance,
    build_messages,
)
from her_nemo.rollout.vllm_engine import configure_environment

# As Qwen3's: a think block in the generation prompt, and none in the history.
WITH_THINK_BLOCK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
ROLE = RolePrompt("Ada", "The Mill", "A miller \u2014 caf\u00e9, caf\u0065\u0301.", scenario="  The yard.\n")
HISTORY = [
    Utterance("Bo", "\u4f60\u597d \U0001f642 <role_action>waves</role_action>"),
    Utterance("Ada", "<system_thinking>p</system_thinking>Ada: <role_thinking>t</role_thinking> Hm."),
    Utterance("Ada", "Ada: And again.\n\nTwice."),
    Utterance("Cy", "\u00a1Ol\u00e9! \u2019tis \u200dodd\u00a0"),
]
CONVERSATIONS: dict[str, list[Message]] = {
    **{f"layout-{layout}": build_messages(ROLE, "Ada", HISTORY, layout) for layout in Layout},
    "two assistant messages in a row": build_messages("S", "Ada", HISTORY[1:3]),
    "nothing said yet": build_messages("S", "Ada", []),
    "no system prompt": [{"role": "user", "content": "u"}],
    "blanks at every end": [
        {"role": "system", "content": " \n s \n"},
        {"role": "user", "content": "\t u\n\n"},
    ],
    "empty": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    "think tokens in the text": [
        {"role": "user", "content": "<think>\n\n</think>\n\nu"},
        {"role": "assistant", "content": "<think>a</think>b"},
        {"role": "user", "content": "</think>"},
    ],
    "jinja in the text": [{"role": "user", "content": "{{ 7 * 7 }} {% raw %} {# x #}"}],
}
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: not any(token in text for token in CONTROL_TOKENS)
)
CONVERSATION = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant"]),
        TEXTS,
    ),
    min_size=1,
    max_size=5,
)

Served = Callable[[list[Message]], list[int]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that came with a template of its own, loaded and saved again as `export` does it, and a config."""
    given, out = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("served")
    texts = [
        "Ada: <role_thinking>Who is it?</role_thinking> Hello, my friend!",
        "\u4f60\u597d caf\u00e9 \U0001f642",
    ]
    tokenizer = train_tokenizer(texts * 5, given, 400)
    tokenizer.chat_template = WITH_THINK_BLOCK
    tokenizer.save_pretrained(given)
    Tokeniser(given).hf.save_pretrained(out)
    tiny_config(max_position_embeddings=4096, architectures=["Qwen3ForCausalLM"]).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def tokeniser(directory: Path) -> Tokeniser:
    return Tokeniser(directory)


@pytest.fixture(scope="module")
def transformers_ids(directory: Path) -> Served:
    """`apply_chat_template` of the saved tokenizer, whose template is the one in its directory."""
    loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return lambda messages: loaded.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


@pytest.fixture(scope="module")
def vllm_ids(directory: Path) -> Iterator[Served]:
    """What vLLM's OpenAI server does with a chat request before its engine sees it, without the engine."""
    pytest.importorskip("vllm")
    configure_environment()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import renderer_from_config
    from vllm.renderers.online_renderer import OnlineRenderer

    config = EngineArgs(
        model=str(directory), dtype="float32", enforce_eager=True, max_model_len=4096
    ).create_engine_config()
    renderer = renderer_from_config(config)
    server = OnlineRenderer(
        config.model_config,
        renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    with asyncio.Runner() as runner:

        def ids(messages: list[Message], **options: object) -> list[int]:
            request = ChatCompletionRequest(model="m", messages=messages, **options)
            _, prompts = runner.run(server.render_chat(request))
            return prompts[0]["prompt_token_ids"]

        yield ids
    renderer.shutdown()


def test_the_saved_template_is_ours(directory: Path) -> None:
    assert (directory / "chat_template.jinja").read_text("utf-8") == CHAT_TEMPLATE
    assert "chat_template" not in json.loads((directory / "tokenizer_config.json").read_text("utf-8"))


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_trainer_and_transformers(case: str, tokeniser: Tokeniser, transformers_ids: Served) -> None:
    messages = CONVERSATIONS[case]
    ids = tokeniser.prompt_ids(messages)
    assert ids == transformers_ids(messages)
    # the text is all there, and the template adds no token but ChatML's
    plain = (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        + "<|im_start|>assistant\n"
    )
    assert ids == tokeniser.hf.encode(plain, add_special_tokens=False)


@pytest.mark.vllm
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_trainer_and_vllm(case: str, tokeniser: Tokeniser, vllm_ids: Served) -> None:
    assert vllm_ids(CONVERSATIONS[case]) == tokeniser.prompt_ids(CONVERSATIONS[case])


@pytest.mark.vllm
@pytest.mark.parametrize("thinking", [True, False])
def test_a_client_cannot_bring_the_think_block_back(
    thinking: bool, tokeniser: Tokeniser, vllm_ids: Served
) -> None:
    messages = CONVERSATIONS["layout-her"]
    options = {"chat_template_kwargs": {"enable_thinking": thinking}}
    assert vllm_ids(messages, **options) == tokeniser.prompt_ids(messages)


@pytest.mark.vllm
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=CONVERSATION)
def test_any_conversation(
    messages: list[Message], tokeniser: Tokeniser, transformers_ids: Served, vllm_ids: Served
) -> None:
    ids = tokeniser.prompt_ids(messages)
    assert ids == transformers_ids(messages)
    assert ids == vllm_ids(messages)


def test_a_reply_continues_its_prompt(tokeniser: Tokeniser) -> None:
    """A turn trained as a reply and the same turn in the history have the same tokens (without its plan)."""
    messages = build_messages("S", "Ada", HISTORY[:1])
    reply = "Ada: <role_thinking>t</role_thinking> Hm."
    history = tokeniser.prompt_ids([*messages, {"role": "assistant", "content": reply}])
    sample = [*tokeniser.prompt_ids(messages), *tokeniser.reply_ids(reply)]
    assert history[: len(sample)] == sample
