"""Cross-entropy over a vocabulary or over classes, as sums to be divided once by the sum of weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.sharding import constrain, ways

Array = jax.Array
Sums = dict[str, Array]


def cross_entropy(
    logits: Array,
    targets: Array,
    weights: Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    by_row: bool = False,
) -> tuple[Array, Sums]:
    """Weighted sums of the cross-entropy of `logits`.

    Args:
      logits: float32 `[..., V]`.
      targets: int32 `[...]`.
      weights: float32 `[...]`, 0 = not scored.
      label_smoothing: share of the target's probability spread evenly over the vocabulary (arXiv:1512.00567).
      z_loss: factor of the squared log-partition, which keeps logits from drifting (arXiv:2204.02311, section 5).
      by_row: sums to report are of each row, `[B]`, as standard errors want them; inputs are then `[B, ...]`.

    Returns:
      The objective's sum, float32 scalar (what training minimises, once divided by the sum of weights), and sums to
      report: `loss` (plain cross-entropy, nats) and `correct` (targets that had the highest logit).
    """
    # A comparison against the row of ids instead of a gather: its gradient is then no scatter, which CPUs and TPUs
    # execute slowly.
    at_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
    plain = log_partition - target_logit
    objective = plain
    if label_smoothing:
        smooth = log_partition - jnp.mean(logits, axis=-1)
        objective = (1.0 - label_smoothing) * plain + label_smoothing * smooth
    if z_loss:
        objective = objective + z_loss * jnp.square(log_partition)
    hits = (target_logit >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    along = tuple(range(1, weights.ndim)) if by_row else None
    sums = {"loss": jnp.sum(plain * weights, axis=along), "correct": jnp.sum(hits * weights, axis=along)}
    return jnp.sum(objective * weights), jax.lax.stop_gradient(sums)


def binary_cross_entropy(
    logits: Array, targets: Array, weights: Array, *, label_smoothing: float = 0.0, by_row: bool = False
) -> tuple[Array, Sums]:
    """Weighted sums of the cross-entropy of classes that a row has or has not, each for itself: the mean over classes.

    Args:
      logits: float32 `[B, C]`.
      targets: float32 `[B, C]`, 1 = is of the class, else 0.
      weights: float32 `[B]`, 0 = not scored.
      label_smoothing: share of a target's probability spread evenly over both answers.
      by_row: sums to report are of each row, `[B]`.

    Returns:
      As `cross_entropy`; `correct` are rows with all classes right, where a logit above 0 says yes.
    """
    rest = jax.nn.softplus(logits)  # what both answers share
    plain = jnp.mean(rest - targets * logits, axis=-1)
    smooth = targets + label_smoothing * (0.5 - targets)
    objective = jnp.mean(rest - smooth * logits, axis=-1)
    hits = jnp.all((logits > 0) == (targets > 0), axis=-1).astype(jnp.float32)
    sums = {"loss": plain * weights, "correct": hits * weights}
    if not by_row:
        sums = {name: jnp.sum(value) for name, value in sums.items()}
    return jnp.sum(objective * weights), jax.lax.stop_gradient(sums)


def divergence(
    logits: Array, teacher: Array, weights: Array, *, temperature: float = 1.0, ids: Array | None = None
) -> Array:
    """Weighted sum of the Kullback-Leibler divergence of a student from its teacher, both softened (arXiv:1503.02531).

    Args:
      logits: the student's, float32 `[..., V]`.
      teacher: the teacher's, float32 `[..., V]`, or with `ids` `[..., K]`.
      weights: float32 `[...]`, 0 = not counted.
      temperature: divides both logits.
      ids: int32 `[..., K]`, which logits `teacher` holds; its probabilities then sum to 1 over these alone, and the
        student's over all.

    Returns:
      A float32 scalar, in nats.
    """
    student = jax.nn.log_softmax(logits / temperature, axis=-1)
    if ids is not None:
        student = jnp.take_along_axis(student, ids, axis=-1)
    wanted = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature, axis=-1)
    return jnp.sum(jnp.sum(jnp.exp(wanted) * (wanted - student), axis=-1) * weights)


# What a head adds to a loss: (head parameters, hidden, targets, weights) -> (objective sum, sums to report).
HeadLoss = Callable[[Any, Array, Array, Array], tuple[Array, Sums]]


def chunked(head_loss: HeadLoss, params: Any, hidden: Array, targets: Array, weights: Array, chunk: int):
    """`head_loss` over pieces of `chunk` tokens of each row, so that the logits of a whole batch never exist.

    The forward pass already computes the gradient of each piece and keeps that instead of its logits, so nothing is
    computed twice. Equal to `head_loss` on the whole up to rounding.

    Args:
      head_loss: `(params, hidden, targets, weights) -> (objective sum, sums)`, a sum over tokens.
      params: the head's parameters; differentiated, as `hidden` is.
      hidden: `[B, T, D]`.
      targets: int32 `[B, T]`.
      weights: float32 `[B, T]`.
      chunk: tokens of each row per piece, rounded up to a multiple of the devices that share a row; a last, shorter
        piece is padded with weight 0.

    Returns:
      What `head_loss` returns.
    """
    T = hidden.shape[1]
    # Where devices share the tokens of a row, each piece takes some from every device, so that all work on it.
    shares = ways("length") if T % ways("length") == 0 else 1
    own, size = T // shares, -(-chunk // shares)
    n = -(-own // size)

    def pieces(x: Array) -> Array:
        """`[B, T, ...]` to `[n, B, chunk, ...]`: cut along time, so that rows stay on their devices."""
        x = x.reshape(x.shape[0], shares, own, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, n * size - own)] + [(0, 0)] * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(x.shape[0], shares, n, size, *x.shape[3:]), 2, 0)
        return constrain(x.reshape(n, x.shape[1], shares * size, *x.shape[4:]), None, "batch", "length")

    return _sum_pieces(head_loss, params, pieces(hidden), pieces(targets), pieces(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_pieces(head_loss: HeadLoss, params: Any, hidden: Array, targets: Array, weights: Array):
    def add(total, piece):
        return jax.tree.map(jnp.add, total, head_loss(params, *piece)), None

    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(head_loss, params, hidden[0], targets[0], weights[0])
    )
    return jax.lax.scan(add, zero, (hidden, targets, weights))[0]


def _sum_pieces_forward(head_loss: HeadLoss, params: Any, hidden: Array, targets: Array, weights: Array):
    value_and_grad = jax.value_and_grad(head_loss, argnums=(0, 1), has_aux=True)

    def add(carry, piece):
        total, params_grad = carry
        value, (new_params_grad, hidden_grad) = value_and_grad(params, *piece)
        total = jax.tree.map(jnp.add, total, value)
        return (total, jax.tree.map(lambda a, b: a + b.astype(a.dtype), params_grad, new_params_grad)), hidden_grad

    shape = jax.eval_shape(head_loss, params, hidden[0], targets[0], weights[0])
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    no_grad = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    (total, params_grad), hidden_grad = jax.lax.scan(add, (zero, no_grad), (hidden, targets, weights))
    params_grad = jax.tree.map(lambda g, p: g.astype(p.dtype), params_grad, params)
    return total, (params_grad, hidden_grad)


def _sum_pieces_backward(head_loss: HeadLoss, residuals: Any, cotangent: Any):
    objective_cotangent, _ = cotangent  # the sums to report have none
    params_grad, hidden_grad = residuals

    def scale(g: Array) -> Array:
        return (g.astype(jnp.float32) * objective_cotangent).astype(g.dtype)

    return jax.tree.map(scale, params_grad), scale(hidden_grad), None, None


_sum_pieces.defvjp(_sum_pieces_forward, _sum_pieces_backward)
