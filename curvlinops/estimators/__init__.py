"""Randomised estimates of traces, diagonals, norms and spectra, each with an error estimate."""
