"""Eight simulated devices for the whole suite, set before anything imports JAX."""

import contextlib
import fcntl
import functools
import importlib.util
import io
import logging
import os
from pathlib import Path
import shutil
import signal
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['EPATH_USE_TF'] = '0'  # bucket.py takes the place of what epath uses then
# Programs here run a few times: compiling them well would take longer than all their runs.
os.environ['XLA_FLAGS'] = ' '.join(
    [
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        '--xla_backend_optimization_level=0',
        '--xla_cpu_use_fusion_emitters=false',  # unoptimised, the older ones are twice as fast to compile
    ]
).strip()

# The same programs are compiled by many tests, and by the processes that they start: once is enough.
_PROGRAMS = None
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # set by the process that started this one
    _PROGRAMS = os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='dpp_jax_programs_')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import pytest  # noqa: E402

# Of the files, those that take longest. The first makes the finished run that many need; the second does not.
_LONG = (
    'hosts_run_test.py',
    'chaos_test.py',
    'pipeline_test.py',
    'pytorch_test.py',
    'benchmark_test.py',
    'compare_test.py',
    'bounds_test.py',
    'accounting_test.py',
    'steps_test.py',
    'main_test.py',
    'groups_test.py',
    'inception_test.py',
    'classifiers_test.py',
    'neighbors_test.py',
    'stored_run_test.py',
    'selection_test.py',
    'released_test.py',
    'derive_test.py',
    'generate_test.py',
    'evaluate_test.py',
)


def pytest_collection_modifyitems(items):
    """Let long files begin first: no worker waits at the end for another's last file."""
    rank = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_unconfigure(config):
    """Remove what this process made."""
    del config
    if _PROGRAMS:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)


@pytest.fixture(scope='session')
def golden_file():
    """A function from a file's name to its path: in DPP_GOLDEN, or in tests/golden; skips where it is not."""

    def find(name):
        tests = Path(__file__).resolve().parent
        # Beside the repository, or where DPP_GOLDEN says: whole files. In tests/golden: shortened ones.
        whole = Path(os.environ.get('DPP_GOLDEN', tests.parents[1] / 'shared' / 'golden'))
        found = [folder / name for folder in (whole, tests / 'golden') if (folder / name).exists()]
        if not found:
            pytest.skip(
                f'{name} is missing: reference values of the PyTorch implementation, too large for this '
                'repository; tests/golden/README.md says where they come from and how to add them'
            )
        return found[0]

    return find


def make_tiny_config(**changes):
    """The digits, 8x8, with a network and trainings so small that a run takes seconds."""
    from dpp_jax.configs import digits_8

    config = digits_8.get_config('10')
    config.seed = 1
    # One level halves what there is to compile; networks with more are tested by themselves.
    config.model.update(width=8, multipliers=(1,), attention_resolutions=(8,))
    config.query.queries = 2
    config.pretrain.update(epochs=4, draws=1, batch_size=16)
    config.finetune.update(batch_size=64, epochs=1, draws=2, microbatch=4, snapshots=0)
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


@functools.cache
def _quick_network():
    """Add a network to those that a config can name; its name."""
    import flax.linen as nn
    import jax.numpy as jnp

    from dpp_jax.diffusion import model, unet

    class TwoConvolutions(unet.UNet):
        """As little to trace and compile as a network can be that sees image, noise level and label."""

        @nn.compact
        def __call__(self, x, c_noise, label):
            told = nn.Dense(3)(jnp.stack([c_noise, label / 10], axis=-1))[:, None, None]
            return nn.Conv(self.image_channels, (3, 3))(jnp.tanh(nn.Conv(3, (3, 3))(x) + told))

    model.NETWORKS['two_convolutions'] = TwoConvolutions
    return 'two_convolutions'


def make_quick_config(**changes):
    """The tiny config where no network matters: most of a tiny run is the tracing of its U-Net."""
    return make_tiny_config(model__network=_quick_network(), **changes)


@pytest.fixture(scope='session')
def quick_config():
    """As `tiny_config`, with a network of two convolutions, which started processes do not know."""
    return make_quick_config


@pytest.fixture(autouse=True)
def signal_handlers():
    """Give back the handlers that a command, run in this process, took for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
    """A whole tiny run with every kind of output: its config, its work directory, and all that it told.

    Made once, and copied for every process of the suite.
    """
    from dpp_jax.run.folder import WorkDir

    config = make_tiny_config(generate__png_tree=True, generate__separate_classifier_images=True)
    config.finetune.update(snapshots=2, schedule='cosine', noise_correction=True)
    config.generate.classifier_sampler.update(name='ddim', steps=3)
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own
    told = shared / 'finished_run.txt'
    with open(shared / 'finished_run.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            text = _run_and_listen(config, shared / 'finished_run')
            told.write_text(text)
    root = tmp_path_factory.mktemp('run')
    shutil.copytree(shared / 'finished_run', root, dirs_exist_ok=True)
    return config, WorkDir(root), told.read_text()


def _run_and_listen(config, root):
    """Run all stages; what appeared on the screen and in logs."""
    from dpp_jax import pipeline

    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger().addHandler(handler)
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        pipeline.run(config, root, 'all')
    logging.getLogger().removeHandler(handler)
    return told.getvalue()


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """Config and work directory of a copy of the finished run, to be tampered with."""
    from dpp_jax.run.folder import WorkDir

    config, reference, _ = finished_run
    shutil.copytree(reference.root, tmp_path, dirs_exist_ok=True)
    return config, WorkDir(tmp_path)


@pytest.fixture(scope='session')
def tiny_model():
    """The tiny config's model."""
    from dpp_jax import build

    return build.model(make_tiny_config())


@pytest.fixture(scope='session')
def quick_model():
    """The quick config's model."""
    from dpp_jax import build

    return build.model(make_quick_config())


@pytest.fixture(scope='session')
def gate():
    """A function (config, work directory) → what a command relies on: plan, ledger, and what is done."""
    from dpp_jax import build
    from dpp_jax import gate as gate_lib
    from dpp_jax.run import artefacts, folder

    def read(config, workdir):
        images = artefacts.SyntheticImages(workdir, folder.flatten(config.to_dict()))
        return gate_lib.read(config, workdir, build.model(config), images, read_only=True)

    return read


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


@pytest.fixture(scope='session')
def released():
    """A function: work directory → files of release/ by name, and those of them that no noise went into."""
    noisy = (
        'digests.json',
        'central_images.',
        'moments.',
        'frequency.',
        'generator.',
        'model/',
        'over_finetuning.',
        'report.html',
        'synthetic/images.',
    )

    def read(workdir):
        paths = [path for path in workdir.release.rglob('*') if path.is_file()]
        found = {str(path.relative_to(workdir.release)): path.read_bytes() for path in paths}
        return found, {name: found[name] for name in found if not name.startswith(noisy)}

    return read


@pytest.fixture(scope='session')
def bucket():
    """The module bucket.py: object stores for tests."""
    path = Path(__file__).with_name('bucket.py')
    spec = importlib.util.spec_from_file_location('bucket', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=['gs', 'mounted'])
def store(request, bucket, tmp_path, monkeypatch):
    """The folder of a run in a bucket, by epath; and in one that is mounted, where POSIX is refused."""
    from dpp_jax import files, lease

    monkeypatch.setattr(lease, '_SETTLE', 0.01)
    if request.param == 'gs':
        monkeypatch.setenv(bucket.FOLDER, str(tmp_path))
        yield files.path('gs://bucket/run')
    else:
        with bucket.without_posix(tmp_path / 'mounted') as folder:
            yield files.path(folder) / 'run'
