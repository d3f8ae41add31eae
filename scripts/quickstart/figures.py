"""Measure a quickstart model on the dev splits, with the stages of the training loop.

python -m scripts.quickstart.figures [FOLDER]     # a minute; the shipped model by default
"""

from __future__ import annotations

import argparse
import asyncio

from rosd_fast.batch.samples import build_samples
from rosd_fast.config.chat import make_chats
from rosd_fast.config.load import load_preset
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.model.load import load_model
from rosd_fast.quickstart import MODEL_DIR
from rosd_fast.quickstart.tasks import IN_DOMAIN, OUT_OF_DOMAIN, load_split
from rosd_fast.reflection.locate import locate_errors
from rosd_fast.reflection.probe import teacher_helps
from rosd_fast.reflection.reflect import reflect
from rosd_fast.rollout.sample import sample_groups
from rosd_fast.rollout.select import select_groups
from rosd_fast.text.token_bytes import TokenBytes
from rosd_fast.types import Group, SamplingParams
from rosd_fast.utils.distributed import pick_device
from rosd_fast.verify import VerifierPool, verify_all

Figures = dict[str, float]


async def measure(model_folder: str, *, group_size: int = 8, seed: int = 0) -> Figures:
    """Shares in [0, 1], sampled at temperature 1:

    solve/dev, solve/ood       accuracy with the plain prompt
    reflect/well_formed        unconstrained reflections on wrong rollouts that have both tags and
                               quote the rollout verbatim
    teach/before, teach/after  accuracy with the plain prompt, and with the model's own reflection
                               in the prompt, on the problems of wrong rollouts
    """
    config = load_preset("quickstart").model_copy(update={"model": model_folder})
    model = load_model(config.model, dtype=config.dtype, device=pick_device(config.device))
    chats = make_chats(config.chat, model.tokenizer)
    engine = LocalEngine(model.model, tokenizer=model.tokenizer)
    params = SamplingParams(
        max_new_tokens=config.sample.max_new_tokens, stop_token_ids=model.stop_token_ids
    )
    sampled = await sample_groups(
        engine,
        [*load_split("dev"), *load_split("dev_ood")],
        chat=chats.student,
        group_size=group_size,
        params=params,
        seed=seed,
        step=0,
        max_prompt_tokens=config.sample.max_prompt_tokens,
    )
    groups = [group for group in sampled if group.problem.domain in IN_DOMAIN]
    outside = [group for group in sampled if group.problem.domain in OUT_OF_DOMAIN]
    verdicts = verify_all(sampled, threshold=1.0)
    score = {rollout_id: verdict.score for rollout_id, verdict in verdicts.items()}
    figures: Figures = {
        "solve/dev": _accuracy(groups, score),
        "solve/ood": _accuracy(outside, score),
    }
    for domain in sorted({group.problem.domain for group in sampled}):
        members = [group for group in sampled if group.problem.domain == domain]
        figures[f"solve/{domain}"] = _accuracy(members, score)

    kept = select_groups(groups, verdicts, config.select).kept
    reflections = await reflect(
        kept,
        verdicts,
        engine=engine,
        config=config.reflect.model_copy(update={"mode": "free"}),
        chats=chats,
        stop_token_ids=model.stop_token_ids,
        seed=seed,
        step=0,
    )
    texts = {rollout.id: rollout.text for group in kept for rollout in group.rollouts}
    wrong = [reflection for reflection in reflections.values() if not reflection.correct]
    verbatim = [r for r in wrong if r.well_formed and r.quote and r.quote in texts[r.rollout_id]]
    figures["reflect/well_formed"] = len(verbatim) / len(wrong)

    located = locate_errors(
        kept, verdicts, reflections, token_bytes=TokenBytes(model.tokenizer), config=config.span
    )
    samples = build_samples(
        kept, reflections, located.spans, chat=chats.teacher, config=config.teacher
    )
    taught = [sample for sample in samples if not reflections[sample.rollout_id].correct]
    helped = await teacher_helps(
        engine,
        taught,
        kept,
        verdicts,
        verifiers=VerifierPool(),
        tokenizer=model.tokenizer,
        params=params,
        seed=seed,
        step=0,
    )
    if helped is not None:
        figures["teach/before"], figures["teach/after"] = helped
    return figures


def _accuracy(groups: list[Group], score: dict[str, float]) -> float:
    scores = [score[rollout.id] for group in groups for rollout in group.rollouts]
    return sum(scores) / len(scores)


def show(figures: Figures) -> str:
    return "\n".join(f"{name:24s} {value:.3f}" for name, value in figures.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", default=str(MODEL_DIR), help="default: %(default)s")
    print(show(asyncio.run(measure(parser.parse_args().folder))))
