"""Eight simulated devices for the whole suite, set before anything imports JAX."""

import os
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs here run a few times: compiling them well would take longer than all their runs.
os.environ['XLA_FLAGS'] = ' '.join(
    [
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        '--xla_backend_optimization_level=0',
    ]
).strip()

# The same programs are compiled by many tests, and by the processes that they start: once is enough.
_PROGRAMS = None
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # set by the process that started this one
    _PROGRAMS = os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='dpp_jax_programs_')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import pytest  # noqa: E402


def pytest_unconfigure(config):
    """Remove what this process made."""
    del config
    if _PROGRAMS:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)


def make_tiny_config(**changes):
    """The digits, 8x8, with a network and trainings so small that a run takes seconds."""
    from configs import digits_8

    config = digits_8.get_config('10')
    config.seed = 1
    # One level halves what there is to compile; networks with more are tested by themselves.
    config.model.update(width=8, multipliers=(1,), attention_resolutions=(8,))
    config.query.queries = 2
    config.pretrain.update(epochs=4, draws=1, batch_size=16)
    config.finetune.update(batch_size=64, epochs=1, draws=2, microbatch=4)
    config.generate.update(images=40, batch_size=5)
    config.generate.sampler.steps = 4
    config.evaluate.update(classifiers=('logistic', 'mlp'), epochs=2, feature_epochs=1)
    config.loop.update(log_every_steps=2, checkpoint_every_seconds=1000.0)
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace('__', '.'): value})
    return config


@pytest.fixture(scope='session')
def tiny_config():
    """A function that returns a fresh tiny config; settings change by `finetune__epochs=2`."""
    return make_tiny_config


@pytest.fixture(scope='session')
def tiny_model():
    """The tiny config's model."""
    from dpp_jax import pipeline

    return pipeline.make_model(make_tiny_config())


class CompilationCounter:
    """Counts XLA compilations from the moment it is made."""

    def __init__(self):
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **kwargs):
        self.count += event == '/jax/core/compile/backend_compile_duration'


@pytest.fixture(scope='session')
def compilations():
    """How many programs were compiled so far: `compilations.count`."""
    import jax

    counter = CompilationCounter()
    jax.jit(lambda x: x + 3)(1.0)
    assert counter.count > 0  # JAX still reports compilations under this name
    return counter
