"""What the functions of the API return. `document` of a result is what the same verb prints with `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Result:
    """A result: `status` says how the work ended, the other fields say what came out."""

    SCHEMA: ClassVar[str] = "dcgen.result/1"

    status: str = field(default="done", kw_only=True)

    def document(self) -> dict[str, Any]:
        """The result as plain data, with the name of its schema."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"schema": self.SCHEMA, **{key: _plain(value) for key, value in found.items()}}


@dataclass(frozen=True)
class Plan(Result):
    """What a conversion will cost. status: "feasible" or "infeasible"; `problems` says why it cannot run.

    Sizes are in bytes, but memory is in GiB. `time["wall_hours"]` and `time["gpu_hours"]` are estimates, with a range
    and with a row for each stage; `time["basis"]` names their basis.
    budget: "gpu_hours" and "hours" that may be spent (0: no limit), and "derivation": what follows from them, and why.
    settings: dotted key -> {"value", "origin"}. exit_code: that of the command: 0, 2 or 4.
    licences: what is known of the terms of each source; None: unknown.
    alignment: what the first layer is fitted to ("target"), at which "resolution", at which "side" in px the base sees
    the pictures for it, and the "reason".
    """

    SCHEMA: ClassVar[str] = "dcgen.plan/2"

    problems: list[str]
    exit_code: int
    notes: list[str]
    source: dict[str, Any]
    licences: list[dict[str, Any]]
    autoencoder: dict[str, Any]
    tokens: list[dict[str, Any]]
    alignment: dict[str, Any]
    speedup: dict[str, Any]
    speedup_paper: dict[str, Any] | None
    training: dict[str, Any]
    memory: dict[str, Any]
    quantization: dict[str, Any] | None
    disk: dict[str, Any]
    downloads: list[dict[str, Any]]
    time: dict[str, Any]
    budget: dict[str, Any]
    settings: dict[str, dict[str, Any]]

    @property
    def feasible(self) -> bool:
        return self.status == "feasible"

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Plan:
        return cls(**{key: value for key, value in document.items() if key != "schema"})


@dataclass(frozen=True)
class Conversion(Result):
    """What a conversion has made. status: "done", or "stopped" when `until` ended it before the last stage.

    bundle, metrics: folder, and what the last stage measured; None when it stopped.
    run: the run folder. stages: name, seconds and metrics of every stage. url: where `--push-to` uploaded it.
    """

    bundle: Path | None
    run: Path
    stages: list[dict[str, Any]]
    metrics: dict[str, Any] | None
    url: str | None = None

    def document(self) -> dict[str, Any]:
        return {key: value for key, value in super().document().items() if value is not None}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Conversion:
        bundle = document.get("bundle")
        return cls(
            Path(bundle) if bundle else None,
            Path(document["run"]),
            document["stages"],
            document.get("metrics"),
            status=document["status"],
        )


@dataclass(frozen=True)
class Rehearsed(Result):
    """What a rehearsal measured, and what the real run will take by it.

    file: where this document is kept, for `plan --measured`. run, bundle: what the rehearsal made. random: whether its
    weights were. conversion: settings that the real run has in common with it; recipe: what it ran. device, ranks, gpu,
    memory: the machine, whether it has GPUs, and the bytes that each rank could train in. stages: "seconds", "rest",
    "work" (kind -> count and seconds_each) and "peak" (bytes of "host" and "gpu"). time: the bill, as in `Plan`.
    """

    SCHEMA: ClassVar[str] = "dcgen.rehearsal/1"

    file: Path
    run: Path
    bundle: Path
    random: bool
    conversion: dict[str, Any]
    recipe: dict[str, Any]
    device: str
    ranks: int
    gpu: bool
    memory: float
    stages: list[dict[str, Any]]
    time: dict[str, Any]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Rehearsed:
        values = {key: value for key, value in document.items() if key != "schema"}
        return cls(**values | {key: Path(values[key]) for key in ("file", "run", "bundle")})

    def text(self) -> str:
        """The figures and the bill, for people."""
        from dcgen_convert.planning import rehearsal
        from dcgen_convert.planning.text import bill_lines

        lines = [f"rehearsed on {self.ranks} x {self.device}:", *rehearsal.table(self.stages), ""]
        return "\n".join([*lines, *bill_lines(self.time), f"{self.file} keeps these figures for plan --measured"])


