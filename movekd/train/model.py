"""The student, what stands between it and its teachers, and the terms of the loss.

Comes in: a collated batch, with targets as the cache stores them. Goes out: the loss terms of the
batch as sums, for the Trainer to divide by what the whole optimizer step holds. Everything that
learns lives in one module, so that DDP and FSDP see it.

Legend: B samples, V views of images (LLaVA-1.5: one an image), I views with targets, N student
tokens, D student width, M teacher tokens, T teachers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from movekd.cache.grid import resize_attention, resize_tokens
from movekd.cache.reader import FeatureCache
from movekd.cache.targets import TeacherTargets
from movekd.corpus.anyres import num_views
from movekd.distill import (
    balance_loss,
    effective_rank,
    kd_loss,
    released_sam_tokens,
    routing_statistics,
    teacher_weights,
    token_statistics,
    token_weights,
)
from movekd.distill.balance import BalanceKind
from movekd.distill.weighting import ANCHOR_SHARE
from movekd.errors import ConfigError
from movekd.student import StudentHead, TeacherAdapter, clear_routing, routing
from movekd.student.tokenization import IGNORED
from movekd.student.vlm import Student, image_features, recompute_activations
from movekd.train.config import DistillConfig


@dataclass(frozen=True)
class TargetShape:
    """What a run must know of a teacher before it reads a row."""

    num_tokens: int
    width: int


class DistillModel(nn.Module):
    """A vision-language model and the adapters or heads of its teachers.

    Args:
        student: the model; its parameters say themselves whether they learn.
        distill: what is learned from the teachers; None trains on text alone.
        shapes: shape of each teacher's targets, in the order of ``distill.teachers``.
        balance: form of the routers' loss.
    """

    def __init__(
        self,
        student: Student,
        distill: DistillConfig | None,
        shapes: Mapping[str, TargetShape],
        balance: BalanceKind = "batch",
    ) -> None:
        super().__init__()
        self.vlm = student.vlm
        self.has_language_model = student.tokenizer is not None
        self.has_tiles = student.has_tiles
        self.distill = distill
        self.side = student.grid
        self.balance = balance
        self.measures_rank = False  # the trainer asks for it in steps that are logged
        self.has_experts = any(".mole_" in name for name, _ in self.vlm.named_parameters())
        self.adapters = nn.ModuleDict()
        self.loaded_parts: list[str] = []  # those that an earlier stage trained
        if distill is not None:
            self.adapters.update(_adapters(student, distill, shapes))

    def forward(
        self,
        pixel_values: Tensor | None,
        targets: Mapping[str, TeacherTargets] | None,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        target_views: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss terms of a batch, float32 scalars.

        ``text_sum`` over answer tokens (with a language model), ``kd_sum`` and
        ``kd_<teacher>_sum`` over images with targets, ``balance``; besides ``num_images``, and
        statistics without gradient, of which ``routing_share`` has a value for each expert of each
        layer, and ``token_rank`` is there when ``measures_rank`` is on.
        """
        clear_routing(self.vlm)
        has_images = pixel_values is not None
        if pixel_values is None:  # every process needs a gradient for every parameter, in each step
            pixel_values, image_sizes = self._blank(next(self.parameters()).device)
        output, student_VND = image_features(self.vlm, pixel_values.to(self.vlm.dtype), image_sizes)
        student_IND = student_VND if target_views is None else student_VND[target_views]
        terms = {
            "num_images": torch.tensor(float(len(student_IND) if has_images else 0)),
            "token_std": token_statistics(student_VND),
        }
        if self.measures_rank:
            terms["token_rank"] = effective_rank(student_VND)
        if self.has_language_model:
            assert input_ids is not None
            text = self.vlm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                mm_encoder_outputs={"image": output} if has_images else None,
                num_items_in_batch=torch.ones((), device=input_ids.device),  # a sum, not a mean
                use_cache=False,
            )
            terms["text_sum"] = text.loss
            if not has_images:
                projected = torch.cat(list(output.pooler_output))
                terms["text_sum"] = terms["text_sum"] + 0.0 * projected.sum()
        if self.has_experts:
            terms |= self._balance(len(student_VND) if has_images else 0)
        if self.distill is not None:
            terms |= self.kd_terms(student_IND, targets)
        return terms

    def _blank(self, device: torch.device) -> tuple[Tensor, list[tuple[int, int]] | None]:
        """Return pixels of a black image, and its size where the model asks for one."""
        size, has_tiles = self.vlm.config.vision_config.image_size, self.has_tiles
        count = int(num_views([size], [size])[0]) if has_tiles else 1
        pixels_VCHW = torch.zeros(count, 3, size, size, device=device)
        return pixels_VCHW, [(size, size)] if has_tiles else None

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in backward; Trainer calls this for `gradient_checkpointing`."""
        recompute_activations(self.vlm)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before 5.23

    def _balance(self, num_views: int) -> dict[str, Tensor]:
        """Return the routers' loss and statistics times the views seen; zeros for a blank image."""
        records = routing(self.vlm)
        statistics = routing_statistics(records)
        share_LE = statistics.share_LE
        if torch.distributed.is_initialized():  # F of `batch` is that of all processes
            share_LE = share_LE * num_views
            total = torch.full((), float(num_views), device=share_LE.device)
            torch.distributed.all_reduce(share_LE)
            torch.distributed.all_reduce(total)
            share_LE = share_LE / total.clamp(min=1)
        terms = {
            "balance_sum": balance_loss(records, self.balance, share_LE=share_LE),
            "routing_entropy": statistics.entropy_L.mean(),
            "routing_max_share": statistics.share_LE.max(),
            "routing_share": statistics.share_LE,
        }
        return {name: term * num_views for name, term in terms.items()}

    def kd_terms(
        self, student_IND: Tensor, targets: Mapping[str, TeacherTargets] | None
    ) -> dict[str, Tensor]:
        """Return the terms of the distillation; zero, but with a graph, without targets.

        The names are the same in both cases: processes with and without images add them up.
        """
        distill = self.distill
        assert distill is not None
        student_IND = student_IND.float()  # heads and targets are, whatever the weights are in
        if targets is None:
            touched = [head(student_IND).sum() for head in self._heads_on_student()]
            touched += [p.sum() for a in self._adapters_on_teacher() for p in a.parameters()]
            zero = student_IND.new_zeros(())
            names = [f"kd_{name}_sum" for name in distill.teachers]
            names += [f"teacher_weight_{name}" for name in distill.teachers]
            names += [] if distill.token_weighting == "none" else ["token_weight_entropy"]
            kd_sum = 0.0 * sum(touched, student_IND.sum())
            return {"kd_sum": kd_sum} | dict.fromkeys(names, zero)
        batch = {name: targets[name].to(student_IND.device) for name in distill.teachers}
        predictions, goals = [], []
        for name in distill.teachers:
            goal_IMD = _goal(batch[name], distill.targets)
            if distill.sam_layout == "released" and name == "sam":
                goal_IMD = released_sam_tokens(goal_IMD)
            if distill.grid == "student":
                goal_IMD = resize_tokens(goal_IMD, self.side)
            if distill.adapters == "student":
                predictions.append(self.adapters[name](student_IND))
                goals.append(goal_IMD)
            else:  # the anchor has no adapter: it is compared as it is
                predictions.append(student_IND)
                goals.append(self.adapters[name](goal_IMD) if name in self.adapters else goal_IMD)
        anchor = batch.get(distill.anchor)
        weights_IN = self._token_weights(anchor)
        ones_IT = student_IND.new_ones(len(student_IND), len(goals))
        losses_IT = kd_loss(  # before the teachers' weights, which may depend on them
            predictions,
            goals,
            ones_IT,
            weights_IN,
            combine="sum" if distill.token_weighting == "softmax" else "mean",
        ).per_teacher_BT
        weights_IT = self._teacher_weights(goals, anchor, losses_IT)
        logged = {"kd_sum": (weights_IT * losses_IT).sum()}
        for at, name in enumerate(distill.teachers):
            logged[f"kd_{name}_sum"] = losses_IT[:, at].sum().detach()
            logged[f"teacher_weight_{name}"] = weights_IT[:, at].mean().detach()
        if weights_IN is not None:
            share_IN = weights_IN / weights_IN.sum(1, keepdim=True)
            logged["token_weight_entropy"] = torch.special.entr(share_IN).sum(1).mean()
        return logged

    def _teacher_weights(
        self, goals: list[Tensor], anchor: TeacherTargets | None, losses_IT: Tensor
    ) -> Tensor:
        distill = self.distill
        assert distill is not None
        assert distill.teacher_weighting is not None
        share = distill.anchor_share  # null where the weighting gives the anchor no fixed share
        return teacher_weights(
            goals,
            distill.teacher_weighting,
            cls_BD=None if anchor is None else anchor.cls_BD,
            anchor=distill.teachers.index(distill.anchor) if anchor is not None else 0,
            anchor_share=ANCHOR_SHARE if share is None else share,
            losses_BT=losses_IT,
        )

    def _token_weights(self, anchor: TeacherTargets | None) -> Tensor | None:
        distill = self.distill
        assert distill is not None
        if distill.token_weighting in (None, "none") or anchor is None:
            return None
        attention = anchor.cls_attention_BHN
        assert attention is not None  # checked when the run was set up
        assert distill.token_weighting is not None
        return token_weights(
            resize_attention(attention, self.side),
            distill.token_weighting,
            blend=distill.token_blend,
        )

    def _heads_on_student(self) -> list[nn.Module]:
        return [a for a in self.adapters.values() if isinstance(a, StudentHead)]

    def _adapters_on_teacher(self) -> list[nn.Module]:
        return [a for a in self.adapters.values() if isinstance(a, TeacherAdapter)]


