"""What the planner says of vLLM servers: on GPUs of their own, they take the rollout's place."""

from __future__ import annotations

import shlex

import pytest

from her_nemo.config import partial
from her_nemo.config.schema import PpoConfig
from her_nemo.planning import calibration as cal
from her_nemo.planning import command, search
from her_nemo.planning.shapes import Shape, total_parameters
from her_nemo.planning.stages import StagePlan, plan

GPU = cal.GPUS["h100_80gb"]
POLICY = [
    "model=qwen3_32b",
    "precision=bf16",
    "cluster=h100_4x8",
    "model.global_batch_size=64",
    "model.ppo.num_rollout_samples=64",
    "model.tensor_model_parallel_size=8",
    "model.pipeline_model_parallel_size=2",
    "model.sequence_parallel=true",
]
TWO = ["model.ppo.rollout_engine=vllm", "model.ppo.vllm.servers=['http://a:8000','http://b:8000']"]


def configured(*overrides: str) -> PpoConfig:
    return partial.load("ppo", [*POLICY, *overrides])[0]


def planned(*overrides: str) -> StagePlan:
    config = configured(*overrides)
    return plan(config, Shape.from_architecture(config.model.architecture()))


def seconds(found: StagePlan, name: str) -> float:
    return next(phase.seconds for phase in found.phases if phase.name == name)


def test_what_lies_on_a_server() -> None:
    served = planned(*TWO).servers
    assert served is not None
    assert (served.count, served.tensor, served.gpus) == (2, 8, 16)
    shape = Shape.from_architecture(configured().model.architecture())
    weights = 2 * total_parameters(shape)
    assert served.weights == weights // 8
    # Keys and values: 2 x 64 layers x 1 group of 8 x 128 x 2 bytes a token, of sequences of 4,096 tokens.
    each = 2 * 64 * 128 * 2 * 4096
    assert served.cache == served.together * each
    assert served.together == min(64, int((GPU.memory * 0.8 - cal.CONTEXT_BYTES - weights / 8) / each))
    assert served.sync_seconds == pytest.approx(weights / (GPU.network * cal.COLLECTIVE_EFFICIENCY))


def test_its_gpus_are_the_runs_too() -> None:
    alone, beside = planned(), planned(*TWO)
    assert (alone.servers, alone.gpus, beside.gpus) == (None, 32, 48)
    assert beside.tokens_per_second_per_gpu == pytest.approx(64 * 4096 / beside.step_seconds / 48)
    # What trains is what it was, and holds what it held.
    for name in ("scoring", "critic update", "actor update"):
        assert seconds(beside, name) == seconds(alone, name)
    assert beside.parts == alone.parts
    assert seconds(beside, "rollout (server)") < seconds(alone, "rollout")
    assert seconds(beside, "sync") > seconds(alone, "sync") == 0


def test_servers_of_the_run_itself_are_reached_over_nvlink() -> None:
    served = planned("model.ppo.rollout_engine=vllm", "model.ppo.vllm.tensor_parallel_size=4").servers
    assert served is not None
    assert (served.count, served.gpus) == (1, 4)
    far = planned(*TWO).servers
    assert far is not None
    assert far.sync_seconds / served.sync_seconds == pytest.approx(GPU.nvlink / GPU.network)


def test_one_step_off_hides_the_rollout_behind_training() -> None:
    apart, off = planned(*TWO), planned(*TWO, "model.ppo.one_step_off=true")
    trained = sum(seconds(off, name) for name in seconds_of_training(off))
    hidden = max(0.0, seconds(apart, "rollout (server)") - trained)
    assert seconds(off, "rollout (server)") == pytest.approx(hidden)
    assert off.step_seconds == pytest.approx(apart.step_seconds - min(trained, seconds(apart, "rollout (server)")))


def seconds_of_training(found: StagePlan) -> list[str]:
    return [phase.name for phase in found.phases if phase.name not in ("rollout (server)", "sync")]


def test_a_full_server_decodes_no_more_at_once_than_it_holds() -> None:
    few = planned(*TWO, "model.ppo.vllm.max_num_seqs=4")
    many = planned(*TWO, "model.ppo.vllm.max_num_seqs=64")
    assert few.servers is not None
    assert few.servers.together == 4
    assert seconds(few, "rollout (server)") > seconds(many, "rollout (server)")


def test_the_command_says_it_in_text_and_json() -> None:
    answer = command.answer_for("ppo", [*POLICY, *TWO])
    text = command.as_text(answer)
    assert "rollouts on 16 more, 2 vLLM servers of TP 8: on each GPU 8.2 GB weights" in text
    assert "each server is taken to have a machine" in text
    assert command.as_json(answer)["plan"]["servers"]["count"] == 2
    assert command.as_json(command.answer_for("ppo", POLICY))["plan"]["servers"] is None


def test_the_search_gives_machines_to_servers() -> None:
    answer = command.answer_for("ppo", [*POLICY, "cluster=h100_8x8"], search_layouts=True)
    served = [option for option in answer.found if search.SERVERS in option.changes]
    best = served[0]
    nodes = best.changes[search.NODES] + len(best.changes[search.SERVERS])
    assert nodes == 8
    assert f"VLLM_NODES={len(best.changes[search.SERVERS])}" in best.why()
    again = configured("cluster=h100_8x8", *shlex.split(best.overrides))
    found = plan(again, Shape.from_architecture(again.model.architecture()))
    assert found.step_seconds == pytest.approx(best.plan.step_seconds)


def test_servers_on_the_trainers_gpus_take_their_share_of_them_while_they_are_awake() -> None:
    given = ["model.ppo.rollout_engine=vllm", "model.ppo.vllm.tensor_parallel_size=2",
             "model.ppo.vllm.gpu_memory_utilization=0.4"]  # fmt: skip
    apart, together = planned(*given), planned(*given, "model.ppo.vllm.colocated=true")
    assert (apart.gpus, together.gpus) == (34, 32)
    phases, same = ({phase.name: phase for phase in found.phases} for found in (apart, together))
    assert phases.keys() - same.keys() == {"rollout (server)"}
    assert same["rollout"].seconds == phases["rollout (server)"].seconds
    for name in ("rollout", "sync"):
        assert (same[name].static, same[name].passing) == (same["load"].static, int(0.4 * GPU.memory)), name
    assert phases["sync"].passing == 0
    for name in ("scoring", "critic update", "actor update", "save"):  # asleep
        assert same[name].total == phases[name].total, name
