"""Log-probabilities and entropies straight from hidden states, without the [tokens, vocabulary] logits.

The vocabulary is walked in blocks of output rows with an online softmax (Milakov and Gimelshein, arXiv
1805.02867). The backward pass computes a block's logits again unless they found room where the weight's gradient will
be. With z = logits / temperature and p = softmax(z):

    d logp_y / d z = onehot(y) - p,    d H / d z = -p (log p + H),    H = -sum_v p_v log p_v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits in a block: wide enough for the matrix products to run at full speed (4,096 tokens x 4,096 columns).
BLOCK_ELEMENTS = 1 << 24
MIN_BLOCK_WIDTH = 1024
# Logits that may wait for the backward pass in memory of their own. A small vocabulary fits, and is computed once.
KEPT_BYTES = 256 << 20
# What transformers models do to the output layer's logits, by the config key that asks for it and the value that
# leaves them alone (None always does).
LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,  # Gemma
    "logits_soft_cap": None,  # RecurrentGemma
    "output_logit_soft_cap": None,  # xLSTM
    "logit_scale": 1.0,  # Cohere
    "logits_scaling": 1.0,  # Granite, HyperCLOVA X
    "lm_head_multiplier": 1.0,  # Falcon-H1
    "output_multiplier": 1.0,  # MuseGlimmer
}


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score one token per hidden state under softmax((hidden @ weight.T + bias) / temperature).

    Matrix products run in the inputs' dtype, everything else in float32 (float64 for float64 inputs). Memory
    beyond the gradients is three blocks of logits and at most ``KEPT_BYTES``; without gradients, the blocks alone.

    Args:
        hidden: float [N, H], N may be 0.
        weight: float [V, H], the output layer's weight, of the same dtype.
        targets: int64 [N], in 0..V-1.
        temperature: > 0; logits are divided by it after the product, as the engine does.
        bias: float [V] or None.

    Returns:
        Log-probability of every target and entropy of its distribution in nats, both float32 [N] (float64 for
        float64 inputs), differentiable once in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: a temperature that is not positive, or shapes or dtypes that do not fit together.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    shapes = tuple(hidden.shape), tuple(weight.shape), tuple(targets.shape)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError("expected hidden [N, H], weight [V, H], targets [N]; got {}, {}, {}".format(*shapes))
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden states are {hidden.dtype}, the output weight {weight.dtype}: cast one of them")
    differentiated = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    keep = torch.is_grad_enabled() and differentiated
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, keep)
    return logprobs, entropy


def check_linear_output(causal_lm: nn.Module) -> None:
    """Make sure that the output layer's weight and bias are all there is between hidden states and logits.

    Raises:
        ValueError: the model scales or caps its logits, or its output layer is not a plain ``nn.Linear``.
    """
    config: Any = causal_lm.config.get_text_config()  # type: ignore[operator, union-attr]
    for key, neutral in LOGIT_TRANSFORMS.items():
        value = getattr(config, key, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"{key}={value} in the model's config.json changes the logits after the output layer, "
                "which the learner does not compute: use a model without it"
            )
    head = causal_lm.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the output layer is a {type(head).__name__}, not a plain nn.Linear: leave it out of LoRA's target modules"
        )


class _OnlineSoftmax:
    """Softmax statistics of N rows over the columns seen so far, each [N].

    ``top`` is the largest z, ``total`` = sum exp(z - top), ``mean`` = E[z - top], ``target`` the target's z. Because
    z - top, not z, is summed, logits of any size lose no precision.
    """

    def __init__(self, hidden: Tensor, targets: Tensor, temperature: float) -> None:
        self.targets, self.temperature = targets, temperature
        self.top = torch.full(targets.shape, -torch.inf, dtype=_accumulation(hidden), device=hidden.device)
        self.total, self.mean, self.target = (torch.zeros_like(self.top) for _ in range(3))

    def add(self, logits: Tensor, start: int, scratch: tuple[Tensor, Tensor]) -> None:
        """Take in the columns from ``start`` on, [N, width] in the compute dtype; overwrites ``scratch``."""
        block = _BlockSoftmax(logits, self.temperature, scratch)
        columns, inside = _columns_inside(self.targets, start, logits.shape[1])
        self.target = torch.where(inside, block.scaled.gather(-1, columns).squeeze(-1), self.target)
        top = torch.maximum(self.top, block.top)
        # Before the first block this is -inf, and 0 * -inf not a number; exp(-1000) is 0 as well.
        sunk, below = (self.top - top).clamp_(min=-1000.0), block.top - top
        old, new = sunk.exp() * self.total, below.exp() * block.total
        mean = block.relative_to(block.top).mul_(block.probabilities).sum(-1)
        self.top, self.total = top, old + new
        self.mean = (old * (self.mean + sunk) + new * (mean + below)) / self.total

    def scores(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets and entropies, once all columns are in."""
        normaliser = self.total.log()
        return self.target - self.top - normaliser, normaliser - self.mean


