"""The quickstart: a tiny language model and problems of which it solves about half.

`MODEL_DIR` has model and tokenizer in Hugging Face layout; `tasks` draws the problems. The program
that built the model is in scripts/quickstart of the repository.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
QUICKSTART = "quickstart:"  # prefix of the names of splits, as in quickstart:dev
