"""The options of each algorithm, model and task distribution: frozen dataclasses with a docstring under every field.

Imports no torch. Field names are unique within a configuration, but algorithms, of which a run has one, share them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

Scalar: TypeAlias = int | float | bool | str  # the command line takes the first that fits


# ------------------------------------------------------------------------------------------ algorithms


@dataclass(frozen=True)
class InnerLoop:
    """Gradient descent on the support set: maml, fomaml, anil, boil, meta_sgd, meta_curvature, proto_maml."""

    inner_lr: float = 0.01
    """Step size of the inner loop, on the mean loss over the support set; where rates are learned, their first value.
    Papers that sum the loss over ways (cbfinn/maml) name a rate that is num_ways times smaller for the same step."""
    num_inner_steps: int = 5
    """Inner steps in training, 1 or more."""


@dataclass(frozen=True)
class ReptileOptions:
    """Reptile (Nichol et al., 2018): support and query are one pool, from which every inner step draws."""

    inner_lr: float = 0.01
    """Step size of the inner loop, on the mean loss of a mini-batch; 1e-3 with adam in the paper."""
    num_inner_steps: int = 5
    """Inner steps in training, 1 or more."""
    inner_batch_size: int | None = None
    """Samples that an inner step draws in training, without replacement until the pool is used up; the whole pool by
    default. 10 in the paper, 20 with 20 ways."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser of the inner loop. adam is the paper's: without momentum, its second moments kept from task to task."""


@dataclass(frozen=True)
class MamlPlusPlusOptions:
    """MAML++ (Antoniou et al., 2019); its cosine schedule is that of the outer loop (schedule). With all of its parts
    off it is maml."""

    inner_lr: float = 0.1
    """Step size of the inner loop, on the mean loss; the first value of the learned rates."""
    num_inner_steps: int = 5
    """Inner steps in training, 1 or more."""
    multi_step_loss: bool = True
    """The query loss after every inner step counts, those before the last less and less."""
    annealing_steps: int = 5000
    """Outer steps until the last inner step alone counts. The authors: 10 epochs of 500 steps (Omniglot), 15
    (mini-ImageNet)."""
    learned_rates: bool = True
    """Learn a rate for each parameter tensor and inner step."""
    first_order_steps: int = 0
    """Outer steps at the start that ignore second derivatives. 0 in every configuration that the authors ship."""
    per_step_biases: bool = True
    """Learn scale and shift of batch norms for each inner step, and do not adapt them."""
    per_step_statistics: bool = False
    """Gather the running statistics of batch norms for each inner step, for predictions of one sample at a time.
    Training normalises by the batch with and without, as the authors' code does."""


@dataclass(frozen=True)
class ImamlOptions:
    """iMAML (Rajeswaran et al., 2019)."""

    inner_lr: float = 0.1
    """Step size of the gradient solver, well below 2 / regularization; hessian_free has none."""
    num_inner_steps: int = 16
    """Inner steps in training, 1 or more."""
    regularization: float = 2.0
    """lambda: how strongly the inner loop is held back at the initialisation, greater than 0."""
    num_cg_steps: int = 5
    """Steps of conjugate gradients for the meta-gradient; for hessian_free also for the direction of an inner step."""
    cg_damping: float = 0.0
    """Added to lambda in the linear system of the meta-gradient, against tasks whose loss curves down: 0 or more."""
    solver: Literal["gradient", "hessian_free"] = "gradient"
    """The inner loop: gradient descent with inner_lr, or Newton steps by conjugate gradients with a line search."""


@dataclass(frozen=True)
class CaviaOptions:
    """CAVIA (Zintgraf et al., 2019): the inner loop moves a few context parameters alone, which start at 0."""

    inner_lr: float = 1.0
    """Step size of the context parameters, on the mean loss."""
    num_inner_steps: int = 2
    """Inner steps in training, 1 or more."""
    num_context: int = 5
    """Context parameters. 5 for the sinusoid, 100 for mini-ImageNet in the paper."""
    modulated_layer: str | None = None
    """Name of the submodule whose output they change: a batch or instance norm, or a linear layer or convolution that
    none follows. Default: the first such norm, or, in a model without, the first layer."""
    modulation: Literal["shift", "scale_shift"] = "shift"
    """shift: as if they were further inputs of the layer. scale_shift: FiLM, for convolutions."""


@dataclass(frozen=True)
class MetaLstmOptions:
    """The LSTM meta-learner (Ravi and Larochelle, 2017)."""

    num_inner_steps: int = 8
    """Inner steps in training, 1 or more."""
    hidden_size: int = 20
    """Width of the LSTM that looks at gradient and loss before the gates do."""


@dataclass(frozen=True)
class FineTuningOptions:
    """A body trained to tell all training classes apart, and a new head for each task, in num_eval_steps steps."""

    inner_lr: float = 0.5
    """Step size of the new head in validation and test."""
    body_lr: float = 0.0
    """Step size of the body there; 0 leaves it as it was trained."""
    num_classes: int | None = None
    """Classes in training, rotations counted. Default: those of the tasks."""


