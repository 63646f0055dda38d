#!/usr/bin/env bash
# One shard: infer_array.sh SHARDS IMAGES OUT [options of infer]; see submit.sh.
#SBATCH --job-name=histoseg-infer
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=4G
#SBATCH --time=04:00:00
# At the end of its time infer gets two minutes to finish what is in flight; submitted again, it goes on from there.
#SBATCH --signal=B:TERM@120
set -euo pipefail

shards=$1 images=$2 out=$3
shift 3

# exec: SLURM's signals, and infer's exit code, without a shell in between.
exec histoseg-fast infer --shard "$SLURM_ARRAY_TASK_ID/$shards" --threads "${SLURM_CPUS_PER_TASK:-0}" \
    --out "$out/shards/$SLURM_ARRAY_TASK_ID-of-$shards" "$@" -- "$images"
