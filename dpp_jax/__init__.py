"""Private images in, synthetic labeled images out, under a stated (ε, δ).

dpp_jax.config       the settings of a run
dpp_jax.synthesize   runs it, as the command line does
dpp_jax.load         a released model, to sample from
"""

__version__ = '0.1.0'
_LIBRARY = ('config', 'load', 'synthesize')


def __getattr__(name):
    """Import what `library` offers when it is first used: that takes seconds."""
    if name in _LIBRARY:
        from dpp_jax import library

        return getattr(library, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
