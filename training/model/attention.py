"""GPT-J attention over packed rows.

transformers offers GPT-J an eager attention, which materialises float32 scores, and FlashAttention-2, which silently
lets the documents of a packed row attend to each other. This module calls torch's fused kernel once per document, on
slices of the packed tensors: no mask, no padding, no copy. Parameters, their names and the saved model are those of
transformers' GPT-J."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gptj import modeling_gptj as gptj

from training.data.batching import document_lengths


@dataclass(frozen=True)
class PackedLayout:
    """Data of a packed row that every layer needs; computed once per forward.

    Attributes:
        lengths: tokens of each document, in order.
        sin, cos: `(1, tokens, 1, rotary dimensions)` in the dtype of the hidden states.
        keep: `(kept,) int64`, positions whose hidden states the layer returns; None for all.
    """

    lengths: list[int]
    sin: torch.Tensor
    cos: torch.Tensor
    keep: torch.Tensor | None = None


def rotary_sin_cos(
    embed_positions: torch.Tensor, position_ids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sines and cosines `(rows, tokens, 1, rotary dimensions)` of GPT-J's rotary embedding.

    `embed_positions (positions, rotary dimensions)` is the table of GPTJAttention, sines then cosines; each
    angle serves two neighbouring dimensions.
    """
    sin, cos = embed_positions.to(position_ids.device)[position_ids].to(dtype).chunk(2, dim=-1)
    return sin.repeat_interleave(2, dim=-1)[:, :, None], cos.repeat_interleave(2, dim=-1)[:, :, None]


def rotate(heads: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    """Rotates the first dimensions of `heads (rows, tokens, heads, head size)` by the angle of each position."""
    rotated, rest = heads.split([sin.shape[-1], heads.shape[-1] - sin.shape[-1]], dim=-1)
    rotated = rotated * cos + gptj.rotate_every_two(rotated) * sin
    return torch.cat([rotated, rest], dim=-1)


def attend_within_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], dropout: float
) -> torch.Tensor:
    """Causal attention within each document of a packed row. All tensors are `(1, tokens, heads, head size)`.

    One kernel call per document. On CPU this is 1.8 to 20 times as fast, forward and backward, as one call on
    rows unpacked to (documents, longest): it computes no padding and copies nothing but its result.
    """
    queries, keys, values = (heads.transpose(1, 2).split(lengths, dim=2) for heads in (query, key, value))
    attended = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(attended, dim=1)


class FusedGPTJAttention(gptj.GPTJAttention):
    """GPTJAttention with torch's fused kernel, for packed rows, padded rows and generation."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_past: Cache | None = None,
        attention_mask: PackedLayout | torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention's output for `hidden_states (rows, tokens, width)`, in the same shape.

        `attention_mask` is a PackedLayout for a packed row, otherwise the mask that transformers makes for `sdpa`:
        boolean, or None if plain causal attention is enough. If the layout has `keep`, the output is `(1, kept, width)`.
        """
        rows, tokens, _ = hidden_states.shape
        shape = (rows, tokens, self.num_attention_heads, self.head_dim)
        keep = attention_mask.keep if isinstance(attention_mask, PackedLayout) else None
        if keep is None:
            query = self.q_proj(hidden_states).view(shape)
        else:  # the results of other positions are not used
            kept = self.q_proj(hidden_states[:, keep])
            query = kept.new_zeros(hidden_states.shape).index_copy(1, keep, kept).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape)
        dropout = self.config.attn_pdrop if self.training else 0.0

        if isinstance(attention_mask, PackedLayout):
            layout = attention_mask
            query, key = rotate(query, layout.sin, layout.cos), rotate(key, layout.sin, layout.cos)
            attended = attend_within_documents(query, key, value, layout.lengths, dropout)
            if keep is not None:
                attended = attended[:, keep]
        else:
            assert position_ids is not None
            sin, cos = rotary_sin_cos(self.embed_positions, position_ids, query.dtype)
            query, key = rotate(query, sin, cos).transpose(1, 2), rotate(key, sin, cos).transpose(1, 2)
            value = value.transpose(1, 2)
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_idx)
            causal = attention_mask is None and tokens > 1  # a single new token attends to all before it
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal
            ).transpose(1, 2)
        return self.resid_dropout(self.out_proj(attended.flatten(2))), None


class PackingGPTJBlock(gptj.GPTJBlock):
    """GPTJBlock that returns only the hidden states of the positions that the layout keeps."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: PackedLayout | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        keep = attention_mask.keep if isinstance(attention_mask, PackedLayout) else None
        if keep is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        normed = self.ln_1(hidden_states)
        attended, _ = self.attn(normed, attention_mask=attention_mask)
        return attended + self.mlp(normed[:, keep]) + hidden_states[:, keep], None


class PackingGPTJModel(gptj.GPTJModel):
    """GPTJModel that also accepts a packed row."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like GPTJModel.forward, but `position_ids (1, tokens)` without an attention mask mean a packed row.

        `keep (kept,) int64` selects positions of a packed row, and the hidden states are then `(1, kept, width)`. A call
        with a cache is not a packed row: transformers' generation passes a mask or a cache.
        """
        other_inputs = [kwargs.get(name) for name in ("attention_mask", "past_key_values", "token_type_ids")]
        plain = all(value is None for value in other_inputs) and not kwargs.get("use_cache")
        if plain and input_ids is not None and position_ids is not None and len(position_ids) == 1:
            return self._forward_packed(input_ids, position_ids, keep)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)

    def _forward_packed(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor | None
    ) -> BaseModelOutputWithPast:
        """Hidden states `(1, tokens, width)` of a packed row `(1, tokens)`, or `(1, kept, width)`."""
        hidden_states = self.drop(self.wte(input_ids))
        sin, cos = rotary_sin_cos(self.h[0].attn.embed_positions, position_ids, hidden_states.dtype)
        # The lengths are needed on the host. A forward waits for the device only here.
        layout = PackedLayout(document_lengths(position_ids), sin, cos)
        # The last layer's results at prompt tokens are not used, only their keys and values.
        layouts = [layout] * (len(self.h) - 1) + [replace(layout, keep=keep)]
        for block, layout in zip(self.h, layouts, strict=True):
            # The layout is an argument, which gradient checkpointing stores, so that the recomputation of a block in
            # the backward pass uses the layout of its own batch.
            hidden_states, _ = block(hidden_states, attention_mask=layout)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states))


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switches a loaded GPT-J to the attention above, in place. Does nothing to other models.

    Only the classes of modules change: no parameter is read, moved or renamed, so it works before and after ZeRO-3 has
    sharded the model.
    """
    if not isinstance(model, gptj.GPTJForCausalLM):
        return
    for module in model.modules():
        if isinstance(module, gptj.GPTJAttention):
            module.__class__ = FusedGPTJAttention
        elif isinstance(module, gptj.GPTJBlock):
            module.__class__ = PackingGPTJBlock
        elif isinstance(module, gptj.GPTJModel):
            module.__class__ = PackingGPTJModel
        elif isinstance(module, gptj.GPTJMLP) and model.config.activation_function == "gelu_new":
            # The same function as one kernel; the original keeps four (tokens, 4 x width) tensors for backward.
            module.act = nn.GELU(approximate="tanh")
    # transformers chooses the mask by this name. For "sdpa" it is boolean, or None if causal attention is enough.
    model.config._attn_implementation = "sdpa"
