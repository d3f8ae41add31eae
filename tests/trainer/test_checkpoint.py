"""Checkpoints: bitwise resume, atomic writing, damage, pruning."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rosd_fast.config import Config
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.files import atomic_folder
from rosd_fast.trainer import snapshot
from rosd_fast.trainer.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune,
    rate_checkpoint,
    read_state,
    write_checkpoint,
)
from rosd_fast.trainer.learner import Learner
from rosd_fast.trainer.saver import Saver
from rosd_fast.trainer.snapshot import Export, Snapshot
from rosd_fast.types import PackedBatch, PackedSequences
from tests.tiny import tiny_model as family_model


def tiny_model(dtype=torch.float32, *, hidden=16, seed=0):
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=hidden,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
    return model.to(dtype)


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["a b c"],
        trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, special_tokens=["<eos>"]),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", chat_template="{{ messages[0].content }}"
    )


def options(kind: str) -> Config:
    return Config.model_validate(
        {"teacher": {"kind": kind}, "optim": {"lr": 1e-2, "warmup_steps": 3}}
    )


def batch(seed: int) -> PackedBatch:
    g = torch.Generator().manual_seed(seed)

    def sequences(lengths: list[int]) -> PackedSequences:
        first = lengths[0] - 4
        return PackedSequences(
            input_ids=torch.randint(0, 300, (sum(lengths),), generator=g),
            position_ids=torch.cat([torch.arange(n) for n in lengths]),
            cu_seqlens=(0, lengths[0], sum(lengths)),
            gather=torch.tensor([first, first + 1, sum(lengths) - 3]),
        )

    return PackedBatch(
        rollout_ids=("a", "b"),
        problem_ids=("a", "b"),
        student=sequences([8, 6]),
        teacher=sequences([12, 9]),
        token_ids=torch.randint(0, 300, (3,), generator=g),
        weights=torch.ones(3),
        rollout_logprobs=torch.full((3,), -5.5),
        sample_index=torch.tensor([0, 0, 1]),
    )


def save(run: Path, step: int, learner: Learner, tokenizer: Any, **more: Any) -> Path:
    more = {"config_hash": "abc", **more}
    return write_checkpoint(run, Snapshot.of(learner, tokenizer, step=step, **more))


def run_steps(learner: Learner, first: int, last: int) -> list[dict[str, float]]:
    return [learner.step([batch(2 * s), batch(2 * s + 1)]).metrics for s in range(first, last + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["frozen", "ema", "live", "trust_region"])
def test_a_resumed_run_has_the_same_bits_as_an_uninterrupted_one(tmp_path, tokenizer, kind, dtype):
    straight = Learner(tiny_model(dtype), options(kind))
    run_steps(straight, 1, 4)
    path = save(tmp_path, 4, straight, tokenizer)
    expected = run_steps(straight, 5, 8)

    resumed = Learner(tiny_model(dtype), options(kind))
    assert load_checkpoint(path, resumed) == 4
    assert run_steps(resumed, 5, 8) == expected
    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    state = resumed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in straight.state_dict().items())


def test_a_checkpoint_loads_with_from_pretrained(tmp_path, tokenizer):
    learner = Learner(tiny_model(), options("frozen"))
    run_steps(learner, 1, 2)
    path = save(tmp_path, 2, learner, tokenizer)
    assert path == tmp_path / "checkpoints" / "step_000002"
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.randint(0, 300, (1, 9))
    assert torch.equal(model.eval()(ids).logits, learner.model(ids).logits)
    loaded = AutoTokenizer.from_pretrained(path)
    assert loaded("a b").input_ids == tokenizer("a b").input_ids
    assert loaded.chat_template == tokenizer.chat_template
    state = json.loads((path / "trainer_state.json").read_text())
    assert state["step"] == 2 and state["config_hash"] == "abc"
    assert state["threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "rosd_fast"} <= state["versions"].keys()
    assert not [file for file in path.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "family", ["Llama", "Gemma2", "Qwen3", "Mixtral", "Qwen3Moe", "GPT2", "OPT", "GPTNeoX", "Phi3"]
)
def test_an_export_gives_the_same_logits(tmp_path, tokenizer, family, tied):
    model = family_model(family, torch.float32, tie_word_embeddings=tied, pad_token_id=0)
    Export.of(Learner(model, options("live")), tokenizer).save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 64, (1, 9))
    # Experts may be computed in another order.
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-5)


def test_an_export_drops_no_weight(tmp_path, tokenizer):
    """The model has an untied head, and its config says that the head is tied."""
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        save(tmp_path, 1, Learner(model, options("live")), tokenizer)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("fault", ["drop", "shape", "value", "small"])
def test_an_export_is_compared_with_its_files(tmp_path, tokenizer, monkeypatch, fault):
    export = Export.of(Learner(tiny_model(), options("live")), tokenizer)
    name = "model.norm.weight" if fault == "small" else "model.embed_tokens.weight"
    write = snapshot.write_model

    def damaged(*given):
        write(*given)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        if fault == "drop":
            del tensors[name]
        else:
            weight = tensors[name]
            tensors[name] = weight.T.contiguous() if fault == "shape" else weight + 1
        save_file(tensors, file)

    monkeypatch.setattr(snapshot, "write_model", damaged)
    with pytest.raises(RunFailed, match="export"):
        export.save(tmp_path)


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run folder with checkpoints of steps 1, 2 and 10."""
    learner = Learner(tiny_model(), options("frozen"))
    for step in (1, 2, 10):
        run_steps(learner, step, step)
        save(tmp_path, step, learner, tokenizer)
    return tmp_path


