"""What stops a PPO run: log-probs that disagree, samples of other weights, masks that cover more than the reply."""

from __future__ import annotations

import pytest
import torch

from her_nemo.megatron import parallel
from her_nemo.rollout import invariants
from her_nemo.rollout.engine import Rollout
from her_nemo.rollout.experience import Experience
from her_nemo.rollout.invariants import InvariantError


class Spelling:
    """Says a token's number: all that is asked of a tokenizer here."""

    def decode(self, ids: list[int]) -> str:
        return "/".join(map(str, ids))


@pytest.fixture
def experience(monkeypatch: pytest.MonkeyPatch) -> Experience:
    """Two replies on one replica: tokens 5 6 after 1 2 3, and 7 8 9 after 4."""
    monkeypatch.setattr(parallel, "data_all_reduce", lambda value, *_: value)
    monkeypatch.setattr(parallel, "data_gather_objects", lambda value: [value])
    monkeypatch.setattr(parallel, "data_rank", lambda: 0)
    rollout = Rollout(
        [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]], [[-1.0, -2.0], [-0.5, -0.25, -3.0]], 4, [True, False]
    )
    made = Experience.from_rollout(rollout, [[4, 4], [4, 4, 4]], pad_id=0)
    made.old_log_probs_BT = made.rollout_log_probs_BT.clone()
    made.advantages_BT = made.mask_BT.float()
    return made


def test_a_rollout_that_is_right(experience: Experience) -> None:
    assert experience.mask_BT.tolist() == [[False, False, True, True], [True, True, True, False]]
    assert invariants.check_rollout_gap(experience, Spelling(), 1, "32") == 0.0
    invariants.check_masks(experience, 1)
    assert invariants.check_versions(experience, 4, 1) == 0
    assert invariants.check_versions(experience, 5, 1, allowed=1) == 1


@pytest.mark.parametrize("off", [0.5, float("nan")])
def test_the_first_offending_token_is_named(experience: Experience, off: float) -> None:
    """Not the largest gap: where it begins says more."""
    experience.old_log_probs_BT[1, 1] += off
    experience.old_log_probs_BT[1, 2] += 2.0
    with pytest.raises(InvariantError) as caught:
        invariants.check_rollout_gap(experience, Spelling(), 7, "32")
    said = str(caught.value)
    assert "step 7" in said
    assert "token '8' (8) at place 2 of row 1 on replica 0: -0.2500 in the rollout" in said


def test_what_lies_outside_the_reply_does_not_count_as_a_gap(experience: Experience) -> None:
    experience.old_log_probs_BT[0, 0] = float("nan")
    assert invariants.check_rollout_gap(experience, Spelling(), 1, "32") == 0.0


@pytest.mark.parametrize("place", [(0, 1), (1, 3)])
def test_a_mask_or_an_advantage_outside_the_reply(experience: Experience, place: tuple[int, int]) -> None:
    row, at = place
    experience.advantages_BT[row, at] = 0.1
    with pytest.raises(InvariantError, match=f"row {row} .* at place {at + 1}"):
        invariants.check_masks(experience, 1)
    experience.advantages_BT[row, at] = 0.0
    experience.mask_BT[row, at] = True
    with pytest.raises(InvariantError, match=f"row {row} .* at place {at + 1}"):
        invariants.check_masks(experience, 1)


@pytest.mark.parametrize(("current", "allowed"), [(5, 0), (3, 0), (6, 1)])
def test_samples_of_other_weights(experience: Experience, current: int, allowed: int) -> None:
    with pytest.raises(InvariantError, match=r"samples of weights \[4\], but the actor holds"):
        invariants.check_versions(experience, current, 1, allowed)


def test_ratio_and_kl_of_a_policy_that_has_not_moved() -> None:
    assert invariants.check_unmoved_ratio(1.000001, 1, "32") == 1.000001
    with pytest.raises(InvariantError, match=r"its ratio is 1\.0010"):
        invariants.check_unmoved_ratio(1.001, 1, "32")
    invariants.check_unmoved_kl(1e-6, "32")
    with pytest.raises(InvariantError, match="they hold other weights"):
        invariants.check_unmoved_kl(1e-3, "32")


def test_replies_without_a_score_are_not_learned(experience: Experience) -> None:
    experience.scored_B = torch.tensor([False, True])
    assert experience.learned_BT.tolist() == [[False] * 4, [True, True, True, False]]
