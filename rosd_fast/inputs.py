"""What a run reads: model, data and method, loaded and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rosd_fast.config import Config
from rosd_fast.config.chat import make_chats, read_templates
from rosd_fast.config.load import is_built_in
from rosd_fast.data.collection import Problems
from rosd_fast.data.datasets import Datasets, load_datasets
from rosd_fast.data.fitting import check_context, check_prompts, fitting
from rosd_fast.data.sources import absolute_sources
from rosd_fast.data.splits import TRAIN
from rosd_fast.data.stream import ProblemStream
from rosd_fast.engines.factory import check_engine
from rosd_fast.machine import check_memory
from rosd_fast.methods import Method, find_method
from rosd_fast.methods.budgets import longest_sequence
from rosd_fast.model.adapters import choose_trainable
from rosd_fast.model.layouts import Layout, layout_of
from rosd_fast.model.load import LoadedModel, full_model_device, generation_eos, load_model
from rosd_fast.model.nf4 import check_quantize
from rosd_fast.model.rope import fix_rope, server_rope_args
from rosd_fast.model.run_folder import run_model
from rosd_fast.model.skeleton import build_skeleton, load_skeleton
from rosd_fast.text.chat import Chats
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.text.traps import find_traps
from rosd_fast.trainer.adamw import check_adamw
from rosd_fast.trainer.param_groups import lr_scales, parse_scales
from rosd_fast.trainer.separate_teacher import (
    SeparateTeacher,
    compare_tokenizers,
    load_separate_teacher,
)
from rosd_fast.types import Problem
from rosd_fast.utils.distributed import launched, pick_device
from rosd_fast.verify.user_file import absolute_verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run is made of, checked.

    config: all options, with absolute paths, the texts of chat templates, and steps instead of
        epochs.
    model: the student with its initial weights.
    teacher: another model that teaches it; None where the teacher is the student's own.
    chats: how the prompts of each role are rendered.
    problems: the training problems.
    dev_splits: "dev" and "ood", those that were given.
    data_notes: what a user is told of the data.
    model_notes: what a user is told of the models.
    stream: the problems of each step.
    token_bytes: the bytes that each sampled token stands for.
    method: what a rollout is trained on.
    """

    config: Config
    model: LoadedModel
    teacher: SeparateTeacher | None
    chats: Chats
    problems: Problems
    dev_splits: dict[str, Problems]
    data_notes: list[str]
    model_notes: list[str]
    stream: ProblemStream
    token_bytes: TokenBytes
    method: Method

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special and of added tokens, such as those of a chat template."""
        tokenizer: Any = self.model.tokenizer
        return frozenset(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())

    @property
    def layouts(self) -> set[Layout]:
        """How student and teacher run sequences."""
        models = [self.model] if self.teacher is None else [self.model, self.teacher.model]
        return {layout_of(loaded.model) for loaded in models}

    @property
    def shares_prefixes(self) -> bool:
        """Whether some of the models store a prefix that sequences have in common once."""
        return "shared" in self.layouts

    def chat_notes(self) -> list[str]:
        """The known traps that the chat templates or the tokenizer step into."""
        return find_traps(
            self.chats,
            stop_token_ids=self.model.stop_token_ids,
            generation_eos=generation_eos(self.model.model),
            with_system=any(problem.system for problem in self.problems.checked),
        )


def load_inputs(config: Config, *, weights: bool = True) -> Inputs:
    """Load model and data. Raises UserError for everything that can be known to be wrong by then.

    The cheap checks come first: a model may take minutes to load.

    weights: False: load only the shapes of the model, and do not check this machine.
    """
    config = with_absolute_paths(config)
    method_type = find_method(config.method)
    method_type.check_options(config)
    check_adamw(config.optim, several_ranks=launched())
    check_quantize(config.lora, several_ranks=launched())
    parse_scales(config.optim.lr_scale)
    data = load_datasets(config.data, verify=config.verify, first=config.eval.problems)
    make_stream(config, data.train)
    vocabulary = compare_tokenizers(config)
    if weights:
        check_machine(config, needs_teacher=method_type.weights(config)[0] > 0)
        model = load_model(
            config.model,
            dtype=config.dtype,
            device=full_model_device(config.device, config.engine),
            trust_remote_code=config.trust_remote_code,
            quantize=config.lora.quantize != "none",
        )
    else:
        model = load_skeleton(
            config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
    chats = make_chats(config.chat, model.tokenizer)
    limits = {
        "max_prompt_tokens": config.sample.max_prompt_tokens,
        "context_length": model.context_length,
    }
    data = with_fitting_prompts(data, chats, skip=config.data.bad_rows == "skip", **limits)
    known = data.train.checked
    check_context(known, [chats.reflector, chats.teacher])
    stream = make_stream(config, data.train)
    config = with_resolved_epochs(config, stream)
    token_bytes = TokenBytes(model.tokenizer)
    method = method_type(config, model, token_bytes, chats)
    method.check_problems(known)

    def check_late(problem: Problem) -> None:
        check_prompts([problem], chat=chats.student, **limits)
        check_context([problem], [chats.reflector, chats.teacher])
        method.check_problem(problem)

    choose_trainable(
        model.model, lora=config.lora, trainable=config.optim.trainable, seed=config.seed
    )
    lr_scales(list(model.model.named_parameters(remove_duplicate=False)), config.optim.lr_scale)
    teacher = None
    if vocabulary is not None:
        device = separate_device(config, needs_engine=method.needs_teacher_engine)
        teacher = load_separate_teacher(config, model, vocabulary, device if weights else None)
    return Inputs(
        config=config,
        model=model,
        teacher=teacher,
        chats=chats,
        problems=data.train,
        dev_splits=data.dev,
        data_notes=data.notes,
        model_notes=fix_ropes(config, method, model, teacher),
        stream=stream.with_check(check_late),
        token_bytes=token_bytes,
        method=method,
    )


def fix_ropes(
    config: Config, method: Method, model: LoadedModel, teacher: SeparateTeacher | None
) -> list[str]:
    """Fix the RoPE frequencies of student and teacher for the run; returns lines for the user.

    Raises UserError for servers that would have others.
    """
    longest = longest_sequence(method, model.context_length)
    served = "sglang" in (config.engine.kind, config.teacher.backend)
    taught_by = model if teacher is None else teacher.model
    lines = [(one.name, fix_rope(one.model, longest, served=served)) for one in (model, taught_by)]
    if config.engine.kind == "sglang":
        urls = config.engine.urls
        server_rope_args(model.model, where=f"engine.urls: {urls}", managed=not urls)
    if config.teacher.backend == "sglang":
        url = config.teacher.url
        server_rope_args(taught_by.model, where=f"teacher.url: {url}", managed=not url)
    return [f"{name}: {line}" for name, line in lines if line is not None]


def make_stream(config: Config, problems: Problems) -> ProblemStream:
    """The problems of each step. Raises UserError if they do not fill one."""
    return ProblemStream(
        problems,
        batch_size=config.sample.problems_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )


def with_fitting_prompts(data: Datasets, chats: Chats, *, skip: bool, **limits: int) -> Datasets:
    """The data without problems whose prompts are too long, and lines on these. See `fitting`."""
    train, lines = fitting(data.train, chat=chats.student, skip=skip, **limits)
    shared = [*data.shared, *(f"{TRAIN}: {line}" for line in lines)]
    dev = {}
    for name, problems in data.dev.items():
        dev[name], lines = fitting(problems, chat=chats.eval, skip=skip, **limits)
        shared += [f"{name}: {line}" for line in lines]
    return replace(data, train=train, dev=dev, shared=shared)


def separate_device(config: Config, *, needs_engine: bool) -> torch.device:
    """The device of a separate teacher's full model: the learner's if it computes with that model.

    Several ranks compute with its shards, and a server with its own copy: then host memory will do.

    needs_engine: whether text is generated with the teacher.
    """
    shards = launched() or config.teacher.backend == "sglang"
    return torch.device("cpu") if shards and not needs_engine else pick_device(config.device)


def check_machine(config: Config, *, needs_teacher: bool) -> None:
    """Raise UserError if the run does not fit this machine, or needs what it does not have."""
    model = build_skeleton(
        config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    choose_trainable(model, lora=config.lora, trainable=config.optim.trainable, seed=config.seed)
    check_memory(config, model, teacher=needs_teacher)
    check_engine(config.engine, config.teacher, config.device)


def with_resolved_epochs(config: Config, stream: ProblemStream) -> Config:
    """Return options with the number of steps that `epochs` asks for, instead of epochs."""
    if config.epochs is None:
        return config
    steps = max(1, round(config.epochs * stream.steps_per_epoch))
    return config.model_copy(update={"steps": steps, "epochs": None})


def with_absolute_paths(config: Config) -> Config:
    """Return options that name the same files from whatever folder the run is resumed in.

    A chat template's text replaces its path, so a resumed run has the template it began with.
    """
    data, engine = config.data, config.engine
    texts = {name: getattr(data, name) for name in ("train", "dev", "dev_ood")}
    sources = {name: text and absolute_sources(text) for name, text in texts.items()}
    places = {name: absolute(getattr(engine, name)) for name in ("python", "sync_folder")}
    return config.model_copy(
        update={
            "model": absolute_model(config.model),
            "data": data.model_copy(
                update={**sources, "verifier": absolute_verifier(data.verifier)}
            ),
            "chat": read_templates(config.chat),
            "engine": engine.model_copy(update=places),
            "teacher": config.teacher.model_copy(
                update={"model": absolute_model(config.teacher.model)}
            ),
        }
    )


def absolute(path: str | None) -> str | None:
    """The absolute path of a file or folder."""
    return None if path is None else str(Path(path).expanduser().absolute())


def absolute_model(name: str | None) -> str | None:
    """The absolute path of a model folder; any other model keeps its name.

    A run folder becomes the checkpoint that it stands for now: the run may go on, and have others.
    """
    if name is None or is_built_in(name) or not Path(name).expanduser().is_dir():
        return name
    found = run_model(name)
    return str((found.folder if found else Path(name).expanduser()).absolute())
