"""Which layer used which parameter, and what per-layer inputs and output gradients tell."""
