#!/usr/bin/env bash
# Submit the entropy sweep: the array of runs, and the report that starts when all of them have ended.
#   bash examples/slurm/entropy-sweep.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
array=$(sbatch --parsable examples/slurm/entropy-sweep.sbatch "$@")
report=$(sbatch --parsable --dependency="afterany:$array" examples/slurm/entropy-sweep-report.sbatch)
echo "$array $report"
