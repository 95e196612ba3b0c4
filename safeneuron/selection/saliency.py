"""What each FFN weight, and so each neuron, contributes to given answers: SNIP and Wanda, in one pass over batches.

Both are scored twice: on answers that are safe (refusals of harmful prompts) and on answers that are useful (to
harmless ones). A difference of sets (``Ranking.top_of_layers``) then takes what matters for the former and not for the
latter (Wei et al., "Assessing the Brittleness of Safety Alignment", 2402.05162;
github.com/boyiwei/alignment-attribution-code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeneuron.errors import InputError
from safeneuron.models.exchanges import Batch, Exchange, run_backward, run_decoder, total_over_batches
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import require_eager
from safeneuron.neurons.layout import feed_forwards, names_in, require_dense
from safeneuron.neurons.linears import linear_in
from safeneuron.runtime.offloading import materialised
from safeneuron.runtime.progress import Progress
from safeneuron.runtime.quantization import dense
from safeneuron.selection.ranking import Ranking


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of an FFN, ``[output, input]``, and which neurons its rows or columns belong to.

    ``module`` is what is called, ``first`` the rows at which the neurons begin (two of a fused matrix, one of a
    separate one), or ``None`` for the output projection, whose columns are the neurons.
    """

    name: str
    layer: int
    module: nn.Module
    first: tuple[int, ...] | None

    @property
    def weight(self) -> Tensor:
        """The weights as they are computed with; those that are offloaded within ``materialised`` alone."""
        return dense(linear_in(self.module).weight)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, also of weights that are packed."""
        linear = linear_in(self.module)
        return linear.out_features, linear.in_features

    def per_neuron(self, scores: Tensor) -> Tensor:
        """The sum of the matrix's scores over each row, or over each column of the output projection."""
        precision = torch.promote_types(scores.dtype, torch.float32)
        return scores.sum(dim=0 if self.first is None else 1, dtype=precision)


def snip(
    model: Model, exchanges: Sequence[Exchange], batch_tokens: int = 1024, progress: Progress | None = None
) -> Ranking:
    """SNIP lifted to neurons: the sum over the weights that a neuron owns of mean over answers of |W * dL/dW|.

    L is the mean negative log-likelihood of one answer, and the absolute value is taken answer by answer, as in the
    source. The passes forward and back are batched, since no weight's gradient flows between rows: of each row it is
    the product of what flows into a matrix and what flows back out of it, made, used and forgotten on the spot.

    Args:
        model: A dense model.
        exchanges: Prompts with answers.
        batch_tokens: Tokens in one pass, padding included.
        progress: Called after each batch.

    Returns:
        The ranking, labelled ``SNIP``.

    Raises:
        InputError: For a mixture of experts, FFNs of other layers than torch's linear ones, offloaded weights, or
            values that are not finite.
    """
    matrices = _matrices(model)
    sums = total_over_batches(exchanges, _gradient_pass(model, matrices), batch_tokens, progress)
    sizes = [matrix.shape[1 if matrix.first is None else 0] for matrix in matrices]
    parts = torch.split_with_sizes(sums, sizes)
    return _lifted(model, matrices, [part / len(exchanges) for part in parts], "SNIP")


def wanda(
    model: Model, exchanges: Sequence[Exchange], batch_tokens: int = 2048, progress: Progress | None = None
) -> Ranking:
    """Wanda lifted to neurons: the sum over the weights that a neuron owns of |W| * ||x||.

    ||x|| is the root mean square of the weight's input over the tokens of the answers.

    Args:
        model: A dense model.
        exchanges: Prompts with answers.
        batch_tokens: Tokens in one forward pass, padding included.
        progress: Called after each batch.

    Returns:
        The ranking, labelled ``Wanda``.

    Raises:
        InputError: For a mixture of experts, FFNs of other layers than torch's linear ones, or values that are not
            finite.
    """
    matrices = _matrices(model)
    norms = _input_norms(model, matrices, exchanges, batch_tokens, progress)
    sums = []
    for matrix, norm in zip(matrices, norms, strict=True):
        with materialised(linear_in(matrix.module)):
            sums.append(matrix.per_neuron(matrix.weight.abs().double().cpu() * norm))
    return _lifted(model, matrices, sums, "Wanda")


