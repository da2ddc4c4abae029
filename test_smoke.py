"""The tests are in tests/. This file becomes the one minute that a stranger runs first."""
