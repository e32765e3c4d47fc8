"""Scaled dot-product attention, by the implementation that suits the platform and the shape.

The platform is that for which a program is lowered, not the one that lowers it: a CPU host compiles for TPUs.
`implementation` is the rule:

- TPU: `flash`, a Pallas kernel, for the UNet's attentions in bfloat16. XLA writes the float32 logits to memory, 831 MB
  for one attention of the UNet at 32 x 32 and batch 16, and reads them back; `flash` keeps them on the chip. It is our
  own and not JAX's, because heads of 64 channels fill half of a TPU's 128 lanes: JAX's kernel wants
  `[B, heads, T, 64]`, a transposed copy padded to twice the bytes. This one takes two heads at a time out of the
  `[B, T, heads * 64]` that the projections give. At the shape above an attention block by itself touches 0.8 GB with
  it, 1.6 GB with JAX's kernel, 5.2 GB with neither (v5e, XLA's count).
- CUDA: `cudnn`, cuDNN's fused kernel, for heads of at most 128 channels in bfloat16 or float16. It reads
  `[B, T, heads, 64]` as it is, and keeps the logits on the chip too, in the gradient as well.
- CPU: `by_heads` in float32, unless a head's logits are few. All heads at once take XLA three times as long
  (`tpu_scripts/results/NOTES.md`).
- Otherwise XLA: `plain`, or `in_blocks` where the logits would take more than `BLOCK_BYTES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kandinsky_jax.common.types import Array, Bool, Float

LANES = 128  # of a TPU's vector registers; the kernel's blocks are that wide, or one head where it is wider
KEEP_BYTES = 12 * 2**20  # of the 16 MB of vector memory that a kernel gets by default
LOGIT_BYTES = 6 * 2**20
HIDDEN = -1e30  # as a logit: no weight, but finite, so that a row that sees nothing is no NaN
BLOCK_BYTES = 2**28  # of float32 logits that XLA may write at a time
HEAD_LEAST_BYTES = 2**20  # of float32 logits of a head: from here on `by_heads` pays
HEAD_BLOCK_BYTES = 2**24  # of them that a CPU writes at a time
CUDNN_DIM = 128  # channels of a head that cuDNN takes on every GPU that it serves; from Hopper on it would take 256
CUDNN_CAPABILITY = 8.0  # Ampere, the first generation for which XLA has cuDNN's fused attention

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "B T N*H"]:
    """Scaled dot-product attention, softmax in float32.

    Args:
        q: `[B, T, N, H]`; k, v: `[B, S, N, H]`.
        mask: bool, broadcastable to `[B, N, T, S]`; True is visible. With one, attention is `plain`: only the prior and
            the text tower have them, over at most 81 tokens.
    Returns:
        `[B, T, N * H]`.
    """
    if mask is not None or _divided_by_xla():
        return plain(q, k, v, mask)
    default = implementation("cpu", q, k)
    special = {platform: implementation(platform, q, k) for platform in ("tpu", "cuda")}
    special = {platform: function for platform, function in special.items() if function is not default}
    return jax.lax.platform_dependent(q, k, v, default=default, **special) if special else default(q, k, v)


def implementation(
    platform: str, q: Float[Array | jax.ShapeDtypeStruct, "B T N H"], k: Float[Array | jax.ShapeDtypeStruct, "B S N H"]
) -> Attention:
    """Choose the implementation of attention without a mask, for arrays that lie whole on a device.

    Args:
        platform: for which the program is lowered: `"tpu"`, `"cuda"`, or any other of JAX's names.
        q, k: arrays or shapes, `[B, T, N, H]` and `[B, S, N, H]`.
    """
    if platform == "tpu" and query_block(q, k):
        return flash
    if platform == "cuda" and cudnn_serves(q) and has_cudnn():
        return cudnn
    if platform == "cpu" and q.dtype == jnp.float32 and _head_bytes(q, k) >= HEAD_LEAST_BYTES:
        return by_heads
    return in_blocks if logit_bytes(q, k) > BLOCK_BYTES else plain


def _divided_by_xla() -> bool:
    """Whether, in what is being traced, XLA divides arrays over devices: it cannot divide a Pallas kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in set(mesh.axis_names) - set(mesh.manual_axes))


def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "B T N*H"]:
    """`attend` by XLA, for every platform, dtype and shape."""

    def own_dtype(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)  # [B, T, N, H]

    def in_float32(*rows: jax.Array) -> jax.Array:
        return own_dtype(*(x.astype(jnp.float32) for x in rows)).astype(q.dtype)

    if q.dtype == jnp.float16:  # whose products with sums in float32 XLA's CPU compiler does not have
        out = jax.lax.platform_dependent(q, k, v, cpu=in_float32, default=own_dtype)
    else:
        out = own_dtype(q, k, v)
    return out.reshape(*out.shape[:-2], -1)


