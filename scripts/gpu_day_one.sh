#!/usr/bin/env bash
# What a bare machine with one GPU can show of this project in ten minutes, without a network.
#
#     scripts/gpu_day_one.sh --wheels FOLDER [--out day_one] [--minutes 10] [--device cuda|cpu] [--only STAGE ...]
#
# Python (3.11 or newer), torch and Triton are the machine's; set PYTHON to choose one. What else is
# missing comes from FOLDER (scripts/gpu_wheels.sh) into a side folder in --out; nothing else is
# touched. Start it again to go on where it ended. docs/gpu.md says what it writes.
set -euo pipefail

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_day_one: no ${PYTHON:-python3}; set PYTHON" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { echo "gpu_day_one: $python is older than 3.11; set PYTHON to a newer one that has torch" >&2; exit 2; }
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$tree/scripts:$tree${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m day_one.main "$@"
