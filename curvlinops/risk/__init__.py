"""An empirical risk at one parameter value: model, losses, data, linearisation. Knows nothing of operators."""
