"""The planner: memory of each GPU and tokens per second of a run, estimated from its shape before anything is bought.

An estimate, and it says so: sums of what must be held and of what must be computed, with no measurement behind them.
What allocators, communication buffers and fragmentation add is not in it.
"""

from dataclasses import dataclass

from transformers import LlamaConfig

from lemur_fast.training.activations import Mode
from lemur_fast.training.flops import key_value_heads, matrix_parameters, model_flops, peak_of

MEMORY_GIB = {"A100": 80, "H100": 80, "H200": 141, "B200": 180, "L40S": 48, "RTX 4090": 24, "MI300X": 192}
"""Memory of a device: of the larger model where there are two."""
LOSS_LOGITS = 2**27
"""Logits that the fused loss holds at a time, in 16 bits."""


@dataclass(frozen=True)
class Plan:
    """An estimate; sizes in bytes of one GPU."""

    parameters: int
    gpus: int
    shards: int
    device: str
    parts: dict[str, float]
    """What memory goes to."""
    flops_per_token: float
    mfu: float
    peak: float
    checkpoint: float
    """Bytes of one checkpoint on the disk."""

    @property
    def memory(self) -> float:
        """Bytes of one GPU, all together."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.mfu * self.peak / self.flops_per_token

    def describe(self, run_tokens: int) -> str:
        """A table for people; `run_tokens` is the length of the run."""
        gib = {name: size / 2**30 for name, size in self.parts.items()}
        total, room = self.memory / 2**30, MEMORY_GIB.get(self.device)
        speed = self.tokens_per_second
        fits = "" if room is None else f" of {room}" if total < 0.9 * room else f" of {room}: DOES NOT FIT"
        lines = [
            "This is an estimate from the model's shape; nothing was run. Leave a tenth of the memory free.",
            f"model      {self.parameters:,} parameters, {self.flops_per_token / 1e9:,.1f} GFLOP a token",
            f"processes  {self.gpus} x {self.device}, {self.shards} to one copy of the model",
            *(f"           {size:8.2f} GiB  {name}" for name, size in gib.items()),
            f"memory     {total:8.2f} GiB  a GPU{fits}",
            f"speed      {speed:,.0f} tokens/s a GPU, {speed * self.gpus:,.0f} in all, at an assumed MFU of "
            f"{self.mfu:.0%} of {self.peak / 1e12:,.0f} TFLOP/s",
            f"run        {run_tokens:,} tokens in {run_tokens / speed / self.gpus / 86400:,.2f} days",
            f"checkpoint {self.checkpoint / 1e9:,.1f} GB each",
        ]
        return "\n".join(lines)


def plan(
    config: LlamaConfig,
    *,
    gpus: int,
    shard_size: int | None,
    seq_len: int,
    micro_batches: int,
    checkpointing: Mode,
    sync_every: bool,
    device: str,
    mfu: float,
) -> Plan:
    """Estimate one step of `micro_batches` rows of `seq_len` tokens on each of `gpus` GPUs.

    Args:
        config: of the model.
        gpus: processes of the run.
        shard_size: processes that share one copy; None for all.
        seq_len: tokens of a row.
        micro_batches: rows of a process in a step.
        checkpointing: of activations.
        sync_every: whether gradients are reduced after every micro-batch.
        device: a name of `PEAKS`.
        mfu: share of the peak that is assumed to be reached.

    Raises:
        ValueError: the device has no known peak, or a number is out of range.
    """
    peak = peak_of(device)
    if peak is None:
        raise ValueError(f"--plan-device {device}: no datasheet's peak is known for it")
    if not 0 < mfu <= 1:
        raise ValueError(f"--plan-mfu must be above 0 and at most 1, got {mfu}")
    if gpus < 1 or gpus % (shard_size or gpus):
        raise ValueError(f"--plan-gpus must be at least 1 and a multiple of --shard-size, got {gpus}")
    shards = shard_size or gpus
    h, i, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or h // config.num_attention_heads
    q, k = head * config.num_attention_heads, head * key_value_heads(config)
    in_layers, output = matrix_parameters(config)
    ends = output if config.tie_word_embeddings else 2 * output
    parameters = in_layers + ends + (2 * layers + 1) * h
    layer = in_layers / layers + 2 * h

    # Elements that a layer keeps of a token for its backward: two norms' inputs, q, k, v and attention's output,
    # gate and up. Selective: its input, attention's output and every second product (q, v, gate, down).
    whole = 2 * h + 2 * q + 2 * k + 2 * i
    kept = {"none": whole, "full": h, "selective": h + 2 * q + k + i + h}[checkpointing]
    once = 0 if checkpointing == "none" else whole  # the layer that is being computed again
    whole_gradients = micro_batches > 1 and not sync_every
    gathered = ends + (2 * layer if shards > 1 and (sync_every or micro_batches == 1) else in_layers)
    parts = {
        "weights, float32": 4 * parameters / shards,
        "gradients, float32": 4 * parameters / shards,
        "optimizer, float32": 8 * parameters / shards,
        "gathered weights, bfloat16": 2 * gathered,
        "gradients on their way, float32": 4 * (parameters if whole_gradients else ends + 2 * layer),
        "activations, bfloat16": 2 * seq_len * (kept * layers + once + 4 * h),
        "loss: logits and the output layer's gradient": 2 * LOSS_LOGITS + 4 * output,
    }
    flops = model_flops(config, [seq_len], seq_len) / seq_len  # of documents that fill a row
    return Plan(parameters, gpus, shards, device, parts, flops, mfu, peak, 12.0 * parameters)
