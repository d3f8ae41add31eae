"""What a run reads, loaded and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rosd_fast.config import Config
from rosd_fast.config.load import preset_names
from rosd_fast.config.templates import check_templates
from rosd_fast.data.problems import ProblemStream, load_problems
from rosd_fast.engines.factory import check_engine
from rosd_fast.engines.local.grammar_mask import GrammarCompiler
from rosd_fast.errors import UserError
from rosd_fast.model.adapters import choose_trainable
from rosd_fast.model.head import head
from rosd_fast.model.load import LoadedModel, load_model
from rosd_fast.quickstart import QUICKSTART
from rosd_fast.reflection.requests import template_name
from rosd_fast.rollout.sample import check_prompts
from rosd_fast.text.prompts import fill_template, placeholders, render_prompt
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import Problem


@dataclass(slots=True, kw_only=True)
class Inputs:
    """What a run is made of, checked."""

    config: Config
    model: LoadedModel
    problems: list[Problem]
    dev_splits: dict[str, list[Problem]]  # "dev" and "ood", those that were given
    stream: ProblemStream
    token_bytes: TokenBytes


def load_inputs(config: Config) -> Inputs:
    """Load model and data. Raises UserError for all that can be seen to be wrong at this point."""
    config = with_absolute_paths(config)
    check_templates(config.reflect, config.teacher)
    check_engine(config)
    problems, dev_splits = load_data(config)
    stream = ProblemStream(
        problems,
        batch_size=config.sample.problems_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    model = load_model(config)
    check_prompts(
        [*problems, *(problem for split in dev_splits.values() for problem in split)],
        tokenizer=model.tokenizer,
        max_prompt_tokens=config.sample.max_prompt_tokens,
        context_length=model.context_length,
    )
    check_budgets(config, model, max(problems, key=lambda problem: len(problem.prompt)))
    choose_trainable(model.model, config)
    token_bytes = TokenBytes(model.tokenizer)
    if config.reflect.mode != "free":
        GrammarCompiler(model.tokenizer, head(model.model).weight.shape[0]).check(
            model.stop_token_ids
        )
    return Inputs(
        config=config,
        model=model,
        problems=problems,
        dev_splits=dev_splits,
        stream=stream,
        token_bytes=token_bytes,
    )


def load_data(config: Config) -> tuple[list[Problem], dict[str, list[Problem]]]:
    """Training problems, and the development splits that were given, cut to eval.problems."""
    train = load_problems(config.data.train, verifier=config.data.verifier)
    sources = {"dev": config.data.dev, "ood": config.data.dev_ood}
    splits = {
        name: load_problems(source, verifier=config.data.verifier)
        for name, source in sources.items()
        if source is not None
    }
    first = config.eval.problems or None
    return train, {name: problems[:first] for name, problems in splits.items()}


def with_absolute_paths(config: Config) -> Config:
    """The same files and folders from wherever the run is resumed."""

    def absolute(source: str | None) -> str | None:
        if source is None or source.startswith(QUICKSTART):
            return source
        return str(Path(source).expanduser().absolute())

    data, engine = config.data, config.engine
    sources = {name: absolute(getattr(data, name)) for name in ("train", "dev", "dev_ood")}
    folder = Path(config.model).expanduser()
    named = config.model in preset_names() or not folder.is_dir()
    model = config.model if named else str(folder.absolute())
    places = {name: absolute(getattr(engine, name)) for name in ("python", "sync_folder")}
    return config.model_copy(
        update={
            "model": model,
            "data": data.model_copy(update=sources),
            "engine": engine.model_copy(update=places),
        }
    )


def check_budgets(config: Config, model: LoadedModel, problem: Problem) -> None:
    """Raise UserError when `problem`, the longest, and a template alone are over their budget.

    Only the templates that the run uses are checked.
    """
    for section, name in used_templates(config):
        options = getattr(config, section)
        template = getattr(options, name)
        texts = {**dict.fromkeys(placeholders(template), ""), "problem": problem.prompt}
        user = fill_template(template, texts)
        length = len(render_prompt(model.tokenizer, user=user, system=problem.system))
        if length >= options.max_prompt_tokens:
            raise UserError(
                f"{section}.{name} and the problem have {length} tokens together, and "
                f"{section}.max_prompt_tokens is {options.max_prompt_tokens}",
                where=f"problem {problem.id}",
                fix=f"Raise {section}.max_prompt_tokens, or leave the problem out",
            )


def used_templates(config: Config) -> list[tuple[str, str]]:
    """(section, option) of the user turns of the reflector and of the teacher."""
    used = [
        ("reflect", template_name(config.reflect, correct=False)),
        ("teacher", "wrong_template"),
    ]
    if config.reflect.on_correct == "reflect":
        used += [
            ("reflect", template_name(config.reflect, correct=True)),
            ("teacher", "correct_template"),
        ]
    return used
