"""Load the teacher that a spec describes: a frozen network that turns pixels into features.

``extract`` runs it once over a corpus. Nothing in training imports it.

Legend: B batch, C channels, H W pixels (in pixels_BCHW) or H heads (in cls_attention_BHN),
T tokens with prefix, N patch tokens on a square grid, row-major, D width.
"""

import hashlib
import inspect
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, MovekdError, shorten
from movekd.teachers.attention import find_attention, watch_cls_attention
from movekd.teachers.attention_pool import pool
from movekd.teachers.backbone import Backbone, TeacherOutput
from movekd.teachers.checkpoints import LIBRARY_ERRORS
from movekd.teachers.providers import build_backbone

_SHAPES = 16
"""Most input shapes that one teacher is compiled for: batch sizes tried, and smaller last ones."""

_OF_DEVICE = re.compile(r"cuda|cudnn|cublas|nccl", re.IGNORECASE)
"""Errors of a device, which say nothing about the spec."""


class Teacher(nn.Module):
    """A frozen encoder that returns the features that its spec names.

    ``layer: i`` counts like ``hidden_states`` of transformers, without the final norm: -1 is the
    output of the last block, -2 of the block before it, 1 of the first. ``layer: last`` is the
    model's own output: ``last_hidden_state`` in transformers and ``forward_features`` in timm
    (after the final norm if the model has one), the map of the last stage of a convolutional
    network, the last block of eva02_det. ``layer: neck`` is the model's own output too, but only
    SAM has a neck.

    Attributes:
        spec: the spec that it was loaded from.
        weights_sha256: SHA-256 of its weights; see ``weights_sha256``.
    """

    def __init__(self, backbone: Backbone, spec: CacheSpec, weights_sha256: str) -> None:
        super().__init__()
        self.spec, self.weights_sha256 = spec, weights_sha256
        self.module = backbone.module.eval().requires_grad_(False)
        self._run, self._num_prefix = backbone.run, backbone.num_prefix
        self._is_compiled = False
        takes_pool = (spec.cls or spec.cls_attention) and spec.cls_source == "attention_pool"
        self._pool = backbone.pool if takes_pool else None
        self._caught: dict[str, Tensor] = {}
        self._watch(backbone)

    def _watch(self, backbone: Backbone) -> None:
        """Hook the block that the spec asks for; refuse a layer that the network does not have."""
        spec, depth = self.spec, len(backbone.blocks)
        _check_cls(spec, backbone)
        if spec.layer == "neck" and not backbone.has_neck:
            raise ConfigError(
                f"'{spec.name}' asks for layer: neck; {spec.model} has none, only SAM does. "
                "Set layer: last, or an index."
            )
        if isinstance(spec.layer, int):
            if not -depth <= spec.layer <= depth or spec.layer == 0:
                counts = f"has {depth} blocks" if depth else "has no blocks to count"
                valid = f"-{depth}..-1, 1..{depth} or last" if depth else "last"
                raise ConfigError(
                    f"'{spec.name}' asks for layer {spec.layer}; {spec.model} {counts}. "
                    f"Set layer to {valid}."
                )
            block = backbone.blocks[spec.layer - 1 if spec.layer > 0 else spec.layer]

            def keep_hidden(_module: nn.Module, _args: Any, output: Any) -> None:
                self._caught["hidden"] = output[0] if isinstance(output, tuple) else output

            block.register_forward_hook(keep_hidden)
        if spec.cls_attention and spec.cls_source == "token" and not backbone.is_complete:
            watch_cls_attention(
                find_attention(block if isinstance(spec.layer, int) else backbone.blocks[-1]),
                backbone.num_prefix,
                lambda row_BHN: self._caught.__setitem__("attention", row_BHN),
            )

    def compile_forward(self) -> None:
        """Fuse the network with ``torch.compile``, which compiles each input shape at first use.

        Each teacher gets its own limit of compilations. By default all networks of one class share
        a limit, and torch runs those beyond it uncompiled without a warning.
        """
        if self._is_compiled:
            return
        own: dict[str, Any] = {}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # newer torch
            own = {"isolate_recompiles": True, "recompile_limit": _SHAPES}
        compiled = torch.compile(self._run, dynamic=False, **own)

        def run(pixels_BCHW: Tensor) -> Any:
            limits: Any = torch._dynamo.config
            with limits.patch(fail_on_recompile_limit_hit=True):
                try:
                    return compiled(pixels_BCHW)
                except (MovekdError, torch.OutOfMemoryError, ValueError, AssertionError):
                    raise
                except Exception as error:  # the compiler may raise anything
                    said = str(error).splitlines()[0][:200] if str(error) else ""
                    raise ConfigError(
                        f"{self.spec.model} cannot be compiled ({type(error).__name__}: {said}). "
                        "It needs a C++ compiler, and Triton on a GPU; leave --compile out."
                    ) from error

        self._run, self._is_compiled = run, True

    @torch.inference_mode()
    def forward(self, pixels_BCHW: Tensor) -> TeacherOutput:
        """Return the features of normalised pixels, (B, 3, image_size, image_size).

        The pixels may have any floating dtype and device; they are moved to the teacher's.

        Raises:
            ConfigError: the model does not take images of this size, or its tokens form no square
                grid.
        """
        parameter = next(self.module.parameters())
        try:
            output = self._run(pixels_BCHW.to(parameter.device, parameter.dtype))
        except LIBRARY_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError) or _OF_DEVICE.search(str(error)):
                raise
            size = "x".join(str(side) for side in pixels_BCHW.shape[2:])
            raise ConfigError(
                f"{shorten(self.spec.model)} does not take {size} pixels: {shorten(error)} Set "
                f"image_size of '{self.spec.name}' to the model's own, or give the model this size "
                "in model_args."
            ) from error
        if not isinstance(output, TeacherOutput):
            output = self._select(output)
        if math.isqrt(output.tokens_BND.shape[1]) ** 2 != output.tokens_BND.shape[1]:
            raise ConfigError(
                f"{self.spec.model} gives {output.tokens_BND.shape[1]} tokens per image, which are "
                f"no square grid; '{self.spec.name}' needs a model with one token per patch."
            )
        return output

    def _select(self, output: Tensor) -> TeacherOutput:
        """Return the features that the spec names, from the network's output and its blocks."""
        last_BTD = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
        tokens_BTD = last_BTD
        if isinstance(self.spec.layer, int):
            hidden = self._caught.pop("hidden")  # (B, T, D), or (B, rows, columns, D) in SAM
            tokens_BTD = hidden.flatten(1, 2) if hidden.ndim == 4 else hidden
        cls_BD, attention_BHN = tokens_BTD[:, 0], self._caught.pop("attention", None)
        if self._pool is not None:
            cls_BD, attention_BHN = pool(self._pool, last_BTD[:, self._num_prefix :])
        return TeacherOutput(
            tokens_BND=tokens_BTD[:, self._num_prefix :].float().contiguous(),
            cls_BD=cls_BD.float().contiguous() if self.spec.cls else None,
            cls_attention_BHN=attention_BHN if self.spec.cls_attention else None,
        )


