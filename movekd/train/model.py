"""The student with its adapters or heads: everything that learns, in one module.

Input: a collated batch, with targets as the cache stores them. Output: the terms of
``distill.objective``, for the trainer to normalise. DDP and FSDP wrap this module, so its output
holds scalars only, apart from the routers' shares.

With experts per teacher the tower runs once more per teacher, see ``teacher_passes``.

Legend: B samples, V views of images (LLaVA-1.5: one per image), I views with targets, N student
tokens, D student width, M teacher tokens, T teachers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from movekd.cache.reader import FeatureCache
from movekd.cache.targets import TeacherTargets
from movekd.corpus.anyres import num_views
from movekd.distill import released_sam_tokens
from movekd.distill.config import DistillConfig
from movekd.distill.loss_terms import StudentOutput, Terms
from movekd.distill.objective import Objective
from movekd.distill.summary import head_name, summary_target
from movekd.distill.target_tokens import may_rotate, target_tokens
from movekd.errors import ConfigError
from movekd.student import (
    StudentHead,
    TeacherAdapter,
    checkpoint_contexts,
    clear_routing,
    routing,
)
from movekd.student.hidden_state import global_token, image_hidden_state, patch_tokens
from movekd.student.vlm import Student
from movekd.train.teacher_passes import TeacherPass, teacher_passes


@dataclass(frozen=True)
class TargetShape:
    """Shape of a teacher's targets, known before a row is read."""

    num_tokens: int
    width: int
    summary_width: int = 0
    """Channels of its summary; only read with `summary_weight`."""