def attention_weights(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], mask: Bool[Array, "..."] | None = None
) -> Float[Array, "B N T S"]:
    """The weights of `attend`: the softmax over keys, float32 `[B, N, T, S]`.

    Args:
        q: `[B, T, N, H]`; k: `[B, S, N, H]`.
        mask: bool, broadcastable to `[B, N, T, S]`; True is visible.
    """
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, HIDDEN), axis=-1)


def logit_bytes(
    q: Float[Array | jax.ShapeDtypeStruct, "B T N H"], k: Float[Array | jax.ShapeDtypeStruct, "B S N H"]
) -> int:
    """Bytes of the float32 logits `[B, N, T, S]`."""
    return q.shape[0] * q.shape[2] * _head_bytes(q, k)


def _head_bytes(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct) -> int:
    """`logit_bytes` of one head of one example."""
    return 4 * q.shape[1] * k.shape[1]


def in_blocks(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"]
) -> Float[Array, "B T N*H"]:
    """`plain` without a mask, in blocks of queries whose logits take at most `BLOCK_BYTES`.

    A softmax is over all keys of a query, so blocks change no sum. The gradient computes each block's logits again
    instead of keeping them.
    """
    blocks = _query_blocks(q, logit_bytes(q, k), BLOCK_BYTES).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda part: plain(part, k, v)), blocks)  # [blocks, B, block, N * H]
    return out.swapaxes(0, 1).reshape(len(q), -1, out.shape[-1])[:, : q.shape[1]]


