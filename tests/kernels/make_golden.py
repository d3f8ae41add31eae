"""Write golden.json: small inputs and their results, computed in plain Python.

It uses neither torch nor rosd_kernels: the formulas are written independently, from the
definitions, in float64 with exactly rounded sums (`fsum`). Run it as
`python tests/kernels/make_golden.py`.

With `p` and `q` the probabilities of student and teacher over the vocabulary, or over the buckets
of `top_k` (the student's k likeliest entries, and one for the rest of either side):

    alpha   divergence   D                                       dD/ds_v
    0       forward_kl   KL(q, p)                                p_v - q_v
    0.5     jsd          1/2 KL(q, m) + 1/2 KL(p, m)             p_v/2 (log(p_v/m_v) - KL(p, m))
    1       reverse_kl   KL(p, q)                                p_v (log(p_v/q_v) - KL(p, q))

with `m = (p + q) / 2`; alpha is the name of the same choice in published code. An entry u of the
rest has the gradient of its bucket times `p_u / (sum of p over the rest)`. Logits are
`hidden . head_v + bias_v`; the loss is `sum_n weight_n D_n`, so that

    d/d hidden_n = w_n sum_v G_nv head_v,   d/d head_v = sum_n w_n G_nv hidden_n,

and `d/d bias_v = sum_n w_n G_nv`.
"""

from __future__ import annotations

import json
import random
from math import exp, fsum, log
from pathlib import Path

PATH = Path(__file__).with_name("golden.json")
N, V, H, HT, TOP_K = 3, 6, 2, 3, 2
ALPHAS = {"0": "forward_kl", "0.5": "jsd", "1": "reverse_kl"}

Vector = list[float]
Matrix = list[Vector]


def dot(a: Vector, b: Vector) -> float:
    return fsum(x * y for x, y in zip(a, b, strict=True))


def log_sum_exp(values: Vector) -> float:
    top = max(values)
    return top + log(fsum(exp(x - top) for x in values))


def kl(a: Vector, b: Vector) -> float:
    return fsum(x * log(x / y) for x, y in zip(a, b, strict=True))


def divergence(p: Vector, q: Vector, name: str) -> tuple[float, Vector]:
    """Return (D, dD/ds) for two distributions over entries or buckets."""
    if name == "forward_kl":
        return kl(q, p), [a - b for a, b in zip(p, q, strict=True)]
    if name == "reverse_kl":
        value = kl(p, q)
        return value, [a * (log(a / b) - value) for a, b in zip(p, q, strict=True)]
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    of_student = kl(p, m)
    gradient = [a / 2 * (log(a / c) - of_student) for a, c in zip(p, m, strict=True)]
    return fsum([kl(q, m) / 2, of_student / 2]), gradient


def token(s: Vector, z: Vector, name: str, top_k: int | None) -> tuple[float, Vector]:
    """Return (D, dD/ds over the vocabulary) for a token's logits."""
    p, q = ([exp(x - log_sum_exp(logits)) for x in logits] for logits in (s, z))
    if top_k is None:
        return divergence(p, q, name)
    kept = sorted(range(len(s)), key=lambda v: -s[v])[:top_k]
    rest = [v for v in range(len(s)) if v not in kept]
    merged_p, merged_q = ([*(x[v] for v in kept), fsum(x[v] for v in rest)] for x in (p, q))
    value, of_buckets = divergence(merged_p, merged_q, name)
    gradient = [0.0] * len(s)
    for place, v in enumerate(kept):
        gradient[v] = of_buckets[place]
    for v in rest:
        gradient[v] = of_buckets[-1] * p[v] / merged_p[-1]
    return value, gradient


def make_inputs() -> dict[str, Matrix | Vector]:
    """Numbers with two decimals, so that the file holds exactly the float64 that was used."""
    draw = random.Random(2605)

    def vector(size: int, spread: float) -> Vector:
        return [round(draw.uniform(-spread, spread), 2) for _ in range(size)]

    return {
        "student_hidden": [vector(H, 2) for _ in range(N)],
        "teacher_hidden": [vector(HT, 2) for _ in range(N)],
        "student_head": [vector(H, 2) for _ in range(V)],
        "teacher_head": [vector(HT, 2) for _ in range(V)],
        "student_bias": vector(V, 1),
        "teacher_bias": vector(V, 1),
        "weights": [0.25, 2.0, 0.75],
    }


def solve(inputs: dict, name: str, top_k: int | None) -> dict[str, float | Vector | Matrix]:
    """Loss, values per token, and gradients w.r.t. logits and the student's tensors."""
    hidden, head, weights = inputs["student_hidden"], inputs["student_head"], inputs["weights"]
    values, logit_gradients = [], []
    for n in range(N):
        s, z = (
            [
                fsum([dot(inputs[f"{side}_hidden"][n], row), bias])
                for row, bias in zip(inputs[f"{side}_head"], inputs[f"{side}_bias"], strict=True)
            ]
            for side in ("student", "teacher")
        )
        value, gradient = token(s, z, name, top_k)
        values.append(value)
        logit_gradients.append(gradient)
    scaled = [[w * g for g in row] for w, row in zip(weights, logit_gradients, strict=True)]
    columns = [list(column) for column in zip(*scaled, strict=True)]  # [V, N]
    return {
        "loss": dot(weights, values),
        "per_token": values,
        "logits": logit_gradients,
        "student_hidden": [
            [dot(row, [head[v][h] for v in range(V)]) for h in range(H)] for row in scaled
        ],
        "student_head": [
            [dot(column, [hidden[n][h] for n in range(N)]) for h in range(H)] for column in columns
        ],
        "student_bias": [fsum(column) for column in columns],
    }


def make() -> dict:
    inputs = make_inputs()
    cases = [
        {"alpha": alpha, "divergence": name, "top_k": top_k, **solve(inputs, name, top_k)}
        for alpha, name in ALPHAS.items()
        for top_k in (None, TOP_K)
    ]
    return {"inputs": inputs, "cases": cases}


def text() -> str:
    """Write the file; a number keeps all its digits."""
    return json.dumps(make(), indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
