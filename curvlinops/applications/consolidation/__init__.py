"""Elastic weight consolidation, and the diagonal Fisher matrices that it is mostly used with."""
