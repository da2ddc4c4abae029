"""What is not needed to train or to draw: run as `python -m tools.NAME`. Nothing imports these."""

import os

# Before transformers is imported: it would speak of packages that are not needed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
