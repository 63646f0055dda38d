process HISTOSEGFAST_MERGE {
    tag "${meta.id}"
    label 'process_low'

    container 'histoseg-fast:0.1.0-cpu'

    input:
    tuple val(meta), path(shards, stageAs: 'shards/?/*')

    output:
    tuple val(meta), path('all', type: 'dir')  , emit: run
    tuple val(meta), path('all/summary.csv')   , emit: summary
    path 'versions.yml'                        , emit: versions

    when:
    task.ext.when == null || task.ext.when

    // Exit code 3 says that some images failed, or that shards are missing; the log and the report name them.
    script:
    def args = task.ext.args ?: ''
    """
    histoseg-fast merge \\
        ${args} \\
        -o all \\
        shards/*/shard || [ \$? -eq 3 ]

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        histoseg-fast: \$(histoseg-fast --version | sed 's/^histoseg-fast //')
    END_VERSIONS
    """

    stub:
    """
    mkdir -p all/masks
    touch all/manifest.jsonl all/summary.csv all/run.json

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        histoseg-fast: \$(histoseg-fast --version | sed 's/^histoseg-fast //')
    END_VERSIONS
    """
}