@dataclass(frozen=True)
class Quantised(Result):
    """What `quantize` has made: the bundle folder, figures of the whole model, the checks that it passed, and one
    record per linear.
    """

    bundle: Path
    metrics: dict[str, Any]
    checks: list[str]
    layers: list[dict[str, Any]]


@dataclass(frozen=True)
class Adopted(Result):
    """What `adopt` has made: the bundle folder, what is known of the model, and the checks that it passed.

    adopted: "pipeline" (class that the folder names), "factor", "channels", "scaling_factor", "side" in px, "shift"
    (rule), "r" (its value at that size), "origin" of both, and "left_out".
    """

    bundle: Path
    adopted: dict[str, Any]
    checks: list[str]


@dataclass(frozen=True)
class Exported(Result):
    """A bundle as the files of another program.

    to: the program. weights: the format that was asked for. transformer, autoencoder: the files. bytes: of both.
    tensors: how many each file holds. linears: how many have each rounded format; all else is bfloat16. weight_error:
    for each of these formats the root of sum (w - Q(w))^2 over sum w^2. notes: what a user must know of the weights.
    """

    SCHEMA: ClassVar[str] = "dcgen.export/1"

    bundle: Path
    to: str
    weights: str
    transformer: Path
    autoencoder: Path
    bytes: int
    tensors: dict[str, int]
    linears: dict[str, int]
    weight_error: dict[str, float]
    notes: list[str]


@dataclass(frozen=True)
class Signed(Result):
    """A bundle with a signature: the file that holds it, and how many files it covers."""

    bundle: Path
    signature: Path
    files: int


@dataclass(frozen=True)
class Verdict(Result):
    """A bundle passed its checks (a difference raises `CheckFailed` instead).

    signed_by: whose signature it has; None: nobody asked. files: how many. tensors: "total", and how many are
    "identical" to the base model's. picture: what a fresh process drew: its size in px, runtime, mean and standard
    deviation.
    """

    ok: bool
    bundle: Path
    signed_by: str | None
    checks: list[str]
    files: int
    tensors: dict[str, int]
    picture: dict[str, Any] | None


@dataclass(frozen=True)
class Pictures(Result):
    """Pictures that were drawn: images (PNG files; of videos .mp4), prompts and seeds in the same order, and the
    settings used.

    height, width: px. runtime: "stock", "dequantised" or "emulated". seconds: for all pictures.
    """

    images: list[Path]
    prompts: list[str]
    seeds: list[int]
    runtime: str
    height: int
    width: int
    steps: int
    guidance: float
    seconds: float


@dataclass(frozen=True)
class Served(Result):
    """A page that answers at ``address``, on this machine only, until `close` or the end of the process.

    status: "running". base: name of the model that draws beside the bundle; None: ``without`` says why there is none.
    """

    bundle: Path
    address: str
    base: str | None
    without: str
    page: Any = field(repr=False, compare=False)

    def wait(self) -> None:
        """Until the page is closed, or Ctrl-C."""
        self.page.wait()

    def close(self) -> None:
        """End the page."""
        self.page.close()

    def document(self) -> dict[str, Any]:
        return {key: value for key, value in super().document().items() if key != "page"}