@dataclass(frozen=True)
class MetricOptions:
    """prototypical_networks and matching_networks have no options: nothing descends in them."""


@dataclass(frozen=True)
class CustomAlgorithm:
    """Options of an algorithm named as package.module:attribute."""

    algorithm_arguments: dict[str, Scalar] = field(default_factory=dict)
    """Keyword arguments that the named factory gets beside the objective."""


# ---------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Conv4Options:
    """Four 3x3 convolutions with batch norm on batch statistics and ReLU (Vinyals et al., 2016)."""

    num_filters: int = 64
    """Channels of each convolution. 64 for Omniglot; 32 for mini-ImageNet in the MAML paper."""
    downsample: Literal["stride", "pool"] = "stride"
    """Halve the image by stride 2 (Omniglot) or by 2x2 max-pooling (mini-ImageNet)."""


@dataclass(frozen=True)
class MlpOptions:
    """Fully connected layers with ReLU."""

    hidden_sizes: tuple[int, ...] = (40, 40)
    """Width of each hidden layer. 40 40 is the sinusoid network of the MAML paper."""


@dataclass(frozen=True)
class CustomModel:
    """Options of a model named as package.module:attribute."""

    model_arguments: dict[str, Scalar] = field(default_factory=dict)
    """Keyword arguments of the named factory, which returns an nn.Module."""


# ----------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class ImageTaskOptions:
    """N-way K-shot episodes over a class store."""

    dataset: str = "glyphs"
    """glyphs (embedded), omniglot, image_folder, package.module:attribute, or a ready store: a path or URI that ends in
    .arrow (s3://bucket/omniglot-28.arrow)."""
    data_dir: Path | None = None
    """Folder with the raw files of the data set. Not needed for glyphs; Omniglot is downloaded without it."""
    image_size: int = 28
    """Height and width to which every image is resized, in pixels."""
    color: bool = False
    """Read images as RGB (3 channels) rather than grey (1 channel). Only image_folder has colors."""
    split: str = "default"
    """Which of the store's named class splits to use; omniglot has `maml` and `alphabets`."""
    split_by: Literal["classes", "samples"] = "classes"
    """classes: train, val and test have disjoint classes. samples: the same classes with disjoint pictures, for data
    sets with too few classes to divide (cats and dogs)."""
    num_ways: int = 5
    """Classes in an episode."""
    num_shots: int = 1
    """Support images a class."""
    num_queries: int = 15
    """Query images a class in training."""
    num_eval_queries: int = 15
    """Query images a class in validation and test."""
    rotations: Literal["none", "train", "all"] = "none"
    """Rotations by 90, 180 and 270 degrees make new classes: in no split, in training only, or in all three. A
    class's rotations stay in its own split."""


@dataclass(frozen=True)
class SinusoidOptions:
    """y = amplitude * sin(x - phase): amplitude in [0.1, 5], phase in [0, pi], x in [-5, 5] (Finn et al., 2017)."""

    num_shots: int = 5
    """Support points a task."""
    num_queries: int = 10
    """Query points a task in training."""
    num_eval_queries: int = 100
    """Query points a task in validation and test."""


@dataclass(frozen=True)
class CustomTasks:
    """Options of a task distribution named as package.module:attribute."""

    task_arguments: dict[str, Scalar] = field(default_factory=dict)
    """Keyword arguments that the named factory gets beside split and seed. One named num_eval_queries takes the place
    of num_queries in validation and test."""


AlgorithmOptions: TypeAlias = (
    InnerLoop | ReptileOptions | MamlPlusPlusOptions | ImamlOptions | CaviaOptions | MetaLstmOptions
    | FineTuningOptions | MetricOptions | CustomAlgorithm
)  # fmt: skip
ModelOptions: TypeAlias = Conv4Options | MlpOptions | CustomModel
TaskOptions: TypeAlias = ImageTaskOptions | SinusoidOptions | CustomTasks

OPTIONS: dict[str, tuple[dict[str, type], type]] = {
    "algorithm": (
        {
            "maml": InnerLoop,
            "fomaml": InnerLoop,
            "anil": InnerLoop,
            "boil": InnerLoop,
            "reptile": ReptileOptions,
            "meta_sgd": InnerLoop,
            "maml_plus_plus": MamlPlusPlusOptions,
            "imaml": ImamlOptions,
            "cavia": CaviaOptions,
            "meta_curvature": InnerLoop,
            "proto_maml": InnerLoop,
            "meta_lstm": MetaLstmOptions,
            "prototypical_networks": MetricOptions,
            "matching_networks": MetricOptions,
            "fine_tuning": FineTuningOptions,
        },
        CustomAlgorithm,
    ),
    "model": ({"conv4": Conv4Options, "mlp": MlpOptions}, CustomModel),
    "tasks": ({"images": ImageTaskOptions, "sinusoid": SinusoidOptions}, CustomTasks),
}
"""For each selector: the dataclass of each name's options, and the one for a user's own."""
