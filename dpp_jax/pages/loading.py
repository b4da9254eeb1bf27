"""How the images of a run are loaded: the lines that the page and the card show."""

from collections.abc import Collection
from pathlib import Path

from dpp_jax import files
from dpp_jax.run import artefacts


def snippets(images: artefacts.SyntheticImages, arrays: Collection[str]) -> list[tuple[str, str]]:
    """Return (title, lines of Python) for each form that is there, with paths as seen beside release/.

    Args:
        images: of the run.
        arrays: names of what the npz file holds; that of an earlier version has no names of classes.
    """
    names = "names = data['class_names']\n" if 'class_names' in arrays else ''
    if 'source' in arrays:
        names += (
            "source = data['source']  # uint8 (n,): 0 = drawn from the model, 1 = from the class moments\n"
        )
    found = [
        (
            'NumPy',
            f"""
import numpy as np
data = np.load('{_place(images.paths['images'])}')
images, labels = data['images'], data['labels']  # uint8 (n, height, width, channels), int32 (n,)
{names}""",
        )
    ]
    if files.is_whole(images.png_tree):
        found.append(
            (
                'PNG files (torchvision; it numbers classes by the order of their folders)',
                f"""
from torchvision.datasets import ImageFolder
images = ImageFolder('{_place(images.png_tree)}')
""",
            )
        )
    if files.is_whole(images.tfds):
        found.append(
            (
                'tensorflow-datasets (TensorFlow is not needed)',
                f"""
import tensorflow_datasets as tfds
images = tfds.builder_from_directory('{_place(images.tfds)}').as_data_source(split='train')
""",
            )
        )
    if files.is_whole(images.dpimagebench):
        found.append(
            (
                'DPImageBench (its eval.py takes a copy of the folder as --exp_path)',
                f"""
import numpy as np
data = np.load('{_place(images.dpimagebench)}/gen/gen.npz')
images, labels = data['x'], data['y']  # float32 (n, channels, height, width) in [0, 1], int64 (n,)
""",
            )
        )
    found.append(
        (
            'More images from the model (it costs no privacy)',
            """
import dpp_jax
model = dpp_jax.load('release')
images, labels = model.sample(100)
""",
        )
    )
    return found


def _place(path: Path) -> str:
    """Return a path below release/: where that lies is nobody's business."""
    return f'release/synthetic/{path.name}'
