"""A positive definite operator that learns to be the inverse of a matrix known through products."""
