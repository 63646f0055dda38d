#!/usr/bin/env nextflow
// Segment a folder of images in shards, join them, and write the report:
//     nextflow run workflows/nextflow/main.nf -profile docker --images study --shards 8 --outdir results

include { HISTOSEGFAST_INFER  } from './modules/local/histosegfast/infer/main'
include { HISTOSEGFAST_MERGE  } from './modules/local/histosegfast/merge/main'
include { HISTOSEGFAST_REPORT } from './modules/local/histosegfast/report/main'

workflow {
    if (!params.images) {
        error "--images FOLDER is missing"
    }
    def shards = params.shards as int
    def images = file(params.images, type: 'dir', glob: false, checkIfExists: true)
    def plan = params.plan ? file(params.plan, glob: false, checkIfExists: true) : []

    def ch_shards = channel.of(1..shards).map { shard -> [[id: images.name], images, shard, shards] }
    HISTOSEGFAST_INFER(ch_shards, plan)
    HISTOSEGFAST_MERGE(HISTOSEGFAST_INFER.out.shard.groupTuple(size: shards))
    HISTOSEGFAST_REPORT(HISTOSEGFAST_MERGE.out.run)
}
