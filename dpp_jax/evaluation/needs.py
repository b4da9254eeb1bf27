"""What an evaluation cannot compute, known from public numbers before anything is spent."""

_CLASSES = 2  # that classifiers must tell apart
_TEST_IMAGES = 2  # of which a covariance can be taken


def why_no_classes(classes: int) -> str | None:
    """Say why classifiers cannot be trained; None if they can. FID has features without classes."""
    if classes >= _CLASSES:
        return None
    return f'config.data.classes is {classes}; classifiers need at least {_CLASSES}'


def why_no_reference(test_images: int) -> str | None:
    """Say why nothing can be said of real test images by their features; None if it can."""
    if test_images >= _TEST_IMAGES:
        return None
    return (
        f'the test set has {test_images} image(s); the FID of real test images needs at least {_TEST_IMAGES}'
    )


def left_out(*, classes: int, test_images: int, fid: bool, classifiers: int) -> list[str]:
    """Say, in a line each, what an evaluation will leave out.

    Args:
        classes: number of classes.
        test_images: number of real test images.
        fid: whether FID is asked for.
        classifiers: how many classifiers are asked for.
    """
    no_classes = why_no_classes(classes) if classifiers else None
    no_reference = why_no_reference(test_images) if fid else None
    return [f'Evaluation will leave this out: {reason}' for reason in (no_classes, no_reference) if reason]
