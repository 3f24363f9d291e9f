"""What each process of a test of multi-turn rollouts does: conversations, and PPO on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from learning_checks import everyones
from qwen3_checks import build, start

from her_nemo.algorithms.ppo_loss import policy_loss
from her_nemo.config.sections import OptimConfig
from her_nemo.data.tokenise import Prompt, Tokeniser
from her_nemo.megatron import parallel
from her_nemo.rewards.credit import TurnCredit
from her_nemo.rewards.reward import Replies, Scores
from her_nemo.roleplay.dialogue import Start, read_start
from her_nemo.roleplay.prompt import RolePrompt, Utterance, build_messages
from her_nemo.rollout import experience as ex
from her_nemo.rollout.dialogue import Dialogues
from her_nemo.rollout.engine import Rollout, Sampling
from her_nemo.rollout.experience import Experience
from her_nemo.rollout.invariants import check_masks
from her_nemo.rollout.megatron_engine import MegatronEngine
from her_nemo.rollout.simulator import Ask
from her_nemo.training.learner import Learner

REPLY, ROOM, STARTS, GROUP = 6, 400, 4, 6
LINE = "Now you now you now you."
SYSTEM = RolePrompt(
    name="Ada", book="Salt", profile="Ada acts calm.", others=(("Bo", "A cousin."),), inner_thoughts="I hide a ring.",
    requirements="Answer.",
)  # fmt: skip


class Partner:
    """Says LINE and counts how often it was asked; a shy one is silent the first time it is asked for a turn."""

    def __init__(self, shy: bool = False) -> None:
        self.shy, self.asked = shy, 0
        self.seen: list[str] = []

    def answer(self, asked: Sequence[Ask], alive: Callable[[], None]) -> list[str]:
        alive()
        self.asked += 1
        self.seen += [message["content"] for ask in asked for message in ask.messages]
        silent = self.shy and self.asked % 2 == 1
        return ["" if silent else f"{LINE} {ask.turn} {ask.seed % 97}." for ask in asked]


def starts() -> list[Start]:
    openings = [Utterance("Bo", f"Bo: Good day {number}.") for number in range(STARTS)]
    return [
        read_start(f"start-{number}", build_messages(SYSTEM, "Ada", [opening]))
        for number, opening in enumerate(openings)
    ]


def converse(
    engine: MegatronEngine, tokeniser: Tokeniser, partner: Partner, turns: int, seed: int, attempts: int = 1
) -> tuple[Rollout, Dialogues]:
    """This replica's share of GROUP conversations from each start."""
    begin = starts()
    talks = Dialogues(
        {one.trace_id: one for one in begin}, partner, tokeniser, turns=turns, room=ROOM, simulator_tokens=40,
        attempts=attempts,
    )  # fmt: skip
    mine = range(parallel.data_rank(), STARTS, parallel.data_size())
    prompts = [Prompt(one.trace_id, tokeniser.joined_prompt_ids(one.messages)) for one in begin]
    places = [(index, index * GROUP + sample) for index in mine for sample in range(GROUP)]
    sampling = Sampling(max_tokens=REPLY)
    rollout = talks.generate(
        engine, [prompts[index] for index, _ in places], sampling, seed, [place for _, place in places], GROUP
    )
    return rollout, talks


