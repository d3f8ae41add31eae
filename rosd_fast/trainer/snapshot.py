"""A copy in host memory of what a checkpoint holds: it is written while the run goes on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rosd_fast.model.load import quiet_transformers
from rosd_fast.trainer.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A model to save in the Hugging Face layout; adapters are merged into its weights."""

    model: PreTrainedModel  # without memory for weights
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> Export:
        """A copy of rank 0's model, as of the learner's last `collect`."""
        assert learner.whole is not None
        model = without_adapters(learner.whole)
        names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
        weights = {
            name: weight.detach().to("cpu", copy=True)
            for name, weight in learner.weights.items()
            if name in names
        }
        return cls(model=model, weights=weights, tokenizer=tokenizer)

    def save(self, folder: Path) -> None:
        """`save_pretrained`, also for generation configs that transformers refuses to save."""
        own = self.model.generation_config
        if own is not None:
            try:
                own.validate(strict=True)
            except ValueError:
                # Sampling parameters without do_sample: keep the token ids, which are needed.
                self.model.generation_config = GenerationConfig(
                    bos_token_id=own.bos_token_id,
                    eos_token_id=own.eos_token_id,
                    pad_token_id=own.pad_token_id,
                )
        with quiet_transformers():
            self.model.save_pretrained(folder, state_dict=self.weights)
            self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Of one rank after a step.

    state: this rank's part of `Learner.state_dict`. export: rank 0's, None elsewhere.
    """

    step: int
    config_hash: str
    dev_accuracy: float | None
    fingerprint: str
    state: dict[str, Any]
    export: Export | None

    @classmethod
    def of(
        cls,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        step: int,
        config_hash: str,
        dev_accuracy: float | None = None,
    ) -> Snapshot:
        """A collective: rank 0's model is brought up to date. tokenizer: rank 0's."""
        learner.collect()
        return cls(
            step=step,
            config_hash=config_hash,
            dev_accuracy=dev_accuracy,
            fingerprint=learner.fingerprint,
            state=BlockingAsyncStager(cache_staged_state_dict=False).stage(learner.state_dict()),
            export=None if tokenizer is None else Export.of(learner, tokenizer),
        )


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A model of that kind without memory for its weights."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.generation_config = model.generation_config
    return plain
