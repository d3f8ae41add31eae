"""The table of `docs/models.md`: what each family of `tests.families` gets.

python -m tests.families_page writes it into the page.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers.utils import logging as transformers_logging

from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.model.adapter_targets import without_adapter
from rosd_fast.model.layouts import choose_layout
from tests.families import FAMILIES, names, tiny

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by python -m tests.families_page -->\n", "<!-- end -->\n"
HEADER = (
    "| family | models | layers | layout | local engine | without adapter |\n" + "|---" * 6 + "|\n"
)
KINDS = {
    "full_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "chunks",
    "indexed_attention": "indexed",
    "compressed_sparse_attention": "compressed, indexed",
    "heavily_compressed_attention": "compressed",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "conv": "convolution",
    "hybrid": "full beside recurrent",
    "moe": "",
}
WITH_STATE = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")  # where no config names layers
WITH_ALIBI = ("bloom", "mpt")
VERSION = f"Written with transformers {transformers.__version__}.\n\n"


def layers(model: transformers.PreTrainedModel) -> str:
    """The kinds of a model's layers, as in "window, full, experts"."""
    config = model.config
    found = [KINDS[kind] for kind in getattr(config, "layer_types", None) or ()]
    if config.model_type in WITH_STATE:
        found = ["recurrent"]
    elif not found:
        found = ["window" if getattr(config, "sliding_window", None) else "full"]
        found += ["window"] if "local" in getattr(config, "attention_layers", ()) else []
    if getattr(config, "alibi", False) or config.model_type in WITH_ALIBI:
        found.append("ALiBi")
    if any("experts" in name for name, _ in model.named_parameters()):
        found.append("experts")
    return ", ".join(dict.fromkeys(kind for kind in found if kind))


def left_out(model: transformers.PreTrainedModel) -> str:
    """The linear layers that get no adapter, each by its own name and its owner's."""
    found = {
        "all that its blocks share" if "share" in reason else f"`{'.'.join(name.split('.')[-2:])}`"
        for name, reason in without_adapter(model).items()
    }
    return ", ".join(sorted(found))


def row(family: str) -> str:
    """The family's row of the table."""
    model = tiny(family, torch.float32)
    cells = [
        family,
        FAMILIES[family].known,
        layers(model),
        choose_layout(model),
        LocalEngine(model).way,
        left_out(model),
    ]
    return "| " + " | ".join(cells) + " |\n"


def rows(page: str) -> dict[str, str]:
    """The page's rows by family."""
    table = page.split(BEGIN)[1].split(END)[0]
    lines = table.partition(HEADER)[2].splitlines(keepends=True)
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def main() -> None:
    """Write the table of all families into the page."""
    transformers_logging.set_verbosity_error()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table = VERSION + HEADER + "".join(row(family) for family in names())
    PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
