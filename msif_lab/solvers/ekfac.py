"""EK-FAC: Gauss-Newton blocks in Kronecker-factored eigenbases with corrected eigenvalues."""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..arguments import check_whole
from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator
from ..data.fields import as_model_input
from ..errors import UnsupportedModelError
from ..objective.exclusive import MODULES
from ..objective.losses import cross_entropy, mean_squared_error
from ..objective.switches import twice_differentiable
from .approximation import Approximation, parts
from .report import Settings

__all__ = ["EKFAC"]

_LOSSES = {cross_entropy: nn.CrossEntropyLoss, mean_squared_error: nn.MSELoss}


def _curvlinops():
    """The package curvlinops, imported only when it is needed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the libraries it imports
            import curvlinops
    except ImportError as error:
        raise ImportError(
            "EKFAC needs the package curvlinops: pip install 'curvlinops-for-pytorch>=3'"
        ) from error
    return curvlinops


@dataclass(frozen=True, repr=False)
class EKFAC(Settings):
    """Eigenvalue-corrected Kronecker factorisation of the Gauss-Newton matrix, through curvlinops.

    For models of ``Linear`` and ``Conv2d`` layers under cross-entropy or squared error. Blocks
    between layers are left out. Within a layer the eigenbasis assumes that inputs and output
    gradients are independent; the eigenvalues are then made exact in that basis. Penalty and
    damping are added to the eigenvalues, so they act as in the exact solve. Memory is a few times P
    whatever the number of classes. As a solver it is an approximation; as
    ``ConjugateGradient(preconditioner=EKFAC())`` it gives exact answers.

    Args:
        tol, max_iter, strict, callback: as in `LowRank`.
        samples: labels drawn per example from the model's prediction; None takes the exact
            expectation, which costs one backward pass per output.
        batch_size: examples at a time.
        seed: of the drawn labels.

    Raises:
        ImportError: curvlinops is not installed (the extra ``ekfac``).

    >>> import msif_lab as msif
    >>> msif.ConjugateGradient(preconditioner=msif.EKFAC(samples=4))
    ConjugateGradient(preconditioner=EKFAC(samples=4))

    Reference: George et al. (2018); Grosse et al. (2023, arXiv 2308.03296) for influence.
    """

    tol: float = 1.0
    max_iter: int = 2
    samples: int | None = 1
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self):
        self._check(lambda tol: tol > 0, "positive", batch_size=1)
        check_whole("samples", self.samples, none="the exact expectation")

    def prepare(self, operator: Operator) -> "Kronecker":
        """Two passes over the data: covariances, then eigenvalues.

        Raises:
            UnsupportedModelError: trained parameters in other layers, another loss, or example
                weights.
            ValueError: some parameter has neither penalty nor damping.
        """
        return Kronecker(self, operator)


def _require_known_layers(model: nn.Module, names: list[str]) -> None:
    """Refuse trained parameters of layers other than Linear and plain Conv2d, naming them all."""
    bad = []
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])
        kind = type(layer).__name__
        if type(layer) not in (nn.Linear, nn.Conv2d):
            bad.append(f"{name} ({kind})")
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            bad.append(f"{name} ({kind} in {layer.groups} groups)")
        elif isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            bad.append(f"{name} ({kind} with {layer.padding_mode} padding)")
    if bad:
        raise UnsupportedModelError(
            f"EKFAC knows Linear and Conv2d layers, not {', '.join(bad)}: "
            "use LowRank() or ConjugateGradient()"
        )


def _require_known(base: Operator) -> None:
    """Refuse what EK-FAC has no formula for: other operators, losses, weights and layers."""
    if not isinstance(base, DataCurvature) or base.every:
        raise ValueError(f"EKFAC needs a stage's curvature with its examples, not {base!r}")
    o = base.objective
    if o.loss not in _LOSSES or not bool((base.weights == 1).all()):
        raise UnsupportedModelError(
            f"{o.where}: EKFAC knows cross_entropy and mean_squared_error "
            f"over equally weighted examples, not {getattr(o.loss, '__name__', o.loss)}: "
            "use LowRank() or ConjugateGradient()"
        )
    _require_known_layers(o.model, o.trained_names)


def _uniform_shifts(diagonal: Tensor, sizes: list[int]) -> list[float]:
    """Penalty plus damping of each parameter tensor, which must be one positive number each."""
    shifts = [part.unique() for part in diagonal.split(sizes)]
    if any(len(different) > 1 for different in shifts):
        raise ValueError(
            "EKFAC needs one penalty and damping per parameter tensor: add a number, not a vector"
        )
    if not all(float(shift) > 0 for shift in shifts):
        raise ValueError(
            "EKFAC needs penalty or damping on every parameter: set weight_decay or damping"
        )
    return [float(shift) for shift in shifts]


class Kronecker(Approximation):
    """EK-FAC of one stage, ready to apply; made by `EKFAC.prepare`."""

    def __init__(self, solver: EKFAC, operator: Operator):
        super().__init__(solver, operator)
        known = parts(operator)
        _require_known(known.base)
        o = known.base.objective
        self.shapes = [o.layout.shapes[name] for name in o.trained_names]
        sizes = [shape.numel() for shape in self.shapes]
        self.shifts = _uniform_shifts(known.diagonal, sizes)
        try:
            self.inverses = self._factorise(known.base)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{o.where}: EKFAC needs layers that are each called with every batch, which is "
                f"not so for this model, or curvlinops cannot follow it ({error}): use LowRank() "
                "or ConjugateGradient()"
            ) from error
        self.bytes = 3 * operator.shape[0] * known.diagonal.element_size()

    def _factorise(self, base: DataCurvature) -> dict:
        """An inverse for each different shift.

        Shifts differ with a proximal link, whose 2α is added to the shared parameters only.
        """
        curvlinops = _curvlinops()
        o = base.objective
        with MODULES:  # curvlinops registers hooks on the layers it looks at
            model = copy.deepcopy(o.model)
        parameters = dict(model.named_parameters())
        for name, value in o.layout.named(base.full).items():
            parameters[name].data.copy_(value)
            parameters[name].requires_grad_(name in o.trained_names)
        solver = self.solver
        starts = range(0, len(o.data), solver.batch_size)
        rows = [slice(start, start + solver.batch_size) for start in starts]
        targets = o.data.y
        if targets.is_floating_point():  # as many dimensions as the outputs, which MSELoss compares
            with torch.no_grad():
                targets = targets.reshape(
                    len(targets), *o.outputs(base.full, o.data.x[:1])[0].shape
                )
        batches = [(as_model_input(o.data.x[part]), targets[part]) for part in rows]
        kinds = curvlinops.FisherType
        with torch.enable_grad(), twice_differentiable(model):
            matrix = curvlinops.EKFACLinearOperator(
                model,
                _LOSSES[o.loss](),
                [parameters[name] for name in o.trained_names],
                batches,
                check_deterministic=False,
                seed=solver.seed,
                fisher_type=kinds.TYPE2 if solver.samples is None else kinds.MC,
                mc_samples=solver.samples or 1,
                num_data=len(o.data),
                batch_size_fn=lambda fields: len(next(iter(fields.values()))),
                separate_weight_and_bias=self._apart(o.trained_names),
            )
            inverses = {
                shift: curvlinops.KFACInverseLinearOperator(
                    matrix, damping=shift, use_exact_damping=True
                )
                for shift in set(self.shifts)
            }
            # They are computed at their first product: let that be now, not in the first solve.
            like = {"dtype": base.dtype, "device": base.device}
            zeros = [torch.zeros(shape, **like) for shape in self.shapes]
            for inverse in inverses.values():
                inverse @ zeros
        return inverses

    def _apart(self, names: list[str]) -> bool:
        """Whether a layer's weight and bias have different shifts and so need separate bases."""
        of_layer: dict[str, set[float]] = {}
        for name, shift in zip(names, self.shifts, strict=True):
            of_layer.setdefault(name.rpartition(".")[0], set()).add(shift)
        return any(len(shifts) > 1 for shifts in of_layer.values())

    def apply(self, columns: Tensor) -> Tensor:
        """``M⁻¹ B`` for ``B`` (P, K), each parameter tensor by the inverse for its shift."""
        count = columns.shape[1]
        if not count:
            return columns
        flat = columns.split([shape.numel() for shape in self.shapes])
        shaped = [
            part.reshape(*shape, count) for part, shape in zip(flat, self.shapes, strict=True)
        ]
        with torch.no_grad():
            answers = {shift: inverse @ shaped for shift, inverse in self.inverses.items()}
        chosen = [answers[shift][i] for i, shift in enumerate(self.shifts)]
        return torch.cat([part.reshape(-1, count) for part in chosen])