class _BlockSoftmax:
    """One block's softmax: torch's own kernel, whose exponentials are faster than ``torch.exp`` on a CPU.

    ``scaled`` = z [N, width] and ``probabilities`` sit in ``scratch`` (``scaled`` in ``logits`` where nothing has to
    be done to them); ``top`` [N] is the largest z and ``total`` [N] = sum exp(z - top), whose inverse is the largest
    probability.
    """

    def __init__(self, logits: Tensor, temperature: float, scratch: tuple[Tensor, Tensor]) -> None:
        self._spare, space = scratch
        # Divided in the accumulation dtype; a division with ``out`` would be rounded to the logits' dtype first.
        self.scaled = logits if logits.dtype == space.dtype and temperature == 1.0 else self._spare.copy_(logits)
        if temperature != 1.0:
            self.scaled.div_(temperature)
        self.probabilities = torch.softmax(self.scaled, -1, out=space)
        self.top = self.scaled.amax(-1)
        self.total = self.probabilities.amax(-1).reciprocal_()

    def relative_to(self, level: Tensor) -> Tensor:
        """z - level [N, width], for a level of [N]; ``scaled`` must not be used after it."""
        return torch.sub(self.scaled, level.unsqueeze(-1), out=self._spare)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        blocks = _blocks(len(hidden), len(weight))
        statistics = _OnlineSoftmax(hidden, targets, temperature)
        buffers = _Buffers(hidden, blocks)
        kept = _KeptLogits(hidden, weight, blocks, ctx.needs_input_grad[1]) if keep else None
        for index, block in enumerate(blocks):
            logits = kept.logits(index) if kept else None
            logits = buffers.logits(block) if logits is None else logits
            _project(hidden, weight, bias, block, logits)
            statistics.add(logits, block.start, buffers.scratch(block))
        ctx.save_for_backward(hidden, weight, bias, targets, statistics.top, statistics.total, statistics.mean)
        ctx.kept, ctx.temperature = kept, temperature
        ctx.set_materialize_grads(False)
        return statistics.scores()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, top, total, mean = ctx.saved_tensors
        # The gradient will overwrite what was kept, so a second backward pass computes everything again.
        kept, ctx.kept = ctx.kept, None
        rows = _RowFactors(upstream, top, total, mean, ctx.temperature)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad, kept.gradient if kept else None)
        blocks = _blocks(len(hidden), len(weight))
        buffers = _Buffers(hidden, blocks)
        for index, block in enumerate(blocks):
            logits = kept.logits(index) if kept else None
            if logits is None:
                logits = buffers.logits(block)
                _project(hidden, weight, bias, block, logits)
            gradients.add(block, rows.logit_gradient(logits, block.start, targets, buffers.scratch(block)))
        return *gradients.results(), None, None, None


class _KeptLogits:
    """The logits of the first blocks, from the forward to the backward pass.

    If they take more than ``KEPT_BYTES``, the first ones lie at the end of what will be the weight's gradient
    (``gradient``, else None), whose rows are written from its start, block by block as the logits are read. It never
    reaches logits not yet read: when s of the K columns there are done, it is s H long and the logits of the others
    begin at V H - N (K - s). That s H is not more is linear in s and true at both ends, as N K <= V H and K <= V.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, blocks: list[slice], weight_needs_gradient: bool) -> None:
        self._rows, self._logits = len(hidden), list[Tensor]()
        own = KEPT_BYTES // hidden.itemsize
        shares = weight_needs_gradient and self._rows * len(weight) > own
        self.gradient = weight.new_empty(weight.shape) if shares else None
        if self.gradient is not None:
            self._fill(self.gradient.view(-1), self._fitting(blocks, weight.numel()))
        blocks = self._fitting(blocks[len(self._logits) :], own)
        self._fill(hidden.new_empty(self._elements(blocks)), blocks)

    def logits(self, index: int) -> Tensor | None:
        """Where the block's logits [N, width] are kept, if they are."""
        return self._logits[index] if index < len(self._logits) else None

    def _elements(self, blocks: list[slice]) -> int:
        return self._rows * (blocks[-1].stop - blocks[0].start) if blocks else 0

    def _fitting(self, blocks: list[slice], room: int) -> list[slice]:
        """The first blocks, as many as ``room`` elements hold."""
        return [block for index, block in enumerate(blocks) if self._elements(blocks[: index + 1]) <= room]

    def _fill(self, space: Tensor, blocks: list[slice]) -> None:
        """Lay the blocks out, one after the other, at the end of ``space``."""
        tail = space[len(space) - self._elements(blocks) :].split([self._elements([block]) for block in blocks])
        self._logits += [
            part.view(self._rows, block.stop - block.start) for part, block in zip(tail, blocks, strict=True)
        ]


