"""Solvers, eigensolver and preconditioners on digit networks: products and CPU time, beside what else there is."""