def _matrices(model: Model) -> list[Matrix]:
    """Every weight matrix of every FFN, in the order of the layers, the inputs before the output."""
    require_eager(model)
    require_dense(model, "SNIP or Wanda")
    names = names_in(model.network)
    matrices = []
    for block in feed_forwards(model):
        firsts: dict[nn.Module, tuple[int, ...]] = {}
        for rows in block.inputs:
            firsts[rows.module] = (*firsts.get(rows.module, ()), rows.first)
        for module, first in [*firsts.items(), (block.output, None)]:
            linear = linear_in(module)
            if not isinstance(linear, nn.Linear) or "weight" not in linear._parameters:
                raise InputError(
                    f"SNIP and Wanda read FFNs of torch's linear layers, but layer {block.layer} has a "
                    f"{type(linear).__name__}; use the paper's selector there"
                )
            matrices.append(Matrix(names[id(linear.weight)], block.layer, module, first))
    return matrices


def _lifted(model: Model, matrices: Sequence[Matrix], sums: Sequence[Tensor], label: str) -> Ranking:
    """The score of each neuron: what its rows of the inputs and its column of the output sum to."""
    widths = model.widths
    layers = [torch.zeros(width, dtype=torch.float64) for width in widths]
    for matrix, part in zip(matrices, sums, strict=True):
        width = widths[matrix.layer]
        for first in (0,) if matrix.first is None else matrix.first:
            layers[matrix.layer] += part[first : first + width].double()
    return Ranking(torch.cat(layers), widths, model.fingerprint, label)


def _gradient_pass(model: Model, matrices: Sequence[Matrix]) -> Callable[[Sequence[Exchange]], Tensor]:
    """For some exchanges the sum over them of |W * dL/dW| per neuron, all matrices end to end, float32."""

    def work(exchanges: Sequence[Exchange]) -> Tensor:
        sums: dict[str, Tensor] = {}

        def look(matrix: Matrix) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                entering = inputs[0].detach()

                def backward(leaving: Tensor) -> None:
                    weight = matrix.weight
                    for came, goes in zip(entering, leaving, strict=True):
                        scores = matrix.per_neuron((goes.T @ came).mul_(weight).abs_().float())
                        sums[matrix.name] = scores + sums[matrix.name] if matrix.name in sums else scores

                output.register_hook(backward)  # type: ignore[no-untyped-call]

            return forward

        with _watched([(matrix.module, look(matrix)) for matrix in matrices]):
            run_backward(model, Batch.of(model, exchanges))
        return torch.cat([sums[matrix.name].flatten().cpu() for matrix in matrices])

    return work


def _input_norms(
    model: Model,
    matrices: Sequence[Matrix],
    exchanges: Sequence[Exchange],
    batch_tokens: int,
    progress: Progress | None,
) -> list[Tensor]:
    """For each matrix the root mean square of each input over the tokens of the answers, ``[input]`` float64."""

    def work(part: Sequence[Exchange]) -> Tensor:
        batch = Batch.of(model, part)
        squares: dict[str, Tensor] = {}

        def look(matrix: Matrix) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                squares[matrix.name] = inputs[0][batch.answer.to(inputs[0].device)].double().square().sum(dim=0)

            return forward

        with _watched([(matrix.module, look(matrix)) for matrix in matrices]):
            run_decoder(model, batch)
        return torch.cat([squares[matrix.name].cpu() for matrix in matrices])

    sums = total_over_batches(exchanges, work, batch_tokens, progress)
    tokens = sum(len(exchange.ids) - exchange.prompt for exchange in exchanges)
    parts = torch.split_with_sizes(sums, [matrix.shape[1] for matrix in matrices])
    return [(part / tokens).sqrt() for part in parts]


@contextmanager
def _watched(
    looks: Sequence[tuple[nn.Module, Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]]],
) -> Iterator[None]:
    """Within the block each module shows its input and output to its function."""
    with ExitStack() as stack:
        for module, look in looks:
            stack.callback(module.register_forward_hook(look).remove)
        yield
