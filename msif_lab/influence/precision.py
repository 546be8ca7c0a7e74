"""Faster, coarser multiplication where the hardware has it: on request, with its error shown."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..arguments import check_choice, check_instance
from ..pipeline.pipeline import Pipeline

__all__ = ["reduced_precision"]

MATMUL = {"float32": "highest", "tf32": "high", "bf16": "medium"}  # PyTorch's names for them


@contextmanager
def reduced_precision(
    kind: str, pipeline: Pipeline, curvature: str = "ggn"
) -> Iterator[dict[str, float]]:
    """Multiply float32 matrices as TF32 (10 bits) or bfloat16 (7 bits) within this block.

    Weights stay float32. Prints by how much that changes a curvature product of each stage, as
    ``‖H̃v − Hv‖ / ‖Hv‖`` for random v, and yields these errors by stage name: no solve inside can
    reach a residual below them. PyTorch's settings are restored at the end. On hardware without
    such units, most CPUs included, the errors are zero. ``"float32"`` is for CUDA, where PyTorch by
    itself lets convolutions use TF32.

    Args:
        kind: ``"tf32"``, ``"bf16"`` or ``"float32"``.
        pipeline: trained or adopted, in float32.
        curvature: whose products are compared, ``"ggn"`` or ``"hessian"``.

    Raises:
        ValueError: another kind, or a pipeline that is not float32.

    >>> import msif_lab as msif
    >>> train, _ = msif.load_digits(dtype=torch.float32)
    >>> stage = msif.Stage("digits", msif.softmax_regression(64, 10), train)
    >>> pipeline = msif.Pipeline([stage]).adopt()
    >>> with msif.reduced_precision("float32", pipeline) as errors:
    ...     scores = pipeline.curvature(0, "ggn") @ torch.ones(650)
    digits: float32 changes a ggn product by 0.0e+00
    """
    check_choice("kind", kind, sorted(MATMUL))
    check_choice("curvature", curvature, ("ggn", "hessian"))
    check_instance("pipeline", pipeline, Pipeline)
    if any(full.dtype != torch.float32 for full in pipeline.trained()):
        raise ValueError(
            "pipeline is not float32, so nothing would be faster; use pipeline.to(torch.float32)"
        )
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def switch(matmul: str, convolutions: bool) -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions

    def products():
        found = {}
        for k, stage in enumerate(pipeline.stages):
            operator = pipeline.curvature(k, curvature)
            v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0))
            found[stage.name] = operator @ v.to(operator.device)
        return found

    try:
        switch("highest", False)
        exact = products()
        switch(MATMUL[kind], kind != "float32")
        errors = {
            name: float((p - exact[name]).norm() / exact[name].norm())
            for name, p in products().items()
        }
        for name, error in errors.items():
            print(f"{name}: {kind} changes a {curvature} product by {error:.1e}")
        yield errors
    finally:
        switch(*before)
