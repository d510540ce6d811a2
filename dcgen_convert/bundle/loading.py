"""Loading a bundle as a ready stock pipeline, on any machine.

A quantised bundle runs in one of three ways ("runtime"):
    stock        stock diffusers with the 4-bit kernels, where GPU and packages allow it; every dense bundle. In the
                 form `bfl` it runs anywhere: without the kernels it multiplies the weights out in each forward
    dequantised  4-bit weights multiplied out, 16 or 32 bit activations: any machine, the memory of a dense model
    emulated     4-bit weights and 4-bit activations, computed as the kernels do: any machine, slow
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dcgen_convert import families
from dcgen_convert.bundle.layout import read_index
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.components import plan_copy
from dcgen_convert.checkpoint.shards import STEM
from dcgen_convert.core import names
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.files import read_json
from dcgen_convert.families.base import Family
from dcgen_convert.networks import processors
from dcgen_convert.networks.parts import check as check_parts
from dcgen_convert.networks.pipelines import placed, quiet_diffusers
from dcgen_convert.svdquant import forms

if TYPE_CHECKING:
    import torch

RUNTIMES = ("auto", "stock", "dequantised", "emulated")
LARGE = 8 << 30  # bytes of transformer weights from which a CPU keeps them in bfloat16


def load(
    bundle: Path,
    dtype: torch.dtype | None = None,
    runtime: str = "auto",
    device: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, str]:
    """(pipeline, runtime used).

    The bundle's own Python does not run: an in-bundle adapter is loaded with this program's class, other code is
    refused.

    Args:
        bundle: bundle folder, either layout.
        dtype: torch dtype of the weights; None: bfloat16 on a GPU and for models above 8 GiB, else float32.
        runtime: "auto" takes stock where it runs, else dequantised.
        device: None: the GPU if there is one.
        trust_remote_code: run the Python files that come with the bundle.

    Raises:
        InputError: not a bundle, foreign code, weights as a pickle, a text encoder that would be random, or a runtime
            that does not exist or does not apply.
        ResourceError: "stock" asked for a quantised bundle that this machine cannot run; the message says why.
    """
    import torch
    from diffusers import DiffusionPipeline

    bundle = Path(bundle)
    index, family = read_index(bundle), family_of(bundle)
    if not trust_remote_code:
        trust.require(bundle, index)
    for name in trust.components(index):
        plan_copy(bundle / name)  # refuses pickles
    check_parts(bundle, index)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or default_dtype(bundle, device)
    runtime = choose_runtime(bundle, runtime, dtype)
    parts: dict[str, Any] = {}
    if runtime == "dequantised":
        from dcgen_convert.svdquant.runtime import load_dequantised

        parts[family.component] = load_dequantised(families.network_folder(bundle), dtype)
    elif runtime == "emulated":
        from dcgen_convert.svdquant.runtime import emulate

        parts[family.component] = emulate(families.network_folder(bundle), dtype)
    elif is_plain(bundle):
        parts[family.component] = plain_network(families.network_folder(bundle), family, dtype)
    options = dict(dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True, use_safetensors=True)
    kind = index["_class_name"]
    own: AbstractContextManager[dict[str, Any]] = nullcontext({})
    if not trust_remote_code:
        own = adapter_part(bundle, index, dtype)
    with quiet_diffusers(), own as vae:
        if isinstance(kind, list) or kind in family.pipelines:
            parts |= {**vae, **processors.without_torchvision(bundle, index)}
            pipeline = DiffusionPipeline.from_pretrained(bundle, **parts, **options)
        else:
            pipeline = _official(bundle, family, parts, options)
    pipeline.vae.eval()  # "in" and "mix" decoders hold BatchNorm
    if (bundle / names.LORA).is_file():
        pipeline.load_lora_weights(bundle, weight_name=names.LORA, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return placed(pipeline, device), runtime


@contextmanager
def adapter_part(root: Path, index: Mapping[str, Any], dtype: Any) -> Iterator[dict[str, Any]]:
    """{"vae": this program's adapter} for a pipeline folder whose index names it, else {}; for `from_pretrained`."""
    if not trust.is_adapter(index.get("vae")):
        yield {}
        return
    name = index["vae"][0]
    with own_adapter(name):
        yield {"vae": _loaded(_class(name), root / "vae", dtype)}


@contextmanager
def own_adapter(name: str) -> Iterator[None]:
    """Let this program's adapter stand for the module ``name`` of model_index.json.

    diffusers compares a part that it is given with the class in model_index.json, and looks that class up in the
    modules that are already imported.
    """
    from diffusers import ModelMixin

    module = ModuleType(name)
    vars(module).update({trust.class_of(name): _class(name), "ModelMixin": ModelMixin})
    former = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if former is not None:
            sys.modules[name] = former


def family_of(bundle: Path) -> Family:
    """Family by the transformer's class; InputError when no family claims it."""
    return families.family_of(transformer_config(bundle), bundle, read_index(bundle))


def transformer_config(bundle: Path) -> dict[str, Any]:
    """config.json of a bundle's network."""
    read_index(bundle)
    path = families.network_folder(bundle) / "config.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist", "give a bundle folder")
    config: dict[str, Any] = read_json(path)
    return config


