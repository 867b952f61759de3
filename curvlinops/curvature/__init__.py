"""Curvature matrices: one file a matrix, each a sum over mini-batches of a per-batch product."""
