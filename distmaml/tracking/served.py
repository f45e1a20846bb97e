"""The model that MLflow serves: a support set and queries in, predictions out.

MLflow keeps this file with a registered model and runs it where the model is loaded ("models from code"), so nothing is
pickled. It takes ``support_inputs``, ``support_targets`` and ``query_inputs``, each an array.
"""

from typing import Any

import mlflow
import numpy as np
from mlflow.models import set_model

import distmaml


class Served(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined, misc, unused-ignore]
    """`distmaml.load(...).adapt(support).predict(query)` as MLflow wants it."""

    def load_context(self, context: Any) -> None:
        """Reads the weights."""
        self._model = distmaml.load(context.artifacts["model"])

    # Without type hints, from which MLflow would make a schema of its own.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Class probabilities or values ``[num_queries, num_outputs]``.

        Args:
          model_input: the three arrays by their names.
          params: ``num_steps``, inner steps, -1 for as many as in the evaluation of the run; ``transductive``, whether
            to predict all queries at once.
        """
        options = params or {}
        steps = int(options.get("num_steps", -1))
        arrays = {name: np.asarray(model_input[name]) for name in ("support_inputs", "support_targets", "query_inputs")}
        support = distmaml.Batch(arrays["support_inputs"], arrays["support_targets"])
        adapted = self._model.adapt(support, None if steps < 0 else steps)
        predicted = adapted.predict(arrays["query_inputs"], transductive=bool(options.get("transductive", False)))
        return predicted.numpy()


set_model(Served())
