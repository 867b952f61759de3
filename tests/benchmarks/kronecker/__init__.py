"""Kronecker-factored curvature: time and memory of KFAC, EKFAC and KFOC, beside a gradient and beside the peer's."""
