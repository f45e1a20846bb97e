"""Distributions of tasks, over a store or computed."""

TASKS: dict[str, str] = {
    "images": "distmaml.tasks.images:ImageTasks",
    "sinusoid": "distmaml.tasks.sinusoid:SinusoidTasks",
}
"""Name -> where its class is."""
