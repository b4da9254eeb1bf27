"""The shipped configs. In a checkout they lie in the repository's `configs/`; a wheel holds them here."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / 'configs')]
