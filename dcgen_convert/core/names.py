"""Names of files that more than one room reads or writes. A name that only one room needs stands in that room."""

RECIPE = "recipe.json"  # in a run folder: the settings that the run was started with
RUN_HINT = "`dcgen-convert runs` lists the run folders in ./runs; another one is the folder that --run-dir named"
REHEARSAL = "rehearsal.json"  # in the run folder of a rehearsal: what it measured
OPEN = "open.json"  # in a run folder: the stages that may still have to run
TRANSFORMER = "transformer"  # of a stage, a source or a bundle: the folder of the network
LOCK = "lock"  # in a run folder: held by the process that works there
MANIFEST = "dcgen_manifest.json"  # in a bundle: what it holds and what it was made from
SIGNATURE = "model.sig"  # in a bundle: who vouches for it; it covers every other file
MODULES = "modules.safetensors"  # whole tensors of the embedder and the head under the network's own names, float32
LORA = "pytorch_lora_weights.safetensors"  # the name that a stock pipeline's load_lora_weights(folder) looks for
RECORDS = "quantization.json"  # beside 4-bit weights: the record of every layer; written last, so the folder is whole
EXPORT = "export"  # of a phase: the folder of the trained weights
CHECKPOINTS = "checkpoints"  # of a training: the folder of its checkpoints
LORA_START = "lora-start.safetensors"  # in the checkpoints of the first phase: where its LoRA begins
METRICS = "metrics.jsonl"  # of a training: the figures of every step
BEFORE = "evaluation-before.json"  # of a phase: the held-out loss before its first step
EVALUATIONS = "evaluations.jsonl"  # of a phase: the held-out loss on the way
MEASURES = "measures.jsonl"  # of a phase: what the measures said of its sample grids
TRAINING = "training"  # of stage align-head: the folder of its training


def of_set(stage: str, number: int) -> str:
    """Name of stage "data" or "latents" of a set of pictures: "data" of set 0, "data-2" of the one of phase 2."""
    return f"{stage}-{number}" if number else stage
