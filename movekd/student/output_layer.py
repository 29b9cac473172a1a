"""Refuse language models that LLaVA's class in transformers cannot hold, and untie their output.

Input: the type of a language model, or a loaded one. Output: nothing, or an error.
Used by ``language_loading``. LLaVA gives the language model's hidden states to the output layer and
uses what that returns. A language model that changes its logits afterwards would be another model
there, in training and in every export, and nobody would be told.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from movekd.errors import ConfigError, shorten

_KEY = "student.language_model"
_LARGE = 100.0
"""A logit that every kind of soft cap changes: Gemma 2's are at most 30."""
_NUM_ROWS = 256
"""Tokens to choose that logit from; the row of a padding token is zero."""


def require_text_model(model_type: str, source: str) -> None:
    """Refuse a model that has its own vision tower, by the ``model_type`` of its config.

    Raises:
        ConfigError: transformers loads it as a vision-language model.
    """
    name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ""))
    if name.endswith("ForConditionalGeneration"):
        raise ConfigError(
            f"{_KEY} '{shorten(source)}' is a whole vision-language model ({name}); expected only "
            "a language model, such as a Gemma3ForCausalLM. Name one without its own vision tower, "
            "or save the language model of this one by itself."
        )


def require_plain_output(language_model: Any, source: str) -> None:
    """Refuse a language model that does more than its output layer with the hidden states.

    Compares its logits of a fixed hidden state with those of the output layer; no block runs.

    Raises:
        ConfigError: names the model and what LLaVA would leave out.
    """
    name = type(language_model).__name__
    body, head = getattr(language_model, "model", None), language_model.get_output_embeddings()
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Linear):
        raise ConfigError(
            f"{_KEY} '{shorten(source)}' is a {name}, which does not consist of `model` and an "
            "output layer; expected one that does, such as a Llama, Mistral, Qwen or Gemma 3."
        )
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{_KEY} '{shorten(source)}' is a {name}, whose output layer has a bias; LLaVA's has "
            "none. Take another language model, such as a Llama, Mistral, Qwen or Gemma 3."
        )
    rows_VD = head.weight.detach()[:_NUM_ROWS].float()
    row_D = rows_VD[rows_VD.norm(dim=1).argmax()]
    states_D = row_D * (_LARGE / (row_D * row_D).sum().clamp(min=1e-6))
    states_BND = states_D.to(head.weight.dtype).reshape(1, 1, -1)
    language_model.model = _FixedStates(states_BND)
    try:
        with torch.no_grad():
            found = language_model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits
            expected = head(states_BND)
    finally:
        language_model.model = body
    if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"{_KEY} '{shorten(source)}' is a {name}, which changes the output layer's logits, as "
            "a soft cap or a scale does; LLaVA leaves that out, so its answers would be another "
            "model's. Take a language model without, such as a Llama, Mistral, Qwen or Gemma 3."
        )


def untied_output(language_model: Any) -> nn.Module:
    """Return the output layer, untied: a stage may train it and not the input embeddings."""
    head: nn.Module = language_model.get_output_embeddings()
    if head.weight is language_model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        language_model.config.tie_word_embeddings = False
    return head


class _FixedStates(nn.Module):
    """Stands in for a language model's blocks: the same hidden states (1, 1, D) for any input."""

    def __init__(self, states_BND: Tensor) -> None:
        super().__init__()
        self.states_BND = states_BND

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states, as the models of transformers do."""
        return MoeModelOutputWithPast(last_hidden_state=self.states_BND)
