"""Training with Lightning: the module that wraps a model, its schedules and metrics, and the precision plugin."""