class DistillModel(nn.Module):
    """A vision-language model and the adapters or heads of its teachers.

    Args:
        student: the model; its parameters say themselves whether they learn.
        objective: the loss of the run, which says what the forward pass prepares.
        shapes: shape of each teacher's targets, in the order of ``distill.teachers``.
    """

    def __init__(
        self, student: Student, objective: Objective, shapes: Mapping[str, TargetShape]
    ) -> None:
        super().__init__()
        self.vlm = student.vlm
        self.has_language_model = student.tokenizer is not None
        self.has_tiles = student.has_tiles
        self.side = student.grid
        self.objective = objective
        self.measures_rank = False  # the trainer sets it in steps that are logged
        self.has_experts = any(".mole_" in name for name, _ in self.vlm.named_parameters())
        self.adapters = nn.ModuleDict()
        self.loaded_parts: list[str] = []  # those that an earlier stage trained
        if objective.distill is not None:
            self.adapters.update(_adapters(student, objective.distill, shapes))

    @property
    def has_teacher_passes(self) -> bool:
        """Whether the tower runs once more per teacher."""
        return self.objective.distill is not None and self.objective.free_kd_share < 1

    def forward(
        self,
        pixel_values: Tensor | None,
        targets: Mapping[str, TeacherTargets] | None,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        target_views: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Terms:
        """Return the terms of a batch; without images the student sees a black one.

        ``position_ids`` that start again tell conversations of one row apart. transformers reads
        them so only without a mask and without a cache; padding is then one more sequence.
        """
        clear_routing(self.vlm)
        has_images = pixel_values is not None
        if pixel_values is None:  # every rank needs a gradient for every parameter, in each step
            pixel_values, image_sizes = self._blank(next(self.parameters()).device)
        pixel_values = pixel_values.to(self.vlm.dtype)
        features, hidden_VTD = image_hidden_state(self.vlm, pixel_values, image_sizes)
        vision_config = self.vlm.config.vision_config
        student_VND = patch_tokens(hidden_VTD, vision_config)
        student_IND = student_VND if target_views is None else student_VND[target_views]
        unused = student_IND.new_zeros((), dtype=torch.float32)
        text = embeds_BLD = None
        if self.has_language_model:
            assert input_ids is not None
            if not has_images:
                embeds_BLD = self._join_features(input_ids, features.pooler_output)
            text = self.vlm(
                input_ids=input_ids if has_images else None,
                inputs_embeds=embeds_BLD,
                attention_mask=attention_mask if position_ids is None else None,
                position_ids=position_ids,
                labels=labels,
                mm_encoder_outputs={"image": features} if has_images else None,
                num_items_in_batch=torch.ones((), device=input_ids.device),  # a sum, not a mean
                use_cache=False,
            )
        routings = routing(self.vlm) if self.has_experts else None
        passes: list[TeacherPass] = []
        if self.has_teacher_passes:
            assert self.objective.distill is not None
            # without targets, too: with FSDP every rank gathers the weights equally often
            seen_ICHW = pixel_values if target_views is None else pixel_values[target_views]
            seen_ICHW = seen_ICHW[:1] if targets is None else seen_ICHW
            passes = teacher_passes(self.vlm, seen_ICHW, self.objective.distill.teachers)
        output = StudentOutput(student_VND, student_IND)
        if targets is not None:
            global_VD = global_token(hidden_VTD, vision_config)
            global_ID = global_VD if target_views is None else global_VD[target_views]
            output = self.compare(student_IND, targets, global_ID, passes)
        elif self.objective.distill is not None:
            unused = unused + 0.0 * self._touch_adapters(student_IND.float())
            unused = unused + sum(0.0 * each.tokens_IND.float().sum() for each in passes)
        output = output._replace(
            student_VND=student_VND,
            routings=routings,
            labels=labels,
            text_output=text,
            has_images=has_images,
            unused=unused,
        )
        return self.objective.terms(output, measures_rank=self.measures_rank)

    def compare(
        self,
        student_IND: Tensor,
        targets: Mapping[str, TeacherTargets],
        global_ID: Tensor | None = None,
        passes: Sequence[TeacherPass] = (),
    ) -> StudentOutput:
        """Return what the KD loss compares: predictions and goals, (I, N, D_t) per teacher.

        With ``global_ID``, the student's global tokens, also what the global loss compares. With
        ``passes``, one per teacher in order, also what each pass predicts of its teacher.
        """
        distill = self.objective.distill
        assert distill is not None
        targets = {name: targets[name].to(student_IND.device) for name in distill.teachers}
        tokens_IND = student_IND.float()  # as heads and targets are, whatever the weights' dtype
        predictions, own_predictions, goals = [], [], []
        rotates = may_rotate(distill) and not self.objective.extra_terms  # which may read channels
        for at, name in enumerate(distill.teachers):
            rotate = targets[name].rotate if rotates and targets[name].rotates else None
            goal_IMD = target_tokens(
                targets[name], name, distill, self.side, is_rotated=rotate is not None
            )
            own = [each.tokens_IND.float() for each in passes[at : at + 1]]
            if distill.adapters == "student":
                predictions.append(self.adapters[name](tokens_IND, rotate))
                own_predictions += [self.adapters[name](each, rotate) for each in own]
                goals.append(goal_IMD)
            else:  # the anchor has no adapter: its tokens are compared as they are
                predictions.append(tokens_IND)
                own_predictions += own
                goals.append(self.adapters[name](goal_IMD) if name in self.adapters else goal_IMD)
        output = StudentOutput(student_IND, student_IND, tuple(predictions), tuple(goals), targets)
        output = output._replace(
            own_predictions=tuple(own_predictions),
            own_shares=tuple(each.own_share for each in passes),
        )
        if not distill.summary_weight or global_ID is None:
            return output
        heads = [self.adapters[head_name(name)] for name in distill.teachers]
        return output._replace(
            summary_predictions=tuple(head(global_ID.float()) for head in heads),
            summary_goals=tuple(summary_target(targets[n], distill) for n in distill.teachers),
        )

    def _join_features(self, input_ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Return the embeddings (B, L, D) of a text without images, with a black image's times 0.

        Backward then passes the language model's blocks before the tower's, as with images. FSDP2
        waits for ever where ranks gather blocks in different orders.
        """
        embeds_BLD: Tensor = self.vlm.get_input_embeddings()(input_ids)
        return embeds_BLD + (0.0 * torch.cat(list(features)).sum()).to(embeds_BLD.dtype)

    def _touch_adapters(self, student_IND: Tensor) -> Tensor:
        """Return a scalar that depends on the student's tokens and on every adapter and head."""
        total = student_IND.sum()
        for adapter in self.adapters.values():
            if isinstance(adapter, StudentHead):
                total = total + adapter(student_IND).sum()
            else:
                total = total + sum(parameter.sum() for parameter in adapter.parameters())
        return total

    def _blank(self, device: torch.device) -> tuple[Tensor, list[tuple[int, int]] | None]:
        """Return pixels of a black image, and its size where the model asks for one."""
        size, has_tiles = self.vlm.config.vision_config.image_size, self.has_tiles
        count = int(num_views([size], [size])[0]) if has_tiles else 1
        pixels_VCHW = torch.zeros(count, 3, size, size, device=device)
        return pixels_VCHW, [(size, size)] if has_tiles else None

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **layers: Any
    ) -> None:
        """Compute the activations of blocks again in backward, which saves memory.

        Trainer calls this for `gradient_checkpointing`.

        Args:
            activation_checkpointing_kwargs: arguments of ``torch.utils.checkpoint.checkpoint``.
            layers: which blocks, and where their inputs wait, as transformers takes them.
        """
        model = self.vlm if self.has_language_model else self.vlm.model["vision_tower"]
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23
        keys = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if self.has_teacher_passes:
            keys["context_fn"] = checkpoint_contexts(self.vlm)
        (enable or model.gradient_checkpointing_enable)(keys, **layers)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **layers: Any
    ) -> None:
        """Do the same; its name in transformers before 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **layers)


def _adapters(
    student: Student, distill: DistillConfig, shapes: Mapping[str, TargetShape]
) -> dict[str, nn.Module]:
    adapters: dict[str, nn.Module]
    if distill.adapters == "student":
        adapters = {
            name: StudentHead(student.width, shapes[name].width) for name in distill.teachers
        }
    else:
        adapters = {
            name: TeacherAdapter(
                shapes[name].width, shapes[name].num_tokens, student.width, student.num_patches
            )
            for name in distill.teachers
            if name != distill.anchor
        }
    if distill.summary_weight:  # last: the others start from the same random numbers without it
        for name in distill.teachers:
            head = StudentHead(student.width, shapes[name].summary_width)
            adapters[head_name(name)] = head
    return adapters


def check_targets(
    cache: FeatureCache, distill: DistillConfig, student: Student
) -> dict[str, TargetShape]:
    """Return the shape of each teacher's targets, after checking that they fit the run.

    Raises:
        ConfigError: a key of the run contradicts the cache; names both.
        CacheError: a teacher is missing or not built to its end.
    """
    shapes = {}
    for name in distill.teachers:
        teacher = cache[name]
        num_tokens = teacher.layout.num_tokens
        if distill.grid == "student" and teacher.grid != student.grid:
            num_tokens = student.num_patches
        cls = teacher.layout.arrays.get("cls")
        summary_width = teacher.width if cls is None else cls.row_shape[-1]
        shapes[name] = TargetShape(num_tokens, teacher.width, summary_width)
        if distill.sam_layout == "released" and name == "sam":
            released_sam_tokens(torch.empty(1, num_tokens, teacher.width, device="meta"))
    if distill.anchor in shapes:
        _check_anchor(cache, distill, student, shapes[distill.anchor])
    for name in distill.teachers:
        stored = cache[name].spec.grid
        if distill.grid == "native" and stored != "native" and name != distill.anchor:
            raise ConfigError(
                f"distill.grid is 'native', but '{name}' in {cache.url} was pooled (its spec says "
                f"grid: {stored}). Build it with --grid native, or set distill.grid: student."
            )
    return shapes


def _check_anchor(
    cache: FeatureCache, distill: DistillConfig, student: Student, shape: TargetShape
) -> None:
    anchor = cache[distill.anchor]
    if distill.token_weighting in ("softmax", "blend") and (
        "cls_attention" not in anchor.layout.arrays
    ):
        raise ConfigError(
            f"distill.token_weighting '{distill.token_weighting}' needs the [CLS] attention of the "
            f"anchor, which '{distill.anchor}' in {cache.url} was built without. Build it "
            "with cls_attention: true, or set token_weighting: none."
        )
    if distill.teacher_weighting == "anchor" and "cls" not in anchor.layout.arrays:
        raise ConfigError(
            f"distill.teacher_weighting 'anchor' needs the [CLS] embedding of '{distill.anchor}', "
            f"which {cache.url} was built without. Build it with cls: true, or set "
            "teacher_weighting: equal."
        )
    if distill.adapters == "teacher" and (
        shape.width != student.width or shape.num_tokens != student.num_patches
    ):
        raise ConfigError(
            f"distill.adapters: teacher compares the anchor '{distill.anchor}' with the student as "
            f"it is, but it has {shape.num_tokens} tokens of {shape.width} channels and the "
            f"student {student.num_patches} of {student.width}. Take the student's own CLIP "
            "as the anchor, or set adapters: student."
        )