class _RowFactors:
    """What the rows of the logits' gradient share; dz = p (-g - h (z - E[z])) + g onehot, over the temperature.

    g and h are the upstream gradients of log-probability and entropy; log p + H = z - E[z].
    """

    def __init__(
        self, upstream: tuple[Tensor | None, ...], top: Tensor, total: Tensor, mean: Tensor, temperature: float
    ) -> None:
        of_logprobs, of_entropy = (None if each is None else each / temperature for each in upstream)
        self._top, self._total, self._mean, self._temperature = top, total, mean, temperature
        self._of_logprobs = torch.zeros_like(top) if of_logprobs is None else of_logprobs
        self._of_entropy = of_entropy

    def logit_gradient(self, logits: Tensor, start: int, targets: Tensor, scratch: tuple[Tensor, Tensor]) -> Tensor:
        """Gradient with respect to a block's logits, [N, width] in the accumulation dtype, inside ``scratch``."""
        block = _BlockSoftmax(logits, self._temperature, scratch)
        share = (block.top - self._top).exp() * block.total / self._total  # of all probability, in this block
        scale = (-share * self._of_logprobs).unsqueeze(-1)
        if self._of_entropy is None:
            gradient = block.probabilities.mul_(scale)
        else:
            surprise = block.relative_to(self._top).sub_(self._mean.unsqueeze(-1))
            entropy_scale = (-share * self._of_entropy).unsqueeze(-1)
            gradient = surprise.mul_(entropy_scale).add_(scale).mul_(block.probabilities)
        columns, inside = _columns_inside(targets, start, logits.shape[1])
        return gradient.scatter_add_(-1, columns, torch.where(inside, self._of_logprobs, 0.0).unsqueeze(-1))


class _Gradients:
    """Gradients of the inputs that need one, collected block by block; the weight's in ``space`` if given."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...], space: Tensor | None
    ) -> None:
        self._inputs = hidden, weight
        # Sums over blocks are taken in the accumulation dtype; rows of the weight's gradient are written once.
        self._hidden = torch.zeros_like(hidden, dtype=_accumulation(hidden)) if needed[0] else None
        self._weight = space if space is not None or not needed[1] else weight.new_empty(weight.shape)
        self._bias = torch.empty_like(bias) if bias is not None and needed[2] else None

    def add(self, block: slice, logit_gradient: Tensor) -> None:
        """Take in a block's gradient of the logits, [N, width]."""
        hidden, weight = self._inputs
        if self._bias is not None:
            self._bias[block] = logit_gradient.sum(0)
        lowered = logit_gradient.to(hidden.dtype)
        if self._hidden is not None:
            if self._hidden.dtype == hidden.dtype:
                self._hidden.addmm_(lowered, weight[block])
            else:
                self._hidden += lowered @ weight[block]
        if self._weight is not None:
            torch.mm(lowered.T, hidden, out=self._weight[block])

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the inputs' dtype."""
        hidden = None if self._hidden is None else self._hidden.to(self._inputs[0].dtype)
        return hidden, self._weight, self._bias


class _Buffers:
    """Memory that all blocks share: fresh memory would be faulted in page by page at every block."""

    def __init__(self, hidden: Tensor, blocks: list[slice]) -> None:
        self._rows = len(hidden)
        size = self._rows * blocks[0].stop
        self._logits = hidden.new_empty(size)
        self._scratch = hidden.new_empty((2, size), dtype=_accumulation(hidden))

    def logits(self, block: slice) -> Tensor:
        """[N, width] in the compute dtype."""
        return self._shaped(self._logits, block)

    def scratch(self, block: slice) -> tuple[Tensor, Tensor]:
        """Two of [N, width] in the accumulation dtype."""
        return self._shaped(self._scratch[0], block), self._shaped(self._scratch[1], block)

    def _shaped(self, buffer: Tensor, block: slice) -> Tensor:
        width = block.stop - block.start
        return buffer[: self._rows * width].view(self._rows, width)


def _accumulation(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _blocks(tokens: int, vocabulary: int) -> list[slice]:
    width = min(vocabulary, max(BLOCK_ELEMENTS // max(tokens, 1), MIN_BLOCK_WIDTH))
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, block: slice, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight[block].T, out=out)
    else:
        torch.addmm(bias[block], hidden, weight[block].T, out=out)


def _columns_inside(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a block, [N, 1] and clamped, and whether it lies there, [N]: no wait for a GPU."""
    columns = targets - start
    inside = (columns >= 0) & (columns < width)
    return columns.clamp(0, width - 1).unsqueeze(-1), inside
