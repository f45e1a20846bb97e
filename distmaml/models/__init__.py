"""Plain modules that know nothing of meta-learning."""

MODELS: dict[str, str] = {
    "conv4": "distmaml.models.conv4:Conv4",
    "mlp": "distmaml.models.mlp:Mlp",
}
"""Name -> where its class is: ``cls(input_shape, num_outputs, **options) -> nn.Module``."""
