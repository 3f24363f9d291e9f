"""Tokens, layer masks, and what happens to conversations that are too long."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from her_nemo.config.errors import UserError
from her_nemo.data import tokenise
from her_nemo.data.sources import read_rows
from her_nemo.data.tokenise import Dropped, Prompt, Sample, Tokeniser, encode_all, encode_pair, encode_sample
from her_nemo.data.tokenizer import train_tokenizer
from her_nemo.roleplay.prompt import CONTROL_TOKENS, CONVERSATION_START

REPLY = (
    "<system_thinking>Ada waits.</system_thinking>Ada: <role_thinking>I wait.</role_thinking> "
    "Caf\u00e9 e\u0301 \u732b?<role_action>sits</role_action>Yes."
)


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory: pytest.TempPathFactory) -> Tokeniser:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [
        REPLY,
        "system user assistant " + CONVERSATION_START,
        "You are Ada from The Mill. u1 a1 u2 a2 u3",
    ]
    train_tokenizer(texts * 3, directory, 400)
    return Tokeniser(directory)


def row(turns: int = 3, reply: str = REPLY) -> dict[str, Any]:
    """system, u1, a1, u2, a2, ..., u_turns, reply."""
    messages = [{"role": "system", "content": "You are Ada from The Mill."}]
    for i in range(1, turns + 1):
        head = CONVERSATION_START if i == 1 else ""
        messages.append({"role": "user", "content": f"{head}u{i}"})
        messages.append({"role": "assistant", "content": f"a{i}" if i < turns else reply})
    return {"trace_id": "t", "messages": messages}


def kinds_of(text: str, tokeniser: Tokeniser) -> list[tuple[str, str]]:
    ids, kinds = tokeniser.reply_with_kinds(text)
    pieces = tokeniser.hf.convert_ids_to_tokens(ids)
    assert len(ids) == len(kinds) == len(pieces)
    runs = itertools.groupby(zip(ids, kinds.tolist(), strict=True), key=lambda pair: pair[1])
    return [
        (tokenise.KIND_NAMES[kind], tokeniser.decode((i for i, _ in run), skip_special_tokens=False))
        for kind, run in runs
    ]


def test_prompt_is_what_is_served(tokeniser: Tokeniser) -> None:
    messages = row()["messages"][:-1]
    ids = tokeniser.prompt_ids(messages)
    text = tokeniser.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are Ada from The Mill.<|im_end|>\n<|im_start|>user\n===Conversation Start"
        "===\n\nu1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\na2"
        "<|im_end|>\n<|im_start|>user\nu3<|im_end|>\n<|im_start|>assistant\n"
    )
    served = AutoTokenizer.from_pretrained(tokeniser.directory)
    for thinking in (True, False):
        again = served.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=thinking
        )
        assert list(again) == ids


MARKS = "\n\n\n=*<A1aeiou \n\r\t'sS:.,<>/|12\u00e9e\u0301\u732b\u200d\U0001f600"
TEXT = st.text(st.sampled_from(MARKS) | st.characters(), max_size=40)


@settings(max_examples=300, deadline=None)
@given(contents=st.lists(TEXT, min_size=1, max_size=6))
def test_joined_prompt_is_the_prompt(tokeniser: Tokeniser, contents: list[str]) -> None:
    roles = itertools.chain(["system"], itertools.cycle(["user", "assistant", "assistant"]))
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    assume(not any(token in text for text in contents for token in CONTROL_TOKENS))
    assume(all(text.encode("utf-8", "replace").decode() == text for text in contents))
    expected = tokeniser.prompt_ids(messages)
    assert tokeniser.joined_prompt_ids(messages).tolist() == expected
    assert tokeniser.joined_prompt_length(messages) == len(expected)


def test_lines_are_encoded_apart_for_qwens_pattern_only(tokeniser: Tokeniser, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "You are Ada.\n\n===Background===\nA mill. \n Ada\n* one\n\u0301two\n"}]
    assert tokeniser._split(("system", messages[0]["content"])) == [
        "system\n", "You are Ada.\n\n", "===Background===\n", "A mill. \n Ada\n", "* one\n\u0301two\n"
    ]  # fmt: skip
    shutil.copytree(tokeniser.directory, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    # Words that reach over a line break.
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+\n\p{L}+|."
    file.write_text(json.dumps(content))
    other = Tokeniser(tmp_path)
    assert len(other._split(("system", "a\nb"))) == 1
    for one in (tokeniser, other):
        assert one.joined_prompt_ids(messages).tolist() == one.prompt_ids(messages)


def test_prefetched_rows_are_encoded_the_same(tokeniser: Tokeniser) -> None:
    rows = [row(turns, REPLY + str(turns)) for turns in (1, 2, 3, 3)]
    rows.append({"trace_id": "p", "messages": row()["messages"][:-1], "chosen": REPLY, "rejected": "Ada: No."})
    fresh = Tokeniser(tokeniser.directory)
    fresh.prefetch(*tokenise.texts_to_encode(rows))
    for one in rows[:-1]:
        a, b = (encode_sample(t, one, 200) for t in (fresh, Tokeniser(tokeniser.directory)))
        assert (a.token_ids.tolist(), a.kinds.tolist()) == (b.token_ids.tolist(), b.kinds.tolist())
    a, b = (encode_pair(t, rows[-1], 200) for t in (fresh, Tokeniser(tokeniser.directory)))
    assert [s.token_ids.tolist() for s in a] == [s.token_ids.tolist() for s in b]


def test_a_tokenizer_that_looks_beyond_a_message_is_refused(tokeniser: Tokeniser, tmp_path: Path) -> None:
    shutil.copytree(tokeniser.directory, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        # <|im_end|> that swallows the line break after it
        token["rstrip"] = token["content"] == "<|im_end|>"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="differently for what stands before it"):
        Tokeniser(tmp_path)


def test_our_template_wins(tokeniser: Tokeniser, tmp_path: Path) -> None:
    other = AutoTokenizer.from_pretrained(tokeniser.directory)
    other.chat_template = "{{ 'something else' }}"
    other.save_pretrained(tmp_path)
    messages = row()["messages"][:-1]
    assert Tokeniser(tmp_path).prompt_ids(messages) == tokeniser.prompt_ids(messages)


def test_reply_kinds(tokeniser: Tokeniser) -> None:
    # A token over a border goes with its last character, so that a run may begin one mark late.
    runs = kinds_of(REPLY, tokeniser)
    assert [kind for kind, _ in runs] == [
        "system_thinking",
        "speech",
        "role_thinking",
        "speech",
        "role_action",
        "speech",
    ]
    joined = "".join(text for _, text in runs)
    assert joined == REPLY.replace("e\u0301", "\u00e9") + "<|im_end|>"
    assert "Ada waits." in runs[0][1]
    assert "Ada:" in runs[1][1]
    assert "\u732b" in runs[3][1]
    assert runs[5][1].endswith("Yes.<|im_end|>")
    assert kinds_of("", tokeniser) == [("speech", "<|im_end|>")]
    # an unclosed thought is a thought to the end
    assert [kind for kind, _ in kinds_of("Ada: <role_thinking>x y z", tokeniser)] == [
        "speech",
        "role_thinking",
        "speech",
    ]


def test_sample(tokeniser: Tokeniser) -> None:
    sample = encode_sample(tokeniser, row(), 500)
    assert isinstance(sample, Sample)
    prompt, reply = sample.token_ids[: sample.prompt_length], sample.token_ids[sample.prompt_length :]
    assert prompt.tolist() == tokeniser.prompt_ids(row()["messages"][:-1])
    assert reply.tolist() == tokeniser.reply_ids(REPLY)
    assert reply[-1] == tokeniser.eos_id
    assert (sample.kinds[: sample.prompt_length] == tokenise.KIND_NONE).all()
    assert (sample.kinds[sample.prompt_length :] != tokenise.KIND_NONE).all()
    assert sample.token_ids.dtype == np.int32
    assert sample.kinds.dtype == np.int8
    assert sample.turns_dropped == 0


def test_over_long_loses_its_oldest_turns_and_nothing_of_the_reply(tokeniser: Tokeniser) -> None:
    whole = encode_sample(tokeniser, row(), 500)
    reply = tokeniser.reply_ids(REPLY)
    system, *_, last = row()["messages"][:-1]
    shortest = [system, {"role": "user", "content": CONVERSATION_START + last["content"]}]
    least = len(tokeniser.prompt_ids(shortest)) + len(reply)
    for length in range(least, len(whole)):
        sample = encode_sample(tokeniser, row(), length)
        assert isinstance(sample, Sample)
        assert len(sample) <= length
        assert sample.turns_dropped >= 1
        assert sample.token_ids[sample.prompt_length :].tolist() == reply
        text = tokeniser.decode(sample.token_ids, skip_special_tokens=False)
        assert text.startswith(
            f"<|im_start|>system\n{system['content']}<|im_end|>\n<|im_start|>user\n{CONVERSATION_START}u"
        )
        assert "u3<|im_end|>" in text
        assert "u1" not in text
    assert encode_sample(tokeniser, row(), least).turns_dropped == 2
    too_short = encode_sample(tokeniser, row(), least - 1)
    assert too_short == Dropped("t", "prompt_too_long", least, least - 1)
    hopeless = encode_sample(tokeniser, row(), len(reply))
    assert hopeless == Dropped("t", "reply_too_long", len(reply), len(reply))


def test_pair_has_one_prompt(tokeniser: Tokeniser) -> None:
    pair = {"trace_id": "t", "messages": row()["messages"][:-1], "chosen": "Ada: Yes.", "rejected": REPLY}
    chosen, rejected = encode_pair(tokeniser, pair, 500)
    assert chosen.prompt_length == rejected.prompt_length
    shorter = encode_pair(tokeniser, pair, len(rejected) - 1)
    assert isinstance(shorter, tuple)
    prompts = [sample.token_ids[: sample.prompt_length].tolist() for sample in shorter]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) < chosen.prompt_length
    assert isinstance(encode_pair(tokeniser, pair, 10), Dropped)


def test_encode_all_counts(tokeniser: Tokeniser) -> None:
    long_reply = row(reply="Ada: " + "yes " * 300)
    whole = encode_sample(tokeniser, row(), 500)
    samples, report = encode_all(encode_sample, tokeniser, [row(1), row(3), long_reply], len(whole) - 1)
    assert len(samples) == report.kept == 2
    assert report.shortened == 1
    assert report.dropped == {"reply_too_long": 1}
    with pytest.raises(UserError, match="encoder_seq_length"):
        encode_all(encode_sample, tokeniser, [long_reply], 50)
    prompts, _ = encode_all(
        tokenise.encode_prompt, tokeniser, [{"trace_id": "p", "messages": row()["messages"][:-1]}], 500
    )
    assert isinstance(prompts[0], Prompt)
    assert prompts[0].token_ids.tolist() == tokeniser.prompt_ids(row()["messages"][:-1])


def test_pack_text(tokeniser: Tokeniser) -> None:
    blocks = list(tokenise.pack_text([[1, 2, 3], [4], [5, 6, 7, 8, 9]], 4))
    assert [block.tolist() for block in blocks] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    samples = tokenise.text_samples(tokeniser, [{"text": "Ada waits."}] * 40, 16)
    assert samples[0].prompt_length == 0
    flat = np.concatenate([sample.token_ids for sample in samples]).tolist()
    document = tokeniser.text_ids("Ada waits.")
    assert document[-1] == tokeniser.pad_id
    assert flat == (document * 40)[: len(flat)]
    with pytest.raises(UserError, match="shorter than one block"):
        tokenise.text_samples(tokeniser, [{"text": "Ada"}], 1000)


def test_bad_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Tokeniser(tmp_path / "none")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        Tokeniser(tmp_path)


def test_real_rows(tokeniser: Tokeniser, shared_data: Path) -> None:
    rows, _ = read_rows(shared_data / "her" / "sft_single_turn_sample.jsonl", "sft")
    samples, report = encode_all(encode_sample, tokeniser, rows, 1 << 20)
    assert report.kept == 95
    for sample, source in zip(samples, rows, strict=True):
        reply = sample.token_ids[sample.prompt_length : -1]
        assert tokeniser.decode(reply) == source["messages"][-1]["content"]
        assert tokenise.SYSTEM_THINKING in sample.kinds
        assert sample.token_ids[: sample.prompt_length].tolist() == tokeniser.prompt_ids(source["messages"][:-1])
