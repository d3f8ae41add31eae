"""A worker of a stage: items in, rows out, one line of JSON each.

    python -m day_one.worker STAGE DEVICE

What a library prints goes to stderr. The process ends after an item that failed: a fault on a GPU
would spoil all later ones.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    stage_name, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from day_one.stage import load_stage

    stage = load_stage(stage_name)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            answer["rows"] = stage.handle(request["key"], request["args"], device)
        except Exception as error:
            traceback.print_exc()
            answer["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            break
    answers.close()
    os._exit(0)  # a spoiled CUDA context may hang in its destructors


if __name__ == "__main__":
    main()
