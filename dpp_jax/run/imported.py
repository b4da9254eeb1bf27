"""What an imported checkpoint (`config.imported`) stands for in a run, and what its owner declares of it."""

from collections.abc import Mapping
from typing import Any

# What the owner says that a checkpoint was trained on.
PUBLIC, PRETRAINED, FINETUNED = 'public', 'pretrained', 'finetuned'
# What it is → the training in whose place it comes: earlier stages do not run either.
KINDS = {PUBLIC: 'pretrain', PRETRAINED: 'pretrain', FINETUNED: 'finetune'}
MEANINGS = {
    PUBLIC: 'trained without the private images',
    PRETRAINED: 'pre-trained on central images of the private images',
    FINETUNED: 'fine-tuned on the private images with DP-SGD',
}
# What settings say of the queries and of DP-SGD: the owner's word, if a checkpoint was made by them.
_QUERY = ('query.kind', 'query.noise_multiplier', 'query.sampling_probability', 'query.queries')
_DP_SGD = ('imported.noise_multiplier', 'finetune.batch_size', 'finetune.epochs', 'finetune.clip_norm')


def kind(settings: Mapping[str, Any]) -> str:
    """Return what the checkpoint is that a run imports, a name of `KINDS`; '' if it imports none.

    Args:
        settings: of the run, by their full names.
    """
    return settings.get('imported.kind', '') if settings.get('imported.path') else ''


def has_query(settings: Mapping[str, Any]) -> bool:
    """Whether central images are asked for, here or (as declared) where the checkpoint comes from."""
    return settings.get('pretrain.enabled', False) and kind(settings) != PUBLIC


def declaring(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings that declare what was spent for the checkpoint that is imported."""
    found = kind(settings)
    if not found or found == PUBLIC:
        return ()
    query = _QUERY if has_query(settings) else ()
    return query + (_DP_SGD if found == FINETUNED else ())
