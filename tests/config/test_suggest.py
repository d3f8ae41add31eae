"""An unknown name leads to the right option, or to none: a wrong guess is worse."""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.cli import COMMANDS
from rosd_fast.commands.train import Options
from rosd_fast.config import Section, SourceConfig, synonyms
from rosd_fast.config.arguments import as_flag, options_of
from rosd_fast.config.load import load_config
from rosd_fast.config.suggest import nearest, suggestion
from rosd_fast.errors import UserError


class Reading(Section):
    """A command that reads one data set."""

    data: SourceConfig = SourceConfig()
    samples: int = 4
    max_new_tokens: int = 16


TRAIN, READING = options_of(Options), options_of(Reading)
KNOWN = set(READING) | {
    name
    for command in COMMANDS
    for name in options_of(import_module(f"rosd_fast.commands.{command}").Options)
}


@pytest.mark.parametrize(
    ("names", "option"),
    [
        ("learning_rate learning-rate learningRate actor.optim.lr optim.learning_rate", "optim.lr"),
        ("batch_size train_batch_size per_device_train_batch_size", "sample.problems_per_step"),
        ("data.train_batch_size num_prompts", "sample.problems_per_step"),
        ("num_generations rollouts n rollout.n group_size sample.n", "sample.group_size"),
        ("num_train_epochs total_epochs epoch", "epochs"),
        ("max_steps num_steps", "steps"),
        ("max_completion_length max_response_length max_new_tokens", "sample.max_new_tokens"),
        ("sample.max_tokens", "sample.max_new_tokens"),
        ("max_prompt_length", "sample.max_prompt_tokens"),
        ("temperature", "sample.temperature"),
        ("top_p", "sample.top_p"),
        ("warmup", "optim.warmup_steps"),
        ("warmup_ratio", "optim.warmup_frac"),
        ("scheduler lr_scheduler_type", "optim.schedule"),
        ("weight_decay wd", "optim.weight_decay"),
        ("max_grad_norm gradient_clip", "optim.grad_clip"),
        ("random_seed sead", "seed"),
        ("output_dir", "out"),
        ("run_name", "name"),
        ("data dataset train_file", "data.train"),
        ("eval_dataset val_files", "data.dev"),
        ("reward_function reward_fn verifier", "data.verifier"),
        ("bf16 fp16", "dtype"),
        ("gradient_checkpointing", "learner.activation_checkpointing"),
        ("lora_r lora_rank", "lora.rank"),
        ("save_steps", "checkpoint.every"),
        ("eval_steps", "eval.every"),
        ("resume_from_checkpoint", "resume"),
        ("learing_rate", "optim.lr"),  # a slip in another trainer's word
        ("problems_per_stp", "sample.problems_per_step"),
        ("eval.temprature", "eval.temperature"),
        ("optim.beta", "optim.betas"),  # a slip, not the KL coefficient
        ("loss.betta", "loss.beta"),
        ("dataset.train", "data.train"),
        ("sample_group_size", "sample.group_size"),
    ],
)
def test_the_words_of_other_trainers(names: str, option: str) -> None:
    for name in names.split():
        found = suggestion(name.replace("-", "_"), TRAIN, as_flag)
        assert found == f"Did you mean {as_flag(option)}?", name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("kl_coef", "loss.beta is the teacher's weight"),
        ("algorithm.kl_ctrl.kl_coef", "loss.distill_weight with method grpo"),
        ("beta", "loss.beta is the teacher's weight"),
        ("gradient_accumulation_steps", "accumulated by themselves"),
        ("world_size", "torchrun --nproc-per-node"),
        ("deepspeed", "torchrun is enough"),
        ("logging_steps", "metrics.jsonl"),
        ("val_size", "data.dev to 10%"),
        ("max_length", "--sample.max-new-tokens or --sample.max-prompt-tokens"),
        ("clip_range", "--policy.clip-low or --policy.clip-high"),
        ("loss", "loss is a group of options, such as --loss.distill-weight"),
    ],
)
def test_what_one_option_cannot_answer(name: str, says: str) -> None:
    assert says in (suggestion(name, TRAIN, as_flag) or "")


@pytest.mark.parametrize("name", ["loss.foo", "foo", "qqqqqq", "x", "sft", "data.zzz"])
def test_nothing_is_guessed_where_nothing_is_similar(name: str) -> None:
    assert suggestion(name, TRAIN, as_flag) is None


def test_a_command_is_told_its_own_options() -> None:
    for name, option in (
        ("dataset", "data.source"),
        ("num_generations", "samples"),
        ("max_completion_length", "max_new_tokens"),
        ("reward_fn", "data.verifier"),
    ):
        assert suggestion(name, READING, str) == f"Did you mean {option}?"
    assert suggestion("learning_rate", READING, str) is None


def test_every_target_exists_and_no_word_is_said_twice() -> None:
    targets = {option for options in synonyms.OPTIONS for option in options.split()}
    assert targets <= KNOWN, targets - KNOWN
    names = [*synonyms.OPTIONS.values(), *synonyms.ADVICE]
    words = [word for text in names for word in text.split()]
    said = Counter(word.replace("_", "") for word in words)
    assert set(said.values()) == {1}, said.most_common(5)
    for text in synonyms.ADVICE.values():
        named = set(re.findall(r"(?<!docs/)\b[a-z]+\.[a-z_]+", text)) - {"metrics.jsonl"}
        assert named <= set(TRAIN) | {"scaling.md"}, named


def test_a_word_leads_to_its_options_in_training() -> None:
    for options, words in synonyms.OPTIONS.items():
        own = [option for option in options.split() if option in TRAIN]
        for word in words.split():
            if own and word not in TRAIN:  # num_gpus is one of ours, too
                expected = f"Did you mean {' or '.join(own)}?"
                assert suggestion(word, TRAIN, str) == expected, word


@given(st.sampled_from([name for name in TRAIN if len(name.rpartition(".")[2]) > 4]), st.data())
def test_a_name_that_lacks_a_letter_leads_to_its_option(name: str, data: st.DataObject) -> None:
    section, dot, key = name.rpartition(".")
    at = data.draw(st.integers(0, len(key) - 1))
    slip = section + dot + key[:at] + key[at + 1 :]
    if slip in TRAIN or key.startswith("top_") or slip == "select.on_o_success":
        return  # two options are as near
    found = suggestion(slip, TRAIN, str)
    assert found == f"Did you mean {name}?"


def test_nearest_prefers_the_whole_name() -> None:
    names = ["sample.temperature", "eval.temperature", "eval.samples"]
    assert nearest("eval.temprature", names) == "eval.temperature"
    assert nearest("temperature", names) in names[:2]
    assert nearest("zzz", names) is None
    assert nearest("x", []) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1e-5", ":1: unknown key learning_rate. Did you mean optim.lr?"),
        ("\n[loss]\nfoo = 1", ":3: unknown key loss.foo. rosd-fast train --help lists"),
        ("[trainer]\nn_gpus_per_node = 8", ":1: unknown key trainer."),
        ("[sampel]\nn = 8", ":1: unknown key sampel. Did you mean sample?"),
        ("[sample]\nn = 8", ":2: unknown key sample.n. Did you mean sample.group_size?"),
        ("deepspeed = 'x.json'", ":1: unknown key deepspeed. torchrun is enough"),
    ],
)
def test_keys_of_a_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config({}, file=file)
    assert str(caught.value).startswith(f"{file}{message}")
