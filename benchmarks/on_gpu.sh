#!/usr/bin/env bash
# Checks one GPU in one call of at most 9 minutes, without a network: benchmarks/on_gpu.sh OUT [--dry-run]
set -u
cd "$(dirname "$0")/.."
exec python3 benchmarks/on_gpu.py "$@"