def newest(run, **options) -> Path:
    path = latest_checkpoint(run, **options)
    assert path is not None
    return path


def cut(file, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def same_size_garbage(file) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


def state_file(path: Path) -> Path:
    (file,) = (path / "state").glob("*.safetensors")
    return file


DAMAGE = {
    "cut weights": lambda path: cut(path / "model.safetensors", 0.5),
    "cut state": lambda path: cut(state_file(path), 0.99),
    "empty state": lambda path: state_file(path).write_bytes(b""),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "garbage header": lambda path: same_size_garbage(path / "model.safetensors"),
    "no json": lambda path: (path / "trainer_state.json").unlink(),
    "cut json": lambda path: cut(path / "trainer_state.json", 0.5),
    "json is a list": lambda path: (path / "trainer_state.json").write_text("[]"),
    "cut tokenizer": lambda path: cut(path / "tokenizer.json", 0.5),
    "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_skipped(run, damage):
    assert newest(run).name == "step_000010"
    damaged = run / "checkpoints" / "step_000010"
    DAMAGE[damage](damaged)
    warnings: list[str] = []
    assert newest(run, warn=warnings.append).name == "step_000002"
    assert len(warnings) == 1 and str(damaged) in warnings[0]
    with pytest.raises(UserError, match="damaged") as error:
        load_checkpoint(damaged, Learner(tiny_model(), options("frozen")))
    assert "\n" not in str(error.value)


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("other", [{"hidden": 32}, {"seed": 7}], ids=["size", "weights"])
def test_another_model_is_refused(run, other):
    """A frozen teacher needs the initial weights, which the checkpoint does not contain."""
    with pytest.raises(UserError, match="another model"):
        load_checkpoint(newest(run), Learner(tiny_model(**other), options("frozen")))


def test_another_teacher_is_refused(run):
    with pytest.raises(UserError, match="other teacher options"):
        load_checkpoint(newest(run), Learner(tiny_model(), options("ema")))


def test_prune_keeps_the_newest(run):
    leftover = run / "checkpoints" / ".tmp-step_000011-x"
    leftover.mkdir()
    prune(run, 2)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000010"]


def test_prune_keeps_the_best(tmp_path, tokenizer):
    learner = Learner(tiny_model(), options("frozen"))
    accuracies = {1: 0.5, 2: 0.75, 3: None, 4: 0.75, 5: 0.25, 6: None}
    for step, accuracy in accuracies.items():
        save(tmp_path, step, learner, tokenizer, dev_accuracy=accuracy)
    prune(tmp_path, 2, keep_best=True)
    folder = tmp_path / "checkpoints"
    kept = ["step_000002", "step_000005", "step_000006"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    cut(folder / "step_000002" / "model.safetensors", 0.5)
    prune(tmp_path, 1, keep_best=True)  # what is damaged is not the best of anything
    assert sorted(path.name for path in folder.glob("step_*")) == kept[1:]
    prune(tmp_path, 1)
    assert sorted(path.name for path in folder.glob("step_*")) == kept[2:]


@pytest.mark.parametrize("damage", DAMAGE)
def test_prune_counts_intact_checkpoints_only(run, tokenizer, damage):
    """A run that resumes from step 2, as step 10 is damaged, keeps the step 3 that it saves."""
    damaged = run / "checkpoints" / "step_000010"
    DAMAGE[damage](damaged)
    rest = sorted(file.relative_to(damaged) for file in damaged.rglob("*"))
    save(run, 3, Learner(tiny_model(), options("frozen")), tokenizer)
    warnings: list[str] = []
    prune(run, 1, warn=warnings.append)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged_step_000010", "step_000003"]
    assert newest(run, warn=warnings.append).name == "step_000003"
    assert len(warnings) == 1 and str(damaged) in warnings[0] and names[0] in warnings[0]
    aside = damaged.with_name(names[0])
    assert sorted(file.relative_to(aside) for file in aside.rglob("*")) == rest


def test_a_step_that_is_damaged_twice_is_moved_aside_twice(run, tokenizer):
    folder = run / "checkpoints"
    for keep in (0.5, 0.25):
        cut(folder / "step_000010" / "model.safetensors", keep)
        left = (folder / "step_000010" / "model.safetensors").stat().st_size
        prune(run, 2)
        save(run, 10, Learner(tiny_model(), options("frozen")), tokenizer)
    assert (folder / "damaged_step_000010" / "model.safetensors").stat().st_size == left
    assert newest(run).name == "step_000010"


def test_an_unwritable_folder_is_a_user_error(tmp_path, tokenizer):
    learner = Learner(tiny_model(), options("frozen"))
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path, 1, learner, tokenizer)


@pytest.mark.parametrize("limit", [1_000, 60_000])
def test_a_full_disk_leaves_the_old_checkpoint(run, tokenizer, limit):
    """A limit on file size acts like a full disk: the file is written up to the limit, then the
    system refuses to write more."""
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    learner = Learner(tiny_model(), options("frozen"))
    snapshot = Snapshot.of(learner, tokenizer, step=10, config_hash="abc")
    size, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written .*Free some space"):
            write_checkpoint(run, snapshot)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        signal.signal(signal.SIGXFSZ, handler)
    after = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    assert after == before and newest(run).name == "step_000010"


def test_saving_a_step_again_replaces_it(run, tokenizer):
    learner = Learner(tiny_model(seed=3), options("frozen"))
    path = save(run, 10, learner, tokenizer, config_hash="new")
    assert json.loads((path / "trainer_state.json").read_text())["config_hash"] == "new"
    with safe_open(path / "model.safetensors", framework="pt") as tensors:
        weight = tensors.get_tensor("model.norm.weight")
    assert torch.equal(weight, learner.weights["model.norm.weight"])
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_a_generation_config_that_transformers_refuses_to_save(tmp_path, tokenizer):
    model = tiny_model()
    own = GenerationConfig(eos_token_id=5, temperature=0.6, do_sample=False)
    model.generation_config = own
    with pytest.raises(ValueError, match="invalid"):  # the reason for save_model
        own.save_pretrained(tmp_path)
    learner = Learner(model, options("frozen"))
    path = save(tmp_path, 1, learner, tokenizer)
    assert GenerationConfig.from_pretrained(path).eos_token_id == 5
    assert model.generation_config is own


def test_a_generation_config_is_kept(tmp_path, tokenizer):
    """With its sampling parameters, and end-of-text tokens that the tokenizer does not name."""
    model = tiny_model()
    model.generation_config = GenerationConfig(
        eos_token_id=[5, 1], do_sample=True, temperature=0.6, top_k=20, top_p=0.95
    )
    path = save(tmp_path, 1, Learner(model, options("frozen")), tokenizer)
    kept = GenerationConfig.from_pretrained(path).to_diff_dict()
    own = model.generation_config.to_diff_dict()
    assert {name: kept.get(name) for name in own} == own and kept["eos_token_id"] == [5, 1]


def test_a_tied_head_is_saved_once(tmp_path, tokenizer):
    path = save(tmp_path, 1, Learner(tiny_model(), options("frozen")), tokenizer)
    shapes = [tuple(tensor.shape) for tensor in load_file(path / "model.safetensors").values()]
    assert shapes.count((300, 16)) == 1


def test_atomic_folder_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "a" / "b"
    with atomic_folder(path) as folder:
        (folder / "x").write_text("1")

    def interrupted():
        with atomic_folder(path) as folder:
            (folder / "x").write_text("2")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert (path / "x").read_text() == "1"
    with atomic_folder(path) as folder:
        (folder / "y").write_text("3")
    assert [file.name for file in path.iterdir()] == ["y"]
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]


def test_a_checkpoint_is_rated_after_it_was_saved(run: Path) -> None:
    """Then it is the best one, and still whole."""
    before = json.loads((run / "checkpoints" / "step_000002" / "trainer_state.json").read_text())
    rate_checkpoint(run, 2, 0.75)
    rate_checkpoint(run, 3, 0.9)  # it has no checkpoint
    about = read_state(run / "checkpoints" / "step_000002")
    assert before["dev_accuracy"] is None
    assert about == before | {"dev_accuracy": 0.75}
    prune(run, 1, keep_best=True)
    assert [path.name for path in checkpoints(run)] == ["step_000002", "step_000010"]


def test_a_saver_rates_what_it_has_just_begun_to_write(tmp_path: Path, tokenizer: Any) -> None:
    saver = Saver(Learner(tiny_model(), options("frozen")), tokenizer, Config())
    saver.save(tmp_path, 1, None)
    saver.rate(tmp_path, 1, 0.5)
    saver.wait()
    assert read_state(newest(tmp_path))["dev_accuracy"] == 0.5
    saver.rate(tmp_path, 1, 0.75)
    assert read_state(newest(tmp_path))["dev_accuracy"] == 0.75
    saver.rate(tmp_path, 1, None)
    assert read_state(newest(tmp_path))["dev_accuracy"] == 0.75
