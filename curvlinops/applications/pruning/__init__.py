"""Pruning by an inverse curvature: optimal brain surgeon."""
