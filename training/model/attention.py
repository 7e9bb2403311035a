"""GPT-J attention over packed rows.

transformers offers GPT-J an eager attention, which materialises float32 scores, and FlashAttention-2, which silently
lets the documents of a packed row attend to each other. This module calls torch's fused kernels, without a mask, padding
or copy: on newer NVIDIA GPUs once per layer for all documents, elsewhere once per document. Parameters, their names and
the saved model are those of transformers' GPT-J."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gptj import modeling_gptj as gptj

from training.data.batching import Documents, document_lengths, offsets


@dataclass(frozen=True)
class PackedLayout:
    """Data of a packed row that every layer needs; computed once per forward.

    Attributes:
        lengths: tokens of each document, in order.
        offsets: `(documents + 1,) int32` on the device for one kernel call a layer; None for one call per document.
        sin, cos: `(1, tokens, 1, rotary dimensions)` in the dtype of the hidden states.
        keep: `(kept,) int64`, positions whose hidden states the layer returns; None for all.
    """

    lengths: Sequence[int]
    offsets: torch.Tensor | None
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


def varlen_obstacle(device: torch.device, dtype: torch.dtype, head_size: int, dropout: float) -> str | None:
    """Why attention cannot be one call of `varlen_attn` (FlashAttention-2 for rows of any length); None if it can."""
    if device.type != "cuda" or torch.version.hip:
        return "it needs an NVIDIA GPU"
    if _varlen_attn() is None or not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} does not have it"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {dtype}"
    if head_size > 256 or head_size % 8:
        return f"it needs a head size of at most 256, divisible by 8, not {head_size}"
    return "it has no dropout" if dropout else None


@cache
def _varlen_attn() -> Callable[..., Any] | None:
    """torch's function for causal attention within the documents of a packed row; None if this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    # Versions without window_size mark causal attention in another way.
    return varlen_attn if "window_size" in signature(varlen_attn).parameters else None


def attend_in_one_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int
) -> torch.Tensor:
    """Causal attention within each document of a packed row, where `varlen_obstacle` finds none.

    All tensors are `(1, tokens, heads, head size)`; `offsets (documents + 1,) int32` is on their device. `longest` is the
    length of the longest document.
    """
    varlen_attn = _varlen_attn()
    assert varlen_attn is not None
    # Under autocast the rotated heads are float32, and only torch's own functions are cast.
    heads = [tensor[0].to(value.dtype) for tensor in (query, key, value)]
    return varlen_attn(*heads, offsets, offsets, longest, longest, window_size=(-1, 0))[None]


def attend_document_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention within each document of a packed row. All tensors are `(1, tokens, heads, head size)`.

    One kernel call per document. On CPU this is 1.8 to 20 times as fast, forward and backward, as one call on
    rows unpacked to (documents, longest): it computes no padding and copies nothing but its result.
    """
    queries, keys, values = (
        heads.transpose(1, 2).split(list(lengths), dim=2) for heads in (query, key, value)
    )
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
            if layout.offsets is None:
                attended = attend_document_by_document(query, key, value, layout.lengths, dropout)
            else:
                attended = attend_in_one_call(query, key, value, layout.offsets, max(layout.lengths))
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
        cu_seq_lens_q: torch.Tensor | None = None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like GPTJModel.forward, but `position_ids (1, tokens)` without an attention mask mean a packed row.

        `keep (kept,) int64` selects positions of a packed row, and the hidden states are then `(1, kept, width)`. A call
        with a cache is not a packed row: transformers' generation passes a mask or a cache. `cu_seq_lens_q` and
        `documents` are those of the collator. Without them the positions are read, and on a GPU that is a wait.
        """
        other_inputs = [kwargs.get(name) for name in ("attention_mask", "past_key_values", "token_type_ids")]
        plain = all(value is None for value in other_inputs) and not kwargs.get("use_cache")
        if plain and input_ids is not None and position_ids is not None and len(position_ids) == 1:
            lengths = document_lengths(position_ids) if documents is None else documents.lengths
            if cu_seq_lens_q is None:
                cu_seq_lens_q = offsets(lengths, position_ids.device)
            return self._forward_packed(input_ids, position_ids, keep, lengths, cu_seq_lens_q)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)

    def _forward_packed(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        keep: torch.Tensor | None,
        lengths: Sequence[int],
        cu_seq_lens: torch.Tensor,
    ) -> BaseModelOutputWithPast:
        """Hidden states `(1, tokens, width)` of a packed row `(1, tokens)`, or `(1, kept, width)`."""
        hidden_states = self.drop(self.wte(input_ids))
        sin, cos = rotary_sin_cos(self.h[0].attn.embed_positions, position_ids, hidden_states.dtype)
        kind, dtype = hidden_states.device.type, hidden_states.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        dropout = self.config.attn_pdrop if self.training else 0.0
        obstacle = varlen_obstacle(hidden_states.device, dtype, self.h[0].attn.head_dim, dropout)
        layout = PackedLayout(lengths, cu_seq_lens if obstacle is None else None, sin, cos)
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
