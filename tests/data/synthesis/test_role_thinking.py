"""Role thinking end to end over a real socket: good answers, bad answers, and gold text that must not move."""

from __future__ import annotations

import json
from pathlib import Path

import samples
from scripted_endpoint import Reply

from her_nemo.data.records import read_conversations
from her_nemo.roleplay.turn import Kind, parse_turn
from her_nemo.roleplay.views import Reader, view


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def squeezed(text: str) -> str:
    return "".join(text.split())


def assert_gold_unchanged(before, after) -> None:
    for old, new in zip(before.turns, after.turns, strict=True):
        parsed = [parse_turn(t.text, expect_plan=False, expect_name=t.speaker) for t in (old, new)]
        for reader in (Reader.OTHER_CHARACTER, Reader.USER):
            a, b = (squeezed(view(turn, reader)) for turn in parsed)
            assert a == b, (old.text, new.text)
        assert squeezed(parsed[0].text_of(Kind.SPEECH)) == squeezed(parsed[1].text_of(Kind.SPEECH))


def test_one_coser_chapter(serve, settings, synthesise, shared_data, tmp_path, capsys) -> None:
    before = samples.from_coser(shared_data / "coser" / "king_lear.json", (6,))
    source = samples.write(tmp_path / "in.jsonl", before)
    server = serve(lambda request, _: Reply(json.dumps(samples.thoughtful(request))))
    cfg = settings(server, source)
    assert synthesise(cfg) == 0
    after = list(read_conversations(Path(cfg.out) / "conversations.jsonl"))
    assert [c.conversation_id for c in after] == [c.conversation_id for c in before]
    assert len(server.requests) == 1, "both conversations of the chapter are in one request"
    thoughts = [0, 0]
    for old, new in zip(before, after, strict=True):
        assert_gold_unchanged(old, new)
        for index, conversation in enumerate((old, new)):
            for turn in conversation.turns:
                segments = parse_turn(turn.text, expect_plan=False).segments
                thoughts[index] += sum(segment.kind is Kind.ROLE_THINKING for segment in segments)
    assert thoughts[1] > thoughts[0]
    schema = server.requests[0]["response_format"]
    assert schema["type"] == "json_schema"
    assert schema["json_schema"]["schema"]["additionalProperties"] is False
    assert "2 conversations = 2 written + 0 quarantined" in capsys.readouterr().out
