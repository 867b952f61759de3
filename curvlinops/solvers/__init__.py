"""Solvers on linear operators; they see nothing but products."""
