"""What can be known to be wrong with a generative reward before it begins: its judge, and whom it compares with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from her_nemo.config.base import changed
from her_nemo.config.errors import Problem
from her_nemo.config.rl import Generative, JudgeSource
from her_nemo.config.schema import PpoConfig
from her_nemo.planning import server_checks

KEY, JUDGE = "reward.generative", "reward.generative.judge"
GROUP = "model.ppo.num_samples_per_prompt"
OF_SERVERS = ("model", "api_key_env", "structured_output", "concurrency", "timeout_seconds", "retries")
OF_A_CHECKPOINT = ("micro_batch_size",)


def check(config: PpoConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """`environment`: os.environ, for the key of an endpoint. That the checkpoint is one is seen by `preflight`."""
    reward, keys = config.reward, config.reward.generative
    if not reward.is_judged:
        hint = "set reward.kind=generative, or reward.kind=mix and reward.mix.generative"
        for name in sorted(changed(keys)):
            yield Problem(f"{KEY}.{name}", f"has no effect with reward.kind={reward.kind}", hint=hint)
        return
    yield from _judge(keys.judge, environment)
    yield from _opponents(config, keys)
    if keys.cache_dir is not None and Path(keys.cache_dir).exists() and not Path(keys.cache_dir).is_dir():
        yield Problem(f"{KEY}.cache_dir", f"{keys.cache_dir}: is a file, not a directory", hint="give another path")


def _judge(judge: JudgeSource, environment: Mapping[str, str]) -> Iterator[Problem]:
    """One judge, and the keys that go with it."""
    path, servers = judge.restore_from_path, judge.servers
    if path is None and not servers:
        hint = f"give {JUDGE}.restore_from_path=DIR, or {JUDGE}.servers=['http://HOST:8000/v1'] and {JUDGE}.model"
        yield Problem(JUDGE, "there is no judge", hint=hint)
    if path is not None and servers:
        yield Problem(JUDGE, "both a checkpoint and servers are given", hint="leave one of the two out")
        return
    if servers and judge.model is None:
        yield Problem(f"{JUDGE}.model", "has to be given with servers", hint="the name under which they list the judge")
    yield from server_checks.addresses(
        f"{JUDGE}.servers", servers, r"https?://[^/\s]+(/\S*)?",
        what="address", hint="give a base URL such as http://HOST:8000/v1",
    )  # fmt: skip
    if judge.api_key_env is not None and not environment.get(judge.api_key_env):
        text = f"the environment variable {judge.api_key_env} is not set"
        yield Problem(f"{JUDGE}.api_key_env", text, hint="set it, or leave the key out")
    idle = OF_A_CHECKPOINT if servers else OF_SERVERS if path is not None else ()
    for name in sorted(set(idle) & changed(judge)):
        text = f"has no effect with a judge from {'servers' if servers else 'a checkpoint'}"
        yield Problem(f"{JUDGE}.{name}", text, hint="leave it out")


def _opponents(config: PpoConfig, keys: Generative) -> Iterator[Problem]:
    """Somebody to compare with, in training and in validation."""
    if keys.against == "reference" and keys.replies is None:
        hint = "give a file of SFT rows, one for each prompt, or use reward.generative.against=sft"
        yield Problem(f"{KEY}.replies", f"has to be given with {KEY}.against=reference", hint=hint)
    if keys.against == "group":
        group, data = config.model.ppo.num_samples_per_prompt, config.model.data
        if keys.replies is not None:
            yield Problem(f"{KEY}.replies", f"has no effect with {KEY}.against=group", hint="leave one of the two out")
        if group < 2:
            text = f"group, but there is {group} reply to a prompt: it has nobody to be compared with"
            yield Problem(f"{KEY}.against", text, hint=f"set {GROUP} to 2 or more")
        if data.validation_ds.file_path is not None and config.model.ppo.num_val_samples:
            text = "group: what a group's replies win of each other they lose, so validation would measure nothing"
            hint = "set model.ppo.num_val_samples=0, or reward.generative.against=sft"
            yield Problem(f"{KEY}.against", text, hint=hint)
    elif keys.replies is not None and not Path(keys.replies).is_file():
        yield Problem(f"{KEY}.replies", f"{keys.replies}: no such file", hint="give a file of SFT rows that exists")
