"""Rollouts from real vLLM servers: they hold the weights they are given, draw what the seeds say, and may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import vllm_tiny as tiny
from processes import family, running, status

from her_nemo.config.errors import UserError
from her_nemo.megatron import parallel
from her_nemo.rollout.checksum import Checksum, tensor_checksum
from her_nemo.rollout.engine import Rollout, Sampling
from her_nemo.rollout.server_engine import ServerEngine, ServerPool
from her_nemo.rollout.vllm_client import VllmServer
from her_nemo.rollout.vllm_server import ServerOptions, ServerProcess, started
from her_nemo.rollout.weight_sync import FileTransport, SyncError

START_SECONDS = 580
PROMPTS = [
    torch.randint(3, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 17, 33, 8, 21, 12)
]


def options(model: Path, **changes: object) -> ServerOptions:
    given = {
        "model": model, "dtype": "float32", "max_model_len": tiny.LENGTH, "max_num_seqs": 16,
        "tensor_parallel_size": 1, "gpu_memory_utilization": 0.9, "prefix_caching": True, "backend": "her_nemo_files",
    }  # fmt: skip
    return ServerOptions(**given | changes)


def wait_ready(processes: list[ServerProcess]) -> None:
    deadline = time.monotonic() + START_SECONDS
    for process in processes:
        server = VllmServer(process.url)
        while not server.healthy():
            assert process.ended() is None, process.ended()
            assert time.monotonic() < deadline, process.log.read_text()[-4000:]
            time.sleep(0.5)
        server.close()


def engine_of(processes: list[ServerProcess], holder: dict, scratch: Path) -> ServerEngine:
    """An engine whose trainer is holder["model"]."""
    return ServerEngine(
        ServerPool([process.url for process in processes]),
        FileTransport(scratch / "weights", piece_bytes=100_000),
        lambda rows: [tiny.log_probs(holder["model"], row).tolist() for row in rows],
        probe_limit=1e-3, vocab_size=tiny.VOCAB, max_model_len=tiny.LENGTH, in_flight=8, sleeps=True,
    )  # fmt: skip


def largest_gap(model, rollout: Rollout, temperature: float = 1.0) -> float:
    gaps = []
    for prompt, reply, said in zip(rollout.prompt_ids, rollout.response_ids, rollout.log_probs, strict=True):
        expected = tiny.log_probs(model, prompt + reply, temperature)[len(prompt) - 1 :]
        gaps.append(float((expected - torch.tensor(said)).abs().max()))
    return max(gaps)


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if running(pid)}


def kill_server(process: ServerProcess) -> None:
    """SIGKILL to the API server alone, as the kernel does when memory runs out."""
    (server,) = [
        pid for pid in family(process.pid) - {process.pid}
        if status(pid).split("\nPPid:\t")[1].split("\n")[0] == str(process.pid)
    ]  # fmt: skip
    os.kill(server, signal.SIGKILL)


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    parallel.initialize()
    yield
    parallel.destroy()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("world")
class TestTwoServers:
    """In order: what the last tests do to the servers cannot be undone."""

    @pytest.fixture(scope="class")
    def two(self, tmp_path_factory):
        """(engine, its two server processes, the trainer's model in a box)."""
        scratch = tmp_path_factory.mktemp("two")
        holder = {"model": tiny.model(0)}
        with ExitStack() as closing:
            processes = closing.enter_context(
                started(options(tiny.write_config(scratch / "model", tied=True)), scratch, [(), ()])
            )
            wait_ready(processes)
            engine = engine_of(processes, holder, scratch)
            closing.callback(engine.close)
            engine.update_weights(iter(tiny.tensors(holder["model"])), version=0)
            yield engine, processes, holder

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_log_probs_equal_hugging_face(self, two, temperature: float) -> None:
        engine, _, holder = two
        sampling = Sampling(temperature=temperature, max_tokens=24, stop_ids=(tiny.EOS,))
        rollout = engine.generate(PROMPTS, sampling, seed=3)
        assert largest_gap(holder["model"], rollout, temperature) < 1e-4
        assert all(rollout.response_ids)
        assert engine.tags()["rollout/probe_gap_max"] < 1e-4

    def test_samples_depend_on_seed_and_number_alone(self, two) -> None:
        engine, _, _ = two
        sampling = Sampling(max_tokens=12, stop_ids=(tiny.EOS,))
        together = engine.generate(PROMPTS, sampling, seed=11).response_ids
        alone = [
            engine.generate([prompt], sampling, seed=11, indices=[number]).response_ids[0]
            for number, prompt in enumerate(PROMPTS)
        ]
        assert alone == together
        assert engine.generate(PROMPTS, sampling, seed=12).response_ids != together

    def test_servers_sleep_when_told_and_wake_for_the_next_call(self, two) -> None:
        """What sleeping frees is the GPU's; here the phases are proved, and that no weights are lost by them."""
        engine, processes, holder = two

        def sleeping() -> set[bool]:
            return {VllmServer(process.url).get("/is_sleeping")["is_sleeping"] for process in processes}

        sampling = Sampling(max_tokens=12, stop_ids=(tiny.EOS,))
        before = engine.generate(PROMPTS, sampling, seed=21)
        assert sleeping() == {False}
        engine.rest()
        engine.rest()
        assert sleeping() == {True}
        after = engine.generate(PROMPTS, sampling, seed=21)
        assert sleeping() == {False}
        assert (after.response_ids, after.weight_version) == (before.response_ids, before.weight_version)
        engine.rest()
        engine.update_weights(iter(tiny.tensors(holder["model"])), version=0)
        assert sleeping() == {False}
        assert {"timers/sleep", "timers/wake"} <= set(engine.tags())

    def test_new_weights_reach_every_tensor_the_tied_head_and_the_prefix_cache(self, two) -> None:
        engine, processes, holder = two
        sampling = Sampling(max_tokens=16, stop_ids=(tiny.EOS,))
        old, new = holder["model"], tiny.model(1)
        engine.generate(PROMPTS, sampling, seed=1)  # fills the prefix cache
        holder["model"] = new
        engine.update_weights(iter(tiny.tensors(new)), version=5)
        rollout = engine.generate(PROMPTS, sampling, seed=1)
        assert rollout.weight_version == 5
        assert {VllmServer(p.url).get("/weight_info")["weight_version"] for p in processes} == {"5"}
        assert largest_gap(new, rollout) < 1e-4
        assert largest_gap(old, rollout) > 0.1

    def test_weights_that_the_trainer_does_not_have_are_noticed(self, two) -> None:
        engine, _, holder = two
        other = tiny.model(2)
        with pytest.raises(SyncError, match=r"other weights than the trainer .* version 6"):
            engine.update_weights(iter(tiny.tensors(other)), version=6)
        engine.update_weights(iter(tiny.tensors(holder["model"])), version=7)

    def test_a_stop_token_before_its_time_is_drawn_again(self, two) -> None:
        """Every other token stops; the log-probs are still those of the whole vocabulary."""
        engine, _, holder = two
        stops = tuple(range(0, tiny.VOCAB, 2))
        rollout = engine.generate(PROMPTS, Sampling(max_tokens=8, min_tokens=3, stop_ids=stops), seed=4)
        assert all(len(reply) > 3 for reply in rollout.response_ids)
        assert all(token % 2 for reply in rollout.response_ids for token in reply[:-1])
        assert largest_gap(holder["model"], rollout) < 1e-4

    def test_one_step_off(self, two) -> None:
        """A started rollout comes from the weights of its start, and an update waits for it."""
        engine, _, holder = two
        sampling = Sampling(max_tokens=48)
        old, new = holder["model"], tiny.model(3)
        engine.start(PROMPTS, sampling, 21)
        between = engine.generate(PROMPTS[:2], Sampling(max_tokens=4), seed=0)
        assert largest_gap(old, between) < 1e-4
        assert engine.staleness == 0
        holder["model"] = new
        engine.update_weights(iter(tiny.tensors(new)), version=8)
        rollout = engine.generate(PROMPTS, sampling, 21)
        assert rollout.weight_version == 7
        assert largest_gap(old, rollout) < 1e-4
        assert engine.staleness == 1 == engine.tags()["rollout/staleness"]
        assert engine.tags()["rollout/overlap"] > 0.9  # it had ended before it was asked for
        assert largest_gap(new, engine.generate(PROMPTS, sampling, 22)) < 1e-4
        assert engine.staleness == 0

    def test_a_refused_request_is_the_callers_error(self, two) -> None:
        engine, _, _ = two
        with pytest.raises(UserError, match=r"refused a request.*256"):
            engine.generate([[5] * (tiny.LENGTH + 10)], Sampling(max_tokens=4), seed=0)
        assert engine.tags()["rollout/servers"] == 2

    def test_one_dies_while_generating_and_the_other_takes_over(self, two, capfd) -> None:
        engine, processes, holder = two
        prompts, sampling = PROMPTS * 6, Sampling(max_tokens=160)
        everyone = family(processes[0].pid)
        expected = engine.generate(prompts, sampling, seed=31).response_ids
        engine.start(prompts, sampling, 31)
        time.sleep(0.3)
        kill_server(processes[0])
        rollout = engine.generate(prompts, sampling, 31)
        assert rollout.response_ids == expected
        assert engine.tags()["rollout/servers"] == 1
        assert f"rollout server lost, 1 left: {processes[0].url}" in capfd.readouterr().err
        holder["model"] = tiny.model(4)
        engine.update_weights(iter(tiny.tensors(holder["model"])), version=9)
        assert largest_gap(holder["model"], engine.generate(PROMPTS, sampling, seed=2)) < 1e-4
        deadline = time.monotonic() + 20
        while alive(everyone) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not alive(everyone)  # its engine core is not left behind

    def test_the_last_dies_and_one_error_says_so(self, two) -> None:
        engine, processes, _ = two
        engine.start(PROMPTS * 6, Sampling(max_tokens=160), 41)
        time.sleep(0.3)
        kill_server(processes[1])
        begun = time.monotonic()
        with pytest.raises(UserError, match=rf"no rollout server is left: .*{processes[0].url}.*{processes[1].url}"):
            engine.generate(PROMPTS * 6, Sampling(max_tokens=160), 41)
        assert time.monotonic() - begun < 60


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_untied_head_and_a_starter_that_is_killed(tmp_path: Path) -> None:
    """The server of a process that gets SIGKILL goes with it; until then it follows the weights."""
    model = tiny.write_config(tmp_path / "model", tied=False)
    program = (
        "import sys, time; from pathlib import Path\n"
        "from her_nemo.rollout.vllm_server import ServerOptions, ServerProcess\n"
        f"p = ServerProcess(ServerOptions(Path({str(model)!r}), 'float32', 256, 16, 1, 0.9, False, 'her_nemo_files'),"
        f" Path({str(tmp_path / 'log')!r}))\n"
        "print(p.url, p.pid, flush=True); time.sleep(3600)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as starter:
        assert starter.stdout is not None
        try:
            url, guard = starter.stdout.readline().split()
            server = VllmServer(url)
            deadline = time.monotonic() + START_SECONDS
            while not server.healthy():
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
                assert Path(f"/proc/{guard}").exists(), (tmp_path / "log").read_text()[-4000:]
                time.sleep(0.5)
            holder = {}
            engine = ServerEngine(
                ServerPool([url]), FileTransport(tmp_path / "weights"),
                lambda rows: [tiny.log_probs(holder["model"], row).tolist() for row in rows],
                probe_limit=1e-3, vocab_size=tiny.VOCAB, max_model_len=tiny.LENGTH, in_flight=8,
            )  # fmt: skip
            for version in (1, 2):
                holder["model"] = tiny.model(version, tied=False)
                engine.update_weights(iter(tiny.tensors(holder["model"])), version=version)
                rollout = engine.generate(PROMPTS, Sampling(max_tokens=8), seed=1)
                assert largest_gap(holder["model"], rollout) < 1e-4
            engine.close()
            everyone = family(int(guard))
            assert len(everyone) >= 3
        finally:
            starter.kill()
    deadline = time.monotonic() + 30
    while alive(everyone) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(everyone)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """Its log is quoted: here, an option vLLM does not know."""
    model = tiny.write_config(tmp_path / "model", tied=True)
    with started(options(model, dtype="float31"), tmp_path, [()]) as (process,):
        deadline = time.monotonic() + START_SECONDS
        while process.ended() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        assert "float31" in (process.ended() or "")


def test_a_checksum_sees_values_places_names_and_types() -> None:
    one = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    assert tensor_checksum(one) == tensor_checksum(one.clone())
    swapped = one.flatten().clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    changed = one.clone()
    changed[2, 3] += 1e-6
    different = {tensor_checksum(t) for t in (one, swapped, changed, one.to(torch.bfloat16), one[:2])}
    assert len(different) == 5

    def text(*named) -> str:
        found = Checksum()
        found.update(named)
        return found.text

    a, b = ("a", one), ("b", one * 2)
    assert text(a, b) == text(b, a)
    assert len({text(a, b), text(a), text(("a", one * 2), ("b", one)), text(("a", one.reshape(4, 3)), b)}) == 4
    assert tensor_checksum(torch.zeros(5, dtype=torch.bfloat16)) == 0  # bytes that are no whole words
