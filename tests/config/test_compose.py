"""Composition: what is read from where, and that everything wrong is said at once, with the key to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.config.errors import ConfigErrors, UserError, nearest
from her_nemo.config.schema import STAGES, ConvertConfig, DemoConfig, EvaluateConfig, PpoConfig, SftConfig

GIVEN = {
    "sft": ["pretrained_checkpoint.restore_from_path=/base", "model.data.train_ds.file_path=/train.jsonl"],
    "convert": ["source=/hf", "out=/megatron"],
    "export": ["checkpoint=/run", "out=/hf"],
    "verify": ["a=/hf", "b=/megatron"],
    "evaluate": ["model=/hf", "prompts=/prompts.jsonl"],
    "judge": ["model=/hf", "prompts=/prompts.jsonl"],
    "evaluate_coser": ["scenes=/test_set.json"],
    "evaluate_roleplay_bench": ["seeds=/seeds.jsonl"],
    "evaluate_reward_model": ["model=/rm", "pairs=/pairs.jsonl"],
    "evaluate_compare": ["runs=[/a,/b]"],
    "demo": [],
    "data_ingest": ["path=/book.json", "out=/data"],
    "data_inspect": ["path=/samples.parquet"],
    "chat": ["endpoint=http://localhost/v1"],
    "data_synthesise": ["stage=all", "source=/in.jsonl", "out=/out", "endpoint=http://localhost/v1", "model=m"],
    "data_judge": ["source=/pairs.jsonl", "out=/out"],
}
GIVEN["reward"] = GIVEN["sft"]
GIVEN["ppo"] = [*GIVEN["sft"], "reward.restore_from_path=/reward"]


def problems(stage: str, *overrides: str, **options: Path | str) -> dict[str, str]:
    """Key -> text of every problem."""
    with pytest.raises(ConfigErrors) as caught:
        compose.load(stage, list(overrides), **options)
    return {problem.key: str(problem) for problem in caught.value.problems}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_loads(stage: str) -> None:
    config = compose.load(stage, GIVEN[stage])
    assert type(config) is STAGES[stage]
    assert config.name == stage


@pytest.mark.parametrize("stage", STAGES)
def test_conf_files_hold_no_unknown_or_repeated_default(stage: str) -> None:
    # YAML holds only what differs: a value equal to the schema's default has no business in a stage file.
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(compose.conf_dir() / f"{stage}.yaml"), resolve=False)
    content.pop("defaults", None)
    for key, info in compose.known_keys(STAGES[stage]):
        if compose.subsection(info.annotation) is None and not info.is_required():
            value = content
            for part in key.split("."):
                value = value.get(part, ...) if isinstance(value, dict) else ...
            assert value is ... or value != info.get_default(), f"{stage}.yaml repeats the default of {key}"


def test_values_come_from_defaults_files_groups_and_overrides() -> None:
    config = compose.load(
        "ppo",
        [
            *GIVEN["ppo"],
            "model=qwen3_8b",
            "cluster=h100_8x8",
            "precision=bf16",
            "model.optim.betas=[0.8,0.9]",
        ],
    )
    assert isinstance(config, PpoConfig)
    assert config.model.hidden_size == 4096
    assert config.model.optim.betas == [0.8, 0.9]
    assert config.model.optim.lr == 1e-6
    assert config.critic.optim.lr == 5e-6
    assert config.trainer.world_size == 64
    assert config.trainer.precision == "bf16"
    assert config.exp_manager.explicit_log_dir == "runs/ppo"
    assert config.model.ppo.ratio_eps == 0.2


def test_a_later_override_wins_and_plus_and_tilde_work() -> None:
    config = compose.load(
        "sft",
        [*GIVEN["sft"], "trainer.devices=2", "trainer.devices=4", "+model.seed=7", "++model.optim.lr=1"],
    )
    assert isinstance(config, SftConfig)
    assert (config.trainer.devices, config.model.seed, config.model.optim.lr) == (4, 7, 1.0)
    config = compose.load("ppo", [*GIVEN["ppo"], "~model.optim.lr"])
    assert isinstance(config, PpoConfig)
    assert config.model.optim.lr == 1e-5


def test_an_evaluation_model_is_a_path_not_a_group() -> None:
    config = compose.load("evaluate", GIVEN["evaluate"])
    assert isinstance(config, EvaluateConfig)
    assert config.model == "/hf"


def test_the_arithmetic_resolvers_and_pointers_to_defaults() -> None:
    config = compose.load(
        "ppo",
        [
            *GIVEN["ppo"],
            "model.ppo.num_rollout_samples='${multiply:${model.global_batch_size},4}'",
            "model.ppo.length_params.max_length='${int_div:${model.encoder_seq_length},2}'",
            "model.ppo.length_params.min_length='${subtract:5,3}'",
        ],
    )
    assert isinstance(config, PpoConfig)
    assert config.model.ppo.num_rollout_samples == 32
    assert config.model.ppo.length_params.max_length == 2048
    assert config.model.ppo.length_params.min_length == 2


def test_everything_wrong_is_reported_in_one_go() -> None:
    found = problems(
        "sft",
        "model=qwen3_33b",
        "trainer.devises=2",
        "trainer.num_nodes=two",
        "model.optim.lr=fast",
        "model.optim.betas=[0.9]",
        "model.micro_batch_size=0",
        "model.seed=1,2",
        "cannot read this",
    )
    assert "did you mean model=qwen3_32b?" in found["model"]
    assert "did you mean trainer.devices?" in found["trainer.devises"]
    assert "given 'two' (text), wanted a whole number" in found["trainer.num_nodes"]
    assert "given 'fast' (text), wanted a number" in found["model.optim.lr"]
    assert "wanted a list of 2" in found["model.optim.betas"]
    assert "wanted more than 0" in found["model.micro_batch_size"]
    assert "sweep" in found["model.seed"]
    assert "cannot read the override 'cannot read this'" in found[""]
    assert "has to be given" in found["pretrained_checkpoint.restore_from_path"]
    assert "has to be given" in found["model.data.train_ds.file_path"]
    assert all("command line" in found[key] for key in ("model", "trainer.devises", "trainer.num_nodes"))


def test_a_misplaced_key_is_answered_with_its_place() -> None:
    found = problems(
        "ppo", *GIVEN["ppo"], "model.lr=1e-5", "trainer.initial_policy_kl_penalty=0.1", "model.ppo.top_p=1"
    )
    assert "did you mean model.optim.lr?" in found["model.lr"]
    assert "did you mean trainer.ppo.initial_policy_kl_penalty?" in found["trainer.initial_policy_kl_penalty"]
    assert "did you mean model.ppo.sampling_params.top_p?" in found["model.ppo.top_p"]


def test_types_are_strict() -> None:
    found = problems(
        "sft",
        *GIVEN["sft"],
        "trainer.devices=2.0",
        "model.sequence_parallel=1",
        "model.micro_batch_size='4'",
        "name=7",
        "model.optim=adam",
        "model.seed=null",
        "model.activations_checkpoint_granularity=ful",
    )
    assert "given 2.0 (a number), wanted a whole number" in found["trainer.devices"]
    assert "given 1 (a whole number), wanted true or false" in found["model.sequence_parallel"]
    assert "given '4' (text), wanted a whole number" in found["model.micro_batch_size"]
    assert "wanted text" in found["name"]
    assert "wanted a section" in found["model.optim"]
    assert "given null" in found["model.seed"]
    assert "'full' or 'selective'" in found["model.activations_checkpoint_granularity"]


def test_precision_may_be_written_as_a_number() -> None:
    config = compose.load("sft", [*GIVEN["sft"], "trainer.precision=32"])
    assert isinstance(config, SftConfig)
    assert config.trainer.precision == "32"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - model: qwen3_tiny\n  - _self_\nname: mine\n"
        "exp_manager: {explicit_log_dir: '${name}/run'}\n"
        "model: {optim: {lr: 3.0e-4}}\n"
    )
    config = compose.load("sft", GIVEN["sft"], config_dir=tmp_path, config_name="mine")
    assert isinstance(config, SftConfig)
    assert config.model.hidden_size == 128
    assert config.model.optim.lr == 3e-4
    assert config.exp_manager.explicit_log_dir == "mine/run"


def test_problems_in_a_file_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nmodle: {seed: 1}\nmodel: {optim: {lr: '1e-4', lrr: 2}}\n"
    )
    found = problems("sft", *GIVEN["sft"], config_dir=tmp_path, config_name="mine")
    assert "mine.yaml" in found["modle"]
    assert "did you mean model?" in found["modle"]
    assert "mine.yaml" in found["model.optim.lr"]
    assert "(text), wanted a number" in found["model.optim.lr"]
    assert "did you mean model.optim.lr?" in found["model.optim.lrr"]
    assert "has to be given" in found["exp_manager.explicit_log_dir"]


def test_a_file_that_is_not_yaml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: [unclosed\n")
    with pytest.raises(ConfigErrors, match=r"mine\.yaml"):
        compose.load("sft", GIVEN["sft"], config_dir=tmp_path, config_name="mine")


def test_a_pointer_to_nowhere_names_the_key_and_who_set_it() -> None:
    found = problems("sft", *GIVEN["sft"], "exp_manager.explicit_log_dir='${nam}/run'")
    assert "nam" in found["exp_manager.explicit_log_dir"]
    assert "command line" in found["exp_manager.explicit_log_dir"]


def test_a_group_a_stage_does_not_take() -> None:
    assert "has no such group" in problems("evaluate", *GIVEN["evaluate"], "cluster=local")["cluster"]


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        ("sfft", {}, "did you mean 'sft'"),
        ("sft", {"config_dir": "/nowhere"}, "no such directory"),
        ("sft", {"config_name": "nothing"}, "no file nothing.yaml"),
    ],
)
def test_no_such_stage_directory_or_file(stage: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compose.load(stage, [], **options)


def test_the_rest_of_a_configuration_with_unknown_keys_is_offered_for_further_checks() -> None:
    with pytest.raises(ConfigErrors) as caught:
        compose.load("sft", [*GIVEN["sft"], "trainer.devises=2", "model.seed=5"])
    assert isinstance(caught.value.rest, SftConfig)
    assert caught.value.rest.model.seed == 5


def test_nothing_like_it_suggests_nothing() -> None:
    assert nearest("zzzz", ["trainer.devices", "model.seed"]) is None


def test_configurations_do_not_change_after_loading() -> None:
    config = compose.load("demo", [])
    assert isinstance(config, DemoConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_validation_batches() -> None:
    def batches(limit: str) -> int:
        config = compose.load("sft", [*GIVEN["sft"], f"trainer.sft.limit_val_batches={limit}"])
        assert isinstance(config, SftConfig)
        return config.trainer.sft.val_batches(10)

    assert [batches("null"), batches("3"), batches("30"), batches("0.5"), batches("1.0")] == [
        10,
        3,
        10,
        5,
        10,
    ]


def test_every_key_says_what_it_is_for() -> None:
    for stage, schema in STAGES.items():
        for key, info in compose.known_keys(schema):
            if compose.subsection(info.annotation) is None:
                assert info.description, f"{stage}: {key} has no description"
                assert info.description.endswith("."), f"{stage}: {key}: not a sentence"


@pytest.mark.parametrize(
    "path", ["/plain", "a b/c", "x=1,y", "it's", '"quoted"', "[list]", "5", "null", "ends\\", "a\\'b"]
)
def test_assign_keeps_any_path_as_it_is(path: str) -> None:
    config = compose.load("convert", [compose.assign("source", path), "out=/x"])
    assert isinstance(config, ConvertConfig)
    assert config.source == path
