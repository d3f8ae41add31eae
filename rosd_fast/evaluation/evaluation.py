"""An evaluation of one model on several data sets, in a folder, from its start or where it was.

problems that are not complete in completions.jsonl -> engine -> verifiers -> completions.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosd_fast.config.chat import make_chats
from rosd_fast.evaluation.engine import open_model
from rosd_fast.evaluation.folder import CompletionsLog, begin, read_completions
from rosd_fast.evaluation.model import EvaluatedModel
from rosd_fast.evaluation.records import Completion, Sampling
from rosd_fast.evaluation.sample import sample_completions
from rosd_fast.evaluation.settings import identity_hash, identity_of
from rosd_fast.run_lock import RunLock
from rosd_fast.threads import watch_threads
from rosd_fast.utils.distributed import pick_device
from rosd_fast.verify import Limits, VerifierPool

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.model.load import LoadedModel
    from rosd_fast.types import Problem


MAX_NAME = 200  # bytes of a folder's name before the hash; file systems take 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is evaluated, and how.

    source: where the problems are from, as the option data.source.
    problems: by the name of their data set.
    config: model, dtype, device, chat templates, engine and verifiers, as options of a run.
    """

    model: EvaluatedModel
    source: str
    problems: Mapping[str, Sequence[Problem]]
    sampling: Sampling
    config: Config

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the figures."""
        return identity_of(
            self.model,
            self.problems,
            sampling=self.sampling,
            chat=self.config.chat.model_dump(mode="json"),
            dtype=self.config.dtype,
            engine=self.config.engine.kind,
        )

    def longest_sequence(self, model: LoadedModel) -> int:
        """The number of tokens that the longest prompt can have with its completion."""
        chat = make_chats(self.config.chat, model.tokenizer).eval
        problems = (problem for own in self.problems.values() for problem in own)
        prompt = max(len(chat.render_problem(problem)) for problem in problems)
        return min(model.context_length, prompt + self.sampling.max_new_tokens)

    @property
    def default_name(self) -> str:
        """A folder name that is the same for the same evaluation."""
        own = f"{self.model.name[:80]}-{'+'.join(self.problems)[:60]}".encode()
        return f"{own[:MAX_NAME].decode(errors='ignore')}-{identity_hash(self.identity)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is told of an evaluation while it works.

    note: shows the user a line.
    tokens: is called with k after k more tokens were sampled.
    problems: is called with (problems that are done, all problems).
    """

    note: Callable[[str], None]
    tokens: Callable[[int], None]
    problems: Callable[[int, int], None]


async def complete(
    evaluation: Evaluation, folder: Path, settings: Mapping[str, Any], watch: Watch
) -> list[Completion]:
    """Sample what the folder lacks; return all completions, by data set and problem.

    settings: what a new folder's settings.json gets. Raises UserError when the evaluation in the
    folder has other settings, or when another process works on it.
    """
    order = {
        (name, problem.id): place
        for name, own in evaluation.problems.items()
        for place, problem in enumerate(own)
    }
    with closing(RunLock()) as lock:
        begin(folder, settings, lock)
        stored = read_completions(folder, samples=evaluation.sampling.per_problem)
        kept = [completion for completion in stored if completion.key in order]
        done = {completion.key for completion in kept}
        missing = {
            name: [problem for problem in own if (name, problem.id) not in done]
            for name, own in evaluation.problems.items()
        }
        if any(missing.values()):
            with closing(CompletionsLog(folder, kept)) as log:
                kept += await _sample(evaluation, missing, folder, log, watch)
    names = list(evaluation.problems)
    return sorted(kept, key=lambda c: (names.index(c.split), order[c.key], c.index))


async def _sample(
    evaluation: Evaluation,
    missing: Mapping[str, Sequence[Problem]],
    folder: Path,
    log: CompletionsLog,
    watch: Watch,
) -> list[Completion]:
    """Sample the missing problems, and write each when it is judged."""
    config, found = evaluation.config, []
    total = sum(len(own) for own in evaluation.problems.values())
    num_done = total - sum(len(own) for own in missing.values())

    def keep(completions: Sequence[Completion]) -> None:
        nonlocal num_done
        log.write(completions)
        num_done += 1
        watch.problems(num_done, total)

    watch.problems(num_done, total)
    on_cpu = pick_device(config.device).type == "cpu"
    if contended := watch_threads(on_cpu=on_cpu).begin():
        watch.note(contended)
    verifiers = VerifierPool(Limits(**config.verify.model_dump()), note=watch.note)
    try:
        async with open_model(
            config, folder, longest=evaluation.longest_sequence, note=watch.note
        ) as (engine, model):
            chat = make_chats(config.chat, model.tokenizer).eval
            for name, problems in missing.items():
                found += await sample_completions(
                    engine,
                    verifiers,
                    problems,
                    split=name,
                    sampling=evaluation.sampling,
                    chat=chat,
                    stop_token_ids=model.stop_token_ids,
                    on_tokens=watch.tokens,
                    on_problem=keep,
                )
    finally:
        await verifiers.close()
    return found
