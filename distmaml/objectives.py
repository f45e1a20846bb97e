"""From a module to an Objective: what a model predicts with given parameters, and how wrong that is.

Any differentiable module will do. What pure functions need of it is arranged here: parameters come in as
arguments, random masks come from the episode's key, and modules that keep state between calls are refused.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from distmaml.chain import Chain, chain_of
from distmaml.episodes import fold_in
from distmaml.errors import ConfigError
from distmaml.inner import Metrics, Params
from distmaml.trees import Tree


class Moment(NamedTuple):
    """Where in the inner loop a forward pass stands.

    Attributes:
      inner_step: k, for the parameters phi_k.
      key: the random stream of this pass's half of the episode (support or query); None: nothing random happens,
        dropout is off.
    """

    inner_step: int
    key: Tensor | None


Hook: TypeAlias = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""``(submodule, its arguments, its output) -> another output, or None to leave it``, as torch's forward hooks."""


class Objective(NamedTuple):
    """A model seen as pure functions of its parameters, and its loss.

    Attributes:
      predict: ``(params, inputs, moment) -> outputs``: logits, values.
      predict_hooked: ``(params, inputs, moment, hooks) -> outputs``: likewise, with hooks on submodules by their names,
        for this call alone; for algorithms that look at a layer, or change what it says.
      loss: ``(outputs, targets) -> (scalar mean loss, metrics)``.
      features: ``(params, inputs, moment) -> what the head gets``, for algorithms that treat the head apart.
      apply_head: ``(params, features, moment) -> outputs``; ``predict`` is one after the other.
      head: name of the last layer; its parameters start with ``head + "."``.
      metrics: names of the metrics that `loss` returns beside the loss.
      model: the module, to see what it is made of.
      chain: the model as one whose derivatives are known, if it is; they are used where that is faster.
    """

    predict: Callable[[Params, Tree, Moment], Any]
    predict_hooked: Callable[[Params, Tree, Moment, Mapping[str, Hook]], Any]
    loss: Callable[[Any, Any], tuple[Tensor, Metrics]]
    features: Callable[[Params, Tree, Moment], Tensor]
    apply_head: Callable[[Params, Tensor, Moment], Any]
    head: str
    metrics: tuple[str, ...]
    model: nn.Module
    chain: Chain | None = None


def classification(model: nn.Module, *, head: str | None = None) -> Objective:
    """Mean cross-entropy over logits ``[num_samples, num_ways]`` and labels ``[num_samples]``; metric: accuracy."""

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        if labels.is_floating_point():
            raise ConfigError("classification wants whole numbers as labels, and these are not; take regression.")
        correct = (logits.argmax(-1) == labels).to(logits.dtype)
        return F.cross_entropy(logits, labels), {"accuracy": correct.mean()}

    return objective(model, loss, metrics=("accuracy",), head=head)


def regression(model: nn.Module, *, head: str | None = None) -> Objective:
    """Mean squared error over values ``[num_samples, *]`` and targets of the same shape."""

    def loss(values: Tensor, targets: Tensor) -> tuple[Tensor, Metrics]:
        if values.shape != targets.shape:
            raise ConfigError(f"the model returns {list(values.shape)} for targets {list(targets.shape)}; "
                              "broadcasting them would average unrelated pairs. Make the shapes equal.")  # fmt: skip
        return (values - targets).square().mean(), {}  # F.mse_loss has no forward derivative

    return objective(model, loss, metrics=(), head=head)