def _query_blocks(q: jax.Array, logits: int, at_most: int) -> jax.Array:
    """Divide queries `[B, T, N, H]` into `[B, blocks, block, N, H]`, filled up by zeros.

    Args:
        logits: bytes of those of all queries.
        at_most: bytes of those of a block.
    """
    batch, queries = q.shape[:2]
    blocks = min(-(-logits // at_most), queries)
    block = -(-queries // blocks)
    padded = jnp.pad(q, ((0, 0), (0, blocks * block - queries), (0, 0), (0, 0)))
    return padded.reshape(batch, blocks, block, *q.shape[2:])


def by_heads(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"]
) -> Float[Array, "B T N*H"]:
    """`plain` without a mask, one head of one example after the other, in blocks of queries as `in_blocks`."""
    batch, queries, heads, dim = q.shape
    parts = _query_blocks(q * dim**-0.5, _head_bytes(q, k), HEAD_BLOCK_BYTES)
    parts = jnp.moveaxis(parts, 3, 1).reshape(batch * heads, *parts.shape[1:3], dim)
    keys, values = (x.swapaxes(1, 2).reshape(batch * heads, -1, dim) for x in (k, v))

    def one_head(head: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = head  # [blocks, block, H], [S, H]

        @jax.checkpoint
        def one_block(q: jax.Array) -> jax.Array:
            logits = q @ k.T
            weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
            return (weights @ v) / weights.sum(axis=-1, keepdims=True)

        return jax.lax.map(one_block, q)

    out = jax.lax.map(one_head, (parts, keys, values)).reshape(batch, heads, -1, dim)
    return out[:, :, :queries].swapaxes(1, 2).reshape(batch, queries, -1)


def cudnn_serves(q: Float[Array | jax.ShapeDtypeStruct, "B T N H"]) -> bool:
    """Whether `cudnn` takes this shape and dtype, and it pays; the number of keys does not matter."""
    _, queries, _, dim = q.shape
    return q.dtype in (jnp.bfloat16, jnp.float16) and dim % 8 == 0 and dim <= CUDNN_DIM and queries >= 64


@functools.cache
def has_cudnn() -> bool:
    """Whether JAX can trace cuDNN's attention here, and no GPU of this process is too old for it.

    All branches of `platform_dependent` are traced, on every host. Without a GPU, but with JAX's CUDA plugin, a program
    that is compiled ahead is taken to be for a GPU that is new enough.
    """
    probe = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(cudnn, probe, probe, probe)
    except (RuntimeError, NotImplementedError):  # no cuDNN; a cuDNN that is too old for this GPU
        return False
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # no GPU, or JAX is kept from using it
        return True
    return all(float(device.compute_capability) >= CUDNN_CAPABILITY for device in devices)


def cudnn(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"]
) -> Float[Array, "B T N*H"]:
    """`attend` without a mask by cuDNN's fused kernel, where `cudnn_serves` and `has_cudnn` allow it.

    `jax.export` wants `DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")` for programs that have it.

    Raises:
        RuntimeError: where JAX finds no cuDNN, when it is traced.
    """
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return out.reshape(*out.shape[:-2], -1)


def attend_after(
    q: Float[Array, "B T N H"],
    past: tuple[jax.Array, jax.Array],
    k: Float[Array, "B T2 N H"],
    v: Float[Array, "B T2 N H"],
    mask: Bool[Array, "..."],
) -> Float[Array, "B T N*H"]:
    """`attend` of a few queries to keys and values that are kept, and then to new ones, without joining the two.

    Args:
        q, k, v: `[B, T, N, H]`, of the new rows.
        past: keys and values `[B, N, S, H]`, heads first: so each head's lie together.
        mask: bool `[B, 1, T, S + T]`; True is visible.
    Returns:
        `[B, T, N * H]`.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, N, T, H]
    pairs = (past, (k, v))
    logits = [jnp.einsum("bnth,bnsh->bnts", q, keys, preferred_element_type=jnp.float32) for keys, _ in pairs]
    scores = jnp.concatenate(logits, axis=-1) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, HIDDEN), axis=-1).astype(v.dtype)  # [B, N, T, S + T]
    parts = jnp.split(weights, [past[0].shape[2]], axis=-1)
    old, new = (jnp.einsum("bnts,bnsh->bnth", part, values) for part, (_, values) in zip(parts, pairs, strict=True))
    return (old + new).swapaxes(1, 2).reshape(*q.shape[:1], q.shape[2], -1)


def query_block(
    q: Float[Array | jax.ShapeDtypeStruct, "B T N H"], k: Float[Array | jax.ShapeDtypeStruct, "B S N H"]
) -> int:
    """How many queries `flash` takes at a time; 0 where it does not serve a shape or dtype, or does not pay."""
    (_, queries, heads, dim), keys = q.shape, k.shape[1]
    wide = max(dim, LANES)
    if q.dtype != jnp.bfloat16 or (LANES % dim and dim % LANES) or heads * dim % wide or queries < 64:
        return 0
    # Per logit: itself and its exponential in float32, the latter again in bfloat16. Blocks are double-buffered.
    block = LOGIT_BYTES // (10 * keys)
    block = min(1 << block.bit_length() - 1, queries) if block else 0
    needed = 10 * keys * block + 2 * 2 * wide * 2 * (keys + block)
    return block if block >= min(64, queries) and needed <= KEEP_BYTES else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def flash(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"], interpret: bool = False
) -> Float[Array, "B T N*H"]:
    """`attend` without a mask, as a TPU kernel, where `query_block` allows it; every key of a head is in vector memory.

    Args:
        interpret: run it on any platform, for tests.
    """
    from jax.experimental import pallas as pl  # not at import: only bfloat16 needs it

    (b, t, heads, dim), s, block = q.shape, k.shape[1], query_block(q, k)
    width, wide = heads * dim, max(dim, LANES)
    queries = pl.BlockSpec((1, block, wide), lambda row, lane, i: (row, i, lane))
    keys = pl.BlockSpec((1, s, wide), lambda row, lane, i: (row, 0, lane))  # the same for every i: read once
    return pl.pallas_call(
        functools.partial(_flash_kernel, dim=dim),
        grid=(b, width // wide, pl.cdiv(t, block)),
        in_specs=[queries, keys, keys],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct((b, t, width), q.dtype),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * t * s * width,
            transcendentals=b * heads * t * s,
            bytes_accessed=2 * b * (t + s) * width * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="attention",
    )(*(x.reshape(*x.shape[:2], width) for x in (q, k, v)))


def _flash_kernel(q_ref: jax.Ref, k_ref: jax.Ref, v_ref: jax.Ref, out_ref: jax.Ref, *, dim: int) -> None:
    for start in range(0, q_ref.shape[-1], dim):  # head by head
        head = slice(start, start + dim)
        q, k, v = q_ref[0, :, head], k_ref[0, :, head], v_ref[0, :, head]
        logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * dim**-0.5
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))  # [block, S]
        out = jax.lax.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out_ref[0, :, head] = (out / weights.sum(axis=-1, keepdims=True)).astype(out_ref.dtype)


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return flash(q, k, v, interpret), (q, k, v)


def _flash_backward(interpret: bool, saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(plain, *saved)[1](gradient)  # training does not need its own kernel until it is measured


flash.defvjp(_flash_forward, _flash_backward)
