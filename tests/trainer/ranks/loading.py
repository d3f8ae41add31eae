"""Each rank reads its shards from the files of the model; this is one rank:

    torchrun --nproc-per-node 2 -m tests.trainer.ranks.loading OUT [--other-files]

Rank 0 asserts that the shards are those of the model that it has loaded, and writes the number of
parameters that the ranks have read to OUT/CASE. other-files: rank 1 sees other files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rosd_fast.config import Config
from rosd_fast.model import shard_files
from rosd_fast.model.load import load_weights
from rosd_fast.trainer import learner as learner_module
from rosd_fast.trainer.ranks import LearnerGroup, run_worker
from rosd_fast.utils.distributed import World, open_world
from tests.tiny import mark_trainable, tiny_model

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "whole": ("Llama", {"tie_word_embeddings": False}, {}, "float32"),
    "tied": ("Llama", {"tie_word_embeddings": True}, {}, "bfloat16"),
    "rows": ("Qwen3", {"tie_word_embeddings": False}, {"parallel": {"head": "shard"}}, "float32"),
    "lora": ("Llama", {}, {"lora": {"rank": 4}}, "float32"),
    "experts": ("Qwen3Moe", MOE, {}, "float32"),
    "changed": ("Llama", {}, {}, "float32"),
}


def work(world: World, out: Path) -> None:
    counts: list[int] = []
    own = shard_files.read_shards

    def counting(*given: Any) -> set[str]:
        names = own(*given)
        counts.append(len(names))
        return names

    learner_module.read_shards = counting
    for case, (family, shape, options, dtype) in CASES.items():
        if not world.is_rank0:
            run_worker(world)
            continue
        config = Config.model_validate({"dtype": dtype, **options})
        folder = out / f"model {case}"
        tiny_model(family, torch.float32, **shape).save_pretrained(folder)
        model = load_weights(folder, dtype=getattr(torch, dtype), trust_remote_code=False).eval()
        if case == "changed":  # since it was loaded
            weights = load_file(folder / "model.safetensors")
            weights["model.embed_tokens.weight"][0] += 1
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        mark_trainable(model, config)
        before = {name: w.clone() for name, w in model.named_parameters()}
        counts.clear()
        learners = LearnerGroup.create(model, config, world, None)
        names = tuple(before)
        gathered = learners._gather(names)
        for name, weight in before.items():
            assert torch.equal(gathered[name], weight), (case, name)
        teacher = learners.learner._teacher
        assert teacher is not None
        (out / case).write_text(f"{counts[0]} {len(names)} {len(counts)}")
        learners.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--other-files", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with open_world(Config().parallel, "cpu") as world:
        if args.other_files and not world.is_rank0:
            shard_files.digest_of = lambda files: "another"
        work(world, args.out)


if __name__ == "__main__":
    main()
