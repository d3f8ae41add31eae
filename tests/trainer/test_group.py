"""`LearnerGroup` on a single process."""

from __future__ import annotations

import sys

import pytest

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.ranks import LearnerGroup
from rosd_fast.utils.distributed import SINGLE_PROCESS


def test_a_step_is_two_calls_from_the_learner(make_model, distill_samples, monkeypatch) -> None:
    group = LearnerGroup(make_model(), Config(), SINGLE_PROCESS, tokenizer=None)
    callers = []
    step = Learner.step

    def recorded(self, *args):
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not LearnerGroup.step.__code__:
            callers.append(frame.f_code.co_name)
            frame = frame.f_back
        return step(self, *args)

    monkeypatch.setattr(Learner, "step", recorded)
    result = group.step(pack(distill_samples, max_tokens=1000))
    assert callers == ["_call_all"]
    assert result.metrics["loss/grad_norm"] > 0
    group.close()


def test_only_the_methods_of_a_run_can_be_named(make_model) -> None:
    group = LearnerGroup(make_model(), Config(), SINGLE_PROCESS, tokenizer=None)
    assert group.method("learner.step") == group.learner.step
    for name in ("learner.load_state_dict", "learner.__init__", "step", "saver.wait"):
        with pytest.raises(ValueError, match="not a method that all ranks run"):
            group.method(name)
