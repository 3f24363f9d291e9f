"""Judge transcripts from labelled pairs: who sees what, both orders, contradictions counted, faults sent back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoint import Reply

from her_nemo.config.errors import UserError
from her_nemo.data.judge_rows import first_order, read_pair
from her_nemo.data.synthesis.judge_transcripts import JudgeAnswer, check, load_library
from her_nemo.roleplay.judging import INSTRUCTIONS
from her_nemo.roleplay.principles import shipped_library, write_library
from her_nemo.roleplay.verdict import Winner, parse_verdict

SYSTEM = "You are Ada from The Well.\n\n===Ada's Profile===\nA keeper.\n\n===Requirements===\nPlan first."


def pair(number: int) -> dict[str, Any]:
    return {
        "trace_id": f"pair-{number}",
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Ben: Well, number {number}?"},
        ],
        "chosen": f"<system_thinking>HIDDEN</system_thinking>Ada: good {number}.",
        "rejected": f"<system_thinking>HIDDEN</system_thinking>Ada: poor {number}.",
    }


def answer(better: str, **changes: Any) -> dict[str, Any]:
    other = "cand_2" if better == "cand_1" else "cand_1"
    body = {
        "reasoning": f"Ada keeps the well. {better} is good, {other} is poor.",
        "principles": [
            {
                "name": "Voice of its own",
                "dimension": "Character Development",
                "level": "sentence",
                "content": "It sounds like her.",
                "reason": f"{better} does.",
            }
        ],
        "comparisons": [{"principle": "Voice of its own", "reason": f"only {better} has it", "winner": better}],
        "analysis": f"{better} is better.",
        "better_response": better,
    }
    return body | changes


def judging(body: dict[str, Any], _: int) -> Reply:
    """The reply that says good; of pair 3 the other one, of pair 4 a tie."""
    shown = body["messages"][1]["content"]
    better = "cand_1" if shown.index("good") < shown.index("poor") else "cand_2"
    if "number 3?" in shown:
        better = "cand_2" if better == "cand_1" else "cand_1"
    if "number 4?" in shown:
        tie = [{"principle": "Voice of its own", "reason": "", "winner": "tie"}]
        return Reply(json.dumps(answer(better, comparisons=tie, better_response="tie")))
    return Reply(json.dumps(answer(better)))


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def source(tmp_path: Path, *pairs: dict[str, Any]) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def test_from_pairs_to_sft_rows(serve, settings, synthesise, tmp_path: Path) -> None:
    server = serve(judging)
    alike = pair(9) | {"rejected": "<system_thinking>Another.</system_thinking>Ada: good 9."}
    path = source(tmp_path, *(pair(number) for number in range(8)), alike)
    assert synthesise(settings(server, path, "judge")) == 0

    # The labeller sees the library, the context without its requirements, and no plan.
    assert len(server.requests) == 8
    for request in server.requests:
        system, user = (message["content"] for message in request["messages"])
        assert INSTRUCTIONS in system
        assert shipped_library()[0].definition in system
        assert "HIDDEN" not in user
        assert "Plan first." not in user
    # Half of the pairs are asked the other way round.
    orders = {first_order(read_pair(pair(number))) for number in range(8)}
    assert orders == {Winner.CAND_1, Winner.CAND_2}

    written = rows(tmp_path / "out/judge_sft.jsonl")
    kept = [f"pair-{number}" for number in (0, 1, 2, 5, 6, 7)]
    assert [row["trace_id"] for row in written] == [f"{name}/cand_{k}" for name in kept for k in (1, 2)]
    for row in written:
        system, user, reply = (message["content"] for message in row["messages"])
        order = row["trace_id"].rpartition("/")[2]
        assert system == INSTRUCTIONS
        assert "HIDDEN" not in user
        assert f"==={order}===\nAda: good" in user
        verdict = parse_verdict(reply)
        assert verdict.better == order == verdict.comparisons[0].winner
        assert reply.startswith(f"Ada keeps the well. {order} is good, ")
        assert verdict.principles[0].reason == f"{order} does."

    balance = json.loads((tmp_path / "out/balance.json").read_text())
    counts = {key: value for key, value in balance.items() if isinstance(value, int)}
    assert counts == {
        "pairs": 9, "alike_to_a_judge": 1, "left_out_for_balance": 0, "quarantined": 0, "contradict_the_label": 2,
        "kept": 6, "sft_rows": 12,
    }  # fmt: skip
    assert balance["better_reply"]["order"] == {"cand_1": 6, "cand_2": 6}
    assert sum(seen["ties"] for seen in balance["labeller"].values()) == 1
    assert {row["pair"]: row["said"] == "tie" for row in rows(tmp_path / "out/contradicted.jsonl")} == {
        "pair-3": False,
        "pair-4": True,
    }
    # Again: nothing is asked twice, and the files are the same.
    before = (tmp_path / "out/judge_sft.jsonl").read_bytes()
    assert synthesise(settings(server, path, "judge")) == 0
    assert len(server.requests) == 8
    assert (tmp_path / "out/judge_sft.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"better_response": "cand_2"}, "contradiction"),
        ({"principles": []}, "bad_part"),
        ({"comparisons": [{"principle": "Wit", "reason": "", "winner": "cand_1"}]}, "unknown_principle"),
        ({"reasoning": "The first reply is good."}, "named_by_place"),
        ({"analysis": "Reply B is poor."}, "named_by_place"),
        ({"comparisons": [{"principle": "Voice of its own", "reason": "the latter lacks it", "winner": "cand_1"}]},
         "named_by_place"),
    ],
)  # fmt: skip
def test_faults_of_an_answer(changes: dict[str, Any], kind: str) -> None:
    found = check(JudgeAnswer.model_validate_json(json.dumps(answer("cand_1", **changes))))
    assert [fault.kind for fault in found] == [kind]
    first_love = answer("cand_1", reasoning="His first one-way ticket; cand_1 knows it.")
    assert check(JudgeAnswer.model_validate_json(json.dumps(first_love))) == []


def test_a_fault_is_told_and_what_stays_wrong_is_quarantined(serve, settings, synthesise, tmp_path: Path) -> None:
    def script(body: dict[str, Any], _: int) -> Reply:
        if "number 0?" in body["messages"][1]["content"]:
            return Reply(json.dumps(answer("cand_1", reasoning="The second reply is poor.")))
        if len(body["messages"]) == 2:
            return Reply("not JSON")
        return judging(body, 0)

    server = serve(script)
    path = source(tmp_path, pair(0), pair(1))
    assert synthesise(settings(server, path, "judge", attempts=2)) == 0
    assert len(server.requests) == 4
    assert any("call the replies cand_1 and cand_2" in r["messages"][-1]["content"] for r in server.requests)
    balance = json.loads((tmp_path / "out/balance.json").read_text())
    assert (balance["quarantined"], balance["kept"]) == (1, 1)
    (lost,) = rows(tmp_path / "out/quarantine.jsonl")
    assert lost["unit"] == "pair-0"
    assert lost["faults"][0]["kind"] == "named_by_place"


def test_a_library_of_ones_own(tmp_path: Path) -> None:
    own = shipped_library()[:3]
    (tmp_path / "library.yaml").write_text(write_library(own))
    assert tuple(load_library(str(tmp_path / "library.yaml"))) == own
    (tmp_path / "broken.yaml").write_text("- no")
    with pytest.raises(UserError, match=r"judge\.library"):
        load_library(str(tmp_path / "broken.yaml"))
