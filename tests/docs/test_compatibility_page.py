"""docs/compatibility.md names the key, or the reason, for each flag of the released training."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from transformers import TrainingArguments

from movekd.train.config import TrainConfig

PAGE = (Path(__file__).parents[2] / "docs/compatibility.md").read_text(encoding="utf-8")
_, SECTION = PAGE.split("## Flags of the released training program")
ROWS = re.findall(r"^\| `--(\w+)` \| *(.*?) *\| (.*) \|$", SECTION, re.MULTILINE)

ADDED_BY_MOVEKD = """
encoder_teachers pretrain_encoder_adapter moe_encoder moe_encoder_dense moe_encoder_lora_rank
moe_encoder_lora_alpha moe_encoder_num_experts pretrain_mole_encoder finetune tune_encoder
tune_encoder_adapter tune_all kd kd_w kd_memory_w token_weight teacher_weight moe_encoder_balance_w
"""
OF_LLAVA = """
model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token
mm_patch_merge_type mm_vision_select_feature data_path lazy_preprocess is_multimodal image_folder
image_aspect_ratio cache_dir optim remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl
model_max_length double_quant quant_type bits lora_enable lora_r lora_alpha lora_dropout
lora_weight_path lora_bias mm_projector_lr group_by_modality_length
"""
ONLY_IN_SCRIPTS = """
bf16 dataloader_num_workers deepspeed evaluation_strategy gradient_accumulation_steps
gradient_checkpointing learning_rate logging_steps lr_scheduler_type num_train_epochs output_dir
per_device_eval_batch_size per_device_train_batch_size report_to save_steps save_strategy
save_total_limit tf32 warmup_ratio weight_decay
"""
"""hey-cjj/MoVE-KD c822da0: fields of llava/train/train.py, and flags in scripts/move-kd/*.sh."""


def test_every_flag_stands_there_once() -> None:
    listed = [flag for flag, _, _ in ROWS]
    assert len(set(listed)) == len(listed)
    assert set(listed) == set((ADDED_BY_MOVEKD + OF_LLAVA + ONLY_IN_SCRIPTS).split())


@pytest.mark.parametrize(("flag", "said"), [(flag, said) for flag, _, said in ROWS])
def test_a_flag_has_a_key_that_exists_or_a_reason(flag: str, said: str) -> None:
    if said.startswith("None: "):
        assert len(said) > len("None: ")
        return
    key = re.match(r"`([\w.]+)`", said)
    assert key is not None
    assert has_key(TrainConfig, key[1].split(".")), key[1]


def has_key(model: type[BaseModel], path: list[str]) -> bool:
    """Return whether a config class or TrainingArguments has a dotted key."""
    name, *rest = path
    if path[0] == "training" and model is TrainConfig:
        return rest[0] in TrainingArguments.__dataclass_fields__
    field = model.model_fields.get(name)
    if field is None:
        return False
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    return not rest or any(has_key(inner, rest) for inner in models)