def _check_cls(spec: CacheSpec, backbone: Backbone) -> None:
    """Refuse a spec that asks for a [CLS] token or pool that the network does not have."""
    if backbone.is_complete or not (spec.cls or spec.cls_attention):
        return
    asks = f"'{spec.name}' asks for cls or cls_attention"
    if spec.cls_source == "attention_pool" and backbone.pool is None:
        way_out = "Set cls_source: token." if backbone.has_cls else "Set both to false."
        raise ConfigError(
            f"{asks} of an attention pool; {spec.model} has no attention-pooling head that movekd "
            f"knows (SigLIP's, with one probe). {way_out}"
        )
    if spec.cls_source == "token" and not backbone.has_cls:
        way_out = "Set both to false."
        if backbone.pool is not None:
            way_out = (
                "Its attention-pooling head can stand for one: set cls_source: attention_pool, or "
                "both to false."
            )
        raise ConfigError(f"{asks}; {spec.model} has no [CLS] token. {way_out}")
    if spec.cls_source == "token" and spec.cls_attention and not backbone.blocks:
        raise ConfigError(
            f"'{spec.name}' asks for cls_attention; {spec.model} has no blocks to read it in. Set "
            "cls_attention: false."
        )


def load_teacher(
    spec: CacheSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Teacher:
    """Return the teacher that ``spec`` describes: frozen, in evaluation mode, on ``device``.

    Weights are read and hashed in float32 before they are cast to ``dtype``, so that the hash does
    not depend on the dtype.

    Raises:
        ConfigError: the model, one of its arguments or the layer does not exist.
        WeightsError: the weights are missing, unreadable, or do not fit.
    """
    backbone = build_backbone(spec)
    _own_weights(backbone.module)
    teacher = Teacher(backbone, spec, weights_sha256(backbone.module))
    rotary = {n: b for n, b in teacher.named_buffers() if n.endswith("inv_freq")}
    teacher = teacher.to(device=device, dtype=dtype)
    # Rounded to half precision, the frequencies would rotate far patches wrongly by a degree.
    for name, frequencies in rotary.items():
        owner, _, own = name.rpartition(".")
        setattr(teacher.get_submodule(owner), own, frequencies.to(device))
    return teacher


def _own_weights(module: nn.Module) -> None:
    """Copy weights that may be views of a mapped file into new memory, one at a time.

    A mapped file that is overwritten later changes its views, after they were hashed. And kernels
    sum in another order where an address is not aligned, so the last bits would depend on where
    in a file a tensor lies.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers as a hex string.

    It covers names (sorted), shapes and bytes, floating tensors as float32. So neither the device
    nor a float16 or bfloat16 copy of the same values changes the hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