@dataclass(frozen=True)
class Evaluation(Result):
    """What an evaluation measured. It is what evaluation.json holds.

    base: the model that was compared with; None: the bundle was judged alone. prompts: what they are, in words; count,
    seed: how many, and the seed of the first picture. models: how each drew, with the "width" of pictures that are no
    squares. sides: height in px of the pictures, and at which they were "measured". jpeg: whether they went through
    JPEG. reference: "name" and "count". weights: of the measures. measures: one row each, see `evaluation.rows`.
    values: the figures by the names that gates have. left_out: measure -> why. gates: each with its "value" and
    "passed". pictures: set -> "folder", and how many were "drawn" now.
    """

    SCHEMA: ClassVar[str] = "dcgen.evaluation/1"

    bundle: Path
    base: str | None
    prompts: str
    count: int
    seed: int
    models: dict[str, Any]
    sides: dict[str, int]
    jpeg: bool
    reference: dict[str, Any] | None
    weights: dict[str, str]
    measures: list[dict[str, Any]]
    values: dict[str, float]
    left_out: dict[str, str]
    gates: list[dict[str, Any]]
    notes: list[str]
    pictures: dict[str, Any]
    evaluation: Path

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Evaluation:
        values = {key: value for key, value in document.items() if key != "schema"}
        return cls(**values | {key: Path(values[key]) for key in ("bundle", "evaluation")})


@dataclass(frozen=True)
class Benchmarked(Result):
    """How fast a base and its conversion are on one machine.

    source: what was asked for. base: name of the base. models: by name ("base", "converted", a 4-bit format) the
    latent space ("factor", "channels", "patch"), "parameters" and "bytes" of the network, and its "runtime".
    random: whether the base had random weights. notes: what a reader of the figures must know.
    sizes: for each "resolution" in px (of videos with "height", "width" and "frames") the "tokens" and their "ratio",
    the "passes" of the network for a picture, the "rows", their "ratios" (base over model, per picture), and
    "pictures_per_minute". A row ("text", "image", "encode", "step", "step, largest batch", "decode", "picture"; those
    that the model has) has for each model the median "seconds", the "low" and the "high" of its "rounds", how many went
    before as "warm_up", the "batch", and the "peak_bytes": weights and all that the work takes beside them; None where
    nothing tells. The "basis" of a picture is "measured" or "sum of its parts".
    """

    SCHEMA: ClassVar[str] = "dcgen.benchmark/1"

    source: str
    family: str
    base: str
    models: dict[str, dict[str, Any]]
    random: bool
    steps: int
    guidance: float
    dtype: str
    attention: str
    compiled: bool
    device: str
    gpu: bool
    torch: str
    diffusers: str
    notes: list[str]
    sizes: list[dict[str, Any]]

    def text(self) -> str:
        """The figures, for people."""
        from dcgen_convert.judging import speed_text

        return speed_text.table(self.document())


@dataclass(frozen=True)
class Inspection(Result):
    """What a file or folder is.

    kind: "bundle", "pipeline", "component", "checkpoint", "lora", "autoencoder" or "unknown".
    family: name of the model's family, None when it is not known.
    facts: all else that is known of this kind: "tensors", "licences", "runs_on"; of most also "quantisation", "bytes".
    Of a model with several networks these count all, and "networks" has the "tensors" and "bytes" of each by its name.
    """

    SCHEMA: ClassVar[str] = "dcgen.inspection/1"

    path: Path
    kind: str
    family: str | None
    facts: dict[str, Any]

    def document(self) -> dict[str, Any]:
        found = super().document()
        facts = found.pop("facts")
        return {**found, **facts}


@dataclass(frozen=True)
class Runs(Result):
    """The run folders that were found, oldest first.

    runs: of each its "run" (folder), "state" ("running", "finished" or "stopped"), "stages" that are done, "bytes", and
    "age" in seconds since a file of it was last written.
    """

    SCHEMA: ClassVar[str] = "dcgen.runs/1"

    runs: list[dict[str, Any]]


@dataclass(frozen=True)
class Cleaned(Result):
    """What a run folder holds. status: "done" when files were removed, "planned" when they only would be.

    parts: of each its "stage" ("": none), what it "holds", "files" and "bytes", the stages that it is "needed_by", its
    other "use", and whether it is "removed". bytes: of all. freed: bytes that the disk gets back.
    """

    SCHEMA: ClassVar[str] = "dcgen.clean/1"

    run: Path
    keep: str
    bytes: int
    freed: int
    parts: list[dict[str, Any]]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value
