"""The generative reward of a PPO run, from its configuration: who judges, and whom replies are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from her_nemo.config.errors import UserError
from her_nemo.config.rl import JudgeSource
from her_nemo.config.schema import PpoConfig
from her_nemo.data.tokenise import Prompt, Tokeniser
from her_nemo.megatron import parallel
from her_nemo.megatron.qwen3 import Model
from her_nemo.rewards.generative import GenerativeReward, Opponents
from her_nemo.rewards.judge import Judge, Verdicts
from her_nemo.rewards.judge_server import ServerJudge
from her_nemo.rewards.opponents import RepliesOfFile
from her_nemo.rollout.engine import Sampling
from her_nemo.rollout.judge_engine import EngineJudge, EngineReplies
from her_nemo.rollout.megatron_engine import MegatronEngine
from her_nemo.training import source as sources


def generative_reward(
    cfg: PpoConfig, reference: Model, tokeniser: Tokeniser, sampling: Sampling, prompts: Iterable[Sequence[Prompt]]
) -> GenerativeReward | None:
    """The judge as a reward, where the configuration has one (collective).

    Args:
        reference: the frozen start, whose replies are compared with unless the configuration says others.
        sampling: of rollouts.
        prompts: all that replies will be written to, file by file.

    Raises:
        UserError: the judge cannot be reached or is no language model; a prompt has no reply to compare with.
    """
    if not cfg.reward.is_judged:
        return None
    keys = cfg.reward.generative
    judge = ServerJudge(keys.judge) if keys.judge.servers else load_judge(cfg, keys.judge)
    verdicts = Verdicts(judge, brief=keys.judge.brief, cache_dir=keys.cache_dir)
    opponents: Opponents | None = None
    if keys.replies is not None:
        opponents = RepliesOfFile(keys.replies, "reward.generative.replies")
        parallel.on_main(partial(_require, opponents, tokeniser, prompts))
    elif keys.against == "sft":
        engine = MegatronEngine(
            reference, pad_id=tokeniser.pad_id, micro_batch_size=cfg.model.ppo.rollout_micro_batch_size
        )
        opponents = EngineReplies(engine, tokeniser, sampling, seed=cfg.model.seed)
    return GenerativeReward(verdicts, opponents, max_unparsed=keys.max_unparsed)


def load_judge(cfg: PpoConfig, judge: JudgeSource) -> Judge:
    """A judge's checkpoint as a frozen model of this run, cut up as the policy is (collective)."""
    assert judge.restore_from_path is not None  # planning/judge_checks.py
    source = sources.locate(judge.restore_from_path)
    if source.head != "lm" or source.tokenizer is None:
        lacks = "writes nothing: it has a scalar head" if source.head != "lm" else "has no tokenizer beside it"
        raise UserError(f"reward.generative.judge.restore_from_path={source.path}: this model {lacks}")
    model = sources.build(source, cfg.model, cfg.trainer.precision, head="lm", trainable=False)
    tokeniser = Tokeniser(source.tokenizer)
    return EngineJudge(
        MegatronEngine(model, pad_id=tokeniser.pad_id, micro_batch_size=judge.micro_batch_size),
        tokeniser,
        Sampling(judge.temperature, top_p=judge.top_p, max_tokens=judge.max_tokens, stop_ids=(tokeniser.eos_id,)),
        {"weights": parallel.on_main(lambda _alive: sources.digest(source))},
        max_length=source.shape.max_position_embeddings,
        seed=cfg.model.seed,
    )


def _require(
    replies: RepliesOfFile, tokeniser: Tokeniser, prompts: Iterable[Sequence[Prompt]], alive: Callable[[], None]
) -> None:
    """Every prompt has a reply in the file, now rather than in the middle of the run."""

    def texts() -> Iterable[str]:
        for rows in prompts:
            for row in rows:
                alive()
                yield tokeniser.decode(row.token_ids, skip_special_tokens=False)

    replies.require(texts())
