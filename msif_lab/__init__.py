"""msif_lab: which pretraining examples made this finetuned prediction good or bad?

Multi-stage influence functions (Chen et al., NeurIPS 2020, arXiv 2007.09081), checked against real
retraining.
"""

from .curvature import GGN, Hessian, Operator, example_products, per_example_gradients
from .data import Examples, load_cifar10, load_digits, load_mnist
from .errors import (
    ConvergenceWarning,
    DataUnavailableError,
    IndefiniteCurvatureError,
    MemoryBudgetError,
    MsifError,
    NotConvergedError,
    SavedFileError,
    SymmetryWarning,
    UnsmoothTrainingWarning,
    UnsupportedModelError,
    UnsupportedModelWarning,
)
from .evaluation import (
    Agreement,
    Effects,
    agreement,
    compare_methods,
    method_table,
    noise_ceiling,
    random_removals,
    removal_effects,
)
from .exercises import check
from .influence import (
    Entropy,
    GradientDot,
    GradientNorm,
    ImplicitInfluence,
    Influence,
    Loss,
    Margin,
    Plan,
    Random,
    Ranking,
    RepresentationSimilarity,
    SingleStage,
    StagePlan,
    TopInfluence,
    TracIn,
    UnrolledInfluence,
    all_baselines,
    plan,
    reduced_precision,
)
from .objective import (
    EmbeddingHead,
    convnet,
    cross_entropy,
    mean_squared_error,
    mlp,
    next_token_loss,
    softmax_regression,
    wrap,
)
from .pipeline import (
    LBFGS,
    SGD,
    Adam,
    AdamW,
    FitReport,
    Frozen,
    Pipeline,
    Proximal,
    Retrained,
    Stage,
    WarmStart,
)
from .solvers import (
    EKFAC,
    MINRES,
    ConjugateGradient,
    Exact,
    Jacobi,
    LiSSA,
    LowRank,
    SolveReport,
    Spectrum,
    schur_complement,
)

__version__ = "0.2.0.dev0"

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
    "wrap",
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
    "UnsupportedModelWarning",
    "UnsmoothTrainingWarning",
    "SymmetryWarning",
]
