"""Our results beside those of PyTorch and Opacus: `python scripts/compare_pytorch.py --help`."""
