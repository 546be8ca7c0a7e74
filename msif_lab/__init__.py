"""msif_lab: which pretraining examples made this finetuned prediction good or bad?

Multi-stage influence functions (Chen et al., NeurIPS 2020, arXiv 2007.09081), held against real retraining.
"""

from .curvature.derivatives import example_products, per_example_gradients
from .curvature.matrices import GGN, Hessian
from .curvature.operators import Operator
from .data.datasets import load_cifar10, load_digits, load_mnist
from .data.examples import Examples
from .errors import (
    ConvergenceWarning,
    DataUnavailableError,
    IndefiniteCurvatureError,
    MemoryBudgetError,
    MsifError,
    NotConvergedError,
    SavedFileError,
    UnsmoothTrainingWarning,
    UnsupportedModelError,
)
from .evaluation.comparison import Agreement, agreement, compare_methods, method_table, noise_ceiling
from .evaluation.removals import Effects, random_removals, removal_effects
from .exercises import check
from .influence.baselines import (
    Entropy,
    GradientDot,
    GradientNorm,
    Loss,
    Margin,
    Random,
    RepresentationSimilarity,
    SingleStage,
    TracIn,
    all_baselines,
)
from .influence.cost import Plan, StagePlan, plan
from .influence.implicit import ImplicitInfluence
from .influence.precision import reduced_precision
from .influence.result import Influence, Ranking, TopInfluence
from .influence.unrolled import UnrolledInfluence
from .objective.losses import cross_entropy, mean_squared_error, next_token_loss
from .objective.models import EmbeddingHead, convnet, mlp, softmax_regression
from .pipeline.lbfgs import LBFGS
from .pipeline.pipeline import Pipeline, Retrained
from .pipeline.recipes import SGD, Adam, AdamW, FitReport
from .pipeline.stages import Frozen, Proximal, Stage, WarmStart
from .solvers.conjugate_gradient import ConjugateGradient
from .solvers.ekfac import EKFAC
from .solvers.exact import Exact, Spectrum, schur_complement
from .solvers.lissa import LiSSA
from .solvers.lowrank import Jacobi, LowRank
from .solvers.minres import MINRES
from .solvers.report import SolveReport

__version__ = "0.1.0"

__all__ = [
    # data
    "Examples",
    "load_digits",
    "load_mnist",
    "load_cifar10",
    # models and losses
    "EmbeddingHead",
    "convnet",
    "mlp",
    "softmax_regression",
    "cross_entropy",
    "mean_squared_error",
    "next_token_loss",
    # stages, links, recipes, pipeline
    "Stage",
    "Frozen",
    "Proximal",
    "WarmStart",
    "LBFGS",
    "SGD",
    "Adam",
    "AdamW",
    "FitReport",
    "Pipeline",
    "Retrained",
    # influence
    "ImplicitInfluence",
    "UnrolledInfluence",
    "Influence",
    "Ranking",
    "TopInfluence",
    "plan",
    "Plan",
    "StagePlan",
    "reduced_precision",
    # baselines
    "all_baselines",
    "Loss",
    "Entropy",
    "Margin",
    "GradientNorm",
    "Random",
    "GradientDot",
    "TracIn",
    "RepresentationSimilarity",
    "SingleStage",
    # curvature and solvers
    "Operator",
    "Hessian",
    "GGN",
    "per_example_gradients",
    "example_products",
    "Exact",
    "ConjugateGradient",
    "MINRES",
    "LiSSA",
    "LowRank",
    "Jacobi",
    "EKFAC",
    "SolveReport",
    "Spectrum",
    "schur_complement",
    # ground truth
    "removal_effects",
    "random_removals",
    "Effects",
    "agreement",
    "Agreement",
    "compare_methods",
    "method_table",
    "noise_ceiling",
    # lessons
    "check",
    # errors
    "MsifError",
    "ConvergenceWarning",
    "NotConvergedError",
    "IndefiniteCurvatureError",
    "MemoryBudgetError",
    "DataUnavailableError",
    "SavedFileError",
    "UnsupportedModelError",
    "UnsmoothTrainingWarning",
]
