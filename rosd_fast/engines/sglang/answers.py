"""A server's JSON answers, read without a Python object per token.

SGLang 0.5.23 has no compact form for the log-probabilities of sampled tokens: `return_flat_raw_*`
are about the most likely tokens, `output_token_sampling_logprobs` needs a finite top_k, and answers
are JSON whatever a request accepts. So each sampled token arrives as [log-probability, id, null],
about 40 bytes. Read as it stands that is one list per token, and most of the time goes to the
garbage collector, which looks for cycles among them; here all entries of a completion are one list.

`json` holds the interpreter's lock while it reads a string. One call per completion, a few
milliseconds, lets the event loop run in between when `read_json` runs in a thread.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

LOGPROBS = "output_token_logprobs"
BEGIN = re.compile(rb'"output_token_logprobs"\s*:\s*\[\s*\[')  # within a JSON string it has \"
END = re.compile(rb"\]\s*\]")
BRACKETS_AND_BLANKS = b"[] \t\r\n"
FIELDS = 3  # of an entry


def read_json(data: bytes) -> Any:
    """The value of a JSON text. Raises ValueError when it is not complete.

    `output_token_logprobs` of a completion becomes a list of its log-probabilities, NaN where the
    server writes null.
    """
    pieces: list[bytes] = []
    logprobs: list[list[float]] = []
    place = 0
    while (begin := BEGIN.search(data, place)) and (end := END.search(data, begin.end())):
        entries = data[begin.end() : end.start()].translate(None, BRACKETS_AND_BLANKS)
        values = json.loads(b"[" + entries + b"]")[::FIELDS]
        if None in values:
            values = [math.nan if value is None else value for value in values]
        pieces += [data[place : begin.start()], b'"output_token_logprobs":%d' % len(logprobs)]
        logprobs.append(values)
        place = end.end()
    value = json.loads(b"".join([*pieces, data[place:]]))
    for item in value if isinstance(value, list) else [value]:
        meta = item.get("meta_info", {}) if isinstance(item, dict) else {}
        if isinstance(index := meta.get(LOGPROBS), int):  # an empty list stays as it is
            meta[LOGPROBS] = logprobs[index]
    return value
