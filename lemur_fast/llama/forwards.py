"""The forwards that `accelerate` puts on the modules of a LLaMA, from the leaves to the root.

They keep Hugging Face's signatures and, to whoever calls or watches a module, its results. Inside they differ in
layout:

- The layers see only real tokens: the input is unpadded once behind the embedding, as a packed batch is from the start.
- The results of a layer's norms are not kept for backward, which makes them again from what the norms keep.
- Both residual additions of a layer run inside the RMSNorm that follows them. A layer therefore hands on the pair
  (branch, stream) whose sum is Hugging Face's hidden state, and the next layer's first norm, or the last norm of the
  model, adds them. Under gradient checkpointing it hands on the sum, which is half of what the pair would keep.
- The loss is taken from the hidden states by the output layer itself, so that no logits are held while training and,
  under FSDP2, the weight is whole when it is read.

Where someone watches the modules inside the model, both layouts give way to Hugging Face's.

Shape suffixes used here: B rows, T tokens of a row, P tokens that the layers see, H hidden size, D head dimension.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from lemur_fast import ops
from lemur_fast.llama.binding import (
    CACHE,
    DTensor,
    FSDPModule,
    describe,
    every_module_is_watched,
    is_replaced_by,
    is_watched,
    own_forward,
)
from lemur_fast.llama.documents import (
    Documents,
    find_documents,
    positions_in_documents,
    targets_within_documents,
)
from lemur_fast.ops import _products
from lemur_fast.ops._loss import LossStats, only_rows
from lemur_fast.ops.rms_norm import Normed
from lemur_fast.ops.swiglu import swiglu_linear

_STOCK_LINEAR = nn.Linear.forward  # some tools replace it for all

LOSSES = frozenset(("linear_cross_entropy", "cross_entropy"))
SILU = (nn.SiLU, SiLUActivation)
"""The classes of the activation that swiglu computes."""

# Older releases of transformers checkpoint a layer in its __call__, which is not replaced here.
_LAYER_CHECKPOINTS_ITSELF = "__call__" in vars(GradientCheckpointingLayer)


@dataclass(frozen=True)
class Options:
    """What `accelerate` was asked for.

    Attributes:
        ops: names of the ops in use.
        return_logits: whether a training call with labels returns logits too.
    """

    ops: frozenset[str]
    return_logits: bool


# ---- norms, MLP, attention -------------------------------------------------------------------------------------------


def norm_forward(
    self: LlamaRMSNorm, hidden_states: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``LlamaRMSNorm.forward``; with `residual` the sum is normalised, and returned as second result."""
    weight = _whole_weight(self)
    if residual is None:
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon)
    return ops.rms_norm(hidden_states, weight, self.variance_epsilon, residual=residual)


def linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """``nn.Linear.forward`` where products of bfloat16 are taken in float32."""
    if is_traceable_wrapper_subclass(self.weight):  # quantized, or a DTensor
        return F.linear(input, self.weight, self.bias)
    return _products.linear(input, self.weight, self.bias)


def mlp_forward(self: LlamaMLP, x: Tensor, normed: Normed | None = None) -> Tensor:
    """``LlamaMLP.forward``; `normed` is what `x` was made of."""
    if type(self.act_fn) not in SILU or is_watched(self.act_fn):  # put there later: accelerate has checked
        return type(self).forward(self, x)
    gate, up = _project(x, self.gate_proj, self.up_proj, normed=normed)
    down = self.down_proj
    if _is_only_its_product(down):
        return swiglu_linear(gate, up, down.weight, down.bias)
    return down(ops.swiglu(gate, up))


def _project(x: Tensor, *modules: nn.Module, normed: Normed | None = None) -> tuple[Tensor, ...]:
    """What each of them makes of `x`, which was made of `normed`."""
    if all(_is_only_its_product(module) and module.bias is None for module in modules):
        return _products.linears(x, [module.weight for module in modules], normed)  # type: ignore[misc]
    return tuple(module(x) for module in modules)


