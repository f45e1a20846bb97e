"""What a configuration may not say, whatever the data are: the first thing that a run looks at."""

import math
import re

from distmaml.config import Config, flatten, is_custom
from distmaml.errors import ConfigError, unknown
from distmaml.options import OPTIONS

POSITIVE = {
    "num_inner_steps", "num_filters", "image_size", "num_ways", "num_shots", "num_queries", "num_eval_queries",
    "num_outer_steps", "meta_batch_size", "reduction_chunk", "num_eval_steps", "log_every", "checkpoint_every",
    "num_val_episodes", "patience", "inner_batch_size", "num_cg_steps", "num_context", "hidden_size", "num_classes",
}  # fmt: skip
NOT_NEGATIVE = {
    "val_every", "num_test_episodes", "weight_decay", "max_failures", "seed", "annealing_steps", "first_order_steps",
    "body_lr", "cg_damping",
}  # fmt: skip
MOST_INNER_STEPS = 10_000
POSITIVE_RATES = {
    "inner_lr", "outer_lr", "clip_norm", "gpus_per_worker", "collective_timeout", "node_timeout", "regularization",
}  # fmt: skip
NO_PULL = " iMAML divides by it; to hold its inner loop back by nothing, take --algorithm maml."


def check(config: Config) -> None:
    """Refuses what cannot work whatever the data are.

    Raises:
      ConfigError: the first field whose value is out of its range, and the range.
    """
    flat = flatten(config)
    for name, value in flat.items():
        if value is None or isinstance(value, bool | str):
            continue
        if name in POSITIVE and value < 1:
            raise ConfigError(f"{name}={value} must be 1 or more.")
        if name in NOT_NEGATIVE and not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value} must be 0 or more.")
        if name in POSITIVE_RATES and not (value > 0 and math.isfinite(value)):
            way_out = NO_PULL if name == "regularization" and value <= 0 else ""
            raise ConfigError(f"{name}={value} must be greater than 0 and finite.{way_out}")
    num_workers = str(config.cluster.num_workers)
    valid = re.fullmatch(r"\d{1,9}(:\d{1,9})?", num_workers)
    if not valid or not 1 <= config.cluster.team[0] <= config.cluster.team[1]:
        raise ConfigError(
            f"num_workers={num_workers!r:.40} must be 1 or more, or LEAST:MOST, as in 2:8, for as many as there is "
            "room for."
        )
    for name in ("num_inner_steps", "num_eval_steps", "num_cg_steps"):
        if flat.get(name, 1) > MOST_INNER_STEPS:
            raise ConfigError(f"{name}={flat[name]} must be {MOST_INNER_STEPS} or less.")
    if flat.get("num_ways", 2) < 2:
        raise ConfigError("num_ways=1 leaves nothing to tell apart; it must be 2 or more.")
    if not 0 <= config.outer.final_lr_fraction <= 1:
        raise ConfigError(f"final_lr_fraction={config.outer.final_lr_fraction} must lie in [0, 1].")
    if any(size < 1 for size in flat.get("hidden_sizes", ())):
        raise ConfigError(f"hidden_sizes={flat['hidden_sizes']} must all be 1 or more.")
    for selector, (table, _) in OPTIONS.items():
        name = getattr(config, selector)
        if not is_custom(name) and name not in table:
            raise ConfigError(f"{unknown(selector, name, table)} Your own is named package.module:attribute.")
    check_uri("dataset", str(flat.get("dataset", "")))
    check_storage(config.run.storage)
    quantity = config.evaluation.selected_quantity.removeprefix("query_").partition("_step_")[0]
    wanted = {"loss": "min", "accuracy": "max"}.get(quantity, config.evaluation.selection_mode)
    if wanted != config.evaluation.selection_mode:
        raise ConfigError(
            f"selection_metric={config.evaluation.selection_metric!r} with selection_mode="
            f"{config.evaluation.selection_mode!r} would pick the worst model. Add --selection-mode {wanted}."
        )
    if config.evaluation.patience is not None and not config.evaluation.val_every:
        raise ConfigError(f"patience={config.evaluation.patience} counts validations, and val_every=0 asks for none.")
    if config.evaluation.num_test_episodes == 1:
        raise ConfigError("num_test_episodes=1 gives no interval; take 2 or more, or 0 for no test.")
    if config.outer.seed >= 2**63:
        raise ConfigError(f"seed={config.outer.seed} must be less than 2**63.")
    if config.cluster.gpus_per_worker > 1 and config.cluster.gpus_per_worker % 1:
        raise ConfigError(f"gpus_per_worker={config.cluster.gpus_per_worker} must be whole, or a fraction of one.")
    run_name = config.run.name
    if run_name is not None and len(run_name.encode(errors="surrogateescape")) > 100:
        raise ConfigError(f"name={run_name[:20]!r}... is longer than the 100 bytes that are allowed.")
    if run_name is not None and (not run_name.strip(".") or not all(c.isalnum() or c in "._-" for c in run_name)):
        raise ConfigError(f"name={run_name!r} may hold only letters, digits, '.', '_' and '-', and not only dots.")


def check_storage(storage: str | None) -> None:
    """Refuses a storage that is no URI, or one that holds a key.

    Raises:
      ConfigError: naming what is allowed.
    """
    check_uri("storage", storage or "")
    if storage is not None and not re.match(r"[a-z][a-z0-9+.-]*://.", storage):
        raise ConfigError(
            f"storage={storage!r:.100} must be a URI, like s3://bucket/prefix, gs://bucket/prefix or file:///folder. "
            "Without --storage a run lies in --output-dir, on a disk that all nodes share."
        )


def check_uri(name: str, uri: str) -> None:
    """Refuses a URI that holds a key; that of a path holds none.

    Raises:
      ConfigError: it does.
    """
    if "://" in uri and "@" in uri.partition("://")[2].partition("/")[0]:
        raise ConfigError(
            f"{name} is a URI that holds a key, which would be written into every run. Leave it out of the URI and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or their like."
        )
