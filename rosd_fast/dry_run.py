"""A dry run: everything up to the first step, without weights and without writing anything.

    options -> data -> prompts of every role -> budgets -> memory plan -> what this machine says

The prompts are those of the loop. A step runs on one problem, the longest, with an engine that
returns placeholders and a verifier that tells them apart; selection, method and templates are the
real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rosd_fast.config import Config
from rosd_fast.data.stream import ProblemStream
from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.lifecycle import Engines
from rosd_fast.errors import UserError
from rosd_fast.inputs import Inputs, check_machine, load_inputs
from rosd_fast.machine import gpu_memory, num_ranks, separate_teacher
from rosd_fast.memory_plan import GIB, MemoryPlan, ModelShape, Row, memory_plan, server_rows
from rosd_fast.pipeline import sample_and_annotate
from rosd_fast.report.progress import Hidden
from rosd_fast.text.printable import printable
from rosd_fast.text.thinking import FAMILIES
from rosd_fast.types import Generation, GenerationRequest, Judgement, Problem
from rosd_fast.verify import VerifierPool

QUOTE, EXPLANATION = "[the wrong part]", "[what the reflector explains]"
CORRECT, WRONG = "[a correct rollout]", "[a wrong rollout]"
OPENINGS = {  # what the reflector writes after the tag that its prompt ends with
    "<error_quote>": f"{QUOTE}</error_quote>\n<explanation>{EXPLANATION}</explanation>",
    "<error_sentence>": f"1</error_sentence>\n<explanation>{EXPLANATION}</explanation>",
    "<explanation>": f"{EXPLANATION}</explanation>",
}
NODE = 8  # GPUs that are assumed where this machine has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt of one role, as the run would send it."""

    role: str
    ids: tuple[int, ...]
    budget: int  # maximum number of tokens
    answer: int  # tokens that follow it


def dry_run(
    config: Config, *, num_gpus: int | None = None, gpu_memory_gib: float | None = None
) -> None:
    """Print the prompts, budgets and the memory plan of a run.

    num_gpus: ranks to plan for, one per GPU; None: torchrun's, else 8. gpu_memory_gib: memory of a
    GPU; None: that of this machine's. Raises UserError as a run does, for all but this machine.
    """
    inputs = load_inputs(config, weights=False)
    console = Console(highlight=False, soft_wrap=True)
    ranks = num_gpus or (num_ranks() if num_ranks() > 1 else NODE)
    available = gpu_memory() if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    longest = max(inputs.problems.checked, key=lambda problem: len(problem.prompt))
    prompts = asyncio.run(render_prompts(inputs, longest))
    print_prompts(console, prompts, inputs)
    print_notes(console, inputs)
    print_budgets(console, prompts, inputs)
    print_memory(console, inputs, num_gpus=ranks, available=available)
    try:
        check_machine(inputs.config, needs_teacher=inputs.method.needs_teacher)
        console.print("This machine can run it.")
    except UserError as error:
        console.print(Text(f"On this machine a run would be refused: {error}"))


async def render_prompts(inputs: Inputs, problem: Problem) -> list[Prompt]:
    """The prompts of a step on a problem, and of its evaluation where that has one of its own."""
    config = inputs.config
    engine = Placeholders(inputs, problem)
    single = ProblemStream([problem], batch_size=1, seed=0, shuffle=False)
    sampled = await sample_and_annotate(
        replace(inputs, stream=single),
        Engines(student=engine, teacher=cast("Any", engine), verifiers=PlaceholderVerifier()),
        1,
        Hidden(),
    )
    training = inputs.method.build(
        sampled.selection.kept, sampled.verdicts, sampled.annotations, Hidden()
    )

    def about(rollout_id: str) -> str:
        return "correct" if sampled.verdicts[rollout_id].success else "wrong"

    prompts = {}
    for request in engine.requests:
        _, _, rollout_id = request.id.partition("/reflect/")
        role = f"reflector, {about(rollout_id)} rollout" if rollout_id else "student"
        budget = config.reflect if rollout_id else config.sample
        prompts[role] = Prompt(
            role=role,
            ids=request.prompt_ids,
            budget=budget.max_prompt_tokens,
            answer=request.params.max_new_tokens,
        )
    for sample in training.samples:
        if sample.teacher_prompt_ids:
            role = f"teacher, {about(sample.rollout_id)} rollout"
            prompts[role] = Prompt(
                role=role,
                ids=sample.teacher_prompt_ids,
                budget=config.teacher.max_prompt_tokens,
                answer=config.sample.max_new_tokens,
            )
    ids = inputs.chats.eval.render_problem(problem)
    if ids != prompts["student"].ids:
        prompts["eval"] = replace(prompts["student"], role="eval", ids=ids)
    return [*prompts.values()]


class PlaceholderVerifier(VerifierPool):
    """Tells the completions of `Placeholders` apart, whatever the problem's verifier would say."""

    async def judge(self, tasks: Sequence[tuple[Problem, str]]) -> list[Judgement]:
        return [
            Judgement(score=float(CORRECT in completion), answer="?", reason=None)
            for _, completion in tasks
        ]


