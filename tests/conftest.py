"""Fixtures for all tests: tiny tokenizers, a tiny model, and records made from texts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from rosd_fast.threads import wait_briefly

# Read where a Triton kernel is defined, so before anything that may import Triton.
os.environ["TRITON_INTERPRET"] = "1"
# Test processes side by side share the cores: threads that wait for one another's are many times
# slower. Read when torch is imported, here and in the processes that tests start, which then do not
# measure how many threads are fast at the moment: their sums are the same each time.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
wait_briefly()

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from rosd_fast.types import Group, Verdict

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "First, we add 3.5 and 4 to get 7.5. Then we divide by 2. The answer is 3.75.",
    "The wrong step is the second one: the wrong rate was used! What is the right rate?",
    "A solution goes like this.\nStep 1: read the question. Step 2: answer it.\n\nSo it is 12.",
    "A note on an attempt. It went wrong here: it is 11. The correct idea: add the ones first.",
    "naïve café, 日本語 and Ελληνικά; \r\n tabs\tand  two spaces.",
] * 4


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with leading-space tokens, a chat template, and <|end|> as stop token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>", "日本"])  # added, but not special: they are text
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a space before the text, as RoBERTa's does, and that cleans up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=True,
    )


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of a real model, where its package is installed."""
    from transformers import AutoTokenizer

    from rosd_fast.errors import UserError
    from rosd_fast.model.smollm2 import smollm2_folder

    try:
        return AutoTokenizer.from_pretrained(smollm2_folder())
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE on ▁ words with byte fallback, as in Llama 2: the decoder drops the first space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # type: ignore[list-item]
    )
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        [text for text in CORPUS if text.isascii()],
        trainers.BpeTrainer(vocab_size=200, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    backend = Tokenizer(
        models.BPE(
            vocab={name: token for token, name in enumerate(names)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{{ bos_token }}{% for message in messages %}"
            "[{{ message['role'] }}] {{ message['content'] }}\n"
            "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
        ),
    )


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram with byte fallback and Metaspace, whose decoder drops the first token's spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=160, show_progress=False, unk_token="<unk>")
    )
    learned = [(name, score) for name, score in json.loads(trained.to_str())["model"]["vocab"]]
    learned = [pair for pair in learned if pair[0] != "<unk>"]
    vocab = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *learned]
    backend = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(dtype=torch.float32, seed=0, **config)`: a new random two-layer Llama.

    Its vocabulary is that of `tokenizer`. Keywords go to LlamaConfig, as in
    `tie_word_embeddings=True`.
    """

    def make(*, dtype: Any = None, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        options: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,  # large, so that next tokens are not all alike
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = LlamaForCausalLM(LlamaConfig(**(options | overrides)))
        return model.to(dtype or torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def make_group(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., tuple[Group, dict[str, Verdict]]]:
    """`make_group(texts, scores, id="p0", **problem)`: a group of rollouts, and its verdicts.

    Each completion is its text's ids and the stop token; its logprobs are -0.5, -1, -1.5 and so on.
    """
    from rosd_fast.text.chat import chat_format
    from rosd_fast.types import Group, Problem, Rollout, Verdict

    stop: Any = tokenizer.eos_token_id
    chat = chat_format(tokenizer)

    def make(
        texts: Sequence[str], scores: Sequence[float], *, id: str = "p0", **fields: Any
    ) -> tuple[Group, dict[str, Verdict]]:
        given: dict[str, Any] = {
            "domain": "sums",
            "prompt": "2 + 2 = ?",
            "answer": "4",
            "verifier": "number",
        }
        problem = Problem(id=id, **(given | fields))
        prompt_ids = chat.render(problem.prompt, system=problem.system)
        rollouts = []
        for index, text in enumerate(texts):
            ids = (*tokenizer.encode(text, add_special_tokens=False), stop)
            rollouts.append(
                Rollout(
                    id=f"{id}/{index}",
                    problem_id=id,
                    prompt_ids=prompt_ids,
                    completion_ids=ids,
                    logprobs=tuple(-0.5 * (place + 1) for place in range(len(ids))),
                    text=text,
                    finish_reason="stop",
                    policy_version=0,
                )
            )
        verdicts = {
            rollout.id: Verdict(
                rollout_id=rollout.id, score=score, success=score == 1.0, answer=None
            )
            for rollout, score in zip(rollouts, scores, strict=True)
        }
        return Group(problem=problem, rollouts=tuple(rollouts)), verdicts

    return make
