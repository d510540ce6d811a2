"""Stage `import`: a source that is no pipeline folder as it stands is written as one."""

from __future__ import annotations


def run(job, stage) -> None:
    """Stage `import`: the source as a pipeline folder."""
    stage.metrics.update(job.source.lay_out(job.console))
