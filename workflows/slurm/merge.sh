#!/usr/bin/env bash
# Join the shards in OUT/shards to OUT/all and write its report: merge.sh SHARDS OUT; see submit.sh.
#SBATCH --job-name=histoseg-merge
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=4G
#SBATCH --time=01:00:00
set -euo pipefail

shards=$1 out=$2
code=0
histoseg-fast merge -o "$out/all" -- "$out"/shards/*-of-"$shards" || code=$?
# 3: some images failed, or a shard is missing; there is still something to report.
if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then
    exit "$code"
fi
histoseg-fast report -- "$out/all"
exit "$code"
