"""A wrong scale of the autoencoder is found on the first pictures."""

from dataclasses import replace

import pytest

from dcgen_convert import conversion
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Run
from dcgen_convert.data import buckets, contents, images
from dcgen_convert.networks import autoencoders
from dcgen_convert.stages import latents
from dcgen_convert.stages.job import prepare


def test_a_wrong_scale_is_found_before_all_pictures_are_encoded(converted, tmp_path, monkeypatch):
    """Measured on EARLY pictures of enough; not where few are left, and not where the latents were begun."""
    job = prepare(conversion.recorded(converted / "run")[0], Run(converted / "run", NULL), NULL)
    pictures = images.read_index(job.folders.latents / images.ROWS, job.pictures_root)
    spans = buckets.whole(len(pictures), job.resolution)
    wrong = autoencoders.load(job.ae.folder, scale=50 * autoencoders.load(job.ae.folder).scale)
    read, original = [], contents.read
    monkeypatch.setattr(contents, "read", lambda file, *how: read.append(file) or original(file, *how))
    latents.check_early(job, pictures, wrong, spans)  # the run has its latents
    job = replace(job, run=Run(tmp_path, NULL))
    latents.check_early(job, pictures, wrong, spans)  # EARLY is more than half of them
    assert not read
    monkeypatch.setattr(latents, "EARLY", 8)
    with pytest.raises(InputError, match=r"measured .* \(1/RMS\) on the first 8 pictures beyond") as caught:
        latents.check_early(job, pictures, wrong, spans)
    assert len(read) == 8 and "latents.scale_override" in caught.value.hint
    latents.check_early(job, pictures, autoencoders.load(job.ae.folder), spans)
