"""Running statistics and the KL controller: the right numbers, and the same ones after a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest

from her_nemo.training.running import KlController, RunningMoments


def take_in(moments: RunningMoments, batch: np.ndarray) -> None:
    moments.update(float(batch.sum()), float((batch**2).sum()), float(len(batch)))


def test_moments_are_those_of_everything_seen() -> None:
    values = np.random.default_rng(0).normal(100.0, 3.0, size=60)
    moments = RunningMoments()
    for batch in np.split(values, [7, 7, 8, 40]):
        take_in(moments, batch)
    assert moments.count == 60
    assert moments.mean == pytest.approx(values.mean(), rel=1e-12)
    assert moments.deviation == pytest.approx(values.std(), rel=1e-9)
    assert RunningMoments().deviation == 0.0


def test_moments_go_on_bit_for_bit_through_json() -> None:
    values = np.random.default_rng(1).normal(size=30)
    whole, cut = RunningMoments(), RunningMoments()
    for moments in (whole, cut):
        take_in(moments, values[:13])
    resumed = RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    for moments in (whole, resumed):
        take_in(moments, values[13:])
    assert whole == resumed


def test_the_controller_leads_the_kl_to_its_target() -> None:
    """A policy whose KL is 1 / coefficient: the target 4 is met at a coefficient of 1/4."""
    controller = KlController(1.0, target=4.0, horizon=100.0)
    for _ in range(400):
        controller.update(1.0 / controller.coefficient, samples=20)
    assert controller.coefficient == pytest.approx(0.25, rel=1e-3)
    resumed = KlController(1.0, target=4.0, horizon=100.0)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert resumed == controller


def test_a_fixed_coefficient_stays_what_the_configuration_says() -> None:
    controller = KlController(0.02)
    controller.update(50.0, samples=100)
    controller.load_state_dict({"coefficient": 0.5})
    assert controller.coefficient == 0.02
