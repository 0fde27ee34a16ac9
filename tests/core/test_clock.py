"""Which step of which run a call is, with real schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from vislr.core.clock import Clock


def run(clock, times, calls=1):
    return [clock.tick(torch.tensor([float(t)])) for t in times for _ in range(calls)]


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_every_call_of_a_run_is_a_step(kind):
    scheduler = kind()
    clock = Clock(lambda: scheduler)
    for steps in (7, 4):
        scheduler.set_timesteps(steps)
        moments = run(clock, scheduler.timesteps)
        total = len(scheduler.timesteps)
        assert [moment.step for moment in moments] == list(range(total))
        assert all(moment.steps == total and moment.branch == 0 for moment in moments)
        assert [moment.first for moment in moments] == [True] + [False] * (total - 1)


def test_a_run_that_was_stopped_does_not_run_on():
    scheduler = DDIMScheduler()
    clock = Clock(lambda: scheduler)
    scheduler.set_timesteps(10)
    run(clock, scheduler.timesteps[:3])
    # Image to image: the next run begins further down than the stopped one ended.
    scheduler.set_timesteps(10)
    moments = run(clock, scheduler.timesteps[6:])
    assert moments[0].first
    assert [(m.step, m.steps) for m in moments] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_two_calls_a_step_are_branches():
    scheduler = DDIMScheduler()
    clock = Clock(lambda: scheduler)
    scheduler.set_timesteps(5)
    moments = run(clock, scheduler.timesteps, calls=2)
    assert [(m.step, m.branch) for m in moments] == [(s, b) for s in range(5) for b in (0, 1)]


def test_sigmas_are_found_among_timesteps():
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock = Clock(lambda: scheduler)
    scheduler.set_timesteps(8)
    moments = run(clock, (scheduler.timesteps[3:] / 1000).to(torch.bfloat16))
    assert [(m.step, m.steps) for m in moments] == [(s, 5) for s in range(5)]


def test_without_a_scheduler_falling_timesteps_are_a_run():
    clock = Clock(None, 3)
    moments = run(clock, [900, 600, 300, 900, 900])
    assert [(m.step, m.first) for m in moments] == [(0, True), (1, False), (2, False), (0, True), (0, True)]
    assert all(m.steps == 3 for m in moments)
