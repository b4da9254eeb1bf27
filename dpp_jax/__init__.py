"""Private images in, synthetic labeled images out, under a stated (ε, δ)."""

__version__ = '0.1.0'
