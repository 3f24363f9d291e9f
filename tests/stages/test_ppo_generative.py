"""PPO with a judge, as a user runs it: in this process and behind servers, on one process and on two."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from judge_model import rows, train_judge, verdict_text
from stage_files import Place, curve, summary
from test_ppo_algorithms import overrides as ppo_overrides

from her_nemo.roleplay.verdict import Winner

sys.path.append(str(Path(__file__).resolve().parents[1] / "data" / "synthesis"))

from scripted_endpoint import Reply, ScriptedEndpoint

pytestmark = [pytest.mark.slow, pytest.mark.parallel]

Stage = Callable[..., None]
CommandLine = Callable[..., subprocess.CompletedProcess[str]]
JUDGE = "reward.generative.judge"
CURVES = ("train_rollouts/rewards", "reward/disagreed", "train_optim/loss", "val_rollouts/rewards")
SHOWN = re.compile(r"===cand_1===\n(.*?)\n\n===cand_2===\n(.*)", re.DOTALL)


def overrides(place: Place, out: Path, **changes: object) -> list[str]:
    """HER's variant with four replies to a prompt, compared with the start's."""
    given = {"algorithm": "her", "model.ppo.num_samples_per_prompt": 4, "reward.kind": "generative"}
    return ppo_overrides(place, out, **given | changes)


@pytest.fixture(scope="module")
def judge(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_judge(place, tmp_path_factory.mktemp("judge"))


def in_process(judge: Path, **changes: object) -> dict[str, object]:
    """A judge of one mind; the rules beside it are what differs between replies."""
    given = {
        "reward.kind": "mix", "reward.mix.scalar": 0.0, "reward.mix.generative": 1.0, "reward.rules.length": 4.0,
        "reward.rules.min_words": 40, f"{JUDGE}.restore_from_path": judge, f"{JUDGE}.brief": True,
        f"{JUDGE}.max_tokens": 200, f"{JUDGE}.micro_batch_size": 32,
    }  # fmt: skip
    return given | changes


def test_the_judge_in_this_process_says_what_hugging_face_says(place: Place, judge: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from her_nemo.config.compose import load
    from her_nemo.megatron import parallel, platform
    from her_nemo.stages.ppo_judge import load_judge

    platform.apply()
    parallel.initialize()
    try:
        cfg = load("ppo", overrides(place, judge / "unused", **in_process(judge)))
        here = load_judge(cfg, cfg.reward.generative.judge)
        questions = rows(place.world, 5, seed=1)
        said = here.ask(questions)
        assert [answer.text for answer in said] == [verdict_text(Winner.CAND_1)] * 5
        reference = AutoModelForCausalLM.from_pretrained(judge, dtype="float32")
        from her_nemo.data.tokenise import Tokeniser

        tokeniser = Tokeniser(judge)
        for question, answer in zip(questions, said, strict=True):
            ids = tokeniser.prompt_ids(question)
            found = reference.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False)[0, len(ids) :]
            assert tokeniser.decode(found) == answer.text
        long = [{"role": "user", "content": "word " * 2000}]
        mixed = here.ask([long, questions[0]])
        assert mixed[0].text is None
        assert "tokens, and 824 are left" in mixed[0].problem
        assert mixed[1].text == said[0].text
    finally:
        parallel.destroy()


def test_in_process_the_same_on_two_replicas_and_over_two_ranks(
    place: Place, judge: Path, stage: Stage, tmp_path: Path
) -> None:
    layouts = {
        "one": [], "dp2": ["trainer.devices=2"],
        "tp2": ["trainer.devices=2", "model.tensor_model_parallel_size=2"],
        "pp2": ["trainer.devices=2", "model.pipeline_model_parallel_size=2"],
    }  # fmt: skip
    for name, layout in layouts.items():
        stage("ppo", *overrides(place, tmp_path / name, **in_process(judge)), *layout)
    one = tmp_path / "one"
    # The rules count replies that do not parse under the same name.
    assert max(curve(one, "reward/generative_unparsed")) <= 0.1  # counted, and no part of the update
    assert curve(one, "reward/unparsed") == curve(one, "reward/rules_unparsed")
    # cand_1 wins in either order: every pair that differs is a tie, and there are many.
    assert min(curve(one, "reward/disagreed")) > 0.5
    assert curve(one, "reward/generative") == [0.0] * 3
    assert curve(one, "reward/won") == curve(one, "reward/lost") == [0.0] * 3
    assert len(set(curve(one, "train_rollouts/rewards"))) == 3
    assert abs(summary(one)["ratio_step0"] - 1.0) < 1e-5
    for name in ("dp2", "tp2", "pp2"):
        for tag in CURVES:
            whole = np.array(curve(one, tag))
            assert len(whole) in (2, 3), tag
            assert np.abs(np.array(curve(tmp_path / name, tag)) - whole).max() < 1e-3, (name, tag)


def longer(body: dict, number: int) -> Reply:
    """The reply of more letters wins."""
    found = SHOWN.search(body["messages"][-1]["content"])
    assert found
    first, second = (len(text) for text in found.groups())
    winner = Winner.TIE if first == second else Winner.CAND_1 if first > second else Winner.CAND_2
    return Reply(verdict_text(winner))


def of_servers(*servers: ScriptedEndpoint, **changes: object) -> dict[str, object]:
    listed = ",".join(f"'{server.url}'" for server in servers)
    return {f"{JUDGE}.servers": f"[{listed}]", f"{JUDGE}.model": "grm"} | changes


def test_servers_judge_alike_on_one_replica_and_on_two(place: Place, stage: Stage, tmp_path: Path) -> None:
    with ScriptedEndpoint(longer) as first, ScriptedEndpoint(longer) as second:
        stage("ppo", *overrides(place, tmp_path / "one", **of_servers(first, second)))
        asked = first.requests + second.requests
        stage("ppo", *overrides(place, tmp_path / "dp2", **of_servers(first, second)), "trainer.devices=2")
        cache = {"reward.generative.cache_dir": tmp_path / "cache"}
        stage("ppo", *overrides(place, tmp_path / "cached", **of_servers(first, **cache)))
        before = len(first.requests)
        stage("ppo", *overrides(place, tmp_path / "again", **of_servers(first, **cache)))
        assert len(first.requests) == before, "all of it was on disk"
    one = tmp_path / "one"
    rewards = curve(one, "train_rollouts/rewards")
    assert len(set(rewards)) > 1
    assert all(-1.0 <= reward <= 1.0 for reward in rewards)
    won, lost = (np.array(curve(one, f"reward/{name}")) for name in ("won", "lost"))
    assert np.abs(won - lost - np.array(rewards)).max() < 1e-6
    assert (won + lost).min() > 0.3
    assert curve(one, "reward/unparsed") == curve(one, "reward/disagreed") == [0.0] * 3
    for name in ("dp2", "cached", "again"):
        for tag in CURVES:
            assert np.abs(np.array(curve(tmp_path / name, tag)) - np.array(curve(one, tag))).max() < 1e-3, (name, tag)
    assert curve(tmp_path / "again", "reward/cached") == [1.0] * 3
    assert not any("system_thinking" in json.dumps(body) for body in asked)


def test_replies_of_the_data_and_of_the_group(place: Place, stage: Stage, tmp_path: Path) -> None:
    lines, plan = [], "<system_thinking>p</system_thinking>"
    for name in ("prompts_train", "prompts_test"):
        for line in (place.world / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            row["messages"].append({"role": "assistant", "content": f"{plan}Ada: {'x' * 400}"})
            lines.append(json.dumps(row))
    (tmp_path / "references.jsonl").write_text("\n".join(lines) + "\n")
    against = {"reward.generative.against": "reference", "reward.generative.replies": tmp_path / "references.jsonl"}
    with ScriptedEndpoint(longer) as server:
        stage("ppo", *overrides(place, tmp_path / "reference", **of_servers(server, **against)))
        group = {"reward.generative.against": "group", "model.ppo.num_val_samples": 0}
        stage("ppo", *overrides(place, tmp_path / "group", **of_servers(server, **group)))
    assert curve(tmp_path / "reference", "train_rollouts/rewards") == [-1.0] * 3, "the reference is longer than all"
    assert np.abs(curve(tmp_path / "group", "train_rollouts/rewards")).max() < 1e-6
    assert min(curve(tmp_path / "group", "reward/won")) > 0.2


def test_a_judge_that_writes_no_verdicts_stops_all_ranks(place: Place, her_nemo: CommandLine, tmp_path: Path) -> None:
    """The policy's own start as judge: it writes noise."""
    given = {f"{JUDGE}.restore_from_path": place.model, f"{JUDGE}.max_tokens": 16, f"{JUDGE}.brief": True}
    begun = time.monotonic()
    done = her_nemo("ppo", *overrides(place, tmp_path / "run", **given), "trainer.devices=2", timeout=240)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("of the 32 verdicts on one rollout are missing or cannot be read") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 120


@pytest.mark.parametrize(("answered", "words"), [(0, "questions was answered: "), (16, "of the 32 verdicts on one")])
def test_servers_that_die_end_the_run_on_all_ranks(
    place: Place, her_nemo: CommandLine, tmp_path: Path, answered: int, words: str
) -> None:
    def dying(body: dict, number: int) -> Reply:
        return longer(body, number) if number < answered else Reply(status=503)

    with ScriptedEndpoint(dying) as server:
        given = of_servers(server, **{f"{JUDGE}.retries": 1})
        done = her_nemo("ppo", *overrides(place, tmp_path / "run", **given), "trainer.devices=2", timeout=240)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count(words) == 1, done.stderr[-3000:]
    assert "HTTP 503" in done.stderr
    assert "Traceback" not in done.stderr
    assert not curve(tmp_path / "run", "train_rollouts/rewards")
