"""Stage `import`: a source that is no pipeline folder yet is written as one."""

from __future__ import annotations

from dcgen_convert.checkpoint.imported import Imported
from dcgen_convert.core.journal import Stage
from dcgen_convert.stages.job import Job


def run(job: Job, stage: Stage) -> None:
    """Writes the source as a pipeline folder."""
    assert isinstance(job.source, Imported), "only such a source has this stage"
    stage.metrics.update(job.source.lay_out(job.console))
