#!/usr/bin/env bash
# A Ray cluster of several nodes with an MLflow server beside it, on this machine, on loopback and behind a token:
#   cluster/local.sh up [--num-nodes 2] | status | add | down
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
python="$here/.venv/bin/python"
[ -x "$python" ] || python=python
exec "$python" "$here/cluster/local.py" "$@"
