"""What is not needed to train or to draw: run as `python -m tools.NAME`. Nothing imports these."""
