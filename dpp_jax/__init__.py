"""Private images in, synthetic labeled images out, under a stated (ε, δ)."""

__version__ = '0.1.0'


def __getattr__(name):
    """Import `dpp_jax.sample` when it is first used: it takes seconds."""
    if name == 'sample':
        from dpp_jax.library import sample

        return sample
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