def objective(
    model: nn.Module,
    loss: Callable[[Any, Any], tuple[Tensor, Metrics]],
    *,
    metrics: tuple[str, ...] = (),
    head: str | None = None,
) -> Objective:
    """An Objective from any module and any loss.

    Args:
      model: called with the inputs (a tensor, or a tuple as positional arguments); its own parameters are not used.
      loss: ``(outputs, targets) -> (scalar, metrics)``, a mean over samples.
      metrics: names of those metrics.
      head: name of the submodule that comes last; the last one with parameters by default.

    Raises:
      ConfigError: the module keeps running statistics, or has no parameters, or no submodule named `head`; at the
        first call, that it changes a buffer of its own (spectral norm does).
    """
    _refuse_running_statistics(model)
    training, deterministic = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
    head = head if head is not None else _last_layer(model)
    if not any(name.startswith(head + ".") for name, _ in model.named_parameters()):
        raise ConfigError(f"head={head!r} names no submodule with parameters; there are "
                          f"{', '.join(name for name, _ in model.named_children()) or 'none'}.")  # fmt: skip
    attends = any(isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in model.modules())
    recurrent_on_gpu = any(isinstance(m, nn.RNNBase) and next(m.parameters()).is_cuda for m in model.modules())

    watched = {training, deterministic}

    def call(params: Params, arguments: tuple[Any, ...], moment: Moment, submodule: str = "") -> Any:
        module = deterministic if moment.key is None else training
        with ExitStack() as stack:
            if module in watched:
                stack.enter_context(_unchanged_buffers(module))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
            if attends:
                stack.enter_context(_composed_attention())
            if recurrent_on_gpu:  # nor have cuDNN's recurrent cells
                allowed = torch.backends.cudnn.allow_tf32  # by default this context allows it
                stack.enter_context(torch.backends.cudnn.flags(enabled=False, allow_tf32=allowed))
            if moment.key is not None:
                stack.enter_context(_seeded(moment.key, moment.inner_step))
            if submodule:
                prefix = submodule + "."
                params = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
                outputs = functional_call(module.get_submodule(submodule), params, arguments)
            else:
                outputs = functional_call(module, params, arguments)
        watched.discard(module)  # a call that has come through
        return outputs

    def predict(params: Params, inputs: Tree, moment: Moment) -> Any:
        return call(params, _arguments(inputs), moment)

    def predict_hooked(params: Params, inputs: Tree, moment: Moment, hooks: Mapping[str, Hook]) -> Any:
        module = deterministic if moment.key is None else training
        with ExitStack() as stack:
            for name, hook in hooks.items():
                stack.callback(module.get_submodule(name).register_forward_hook(hook).remove)
            return call(params, _arguments(inputs), moment)

    def features(params: Params, inputs: Tree, moment: Moment) -> Tensor:
        seen: list[tuple[Any, Any]] = []
        outputs = predict_hooked(
            params, inputs, moment, {head: lambda _, arguments, output: seen.append((arguments, output))}
        )
        if len(seen) != 1 or len(seen[0][0]) != 1 or seen[0][1] is not outputs:
            raise ConfigError(
                f"{type(model).__name__}.forward does not end in its head {head!r}, so head and body cannot be treated "
                "apart. Return what the head returns, or name the right head."
            )
        found: Tensor = seen[0][0][0]
        return found

    def apply_head(params: Params, features: Tensor, moment: Moment) -> Any:
        return call(params, (features,), moment, head)

    return Objective(predict, predict_hooked, loss, features, apply_head, head, metrics, deterministic, chain_of(model))


def initial_params(model: nn.Module) -> Params:
    """A copy of the module's parameters, the theta of step 0."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _arguments(inputs: Tree) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _last_layer(model: nn.Module) -> str:
    kind = type(model).__name__
    if not list(model.parameters()):
        raise ConfigError(f"{kind} has no parameters, so there is nothing to learn.")
    names: list[str] = [
        name for name, module in model.named_modules() if name and list(module.parameters(recurse=False))
    ]
    if not names:
        raise ConfigError(f"{kind} has no submodule that could be its head. Wrap it: nn.Sequential(model).")
    return names[-1]


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            kind = type(module).__name__
            raise ConfigError(
                f"{name} is a {kind} with running statistics. They would carry information from task to task and the "
                f"meta-gradient would not be that of the loss. Write {kind}(..., track_running_stats=False) instead."
            )


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        raise ConfigError(
            f"{type(model).__name__} changes its buffer {changed[0]!r} when it is called, so the adjoint could not "
            "call it again for the same outputs. Take a module without such a state."
        )


@contextmanager
def _composed_attention() -> Iterator[None]:
    """Without the fused inference kernel, which has no batching rule: vmap would go over its tasks one by one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _seeded(key: Tensor, inner_step: int) -> Iterator[None]:
    """Random operators inside draw from (key, inner_step): the same mask wherever the adjoint recomputes.

    Under vmap the key has no value to seed with. There vmap itself refuses random operators, and the engine
    steps down to a loop over tasks.
    """
    try:
        seed = int(fold_in(key, inner_step))
    except RuntimeError:
        yield
        return
    # The generators themselves: torch.random.fork_rng costs 2 ms a pass, as much as the pass of a small network.
    on_gpu = key.device.type == "cuda"
    generator = torch.cuda.default_generators[key.device.index or 0] if on_gpu else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