class Placeholders(RolloutEngine):
    """An engine whose completions are placeholders: every other rollout is correct.

    requests: all that were made.
    """

    def __init__(self, inputs: Inputs, problem: Problem) -> None:
        self.tokenizer: Any = inputs.model.tokenizer
        self.student = inputs.chats.student
        self.stop = inputs.model.stop_token_ids[0]
        self.problem = problem
        self.requests: list[GenerationRequest] = []

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        self.requests += requests
        return [
            self._generation(request, index) for request in requests for index in range(request.n)
        ]

    async def load_weights(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """There are no weights."""

    async def close(self) -> None:
        """There is nothing to free."""

    def _generation(self, request: GenerationRequest, index: int) -> Generation:
        if "/reflect/" in request.id:
            prompt = self.tokenizer.decode(list(request.prompt_ids)).rstrip()
            opening = next((tag for tag in OPENINGS if prompt.endswith(tag)), "<error_quote>")
            text = OPENINGS[opening]
            if not prompt.endswith(opening):
                thought = next((tags for tags in FAMILIES if prompt.endswith(tags.opening)), None)
                text = f"{thought.closing if thought else ''}{opening}{text}"
        elif index % 2:
            text = f"{WRONG} {QUOTE} <answer>?</answer>"
        else:
            text = f"{CORRECT} <answer>{self.problem.answer}</answer>"
        if "/reflect/" not in request.id and self.student.opens is not None:
            text = f"{self.student.opens.closing}\n\n{text}"
        ids = (*self.tokenizer.encode(text, add_special_tokens=False), self.stop)
        return Generation(
            request_id=request.id,
            index=index,
            completion_ids=ids,
            logprobs=(0.0,) * len(ids),
            finish_reason="stop",
            policy_version=0,
        )


def print_prompts(
    console: Console, prompts: Sequence[Prompt], inputs: Inputs, *, with_ids: bool = False
) -> None:
    """Print each prompt as text, with its special tokens; `with_ids`: and its token ids."""
    tokenizer: Any = inputs.model.tokenizer
    for prompt in prompts:
        title = f"--- {prompt.role}: {len(prompt.ids):,} tokens"
        console.print(Text(title, "bold"), soft_wrap=True)
        text = printable(tokenizer.decode(list(prompt.ids)).rstrip("\n"))
        console.print(Text(text), soft_wrap=True)
        if with_ids:
            console.print(Text(" ".join(map(str, prompt.ids)), "dim"), soft_wrap=True)
    console.print()


def print_notes(console: Console, inputs: Inputs) -> None:
    """Print what is said of the models, and the traps that their chat templates step into."""
    for text in inputs.model_notes:
        console.print(Text(f"Note on the model {text}."), soft_wrap=True)
    for text in inputs.chat_notes():
        console.print(Text(f"Note on the chat template: {text}."), soft_wrap=True)


def print_budgets(console: Console, prompts: Sequence[Prompt], inputs: Inputs) -> None:
    """Print what each prompt leaves of its budget, and whether its answer fits the context."""
    context = inputs.model.context_length
    table = Table("longest problem, without rollouts", title="Tokens", title_justify="left")
    for name in ("prompt", "budget", "answer", "budget + answer", "context"):
        table.add_column(name, justify="right")
    for prompt in prompts:
        longest = prompt.budget + prompt.answer
        table.add_row(
            prompt.role,
            f"{len(prompt.ids):,}",
            f"{prompt.budget:,}",
            f"{prompt.answer:,}",
            f"{longest:,}" + (" (over)" if longest > context else ""),
            f"{context:,}",
        )
    console.print(table)


def print_memory(console: Console, inputs: Inputs, *, num_gpus: int, available: int | None) -> None:
    """Print the memory of a GPU row by row, and whether it fits."""
    config = inputs.config
    shape = ModelShape.of(inputs.model.model)
    plan = memory_plan(
        shape,
        config,
        num_ranks=num_gpus,
        teacher=inputs.method.needs_teacher,
        separate=separate_teacher(config),
    )
    console.print(
        f"Memory of rank 0, of {num_gpus} with a GPU each: {shape.trained:,} of "
        f"{shape.parameters:,} parameters are trained in {config.dtype}"
    )
    console.print(memory_table(plan.rows))
    console.print(verdict(plan, available))
    if config.engine.kind == "sglang":
        console.print(f"An SGLang server, of {config.engine.servers}, over all of its GPUs:")
        console.print(memory_table(server_rows(shape, config)))


def memory_table(rows: Sequence[Row]) -> Table:
    """One line per use of memory."""
    table = Table("what", "when", "where")
    table.add_column("GiB", justify="right")
    for row in rows:
        size = f"{'' if row.exact else '~ '}{row.size / GIB:.2f}"
        table.add_row(row.what, row.when, row.place, size)
    return table


def verdict(plan: MemoryPlan, available: int | None) -> str:
    """What the plan comes to, in one sentence."""
    peak, sure = plan.total() / GIB, plan.total(exact=True) / GIB
    text = f"At the peak about {peak:.1f} GiB per GPU, of which {sure:.1f} GiB are certain."
    if available is None:
        return f"{text} Compare with your GPU's memory: --gpu-memory-gib 80."
    has = available / GIB
    if sure > has:
        return f"{text} Too much for a GPU of {has:.0f} GiB."
    return f"{text} {'Tight' if peak > has else 'Fits'} on a GPU of {has:.0f} GiB."
