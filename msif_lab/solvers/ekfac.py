"""EK-FAC: the Gauss-Newton matrix layer by layer, in Kronecker-factored eigenbases with corrected
eigenvalues.
"""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator
from ..errors import UnsupportedModelError
from ..objective.losses import cross_entropy, mean_squared_error
from .approximation import Approximation, parts
from .report import Settings

__all__ = ["EKFAC"]


def _curvlinops():
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

    For models of ``Linear`` and ``Conv2d`` layers under cross-entropy or squared error. Between
    layers it assumes nothing, within one that inputs and output gradients are independent; its
    eigenvalues are then made exact in that basis. Penalty and damping are added to the eigenvalues,
    so they act as in the exact solve. Memory is a few times P whatever the number of classes. As a
    solver it approximates; as ``ConjugateGradient(preconditioner=EKFAC())`` not.

    Args:
        tol, max_iter, strict, callback: as in `LowRank`.
        samples: labels drawn per example from the model's prediction; None takes the exact
            expectation, at one backward pass per output.
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
        few = min(self.max_iter, self.batch_size, 1 if self.samples is None else self.samples)
        if not self.tol > 0 or few < 1:
            raise ValueError(
                f"tol={self.tol} must be positive, max_iter={self.max_iter}, "
                f"samples={self.samples} and batch_size={self.batch_size} at least 1"
            )

    def prepare(self, operator: Operator) -> "Kronecker":
        """Two passes over the data: covariances, then eigenvalues.

        Raises:
            UnsupportedModelError: trained parameters in other layers, another loss, or example
                weights.
            ValueError: neither penalty nor damping on some parameter.
        """
        return Kronecker(self, operator)


def _require_known_layers(model: nn.Module, names: list[str]) -> None:
    """Refuse trained parameters of other layers than Linear and Conv2d, all of them at once."""
    owners = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in names}
    bad = [
        f"{name} ({kind.__name__})"
        for name, kind in owners.items()
        if kind not in (nn.Linear, nn.Conv2d)
    ]
    if bad:
        raise UnsupportedModelError(
            f"EKFAC knows Linear and Conv2d layers, not {', '.join(bad)}: use LowRank() or "
            "ConjugateGradient()"
        )


class Kronecker(Approximation):
    """EK-FAC of one stage, ready to apply; made by `EKFAC.prepare`."""

    def __init__(self, solver: EKFAC, operator: Operator):
        super().__init__(solver, operator)
        p = parts(operator)
        base = p.base
        if not isinstance(base, DataCurvature) or base.every:
            raise ValueError(f"EKFAC needs a stage's curvature with its examples, not {base!r}")
        o = base.objective
        losses = {cross_entropy: nn.CrossEntropyLoss(), mean_squared_error: nn.MSELoss()}
        if o.loss not in losses or not bool((base.weights == 1).all()):
            raise UnsupportedModelError(
                f"{o.where}: EKFAC knows cross_entropy and mean_squared_error over equally "
                f"weighted examples, not {getattr(o.loss, '__name__', o.loss)}: use LowRank() or "
                "ConjugateGradient()"
            )
        _require_known_layers(o.model, o.trained_names)
        self.shapes = [o.layout.shapes[name] for name in o.trained_names]
        sizes = [shape.numel() for shape in self.shapes]
        shifts = [part.unique() for part in p.diagonal.split(sizes)]
        if any(len(s) > 1 for s in shifts):
            raise ValueError(
                "EKFAC needs one penalty and damping per parameter tensor: add a number, not a "
                "vector"
            )
        if not all(float(s) > 0 for s in shifts):
            raise ValueError(
                "EKFAC needs penalty or damping on every parameter: set weight_decay or damping"
            )
        self.shifts = [float(s) for s in shifts]
        # curvlinops hangs hooks on the layers it looks at
        curvlinops, model = _curvlinops(), copy.deepcopy(o.model)
        parameters = dict(model.named_parameters())
        for name, value in o.layout.named(base.full).items():
            parameters[name].data.copy_(value)
            parameters[name].requires_grad_(name in o.trained_names)
        batch = solver.batch_size
        data = [
            (o.data.x[i : i + batch], o.data.y[i : i + batch]) for i in range(0, len(o.data), batch)
        ]
        kinds = curvlinops.FisherType
        with torch.enable_grad():
            matrix = curvlinops.EKFACLinearOperator(
                model,
                losses[o.loss],
                [parameters[name] for name in o.trained_names],
                data,
                check_deterministic=False,
                seed=solver.seed,
                fisher_type=kinds.TYPE2 if solver.samples is None else kinds.MC,
                mc_samples=solver.samples or 1,
                num_data=len(o.data),
                separate_weight_and_bias=self._apart(o.trained_names),
            )
            # One inverse for each different shift: 2α of a proximal link lies on the shared
            # parameters only.
            self.inverses = {
                shift: curvlinops.KFACInverseLinearOperator(
                    matrix, damping=shift, use_exact_damping=True
                )
                for shift in set(self.shifts)
            }
            for inverse in self.inverses.values():
                inverse @ [
                    torch.zeros(shape, dtype=operator.dtype, device=operator.device)
                    for shape in self.shapes
                ]
        self.bytes = 3 * operator.shape[0] * p.diagonal.element_size()

    def _apart(self, names: list[str]) -> bool:
        """Whether some layer's weight and bias have different shifts, so that they cannot share an
        eigenbasis.
        """
        shifts = {}
        for name, shift in zip(names, self.shifts, strict=True):
            shifts.setdefault(name.rpartition(".")[0], set()).add(shift)
        return any(len(different) > 1 for different in shifts.values())

    def apply(self, columns: Tensor) -> Tensor:
        count = columns.shape[1]
        if not count:
            return columns
        parted = columns.split([shape.numel() for shape in self.shapes])
        named = [
            part.reshape(*shape, count) for part, shape in zip(parted, self.shapes, strict=True)
        ]
        with torch.no_grad():
            answers = {shift: inverse @ named for shift, inverse in self.inverses.items()}
        chosen = [answers[shift][i] for i, shift in enumerate(self.shifts)]
        return torch.cat([part.reshape(-1, count) for part in chosen])
