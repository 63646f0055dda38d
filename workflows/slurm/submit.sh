#!/usr/bin/env bash
# Segment IMAGES on a SLURM cluster: an array of shards, then a job that merges them and writes the report.
#
#     workflows/slurm/submit.sh SHARDS IMAGES OUT [options of infer]
#     workflows/slurm/submit.sh 16 /data/study /data/study-out --engine fast --precision int8 --overlay
#
# Name --precision: `auto` may choose differently on different nodes, and such shards cannot be merged. Change
# processors, memory and time in the head of infer_array.sh, or by sbatch's variables (SBATCH_PARTITION, ...).
# A shard that was lost, here the third, goes on where it stopped, and then the merge runs again:
#
#     sbatch --array=3 workflows/slurm/infer_array.sh 16 /data/study /data/study-out --engine fast --precision int8
#     sbatch workflows/slurm/merge.sh 16 /data/study-out
set -euo pipefail

if [ "$#" -lt 3 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: submit.sh SHARDS IMAGES OUT [options of infer]" >&2
    exit 2
fi
shards=$1 out=$3
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
mkdir -p -- "$out"

array=$(sbatch --parsable --array="1-$shards" "$here/infer_array.sh" "$@")
array=${array%%;*} # on a cluster of several, its name follows
# afterany: what is done is merged also where a shard was lost; the job's exit code is then 3 or 1.
merge=$(sbatch --parsable --dependency="afterany:$array" "$here/merge.sh" "$shards" "$out")
echo "shards: job $array; merge and report: job ${merge%%;*}"
