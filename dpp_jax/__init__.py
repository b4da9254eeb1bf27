"""Private images in, synthetic labelled images out, under a stated (ε, δ)."""

__version__ = '0.1.0'
