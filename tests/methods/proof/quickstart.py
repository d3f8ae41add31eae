"""Rollouts of the quickstart model, sampled once per session, and real steps on them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import rosd_fast.run
from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.engines.lifecycle import Engines
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.inputs import Inputs, load_inputs
from rosd_fast.methods import Method, find_method
from rosd_fast.model.adapters import choose_trainable
from rosd_fast.model.head import head
from rosd_fast.pipeline import Sampled, sample_and_annotate
from rosd_fast.report.progress import Hidden
from rosd_fast.rollout.select import select_groups
from rosd_fast.run import Run
from rosd_fast.run_lock import RunLock
from rosd_fast.train import train_on
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.separate_teacher import SeparateTeacher, compare_tokenizers
from rosd_fast.types import Group, Reflection, Rollout, TrainSample, Verdict
from rosd_fast.utils.distributed import SINGLE_PROCESS

OPTIONS: dict[str, Any] = {
    "name": "run",
    "dump_rollouts": False,
    "sample.problems_per_step": 16,
    "sample.group_size": 4,
    "sample.max_new_tokens": 40,  # few enough that some rollouts are cut off
    "data.dev": None,
    "data.dev_ood": None,
    "optim.warmup_steps": 0,
    "pack.max_tokens": 150,  # few enough that a step has several micro-batches
}


def options(**changes: Any) -> Config:
    """The options of the quickstart with changes, as in `loss__divergence="jsd"`."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return apply_args(load_preset("quickstart"), OPTIONS | changed)


@dataclass(frozen=True)
class Quickstart:
    """Three groups of four rollouts: with one correct, with none, and with several.

    Their log-probabilities are moved at random, so that ratios are not 1 and some are clipped.
    """

    inputs: Inputs
    groups: tuple[Group, ...]
    verdicts: Mapping[str, Verdict]
    reflections: Mapping[str, Reflection]

    def method(self, config: Config) -> Method:
        """The method that the options name."""
        shared, method = self.inputs, find_method(config.method)
        method.check_options(config)
        return method(config, shared.model, shared.token_bytes, shared.chats)

    def sampled(self, config: Config) -> Sampled:
        """The rollouts as the pipeline hands them to a step."""
        needs_success = self.method(config).needs_success
        selection = select_groups(
            self.groups, self.verdicts, config.select, needs_success=needs_success
        )
        return Sampled(
            groups=list(self.groups),
            verdicts=dict(self.verdicts),
            selection=selection,
            annotations=dict(self.reflections) if config.method == "rosd" else {},
        )

    def samples(self, config: Config) -> Sequence[TrainSample]:
        """What the method trains on."""
        found, method = self.sampled(config), self.method(config)
        built = method.build(found.selection.kept, found.verdicts, found.annotations, Hidden())
        return built.samples

    def model(self, config: Config, dtype: torch.dtype) -> Any:
        """A copy of the initial model, ready to be trained."""
        model = copy.deepcopy(self.inputs.model.model).to(dtype)  # type: ignore[arg-type]
        choose_trainable(model, lora=config.lora, trainable=config.optim.trainable, seed=0)
        return model

    def separate_teacher(self, config: Config, dtype: torch.dtype) -> SeparateTeacher | None:
        """Another model, where the options name one: the student with other weights."""
        vocabulary = compare_tokenizers(config)
        if vocabulary is None:
            return None
        other = self.model(config, dtype)
        move(dict(other.named_parameters()), seed=2)
        model = replace(self.inputs.model, model=other)
        return SeparateTeacher(model=model, vocabulary=vocabulary, num_rows=len(head(other).weight))

    @contextmanager
    def run(self, config: Config, folder: Path, dtype: torch.dtype) -> Iterator[Run]:
        """A run as `rosd_fast.train` opens it, without its report."""
        model = replace(self.inputs.model, model=self.model(config, dtype))
        config = config.model_copy(update={"out": str(folder)})
        inputs = replace(
            self.inputs,
            config=config,
            model=model,
            method=self.method(config),
            teacher=self.separate_teacher(config, dtype),
        )
        with (
            patch.object(rosd_fast.run, "load_inputs", lambda _: inputs),
            closing(RunLock()) as lock,
            rosd_fast.run.opened(config, None, SINGLE_PROCESS, lock) as run,
        ):
            yield run

    def step(self, run: Run) -> dict[str, float]:
        """Train one step of the run on the rollouts; return its metrics."""

        async def train() -> dict[str, float]:
            async with run.open_engines() as engines:
                return await train_on(run, engines, 1, self.sampled(run.config))

        return asyncio.run(train())