def layouts(args: dict) -> dict:
    """At every layout: the conversations, the simulator's part in them, and what the trainer makes of them."""
    directory, results = Path(args["directory"]), {}
    tokeniser = Tokeniser(directory / "talker")
    for layout in args["layouts"]:
        start(layout)
        model = build(directory, "talker", layout, trainable=False)
        engine = MegatronEngine(model, pad_id=tokeniser.pad_id, micro_batch_size=5)
        engine.update_weights(iter(()), version=3)
        partner = Partner(shy=True)
        rollout, talks = converse(engine, tokeniser, partner, args["turns"], seed=5, attempts=2)
        kinds = [tokeniser.kinds_of(ids) for ids in rollout.response_ids]
        experience = Experience.from_rollout(rollout, kinds, pad_id=tokeniser.pad_id)
        ex.evaluate_policy(experience, model, model, None, 7, 1.0)
        experience.scores_B = torch.arange(len(experience), dtype=torch.float32)
        ex.estimate_advantages(
            experience, kl_penalty=0.0, discount=1.0, gae_lambda=1.0, normalize=False, estimator="rloo",
            group_size=GROUP,
        )  # fmt: skip
        check_masks(experience, step=0)
        trained = [tokens[1:][mask] for tokens, mask in zip(experience.tokens_BS, experience.mask_BT, strict=True)]
        results[layout["name"]] = {
            "replies": parallel.data_gather_objects(rollout.response_ids),
            "prompts": parallel.data_gather_objects([tokeniser.decode(ids) for ids in rollout.prompt_ids]),
            "trained_is_reply": [row.tolist() for row in trained] == rollout.response_ids,
            "gap": float(ex.gaps(experience).max()),
            "version": rollout.weight_version,
            "asked": partner.asked,
            "seen": partner.seen,
            "tags": {name: value for name, value in talks.tags().items() if name != "timers/simulate"},
            "transcripts": talks.transcripts,
            "rows": len(experience),
        }
    return results


class Parity:
    """Half the share of even tokens in the first turn and half that of odd ones in the second, told after the second
    alone. Whoever says the same in both turns gets a half; 1 takes two turns that differ."""

    def __call__(self, replies: Replies) -> Scores:
        odd = torch.tensor([[token % 2 for token in ids] for ids in replies.reply_ids]).float().mean(dim=1)
        odd = odd.view(-1, 2, replies.group_size)
        told = (1.0 - odd[:, 0] + odd[:, 1]) / 2.0
        scores = torch.stack([torch.zeros_like(told), told], dim=1).view(-1)
        return Scores(scores, torch.ones_like(scores, dtype=torch.bool))


def learn(args: dict) -> dict:
    """Policy updates on two-turn conversations whose reward is known at the end only."""
    start(args["layout"])
    directory, layout = Path(args["directory"]), args["layout"]
    tokeniser = Tokeniser(directory / "talker")
    optim = OptimConfig(name="fused_adam", lr=args["lr"], weight_decay=0.0)
    actor = Learner("model", build(directory, "talker", layout), optim, clip_grad=1.0, max_steps=args["steps"])
    reference = build(directory, "talker", layout, trainable=False)
    engine = MegatronEngine(actor.model, pad_id=tokeniser.pad_id, micro_batch_size=64)
    reward = TurnCredit(Parity(), args["credit"], 1.0)
    told, ratios, advantages = [], [], []
    for step in range(args["steps"]):
        rollout, _ = converse(engine, tokeniser, Partner(), 2, seed=step)
        experience = Experience.from_rollout(
            rollout, [[4] * len(ids) for ids in rollout.response_ids], pad_id=tokeniser.pad_id
        )
        replies = Replies(
            [], [""] * len(experience), rollout.prompt_ids, rollout.response_ids, rollout.finished,
            experience.tokens_BS, experience.lengths_B, group_size=GROUP, turns=2,
        )  # fmt: skip
        sums = ex.score(experience, replies, reward)
        told.append(everyones(experience.scores_B, GROUP))
        assert float(sums["turn"]) > 0.0
        ex.evaluate_policy(experience, actor.model, reference, None, 16, 1.0)
        ex.estimate_advantages(
            experience, kl_penalty=0.0, discount=1.0, gae_lambda=1.0, normalize=False, estimator="rloo",
            group_size=GROUP,
        )  # fmt: skip
        advantages = advantages or everyones(experience.advantages_BT.sum(1), GROUP)
        done = actor.update(experience.micro_batches(8), _loss, step=step)
        ratios.append(done["ratio_sum"] / done["count"])
    return {"reward": [sum(row) / len(row) for row in told], "ratios": ratios, "advantages": advantages}


def _loss(out, rows):
    return policy_loss(out.log_probs_BT, rows["old_log_probs_BT"], rows["advantages_BT"], rows["mask_BT"], 0.2, 0.2)