def _is_only_its_product(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but a linear layer's product, of a whole weight that is here."""
    return (
        type(module) is nn.Linear
        and (own_forward(module) is None or is_replaced_by(module, linear_forward))
        and not any((module._forward_pre_hooks, module._forward_hooks))
        and not any((module._backward_pre_hooks, module._backward_hooks))
        and not every_module_is_watched()
        and type(module.weight) in (nn.Parameter, Tensor)  # a subclass may have a product of its own
        and nn.Linear.forward is _STOCK_LINEAR
    )


def attention_forward(
    self: LlamaAttention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    *,
    options: Options,
    cu_seqlens: Tensor | None = None,
    record_weights: Callable[[Tensor], None] | None = None,
    normed: Normed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``LlamaAttention.forward``: with `cu_seqlens` inside documents, else Hugging Face's attention (cache, mask).

    Args:
        self: the attention module.
        hidden_states: ``[B, T, H]``, or ``[P, H]``; then cos and sin say what B and T are.
        position_embeddings: cos and sin, each ``[B, T, D]``.
        attention_mask: as `create_causal_mask` makes it; without `cu_seqlens` only.
        past_key_values: the KV cache; without `cu_seqlens` only.
        options: what `accelerate` was asked for.
        cu_seqlens: ``[N + 1]`` int32.
        record_weights: called with the attention weights where the implementation returns them.
        normed: what `hidden_states` was made of.
        **kwargs: passed on to the attention implementation.
    """
    cos, sin = position_embeddings
    batch_shape = cos.shape[:-1] if hidden_states.dim() == 2 else hidden_states.shape[:-1]
    q, k, v = (  # each [P, heads, D]
        x.flatten(0, -2).unflatten(-1, (-1, self.head_dim))
        for x in _project(hidden_states, self.q_proj, self.k_proj, self.v_proj, normed=normed)
    )
    cos, sin = (table.expand(*batch_shape, -1).flatten(0, -2) for table in (cos, sin))
    if "rotary" in options.ops:
        q, k = ops.rotary(q, k, cos, sin)
    else:
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    weights = None
    if cu_seqlens is not None:
        if (
            kwargs.get("is_causal") is not None
        ):  # no caller here says so: accelerate's hook for context parallelism does
            raise TypeError("context parallelism: lemur_fast's attention sees one rank's tokens only, so it is refused")
        out: Any = ops.attention(q, k, v, cu_seqlens, causal=True, scale=self.scaling)
    else:
        q, k, v = (x.unflatten(0, batch_shape).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, D]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        if record_weights is not None and weights is not None:
            record_weights(weights)
    (out,) = _project(out.reshape(*hidden_states.shape[:-1], out.shape[-2] * out.shape[-1]), self.o_proj)
    return out, weights


# ---- the layer -------------------------------------------------------------------------------------------------------


def layer_forward(
    self: LlamaDecoderLayer,
    hidden_states: Tensor,
    residual: Tensor | None = None,
    *,
    fused: bool = False,
    hands_on: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``LlamaDecoderLayer.forward``, with residual additions inside the norms where `fused`.

    Args:
        self: the layer.
        hidden_states: the previous layer's branch, or the hidden state where `residual` is None.
        residual: the previous layer's stream. Positional, because reentrant checkpointing differentiates only those.
        fused: add inside the norms.
        hands_on: return (branch, stream) for the next norm to add, instead of their sum.
        **kwargs: passed on to the attention module.
    """
    if residual is not None and not fused:
        raise TypeError("LlamaDecoderLayer.forward: pass every argument but hidden_states by its name")
    run = functools.partial(_run_layer, self, fused=fused, hands_on=hands_on, **kwargs)
    if self.gradient_checkpointing and self.training and not _LAYER_CHECKPOINTS_ITSELF:
        checkpoint: Callable = self._gradient_checkpointing_func  # type: ignore[assignment]
        return checkpoint(run, hidden_states, residual)
    return run(hidden_states, residual)  # type: ignore[call-arg]


def _run_layer(
    self: LlamaDecoderLayer,
    hidden_states: Tensor,
    residual: Tensor | None,
    *,
    fused: bool,
    hands_on: bool,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    if not fused:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
    if residual is None:
        stream, x = hidden_states, self.input_layernorm(hidden_states)
    else:
        x, stream = self.input_layernorm(residual, residual=hidden_states)
    attended, _ = self.self_attn(
        hidden_states=x, **_made_of(stream, self.input_layernorm, self.self_attn, attention_forward), **kwargs
    )
    x, stream = self.post_attention_layernorm(stream, residual=attended)
    branch = self.mlp(x, **_made_of(stream, self.post_attention_layernorm, self.mlp, mlp_forward))
    return (branch, stream) if hands_on else stream + branch


def _made_of(stream: Tensor, norm: nn.Module, module: nn.Module, forward: Callable) -> dict[str, Normed]:
    """The argument that tells `module`, where it runs `forward`, what `norm` made its input of."""
    # Sharded apart from their layer, a norm's weight is gone again until its own backward, and FSDP2 casts what goes in
    # and out of either.
    apart = isinstance(norm, FSDPModule) or isinstance(module, FSDPModule)
    if apart or not is_replaced_by(module, forward) or type(module).__call__ is not nn.Module.__call__:
        return {}
    return {"normed": Normed(stream, norm.weight, norm.variance_epsilon)}  # type: ignore[arg-type]


# ---- the model -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How one call runs, settled at its entry.

    Attributes:
        documents: where documents lie; None while a KV cache is in play.
        packed: the same where layers attend inside documents by `ops.attention`; None for Hugging Face's attention.
        watched: whether the modules inside must see Hugging Face's shapes and values.
    """

    documents: Documents | None
    packed: Documents | None
    watched: bool


_DOCUMENT_ARGUMENTS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# Longest documents: known to the kernels without being told.
_SUPERFLUOUS_ARGUMENTS = ("max_length_q", "max_length_k")
_OUTPUT_ARGUMENTS = ("output_hidden_states", "output_attentions", "return_dict")
# Accepted with the values that LLaMA has anyway.
_FIXED_ARGUMENTS = {"is_causal": (None, True), "output_router_logits": (None, False)}


def model_forward(
    self: LlamaModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    *,
    options: Options,
    plan: Plan | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast | tuple:
    """``LlamaModel.forward``; also takes documents (see `documents`), and skips padding.

    Hidden states come back in Hugging Face's shape, with zeros at padding that was skipped. Only a caller who passes
    `plan` gets the tokens as the layers saw them: ``[1, P, H]`` where the plan has rows.
    """
    _check_arguments("LlamaModel", kwargs)
    outputs = _requested_outputs(self, kwargs)
    as_planned = plan is not None
    batch_shape, device = _input_shape(input_ids, inputs_embeds)
    if inputs_embeds is None:
        inputs_embeds = self.embed_tokens(input_ids)
    if plan is None:
        plan = plan_call(
            self, options, batch_shape, device, attention_mask, position_ids, past_key_values, use_cache, kwargs
        )
    documents, packed, watched = plan

    if documents is None and past_key_values is None:
        past_key_values = DynamicCache(config=self.config)
    if packed is not None:
        hidden_states = inputs_embeds if watched else packed.take(inputs_embeds)
        positions, mask = packed.position_ids, None
    else:
        hidden_states = inputs_embeds if watched else inputs_embeds.flatten(0, 1)
        positions = _hf_positions(batch_shape, device, position_ids, past_key_values, documents)
        mask = _hf_mask(self, inputs_embeds, attention_mask, past_key_values, documents)

    attentions: list[Tensor] = []
    arguments: dict[str, Any] = {
        "attention_mask": mask,
        "position_ids": positions,
        CACHE: past_key_values,
        "use_cache": documents is None,
        "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=positions),
    }
    if packed is not None:
        arguments["cu_seqlens"] = packed.cu_seqlens
    if outputs.attentions:
        # A bound method, because FSDP2 copies lists among a layer's arguments.
        arguments |= {"record_weights": attentions.append, "output_attentions": True}

    def in_shape(x: Tensor) -> Tensor:
        if x.dim() == 3:
            return x
        return x.unflatten(0, batch_shape) if packed is None else packed.put_back(x)

    states: list[Any] = []  # None where a state was not selected
    fused = not watched and not outputs.hidden_states and _norms_can_add(self)
    # A checkpointed layer keeps what it is handed: the sum is half of the pair.
    hands_on = fused and not (self.gradient_checkpointing and self.training)
    residual = None
    for layer in self.layers[: self.config.num_hidden_layers]:
        if outputs.hidden_states:
            states.append(in_shape(hidden_states) if outputs.selects(len(states)) else None)
        if hands_on:
            hidden_states, residual = layer(hidden_states, residual, fused=True, hands_on=True, **arguments)
        else:
            # A forward that someone put there does not know the word.
            hidden_states = layer(hidden_states, **({"fused": True} if fused else {}), **arguments)
    if residual is None:
        hidden_states = self.norm(hidden_states)
    else:
        hidden_states, _ = self.norm(residual, residual=hidden_states)
    if outputs.hidden_states:
        states.append(in_shape(hidden_states) if outputs.selects(len(states)) else None)
    stays_unpadded = as_planned and packed is not None and packed.rows is not None
    hidden_states = hidden_states[None] if stays_unpadded else in_shape(hidden_states)
    result = BaseModelOutputWithPast(
        last_hidden_state=hidden_states,
        hidden_states=tuple(states) if outputs.hidden_states else None,
        attentions=tuple(attentions) if outputs.attentions else None,
        **{CACHE: past_key_values},
    )
    return result if outputs.as_dict else result.to_tuple()


def plan_call(
    self: LlamaModel,
    options: Options,
    batch_shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    arguments: dict[str, Any],
) -> Plan:
    """Settles how a call of the LlamaModel `self` runs. `arguments` are the call's further keyword arguments."""
    watched = _is_watched_inside(self)
    stated = {name: arguments[name] for name in _DOCUMENT_ARGUMENTS if arguments.get(name) is not None}
    asks_for_cache = bool(use_cache) or past_key_values is not None
    if asks_for_cache and self.training and self.gradient_checkpointing:
        if past_key_values is not None:
            raise ValueError("past_key_values: got a cache while gradient checkpointing; it would be filled twice")
        _warn_once("use_cache=True while gradient checkpointing: no cache is filled (Hugging Face does the same)")
        asks_for_cache, use_cache = False, False
    if asks_for_cache and stated:
        raise ValueError(f"{next(iter(stated))}: got documents beside a KV cache; pass use_cache=False and no cache")
    if use_cache is None and not stated:
        # The configuration's default is meant for generation: training never reads the cache it would fill.
        asks_for_cache = asks_for_cache or (bool(self.config.use_cache) and not self.training)

    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: got {type(attention_mask).__name__}; takes a tensor")
    rows_masked = attention_mask is None or attention_mask.dim() == 2
    if asks_for_cache and position_ids is not None and rows_masked and past_key_values is None:
        # Among real tokens alone: what a mask leaves out may have any position. Under torch.compile the answer is that
        # they may restart, because looking would break the graph.
        restart = find_documents(
            batch_shape, device, attention_mask=attention_mask, position_ids=position_ids
        ).split_rows
        if restart and use_cache is None:
            asks_for_cache = False
        elif restart:
            may = "may restart (torch.compile cannot look)" if torch.compiler.is_compiling() else "restart"
            raise ValueError(f"position_ids: they {may}, which says documents, beside use_cache=True; pass False")
    if asks_for_cache:
        return Plan(None, None, watched)

    documents = find_documents(batch_shape, device, attention_mask=attention_mask, position_ids=position_ids, **stated)
    packed = (
        "attention" in options.ops
        and not _requested_outputs(self, arguments).attentions
        and (attention_mask is None or attention_mask.dim() == 2)
        and not (watched and documents.rows is not None)
    )
    implementation = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
    if packed and getattr(implementation, "__module__", "").startswith("deepspeed."):
        raise TypeError("DeepSpeed's sequence parallelism: lemur_fast's attention sees one rank's tokens only")
    if packed and self.training and self.config.attention_dropout:
        raise ValueError(
            f"config.attention_dropout: got {self.config.attention_dropout}; lemur_fast's attention has no dropout. "
            'Set it to 0, or leave "attention" out of accelerate(ops=...)'
        )
    return Plan(documents, documents if packed else None, watched)


def _hf_positions(
    batch_shape: tuple[int, int],
    device: torch.device,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    documents: Documents | None,
) -> Tensor:
    """``[B, T]`` positions where Hugging Face's attention runs."""
    if position_ids is None and documents is not None and documents.rows is None:
        position_ids = documents.position_ids
    if position_ids is None:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = (torch.arange(batch_shape[1], device=device) + seen)[None]
    return position_ids.expand(batch_shape)


def _hf_mask(
    self: LlamaModel,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    documents: Documents | None,
) -> Any:
    """The mask of Hugging Face's attention, of whatever kind the configured implementation takes."""
    positions = None
    if documents is not None and documents.split_rows:
        if attention_mask is not None and attention_mask.dim() == 2:
            raise ValueError(
                "position_ids: they restart beside an attention_mask, which only lemur_fast's attention can honour; it "
                "does not run here (output_attentions, a hook inside the model, or ops without attention)"
            )
        if attention_mask is None:  # Hugging Face tells documents by positions that restart
            tokens = documents.batch_shape[0] * documents.batch_shape[1]
            positions = positions_in_documents(documents.cu_seqlens, tokens).view(documents.batch_shape)
    return create_causal_mask(
        config=self.config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=positions,
        **{CACHE: past_key_values},
    )


# ---- the language model ----------------------------------------------------------------------------------------------


def head_forward(self: nn.Linear, hidden_states: Tensor, loss: Callable[..., Tensor] | None = None) -> Tensor:
    """``lm_head.forward``; `loss` is called with (hidden_states, weight, bias=) and its result returned.

    Going through the module's call lets FSDP2 gather the weight first. `loss` is opaque to FSDP2, which would round
    any floating tensor among the arguments, such as a token count.
    """
    if loss is None:
        return linear_forward(self, hidden_states)
    return loss(hidden_states, _whole_weight(self), bias=self.bias)


def causal_lm_forward(
    self: LlamaForCausalLM,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    *,
    options: Options,
    cu_seqlens: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | float | int | None = None,
    trained_rows: Tensor | None = None,
    ignore_index: int = -100,
    record_stats: Callable[[LossStats], None] | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast | tuple:
    """``LlamaForCausalLM.forward``; also takes documents, and what `PackedBatch.model_inputs` gives.

    The loss is Hugging Face's, except that a token whose target lies outside its document predicts nothing.
    `record_stats` is called with the `LossStats` of the tokens that the layers saw, for figures of single tokens.
    """
    kwargs["cu_seqlens"] = cu_seqlens
    _check_arguments("LlamaForCausalLM", kwargs)
    outputs = _requested_outputs(self, kwargs)
    batch_shape, device = _input_shape(input_ids, inputs_embeds)
    has_labels = labels is not None or shift_labels is not None
    for name, given in (("trained_rows", trained_rows), ("record_stats", record_stats)):
        if not has_labels and given is not None:
            raise ValueError(f"{name}: got a value without labels or shift_labels")
    if has_labels and use_cache is None and past_key_values is None:
        use_cache = False  # nobody decodes on from a call that is scored
    plan = plan_call(
        self.model, options, batch_shape, device, attention_mask, position_ids, past_key_values, use_cache, kwargs
    )
    base = self.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        plan=plan,
        **(kwargs | {"return_dict": True}),
    )
    hidden_states = base.last_hidden_state
    unpadded = plan.packed if plan.packed is not None and plan.packed.rows is not None else None

    logits = loss = None
    returns_logits = not (has_labels and self.training) or options.return_logits
    head_is_watched = has_labels and is_watched(self.lm_head)
    if head_is_watched and not returns_logits:
        _announce_logits(self, options)
    if returns_logits or head_is_watched:
        in_shape = hidden_states if unpadded is None else unpadded.put_back(hidden_states[0])
        logits = self.lm_head(_keep(in_shape, logits_to_keep))
    if has_labels:
        all_logits = logits if isinstance(logits_to_keep, int) and logits_to_keep == 0 else None
        targets = Targets(
            labels=_targets(labels, shift_labels, batch_shape, device, plan.documents, ignore_index),
            rows=_checked_rows(trained_rows, plan.documents, device),
            num_items=_checked_count(num_items_in_batch),
            ignore_index=ignore_index,
            record_stats=record_stats,
        )
        loss = _loss(
            self,
            options,
            _seen_by_layers(hidden_states, plan.documents) if unpadded is None else hidden_states[0],
            None if all_logits is None else _seen_by_layers(all_logits, plan.documents),
            targets,
        )
    result = CausalLMOutputWithPast(
        loss=loss,
        logits=logits if returns_logits else None,
        hidden_states=base.hidden_states,
        attentions=base.attentions,
        **{CACHE: getattr(base, CACHE)},
    )
    return result if outputs.as_dict else result.to_tuple()


class Targets(NamedTuple):
    """What a loss is taken against.

    Attributes:
        labels: ``[P]``: the target of every token that the layers saw.
        rows: ``[R]``, the only tokens that train; None for all that have a target.
        num_items: what the sum is divided by; None for the number of targets.
        ignore_index: the label of a token without a target.
        record_stats: called with the statistics of every token; None for nobody.
    """

    labels: Tensor
    rows: Tensor | None
    num_items: Tensor | float | int | None
    ignore_index: int
    record_stats: Callable[[LossStats], None] | None


def _loss(
    self: LlamaForCausalLM, options: Options, hidden_states: Tensor, logits: Tensor | None, targets: Targets
) -> Any:
    """The loss of ``hidden_states [P, H]``, from ``logits [P, V]`` where they are at hand."""
    if not options.ops.isdisjoint(LOSSES):
        check_loss_function(self)
    labels, rows, num_items, ignore_index, record_stats = targets
    if logits is None and "linear_cross_entropy" in options.ops:
        loss: Callable[..., Any] = functools.partial(
            _recorded,
            ops.linear_cross_entropy,
            record_stats,
            labels=labels,
            rows=rows,
            num_items=num_items,
            ignore_index=ignore_index,
        )
        if _head_takes_loss(self.lm_head):
            return self.lm_head(hidden_states, loss=loss)
        if type(self.lm_head) is nn.Linear and not is_watched(self.lm_head):
            return head_forward(self.lm_head, hidden_states, loss)  # put there later, by resize_token_embeddings
        _announce_logits(self, options)
    if logits is None:
        logits = self.lm_head(hidden_states)
    labels = only_rows(labels, rows, ignore_index)
    if options.ops.isdisjoint(LOSSES):
        if record_stats is not None:
            raise ValueError("record_stats: the losses of lemur_fast give statistics; ops leaves out both")
        return self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=labels,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items,
            ignore_index=ignore_index,
        )
    return _recorded(ops.cross_entropy, record_stats, logits, labels, num_items=num_items, ignore_index=ignore_index)


def check_loss_function(self: LlamaForCausalLM) -> None:
    """Refuses a loss that is not the one that ours compute."""
    if self.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"model.loss_function: got {describe(self.loss_function)}; cross_entropy and linear_cross_entropy compute "
            "Hugging Face's ForCausalLMLoss. Leave both out of ops to keep yours"
        )


def _announce_logits(self: LlamaForCausalLM, options: Options) -> None:
    if "linear_cross_entropy" in options.ops:
        _warn_once(
            f"lm_head has an adapter, a hook or a forward of its own ({_full_name(type(self.lm_head))}): the loss is "
            "taken from logits held in memory, by cross_entropy"
        )


def _recorded(
    loss: Callable[..., Any], record_stats: Callable[[LossStats], None] | None, *args: Any, **options: Any
) -> Any:
    """Calls `loss`, and `record_stats` with what it says of every token, where that is wanted."""
    if record_stats is None:
        return loss(*args, **options)
    value, stats = loss(*args, return_stats=True, **options)
    record_stats(stats)
    return value


def _head_takes_loss(head: Any) -> bool:
    """Whether calling `head` with a loss reaches `head_forward`, with nobody on the way who expects logits."""
    if is_watched(head):
        return False
    copies = head._modules.get("modules_to_save")
    if copies is not None:  # PEFT's wrapper around a fully trained module hands all arguments on to one of its copies
        adapters = [] if head.disable_adapters else head.active_adapters
        return _head_takes_loss(copies[adapters[0]] if adapters else head.original_module)
    return is_replaced_by(head, head_forward)


# ---- helpers ---------------------------------------------------------------------------------------------------------


class RequestedOutputs(NamedTuple):
    """What a call returns beside hidden states or logits."""

    hidden_states: bool
    selected_states: frozenset[int] | None
    attentions: bool
    as_dict: bool

    def selects(self, index: int) -> bool:
        """Whether the hidden state of this index is wanted."""
        return self.selected_states is None or index in self.selected_states


def _requested_outputs(self: PreTrainedModel, arguments: dict[str, Any]) -> RequestedOutputs:
    """Reads output_hidden_states, output_attentions and return_dict; what is not given, the configuration says."""
    hidden_states, attentions, as_dict = (
        getattr(self.config, name, None) if arguments.get(name) is None else arguments[name]
        for name in _OUTPUT_ARGUMENTS
    )
    selected = None
    if hidden_states is not None and not isinstance(hidden_states, bool):
        count = self.config.num_hidden_layers + 1
        indices = [hidden_states] if isinstance(hidden_states, int) else hidden_states
        selected = frozenset(index % count for index in indices if -count <= index < count)
        hidden_states = True
    return RequestedOutputs(bool(hidden_states), selected, bool(attentions), as_dict is not False)


def _check_arguments(owner: str, arguments: dict[str, Any]) -> None:
    known = {*_DOCUMENT_ARGUMENTS, *_SUPERFLUOUS_ARGUMENTS, *_OUTPUT_ARGUMENTS, *_FIXED_ARGUMENTS}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise TypeError(
            f"{owner}.forward: got unexpected argument {', '.join(unknown)}; beside Hugging Face's own it takes "
            f"{', '.join(sorted(known))}"
        )
    for name, values in _FIXED_ARGUMENTS.items():
        if name in arguments and arguments[name] not in values:
            raise ValueError(f"{name}: got {arguments[name]}; an accelerated LLaMA takes {values[1]} only")


def _input_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[tuple[int, int], torch.device]:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids, inputs_embeds: takes exactly one of them")
    name, given, layout = (
        ("input_ids", input_ids, "[B, T]") if inputs_embeds is None else ("inputs_embeds", inputs_embeds, "[B, T, H]")
    )
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(given).__name__}; takes a tensor {layout}")
    if given.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: got shape {list(given.shape)}; takes {layout}")
    return (given.shape[0], given.shape[1]), given.device


