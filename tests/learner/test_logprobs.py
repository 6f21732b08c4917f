"""Log-probabilities in blocks of the vocabulary against float64 log-softmax, and what they allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from learner import logprobs as module
from learner.logprobs import check_linear_output, linear_logprobs

VOCAB, WIDTH = 37, 6


# With 0 bytes of their own, logits are kept in the gradient's space as far as it goes.
@pytest.fixture(params=[0, 500, 1 << 30], ids=["in the gradient", "there and beside it", "beside it"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 columns, so that 37 need five, the last of them narrower."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 8)
    monkeypatch.setattr(module, "MIN_BLOCK_WIDTH", 8)
    monkeypatch.setattr(module, "KEPT_BYTES", request.param)


def make_inputs(
    tokens: int = 9, dtype: torch.dtype = torch.float32, scale: float = 1.0, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states, weight, targets (at block edges among others) and bias; the logits have about ``scale``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight = draw(tokens, WIDTH) * scale, draw(VOCAB, WIDTH)
    targets = torch.tensor([0, 7, 8, 15, 16, 31, 32, 36, 20])[:tokens]
    return hidden.requires_grad_(), weight.requires_grad_(), targets, draw(VOCAB).requires_grad_() if bias else None


def expected(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    table = (logits / temperature).log_softmax(-1)
    return table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


def gradients(scores: tuple[Tensor, Tensor], inputs: list[Tensor], use: str) -> tuple[Tensor, ...]:
    """Of a sum with different weights for every token; entropies weigh less so that errors in either show."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, len(scores[0]), generator=generator)
    terms = [score * weight for score, weight in zip(scores, weights, strict=True)]
    chosen = {"logprobs": terms[:1], "entropy": terms[1:], "both": terms}[use]
    return torch.autograd.grad(sum(term.sum() for term in chosen), inputs)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("use", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(use: str, temperature: float, bias: bool) -> None:
    hidden, weight, targets, offset = make_inputs(bias=bias)
    inputs = [hidden, weight] + ([offset] if offset is not None else [])
    scores = linear_logprobs(hidden, weight, targets, temperature, offset)
    reference = expected(hidden, weight, targets, temperature, offset)
    for score, exact in zip(scores, reference, strict=True):
        assert score.dtype == torch.float32
        torch.testing.assert_close(score.double(), exact, atol=2e-6, rtol=1e-6)
    for ours, exact in zip(gradients(scores, inputs, use), gradients(reference, inputs, use), strict=True):
        torch.testing.assert_close(ours, exact, atol=5e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_against_finite_differences() -> None:
    hidden, weight, targets, bias = make_inputs(4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: linear_logprobs(*inputs[:2], targets, 0.7, inputs[2]), (hidden, weight, bias)
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    hidden, weight, targets, bias = make_inputs(tokens)
    assert bias is not None
    scores = linear_logprobs(hidden, weight, targets, 1.0, bias)
    assert [score.shape for score in scores] == [(tokens,), (tokens,)]
    inputs = [hidden, weight, bias]
    reference = expected(hidden, weight, targets, 1.0, bias)
    for ours, exact in zip(gradients(scores, inputs, "both"), gradients(reference, inputs, "both"), strict=True):
        torch.testing.assert_close(ours, exact, atol=5e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_logits_of_ten_thousand_stay_exact() -> None:
    """float32 has steps of 0.001 there; whole numbers make the product exact, so any loss would be the softmax's."""
    hidden, weight, targets, _ = make_inputs(bias=False)
    hidden, weight = (hidden.detach() * 1000).round().requires_grad_(), (weight.detach() * 4).round().requires_grad_()
    scores = linear_logprobs(hidden, weight, targets, 1.0)
    reference = expected(hidden, weight, targets, 1.0, None)
    assert reference[0].min().item() < -1e4
    for score, exact in zip(scores, reference, strict=True):
        torch.testing.assert_close(score.double(), exact, atol=1e-6, rtol=1e-6)
    ours, exact = (gradients(each, [hidden, weight], "both") for each in (scores, reference))
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_keeps_statistics_and_confident_gradients() -> None:
    """The statistics are exact for the rounded logits; 1 - p must not be lost where p rounds to 1."""
    hidden, weight, targets, _ = make_inputs(dtype=torch.bfloat16, bias=False)
    scores = linear_logprobs(hidden, weight, targets, 0.8)
    table = ((hidden @ weight.T).double() / 0.8).log_softmax(-1)
    torch.testing.assert_close(scores[0].double(), table.gather(1, targets[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    ours = gradients(scores, [hidden, weight], "both")
    exact = gradients(expected(hidden, weight, targets, 0.8, None), [hidden, weight], "both")
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, torch.bfloat16]
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=0.03, rtol=0.03)

    confident = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    linear_logprobs(confident, rows, torch.tensor([0]), 1.0)[0].sum().backward()
    assert confident.grad is not None
    assert confident.grad.item() == pytest.approx(1 / (1 + torch.tensor(7.0).exp().item()), rel=0.01)


@pytest.mark.usefixtures("small_blocks")
def test_tied_weights_get_both_gradients() -> None:
    _, weight, targets, _ = make_inputs(bias=False)
    ids = torch.tensor([3, 3, 0, 36, 8, 9, 1, 2, 5])

    def gradient(score: Any) -> Tensor:
        return gradients(score(weight[ids].tanh(), weight, targets, 1.0, None), [weight], "both")[0]

    torch.testing.assert_close(gradient(linear_logprobs), gradient(expected), atol=5e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_a_second_backward_pass_gives_the_same() -> None:
    """The first one overwrites the logits that were kept."""
    hidden, weight, targets, _ = make_inputs(bias=False)
    logprobs, entropy = linear_logprobs(hidden, weight, targets, 1.0)
    loss = logprobs.sum() + entropy.sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, [hidden, weight])
    for one, copy, other in zip(first, copies, second, strict=True):
        assert torch.equal(one, copy)
        torch.testing.assert_close(other, copy)


@pytest.mark.parametrize(("tokens", "kept_columns"), [(3, 37), (5, 37), (7, 24), (9, 24), (60, 0)])
def test_the_gradient_overwrites_kept_logits_only_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch, tokens: int, kept_columns: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 8)
    monkeypatch.setattr(module, "MIN_BLOCK_WIDTH", 8)
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    with MatrixProducts() as products:
        scores = linear_logprobs(hidden, weight, targets, 1.0)
        ours = gradients(scores, [hidden, weight], "both")
    assert products.columns == VOCAB + (VOCAB - kept_columns)
    exact = gradients(expected(hidden, weight, targets, 1.0, None), [hidden, weight], "both")
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-5)


class MatrixProducts(TorchDispatchMode):
    """Counts the columns of logits that were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::mm" and args[0].shape[1] == WIDTH:
            self.columns += args[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients_are_computed(frozen: int) -> None:
    hidden, weight, targets, bias = make_inputs()
    assert bias is not None
    inputs = [hidden, weight, bias]
    inputs[frozen].requires_grad_(False)
    linear_logprobs(hidden, weight, targets, 1.0, bias)[0].sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [index == frozen for index in range(3)]


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation returns, except those seen before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self._alive = [tensor.untyped_storage() for tensor in known]
        self._known = {storage.data_ptr() for storage in self._alive}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    # Kept alive, so that no address comes twice.
                    self._alive.append(storage)
                    self._known.add(storage.data_ptr())
                    self.bytes[storage.data_ptr()] = storage.nbytes()
        return result

    @property
    def largest(self) -> int:
        return max(self.bytes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 200_000])
def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kept: int) -> None:
    tokens, vocabulary, width, block = 256, 4096, 4, 16
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(module, "MIN_BLOCK_WIDTH", block)
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    with Allocations(hidden, weight, targets) as seen:
        logprobs, entropy = linear_logprobs(hidden, weight, targets, 0.7)
        (logprobs.sum() + entropy.sum()).backward()
    scratch = 2 * tokens * block * 4
    assert seen.largest <= max(scratch, weight.nbytes, kept)
    with torch.no_grad(), Allocations(hidden, weight, targets) as scoring:
        linear_logprobs(hidden, weight, targets, 0.7)
    assert scoring.largest <= scratch, "nothing is kept without a backward pass"


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, targets, _ = make_inputs()
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprobs(hidden, weight, targets, 0.0)
    with pytest.raises(ValueError, match=r"expected hidden \[N, H\]"):
        linear_logprobs(hidden, weight, targets[1:], 1.0)
    with pytest.raises(ValueError, match="cast one of them"):
        linear_logprobs(hidden.bfloat16(), weight, targets, 1.0)


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_models_that_change_their_logits_are_refused() -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0 in the model's config\.json"):
        check_linear_output(capped)
    check_linear_output(Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=None)))
    with pytest.raises(ValueError, match=r"logit_scale=0\.0625"):
        check_linear_output(CohereForCausalLM(CohereConfig(**SIZES)))
    plain = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    check_linear_output(plain)
    plain.lm_head = nn.Sequential(plain.lm_head, nn.Tanh())
    with pytest.raises(ValueError, match="output layer is a Sequential"):
        check_linear_output(plain)
