"""What no 4-bit format can hold, refused by the layer's name."""

import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.quant_targets import CONTAINERS
from dcgen_convert.svdquant.settings import AWQ_GROUP

LEAVE_OUT = "Leave this layer out of the targets."


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity in a floating tensor."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{name} holds {count} NaN or infinite values; it cannot be quantised.", hint="Repair the checkpoint."
        )


def check_svdq_shape(name: str, shape: tuple[int, ...]) -> None:
    """A W4A4 layer is a matrix with both sides multiples of 128 (nunchaku's file format)."""
    _check_matrix(name, shape)
    for label, size in (("out", shape[0]), ("in", shape[1])):
        if size % 128 or not size:
            raise InputError(
                f"{name}.weight is {shape[0]} x {shape[1]}: {size} {label} channels is not a multiple of 128, which "
                f"W4A4 needs.",
                hint=LEAVE_OUT,
            )


def check_plain_shape(name: str, shape: tuple[int, ...]) -> None:
    """A plain NVFP4 layer is a matrix with both sides multiples of 32 (FlashInfer's kernel)."""
    _check_matrix(name, shape)
    multiple = CONTAINERS["bfl"].multiple
    if shape[0] % multiple or shape[1] % multiple or not min(shape):
        raise InputError(
            f"{name}.weight is {shape[0]} x {shape[1]}: plain NVFP4 needs multiples of {multiple}.", hint=LEAVE_OUT
        )


def check_awq_shape(name: str, shape: tuple[int, ...]) -> None:
    """A W4A16 layer has in channels in multiples of 64 and out channels in multiples of 8 (nunchaku's file format)."""
    _check_matrix(name, shape)
    if shape[1] % AWQ_GROUP or shape[0] % 8:
        raise InputError(
            f"{name}.weight is {shape[0]} x {shape[1]}: W4A16 needs in channels in multiples of 64 and out channels in "
            f"multiples of 8.",
            hint=LEAVE_OUT,
        )


def _check_matrix(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise InputError(f"{name}.weight has shape {list(shape)}; only linear layers can be quantised.", hint=LEAVE_OUT)
