"""Krylov methods on flat columns ``[D, K]``, each column with a life of its own."""
