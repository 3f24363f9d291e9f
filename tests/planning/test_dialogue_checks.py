"""What preflight finds wrong with conversations, each with its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.config.schema import PpoConfig
from her_nemo.planning import backend_checks, ppo_checks, rollout_checks

PREFIX = "model.ppo.dialogue"
SERVED = [f"{PREFIX}.turns=2", f"{PREFIX}.simulator.kind=openai", f"{PREFIX}.simulator.model=m",
          f"{PREFIX}.simulator.servers=['http://a:8000/v1','https://b/v1']"]  # fmt: skip


def config(*overrides: str) -> PpoConfig:
    given = [
        "pretrained_checkpoint.restore_from_path=/m", "model.data.train_ds.file_path=/d",
        "reward.restore_from_path=/r", "model.global_batch_size=64",
    ]  # fmt: skip
    loaded = compose.load("ppo", [*given, *overrides])
    assert isinstance(loaded, PpoConfig)
    return loaded


def found(*overrides: str) -> dict[str, str]:
    given = config(*overrides)
    problems = [*rollout_checks.check(given, {}), *ppo_checks.check(given, 2)]
    return {problem.key: str(problem) for problem in problems}


def test_nothing_is_wrong(tmp_path: Path) -> None:
    scenes = tmp_path / "scenes.jsonl"
    scenes.touch()
    assert found() == {}
    assert found(*SERVED) == {}
    assert found(*SERVED, f"{PREFIX}.credit=to_go", f"{PREFIX}.discount=0.5") == {}
    assert found(f"{PREFIX}.turns=2", f"{PREFIX}.scenes=['{scenes}']") == {}


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        ([f"{PREFIX}.credit=last"], f"{PREFIX}.credit", "has no effect with model.ppo.dialogue.turns=1"),
        ([f"{PREFIX}.simulator.model=m"], f"{PREFIX}.simulator.model", "has no effect"),
        ([f"{PREFIX}.turns=2"], f"{PREFIX}.scenes", "has to be given"),
        ([f"{PREFIX}.turns=2", f"{PREFIX}.scenes=['/no/file']"], f"{PREFIX}.scenes", "/no/file: no such file"),
        ([f"{PREFIX}.turns=2", f"{PREFIX}.simulator.retries=1"], f"{PREFIX}.simulator.retries", "no effect with"),
        ([*SERVED, f"{PREFIX}.simulator.model=null"], f"{PREFIX}.simulator.model", "has to be given"),
        ([*SERVED, f"{PREFIX}.simulator.servers=[]"], f"{PREFIX}.simulator.servers", "give base URLs"),
        ([*SERVED, f"{PREFIX}.simulator.servers=['a:80']"], f"{PREFIX}.simulator.servers", "'a:80' is no URL"),
        ([*SERVED, f"{PREFIX}.discount=0.5"], f"{PREFIX}.discount", "set model.ppo.dialogue.credit=to_go"),
        ([*SERVED, "model.ppo.one_step_off=true"], "model.ppo.one_step_off", "turn by turn"),
        ([*SERVED, "model.ppo.num_rollout_samples=66"], "model.ppo.num_rollout_samples",
         "use model.ppo.num_rollout_samples=68"),
        ([*SERVED, "reward.kind=verdict"], "reward.kind", "there is no conversation"),
        ([*SERVED, "reward.kind=generative", "reward.generative.against=group"], "reward.generative.against",
         "answer a prompt of their own"),
        ([*SERVED, "model.ppo.share_prompts=true"], "model.ppo.share_prompts", "prompts of their own"),
        (["model.ppo.packing=true", "model.ppo.share_prompts=true"], "model.ppo.share_prompts", "packed rows"),
        ([*SERVED, f"{PREFIX}.simulator.max_tokens=4000"], f"{PREFIX}.simulator.max_tokens", "no room"),
    ],
)  # fmt: skip
def test_what_is_wrong(overrides: list[str], key: str, words: str) -> None:
    problems = found(*overrides)
    assert words in problems[key], problems


def test_nemo_aligners_loop_has_no_conversations() -> None:
    given = config(*SERVED, "trainer.backend=nemo_aligner", "reward.kind=scalar")
    assert f"{PREFIX}" in {problem.key for problem in backend_checks.check(given)}


def test_servers_on_the_trainers_gpus() -> None:
    vllm = ["model.ppo.rollout_engine=vllm", "model.ppo.vllm.colocated=true", "trainer.accelerator=gpu"]
    assert found(*vllm, "model.ppo.vllm.gpu_memory_utilization=0.4") == {}
    problems = found(*vllm, "model.ppo.vllm.sync=nccl", "model.ppo.one_step_off=true")
    assert set(problems) == {
        "model.ppo.vllm.sync", "model.ppo.one_step_off", "model.ppo.vllm.gpu_memory_utilization"
    }  # fmt: skip
    assert "use 0.6 or less" in problems["model.ppo.vllm.gpu_memory_utilization"]
    given = found("model.ppo.rollout_engine=vllm", "model.ppo.vllm.colocated=true", "trainer.accelerator=cpu",
                  "model.ppo.vllm.servers=['http://a:8000']")  # fmt: skip
    assert list(given) == ["model.ppo.vllm.colocated"]


def test_groups_are_counted_by_turn() -> None:
    group = ["trainer.ppo.advantage_estimator=grpo", "model.ppo.num_samples_per_prompt=4"]
    assert found(*SERVED, *group) == {}
    problems = found(*SERVED, *group, "model.ppo.num_rollout_samples=72")
    assert "use model.ppo.num_rollout_samples=80" in problems["model.ppo.num_rollout_samples"]
    assert config(*SERVED, *group).model.ppo.num_prompts == 64 // 8
