"""Time and peak memory of curvature operators, as ratios to one gradient over the same data."""
