"""The engines of a run, opened and closed together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.factory import open_engine, open_sglang_teacher
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.sglang.teacher import SglangTeacher
from rosd_fast.verify import Limits, VerifierPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rosd_fast.config import Config
    from rosd_fast.model.load import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Everything that generates, scores or verifies text for a run.

    student: samples with the current weights.
    teacher: samples with the teacher's weights; None where nothing is written with them.
    teacher_server: scores with the teacher's weights; None where the learner does.
    verifiers: judges completions.
    """

    student: RolloutEngine
    teacher: LocalEngine | None = None
    teacher_server: SglangTeacher | None = None
    verifiers: VerifierPool = field(default_factory=VerifierPool)


@asynccontextmanager
async def open_engines(
    config: Config,
    model: LoadedModel,
    folder: Path,
    *,
    teacher_model: PreTrainedModel | None,
    served_teacher: LoadedModel,
    weight_check_ids: Sequence[int],
    expected_logprobs: Callable[[Sequence[int]], list[float]],
    note: Callable[[str], None],
) -> AsyncIterator[Engines]:
    """Yield the engines that the options ask for, and close them at the end.

    teacher_model: the teacher's weights, None where nothing is written with them.
    served_teacher: the model that a teacher server runs.
    weight_check_ids: the prompt on which servers are compared with the trainer, whose current
        log-probabilities `expected_logprobs` returns.
    Servers start with their first weights or their first request.
    """
    async with AsyncExitStack() as stack:
        student = open_engine(
            config,
            model,
            folder,
            weight_check_ids=weight_check_ids,
            expected_logprobs=expected_logprobs,
            note=note,
        )
        stack.push_async_callback(student.close)
        teacher_server = open_sglang_teacher(config, served_teacher, folder, note=note)
        del served_teacher  # its memory is freed once the server has been compared with it
        if teacher_server is not None:
            stack.push_async_callback(teacher_server.close)
        teacher = None
        if teacher_model is not None:
            teacher = LocalEngine(
                teacher_model,
                max_rows=config.engine.max_rows,
                tokenizer=model.tokenizer,
                shares_learner_weights=False,
            )
            stack.push_async_callback(teacher.close)
            if teacher.note and teacher.note != getattr(student, "note", ""):
                note(teacher.note)
        verifiers = VerifierPool(Limits(**config.verify.model_dump()), note)
        stack.push_async_callback(verifiers.close)
        yield Engines(
            student=student, teacher=teacher, teacher_server=teacher_server, verifiers=verifiers
        )
