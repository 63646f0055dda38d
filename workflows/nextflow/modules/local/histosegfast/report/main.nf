process HISTOSEGFAST_REPORT {
    tag "${meta.id}"
    label 'process_low'

    container 'histoseg-fast:0.1.0-cpu'

    input:
    tuple val(meta), path(run, stageAs: 'all')

    output:
    tuple val(meta), path('report.html'), emit: html
    path 'versions.yml'                 , emit: versions

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    """
    histoseg-fast report \\
        ${args} \\
        -o report.html \\
        all

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        histoseg-fast: \$(histoseg-fast --version | sed 's/^histoseg-fast //')
    END_VERSIONS
    """

    stub:
    """
    touch report.html

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        histoseg-fast: \$(histoseg-fast --version | sed 's/^histoseg-fast //')
    END_VERSIONS
    """
}
