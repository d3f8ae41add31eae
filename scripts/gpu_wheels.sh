#!/usr/bin/env bash
# The folder that scripts/gpu_day_one.sh needs on a machine without a network: source and wheels.
#
#     scripts/gpu_wheels.sh [FOLDER] [--python 3.11 3.12] [--max-mb 60]        default: wheels
#
# It needs a network, git and pip. docs/gpu.md has the rest.
set -euo pipefail

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$tree/.venv/bin/python}
[ -x "$python" ] || python=$(command -v "${PYTHON:-python3}") || { echo "gpu_wheels: no python3; set PYTHON" >&2; exit 2; }
PYTHONPATH="$tree/scripts" exec "$python" -m day_one.wheels "$@"