@torch.no_grad()
def move(weights: Mapping[str, Tensor], seed: int) -> None:
    """Add noise to weights in place, a tenth of the spread of each."""
    g = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=g, dtype=torch.float64)
        spread = 0.2 if "lora_" in name else 0.1 * float(weight.double().std())
        weight.add_((spread * noise).to(weight.dtype))


def move_student(learner: Learner, seed: int = 1) -> None:
    """Move the student away from its initial weights."""
    move(learner.optimizer.masters, seed)
    learner.optimizer.load_state_dict(learner.optimizer.state_dict())  # writes to the parameters


@pytest.fixture(scope="session")
def quickstart() -> Quickstart:
    """One sampled step of the quickstart, of which three groups are kept."""
    inputs = load_inputs(options(method="grpo"))
    engine = LocalEngine(inputs.model.model, tokenizer=inputs.model.tokenizer)
    sampled = asyncio.run(sample_and_annotate(inputs, Engines(student=engine), 1, Hidden()))

    def first(wanted: Callable[[int], bool], *, cut: bool = False) -> Group:
        for group in sampled.groups:
            correct = sum(sampled.verdicts[r.id].success for r in group.rollouts)
            is_cut = any(r.finish_reason == "length" for r in group.rollouts)
            if wanted(correct) and (is_cut or not cut):
                return group
        raise AssertionError("the model's accuracy has changed: sample more problems")

    groups = [
        first(lambda n: n == 1),
        first(lambda n: n == 0),
        first(lambda n: 1 < n < 4, cut=True),
    ]
    groups = [replace(g, rollouts=tuple(map(moved_logprobs, g.rollouts))) for g in groups]
    found = Quickstart(inputs, tuple(groups), sampled.verdicts, {})
    return replace(found, reflections=reflections_on(found, engine))


def reflections_on(found: Quickstart, engine: LocalEngine) -> dict[str, Reflection]:
    """The model's reflections on the groups that have a correct rollout."""
    config = options(method="rosd")
    rosd, kept = found.method(config), found.sampled(config).selection.kept
    engines = Engines(student=engine)
    return asyncio.run(rosd.annotate(1, kept, found.verdicts, engines, Hidden()))


def moved_logprobs(rollout: Rollout) -> Rollout:
    """The rollout with log-probabilities as an older policy might have had them, in float32."""
    g = torch.Generator().manual_seed(len(rollout.completion_ids))
    noise = 0.4 * torch.randn(len(rollout.logprobs), generator=g)
    moved = np.asarray(rollout.logprobs, np.float32) + noise.numpy()
    return replace(rollout, logprobs=tuple(float(min(x, 0)) for x in moved))


@dataclass(frozen=True)
class Update:
    """What reached the optimizer in an update, and the weights that the update began with.

    loss: of all ranks and micro-batches.
    gradients: by name of the master weight.
    student, teacher: state dicts; without a teacher both are the student's.
    """

    loss: float
    gradients: dict[str, Tensor]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]


def record(run: Run) -> list[Update]:
    """The list to which each update of the run's learner is added from now on."""
    updates: list[Update] = []
    learner, needs_teacher = run.learners.learner, run.inputs.method.needs_teacher
    own = learner._update

    def copied(module: torch.nn.Module) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in module.state_dict().items()}

    def update(loss: float) -> float | None:
        masters = learner.optimizer.masters.items()
        teacher = learner.teacher.model if needs_teacher else learner.model
        gradients = {n: master.grad.clone() for n, master in masters if master.grad is not None}
        updates.append(Update(loss, gradients, copied(learner.model), copied(teacher)))
        return own(loss)

    setattr(learner, "_update", update)  # noqa: B010
    return updates