def _goal(targets: TeacherTargets, kind: str | None) -> Tensor:
    """Return a teacher's tokens as `distill.targets` wants them, on the cache's grid."""
    if kind == "standardised":
        return targets.standardised_BND
    return targets.scaled_BND if kind == "scaled" else targets.tokens_BND


def count_answer_tokens(labels: Tensor) -> Tensor:
    """Return how many labels the text loss is taken on (the first has no predecessor)."""
    return labels[:, 1:].ne(IGNORED).sum()


def _adapters(
    student: Student, distill: DistillConfig, shapes: Mapping[str, TargetShape]
) -> dict[str, nn.Module]:
    if distill.adapters == "student":
        return {name: StudentHead(student.width, shapes[name].width) for name in distill.teachers}
    return {
        name: TeacherAdapter(
            shapes[name].width, shapes[name].num_tokens, student.width, student.num_image_tokens
        )
        for name in distill.teachers
        if name != distill.anchor
    }


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
            num_tokens = student.num_image_tokens
        shapes[name] = TargetShape(num_tokens, teacher.width)
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
        shape.width != student.width or shape.num_tokens != student.num_image_tokens
    ):
        raise ConfigError(
            f"distill.adapters: teacher compares the anchor '{distill.anchor}' with the student as "
            f"it is, but it has {shape.num_tokens} tokens of {shape.width} channels and the "
            f"student {student.num_image_tokens} of {student.width}. Take the student's own CLIP "
            "as the anchor, or set adapters: student."
        )
