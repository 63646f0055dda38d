process HISTOSEGFAST_INFER {
    tag "${meta.id}, shard ${shard} of ${shards}"
    label 'process_medium'

    container 'histoseg-fast:0.1.0-cpu'

    // Names of the user's files never enter the script: they are staged under names of our own.
    input:
    tuple val(meta), path(images, stageAs: 'images'), val(shard), val(shards)
    path plan, stageAs: 'model.plan'

    output:
    tuple val(meta), path('shard', type: 'dir'), emit: shard
    path 'versions.yml'                        , emit: versions

    when:
    task.ext.when == null || task.ext.when

    // Exit code 3 says that some images failed: the others are done, and the report names those.
    script:
    def args = task.ext.args ?: ''
    def engine = plan ? '--engine model.plan' : ''
    """
    histoseg-fast infer \\
        --shard ${shard as int}/${shards as int} \\
        --threads ${task.cpus} \\
        --out shard \\
        ${engine} \\
        ${args} \\
        images || [ \$? -eq 3 ]

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        histoseg-fast: \$(histoseg-fast --version | sed 's/^histoseg-fast //')
    END_VERSIONS
    """

    stub:
    """
    mkdir -p shard/masks
    touch shard/manifest.jsonl shard/summary.csv shard/run.json

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        histoseg-fast: \$(histoseg-fast --version | sed 's/^histoseg-fast //')
    END_VERSIONS
    """
}
