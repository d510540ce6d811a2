"""dcgen-convert: move a trained latent diffusion transformer into a deep-compression autoencoder's latent space
(DC-Gen).

    import dcgen_convert

    made = dcgen_convert.convert("flux-krea", ae="dc-ae-f64", quantize="nvfp4")
    dcgen_convert.sample(made.bundle, "a red fox in the snow")

Every name of `__all__` is imported when it is first used: `import dcgen_convert` alone does no work and needs no torch.
The functions stand in `dcgen_convert.api.calls`, what they return in `dcgen_convert.api.results`.
"""

from __future__ import annotations

from dcgen_convert.core.version import __version__

TYPE_CHECKING = False  # typing is not imported for it: the command must hear signals soon after its start
if TYPE_CHECKING:
    from dcgen_convert.api.benchmarking import benchmark
    from dcgen_convert.api.calls import adopt, clean, convert, inspect, plan, quantize, resume, runs, sample, verify
    from dcgen_convert.api.evaluating import evaluate
    from dcgen_convert.api.exporting import export
    from dcgen_convert.api.rehearsing import rehearse
    from dcgen_convert.api.results import (
        Adopted,
        Benchmarked,
        Cleaned,
        Conversion,
        Evaluation,
        Exported,
        Inspection,
        Pictures,
        Plan,
        Quantised,
        Rehearsed,
        Runs,
        Served,
        Signed,
        Verdict,
    )
    from dcgen_convert.api.serving import serve
    from dcgen_convert.api.signing import sign
    from dcgen_convert.core.errors import (
        AccessError,
        CheckFailed,
        DcgenError,
        InputError,
        InternalError,
        RankLost,
        RecipeError,
        ResourceError,
    )

__all__ = [
    "AccessError",
    "Adopted",
    "Benchmarked",
    "CheckFailed",
    "Cleaned",
    "Conversion",
    "DcgenError",
    "Evaluation",
    "Exported",
    "InputError",
    "Inspection",
    "InternalError",
    "Pictures",
    "Plan",
    "Quantised",
    "RankLost",
    "RecipeError",
    "Rehearsed",
    "ResourceError",
    "Runs",
    "Served",
    "Signed",
    "Verdict",
    "__version__",
    "adopt",
    "benchmark",
    "clean",
    "convert",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "quantize",
    "rehearse",
    "resume",
    "runs",
    "sample",
    "serve",
    "sign",
    "verify",
]

_HOMES = (
    "api.calls",
    "api.evaluating",
    "api.benchmarking",
    "api.exporting",
    "api.rehearsing",
    "api.serving",
    "api.signing",
    "api.results",
    "core.errors",
)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name in __all__:
        from importlib import import_module

        for home in _HOMES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