def _seen_by_layers(x: Tensor, documents: Documents | None) -> Tensor:
    """``[B, T, ...] -> [P, ...]``."""
    return x.flatten(0, 1) if documents is None else documents.take(x)


def _targets(
    labels: Tensor | None,
    shift_labels: Tensor | None,
    batch_shape: tuple[int, int],
    device: torch.device,
    documents: Documents | None,
    ignore_index: int,
) -> Tensor:
    """``[P]``: the target of every token that the layers saw."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(given).__name__}; takes a tensor {list(batch_shape)}")
    if tuple(given.shape) != batch_shape:
        raise ValueError(f"{name}: got shape {list(given.shape)}; takes {list(batch_shape)}, the shape of the input")
    given = given.to(device)
    shifted = F.pad(given, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else given
    return shifted.flatten() if documents is None else targets_within_documents(shifted, documents, ignore_index)


def _checked_rows(trained_rows: Tensor | None, documents: Documents | None, device: torch.device) -> Tensor | None:
    if trained_rows is None:
        return None
    if not isinstance(trained_rows, Tensor):
        raise TypeError(f"trained_rows: got {type(trained_rows).__name__}; takes an int32 tensor [R]")
    if trained_rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"trained_rows: got dtype {trained_rows.dtype}; takes int32 or int64 (indices, not a mask)")
    if trained_rows.dim() != 1:
        raise ValueError(f"trained_rows: got shape {list(trained_rows.shape)}; takes [R]")
    if trained_rows.device != device:
        raise ValueError(f"trained_rows: got device {trained_rows.device}; takes {device}, where the input is")
    if documents is not None and documents.rows is not None:
        raise ValueError("trained_rows: got it beside padding in attention_mask; takes a packed batch")
    return trained_rows


def _checked_count(num_items: Tensor | float | int | None) -> Tensor | float | int | None:
    if isinstance(num_items, Tensor) and num_items.dtype in (torch.bfloat16, torch.float16):
        _warn_once(
            f"num_items_in_batch: got {num_items.dtype}, which rounds counts above 256. FSDP2's mixed precision casts "
            "floating inputs of the model: pass a Python number or an integer tensor"
        )
    return num_items


def _keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions of ``[B, T, H]`` to project: the last ones (0: all), or those that a tensor names.

    A tensor is ``[n]`` for all rows alike, ``[B, n]`` integers, or a ``[B, T]`` mask, whose result is ``[n, H]``.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dim() < 2:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def _is_watched_inside(self: LlamaModel) -> bool:
    """Whether a hook looks into the LlamaModel `self`; one on the embedding sees Hugging Face's shape in any case."""
    if every_module_is_watched():
        return True
    return any(is_watched(module) for module in self.modules() if module is not self.embed_tokens)


def _norms_can_add(self: LlamaModel) -> bool:
    """Whether every norm of the LlamaModel `self` takes a residual."""
    norms: list[Any] = [self.norm]
    for layer in self.layers:
        norms += (layer.input_layernorm, layer.post_attention_layernorm)
    return all(is_replaced_by(norm, norm_forward) for norm in norms)


def _whole_weight(module: nn.Module) -> Tensor:
    """The module's weight, refused where it is one rank's share of it."""
    weight = module.weight
    if isinstance(weight, DTensor):
        raise TypeError(
            f"{type(module).__name__}.weight: got a DTensor; takes a whole tensor. FSDP2 gives one inside the forward "
            "of a module it shards; tensor parallel weights are not supported"
        )
    if hasattr(weight, "ds_id"):
        raise TypeError(f"{type(module).__name__}.weight: got a DeepSpeed ZeRO-3 share, which is not supported")
    return weight


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


_announced: set[str] = set()


@torch.compiler.assume_constant_result  # runs while torch.compile traces, instead of breaking its graph
def _warn_once(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, stacklevel=3)