def formats_of_bundle(bundle: Path) -> dict[str, str]:
    """Module path -> format of the 4-bit linears of the bundle's transformer; empty for a dense one."""
    transformer_config(bundle)
    return forms.formats_of(families.network_folder(bundle))


def is_quantised(bundle: Path) -> bool:
    """Whether the bundle's transformer holds 4-bit linears."""
    return bool(formats_of_bundle(bundle))


def is_plain(bundle: Path) -> bool:
    """Whether its 4-bit linears are plain NVFP4, in diffusers' form `bfl`."""
    return forms.is_plain(transformer_config(bundle))


def choose_runtime(bundle: Path, runtime: str, dtype: torch.dtype) -> str:
    """One of "stock", "dequantised", "emulated"."""
    if runtime not in RUNTIMES:
        raise InputError(f"runtime {runtime!r} does not exist", f"choose one of {', '.join(RUNTIMES)}")
    if not is_quantised(bundle):
        if runtime in ("dequantised", "emulated"):
            raise InputError(
                f"{bundle} is not quantised, so there is nothing to run {runtime}", "leave the runtime at auto"
            )
        return "stock"
    reason = why_no_kernels(bundle, dtype)
    if runtime == "stock" and reason and not is_plain(bundle):  # that one runs anywhere, without the kernels
        raise ResourceError(
            f"{bundle} cannot run on its 4-bit kernels here: {reason}", "leave the runtime at auto, which dequantises"
        )
    return runtime if runtime != "auto" else "dequantised" if reason else "stock"


def why_no_kernels(bundle: Path, dtype: torch.dtype) -> str:
    """Why diffusers cannot run the bundle's 4-bit kernels on this machine; empty when it can."""
    import torch

    nvfp4 = "nvfp4" in formats_of_bundle(bundle).values()
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if is_plain(bundle):
        if capability < (10, 0):
            return f"FlashInfer's NVFP4 needs compute capability 10.0, this GPU has {capability[0]}.{capability[1]}"
        return "" if find_spec("flashinfer") else "the package `flashinfer-python` is not installed"
    # The NVFP4 kernels are compiled for consumer and workstation Blackwell only, whatever diffusers' own check admits.
    if nvfp4 and capability < (12, 0):
        return f"NVFP4 needs compute capability 12.0, this GPU has {capability[0]}.{capability[1]}"
    if capability[0] == 9 or capability < (7, 5):
        return f"there are no kernels for compute capability {capability[0]}.{capability[1]}"
    if find_spec("kernels") is None:
        return "the package `kernels` is not installed"
    if os.environ.get("DIFFUSERS_TRUST_REMOTE_KERNELS", "").lower() not in ("1", "true", "yes", "on"):
        return "DIFFUSERS_TRUST_REMOTE_KERNELS is not set to true"
    if dtype == torch.float32:
        return "the kernels take bfloat16 or float16, not float32"
    return ""


def default_dtype(bundle: Path, device: str) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU for large models. Else float32, which is exact and faster on a CPU."""
    import torch

    weights = (path for folder in families.network_folders(bundle) for path in folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    return torch.bfloat16 if device.startswith("cuda") or size > LARGE else torch.float32


def plain_network(folder: Path, family: Family, dtype: torch.dtype) -> Any:
    """The network in a folder of the form `bfl`, as diffusers reads it: `from_pretrained` of 0.42 cannot."""
    import diffusers

    network = getattr(diffusers, family.model_class)
    how = {"config": str(folder), "quantization_config": diffusers.BFLQuantizationConfig(dtype), "dtype": dtype}
    with quiet_diffusers():
        return network.from_single_file(str(folder / f"{STEM}.safetensors"), local_files_only=True, **how)


def _official(bundle: Path, family: Family, parts: dict[str, Any], options: dict[str, Any]) -> Any:
    """The official layout names a class of the authors' repository. Its weights are the stock layout's: run it with
    the stock class.
    """
    import diffusers

    from dcgen_convert.bundle.autoencoder_dc_adapter import AutoencoderDCAdapter

    vae = _loaded(AutoencoderDCAdapter, bundle / "vae", options["dtype"], latent_order=family.adapter_order)
    return getattr(diffusers, family.pipeline_class).from_pretrained(bundle, vae=vae, **parts, **options)


def _class(name: str) -> Any:
    """This program's class for the module ``name`` of model_index.json."""
    from dcgen_convert.bundle.autoencoder_dc_adapter import AutoencoderDCAdapter
    from dcgen_convert.networks.folder import class_called

    found = trust.class_of(name)
    return AutoencoderDCAdapter if found == trust.ADAPTER_CLASS else class_called(found)


def _loaded(kind: Any, folder: Path, dtype: Any, **settings: Any) -> Any:
    """The autoencoder in ``folder``."""
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **settings)
