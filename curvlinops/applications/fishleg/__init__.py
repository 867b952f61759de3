"""Natural gradients by a learned inverse of the curvature: FishLeg and its parts (Garcia et al., ICLR 2023)."""
