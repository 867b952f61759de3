"""Kronecker-factored curvature: KFAC, EKFAC and KFOC over all parameters of a model."""
