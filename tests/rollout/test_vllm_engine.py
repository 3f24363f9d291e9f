"""The vLLM engine against Hugging Face: same tokens, same log-probs, before and after a weight update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_qwen3 import tiny_model
from transformers import Qwen3ForCausalLM

from her_nemo.config.errors import UserError
from her_nemo.rollout.engine import Rollout, Sampling
from her_nemo.rollout.vllm_engine import VllmEngine, sample_seed

pytestmark = pytest.mark.vllm

EOS = 2
PROMPTS = [
    torch.randint(3, 1024, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 17, 33, 8, 21, 12)
]


def make_model(out: Path, seed: int, *, tied: bool = True, head_dim: int = 32) -> Qwen3ForCausalLM:
    return tiny_model(
        out, seed=seed, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, tie_word_embeddings=tied, max_position_embeddings=128,
        initializer_range=0.05, eos_token_id=EOS,
    )


def hf_log_probs(model: Qwen3ForCausalLM, prompt: list[int], reply: list[int], temperature: float):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def largest_gap(model: Qwen3ForCausalLM, rollout, temperature: float = 1.0) -> float:
    rows = zip(rollout.prompt_ids, rollout.response_ids, rollout.log_probs, strict=True)
    return max(
        (hf_log_probs(model, prompt, reply, temperature) - torch.tensor(scores)).abs().max().item()
        for prompt, reply, scores in rows
    )


class TestTiedModel:
    @pytest.fixture(scope="class")
    def tied(self, tmp_path_factory):
        """(engine, its Hugging Face twin, another model of the same shape)."""
        root = tmp_path_factory.mktemp("vllm")
        model, other = make_model(root / "a", 0), make_model(root / "b", 1)
        with VllmEngine(root / "a") as engine:
            yield engine, model, other

    def test_greedy_tokens_equal_hugging_face(self, tied) -> None:
        engine, model, _ = tied
        rollout = engine.generate(PROMPTS, Sampling(temperature=0.0, max_tokens=16, stop_ids=(EOS,)), seed=0)
        for prompt, reply in zip(PROMPTS, rollout.response_ids, strict=True):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                expected = model.generate(
                    ids, do_sample=False, max_new_tokens=16, eos_token_id=EOS, pad_token_id=0
                )
            assert reply == expected[0, len(prompt) :].tolist()
        assert largest_gap(model, rollout) < 1e-4

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_log_probs_equal_hugging_face(self, tied, temperature: float) -> None:
        engine, model, _ = tied
        sampling = Sampling(temperature=temperature, max_tokens=24, stop_ids=(EOS,))
        rollout = engine.generate(PROMPTS, sampling, seed=3)
        assert largest_gap(model, rollout, temperature) < 1e-4
        assert rollout.weight_version == 0
        assert rollout.response_tokens == sum(map(len, rollout.log_probs))

    def test_a_seed_gives_the_same_samples_in_any_batch(self, tied) -> None:
        engine, _, _ = tied
        sampling = Sampling(max_tokens=12, stop_ids=(EOS,))
        together = engine.generate(PROMPTS, sampling, seed=11).response_ids
        alone = [
            engine.generate([prompt], sampling, seed=11, indices=[number]).response_ids[0]
            for number, prompt in enumerate(PROMPTS)
        ]
        assert alone == together
        assert engine.generate(PROMPTS, sampling, seed=12).response_ids != together
        twins = engine.generate([PROMPTS[0]] * 2, sampling, seed=11).response_ids
        assert twins[0] != twins[1]

    def test_more_prompt_tokens_than_one_step_takes(self, tied) -> None:
        engine, model, _ = tied
        prompts = [(PROMPTS[2] * 3)[number % 7 :] for number in range(70)]
        assert sum(map(len, prompts)) > 6000
        rollout = engine.generate(prompts, Sampling(max_tokens=4), seed=2)
        assert largest_gap(model, rollout) < 1e-4

    def test_samples_follow_the_distribution(self, tied) -> None:
        engine, model, _ = tied
        count = 4000
        rollout = engine.generate([PROMPTS[0]] * count, Sampling(temperature=0.5, max_tokens=1), seed=5)
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
        probs = (logits / 0.5).softmax(-1)
        drawn = Counter(reply[0] for reply in rollout.response_ids)
        likely = probs.topk(12).indices.tolist()
        groups = [([token], probs[token].item()) for token in likely]
        observed = [drawn[token] for token in likely] + [count - sum(drawn[token] for token in likely)]
        expected = [count * share for _, share in groups]
        expected.append(count - sum(expected))
        chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
        assert min(expected) > 5
        assert chi2 < 32.9  # 99.9 % point at 12 degrees of freedom

    def test_stop_token_ends_a_reply_and_is_part_of_it(self, tied) -> None:
        engine, _, _ = tied
        free = engine.generate(PROMPTS[:1], Sampling(max_tokens=10), seed=7).response_ids[0]
        stop = free[4]
        sampling = Sampling(max_tokens=10, stop_ids=(stop,))
        rollout = engine.generate(PROMPTS[:1], sampling, seed=7)
        assert rollout.response_ids[0] == free[: free.index(stop) + 1]
        assert rollout.finished == [True]
        assert engine.generate(PROMPTS[:1], Sampling(max_tokens=3), seed=7).finished == [False]

    def test_a_prompt_without_room_for_the_reply_is_refused(self, tied) -> None:
        engine, _, _ = tied
        with pytest.raises(UserError, match=r"33 tokens and max_tokens is 100.*model's 128"):
            engine.generate(PROMPTS, Sampling(max_tokens=100), seed=0)
        with pytest.raises(UserError, match=r"prompt 1 has no tokens"):
            engine.generate([[5], []], Sampling(max_tokens=4), seed=0)

    def test_update_weights_reaches_every_tensor_and_the_tied_head(self, tied) -> None:
        engine, model, other = tied
        sampling = Sampling(max_tokens=16, stop_ids=(EOS,))
        trained = [(name, tensor) for name, tensor in other.state_dict().items() if name != "lm_head.weight"]

        with pytest.raises(ValueError, match=r"1 missing, first 'model\..*1 unknown, first 'model.typo'"):
            engine.update_weights(iter([*trained[1:], ("model.typo", trained[0][1])]), version=1)
        assert largest_gap(model, engine.generate(PROMPTS, sampling, seed=1)) < 1e-4  # nothing changed

        engine.update_weights(iter(trained), version=1)
        rollout = engine.generate(PROMPTS, sampling, seed=1)
        assert rollout.weight_version == engine.weight_version == 1
        assert largest_gap(other, rollout) < 1e-4
        assert largest_gap(model, rollout) > 0.1

        engine.update_weights(iter(model.state_dict().items()), version=2)  # with lm_head.weight named
        assert largest_gap(model, engine.generate(PROMPTS, sampling, seed=1)) < 1e-4


def test_building_an_engine_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    make_model(tmp_path / "a", 2)
    torch.manual_seed(99)
    expected, set_num_threads = torch.rand(3), torch.set_num_threads
    torch.manual_seed(99)
    with VllmEngine(tmp_path / "a"):
        assert torch.equal(torch.rand(3), expected)
        assert torch.set_num_threads is set_num_threads


def test_untied_head_and_one_engine_at_a_time(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 2, tied=False)
    other = make_model(tmp_path / "b", 3, tied=False)
    with VllmEngine(tmp_path / "a", max_num_seqs=2) as engine:
        sampling = Sampling(max_tokens=8)
        assert largest_gap(model, engine.generate(PROMPTS, sampling, seed=1)) < 1e-4
        engine.update_weights(iter(other.state_dict().items()), version=4)
        assert largest_gap(other, engine.generate(PROMPTS, sampling, seed=1)) < 1e-4
        with pytest.raises(RuntimeError, match=r"already open"):
            VllmEngine(tmp_path / "b")
    engine.close()
    with pytest.raises(RuntimeError, match=r"closed"):
        engine.generate(PROMPTS, Sampling(max_tokens=2), seed=0)


def test_directories_that_cannot_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is missing"):
        VllmEngine(tmp_path)
    make_model(tmp_path / "small_heads", 0, head_dim=16)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"head size 16.*kv_channels"):
            VllmEngine(tmp_path / "small_heads")
    for file in (tmp_path / "small_heads").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=r"no .*safetensors"):
        VllmEngine(tmp_path / "small_heads")


def test_sampling_names_every_wrong_value() -> None:
    with pytest.raises(ValueError, match=r"temperature is -1.*top_p is 0.*min_tokens is 9"):
        Sampling(temperature=-1, top_p=0, max_tokens=4, min_tokens=9)


def test_sample_seeds_are_distinct_and_fit() -> None:
    seeds = {sample_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_importing_the_module_does_not_import_vllm_and_keeps_the_users_environment() -> None:
    code = (
        "import os, sys; from her_nemo.rollout import vllm_engine; vllm_engine.configure_environment();"
        "assert 'vllm' not in sys.modules;"
        "print(os.environ['VLLM_LOGGING_LEVEL'], os.environ.get('VLLM_CPU_OMP_THREADS_BIND', 'nobind'))"
    )
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "ERROR nobind"


TWO_WORKERS = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
from her_nemo.rollout.engine import Rollout, Sampling
from her_nemo.rollout.vllm_engine import VllmEngine

if __name__ == "__main__":
    root, prompts = Path(sys.argv[1]), json.loads(sys.argv[2])
    with VllmEngine(root / "a", tensor_parallel_size=2) as engine:
        before = engine.generate(prompts, Sampling(max_tokens=12), 1)
        engine.update_weights(iter(load_file(root / "b" / "model.safetensors").items()), 3)
        after = engine.generate(prompts, Sampling(max_tokens=12), 1)
    (root / "rollouts.json").write_text(json.dumps([vars(before), vars(after)]))
"""


@pytest.mark.slow
def test_two_workers_get_new_weights_through_a_file(tmp_path: Path) -> None:
    model, other = make_model(tmp_path / "a", 0), make_model(tmp_path / "b", 1)
    script = tmp_path / "two_workers.py"  # a file of its own, since vLLM starts its workers by spawning
    script.write_text(TWO_WORKERS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(script), str(tmp_path), json.dumps(PROMPTS)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    before, after = (Rollout(**values) for values in json.loads((tmp_path / "rollouts.json").read_text()))
    assert largest_gap(model, before) < 1e-4
    assert largest_gap(other, after) < 1e-4
    assert after.weight_version == 3
