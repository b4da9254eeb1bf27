"""Speed of private training, beside other ways to do it: `python -m scripts.benchmark --helpshort`."""
