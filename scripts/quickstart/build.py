"""Build the quickstart model: `python -m scripts.quickstart.build`.

It trains a byte-level BPE tokenizer and a small Llama on `corpus`, saves both in Hugging Face
layout, and measures them (`figures`). It is seeded and takes about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rosd_fast.config.load import load_preset
from rosd_fast.quickstart import MODEL_DIR
from scripts.quickstart.corpus import Conversation, Corpus
from scripts.quickstart.figures import measure, show

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 1024
CONTEXT = 1024


def build_tokenizer(conversations: list[Conversation]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: words with their leading space, one token per digit."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for item in conversations for text in (item.user, item.assistant)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.backend_tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, "<|end|>"),
        pad_token_id=token_id(tokenizer, "<|pad|>"),
    )
    return LlamaForCausalLM(config)


Batch = tuple[torch.Tensor, torch.Tensor]  # input ids and the weight of each as a target: [B, T]
PROMPT_WEIGHT = 0.2  # prompts contain solutions, so learning them too teaches copying early


def batches(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tokens: int) -> Iterator[Batch]:
    """Yield batches of about `tokens` tokens, of conversations of similar length."""
    user, assistant, end = (
        token_id(tokenizer, name) for name in ("<|user|>", "<|assistant|>", "<|end|>")
    )
    fast = tokenizer.backend_tokenizer
    while True:
        pool = [item for _ in range(1500) for item in corpus.draw()]
        prompts = fast.encode_batch([item.user for item in pool])
        answers = fast.encode_batch([item.assistant for item in pool])
        rows = [
            ([user, *prompt.ids, end, assistant], [*answer.ids, end])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        cut: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            width = len(row[0]) + len(row[1])
            if (len(cut[-1]) + 1) * width > tokens:
                cut.append([])
            cut[-1].append(row)
        corpus.rng.shuffle(cut)
        for part in cut:
            yield collate(part, pad=token_id(tokenizer, "<|pad|>"))


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), pad)
    weights = torch.zeros(len(rows), width)
    for row, (prompt, answer) in enumerate(rows):
        total = len(prompt) + len(answer)
        ids[row, :total] = torch.tensor(prompt + answer)
        weights[row, : len(prompt)] = PROMPT_WEIGHT
        weights[row, len(prompt) : total] = 1.0
    return ids, weights


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embedding and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def fit(model: LlamaForCausalLM, stream: Iterator[Batch], *, steps: int, lr: float) -> None:
    """Train, with a short warm-up and a linear decay to zero over the last 60% of the steps."""
    chosen, start, seen, smooth = optimizers(model, lr), time.monotonic(), 0, math.nan
    model.train()
    for step in range(steps):
        scale = min(1.0, (step + 1) / 50) * min(1.0, (1 - step / steps) / 0.6)
        ids, weights = next(stream)
        states = model.model(input_ids=ids).last_hidden_state[:, :-1]
        keep = weights[:, 1:] > 0
        losses = cross_entropy(model.lm_head(states[keep]), ids[:, 1:][keep], reduction="none")
        loss = torch.dot(losses, weights[:, 1:][keep]) / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()
        seen += ids.numel()
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            seconds = time.monotonic() - start
            rate = f"{seen / seconds:.0f} tokens/s {seconds:.0f} s"
            print(f"step {step}/{steps} loss {smooth:.4f} {rate}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--tokens", type=int, default=6000, help="tokens per batch")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = load_preset("quickstart")
    start = time.monotonic()
    texts = Corpus(config, args.seed + 1)
    tokenizer = build_tokenizer([item for _ in range(4000) for item in texts.draw()])
    model = build_model(tokenizer)
    stream = batches(Corpus(config, args.seed), tokenizer, args.tokens)
    fit(model, stream, steps=args.steps, lr=args.lr)
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    minutes = (time.monotonic() - start) / 60
    cpu = time.process_time() / 60
    print(f"built {args.out} in {minutes:.1f} minutes ({cpu:.1f} CPU minutes)")
    print(show(asyncio.run(measure(str(args.out)))))


if __name__ == "__main__":
    main()
